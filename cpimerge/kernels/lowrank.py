"""The update of an adapter, added to a weight: W + scale · left · right, element by element in a fixed order."""

from __future__ import annotations

import numba
import numpy as np

from .arrays import Doubles, Floats, compiled, intrinsic

UNROLL = 4  # ranks that are added at a time; factors are padded with zeros to a multiple
WIDTH = 1024  # columns that are worked on together, so that their part of the right factor stays in the cache
LANES = 64  # partial sums of a row's squares


@intrinsic
def fused(typing, factor, value, total):  # type: ignore[no-untyped-def]
    """factor · value + total of float32, rounded once: on every processor, those without such an instruction too."""
    signature = numba.types.float32(factor, value, total)

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.fma(*args)

    return signature, generate


@compiled
def add_low_rank(left: Floats, right: Floats, scale: np.float32, place: int, values: Floats, room: Floats) -> None:
    """values += scale · (left · right), where `values` float32 [n] are elements [place, place + n) of [R, C].

    `left` float32 [R, K], `right` float32 [K, C], UNROLL | K; `room` float32 [WIDTH]. Each element is a sum over k in
    order, in float32, product and addition rounded once, as PyTorch's matrix products are; then it is scaled, then
    added. So it does not depend on the division into calls, and is what PEFT computes.
    """
    columns = right.shape[1]
    first, last = place // columns, (place + values.size - 1) // columns
    for begin in range(0, columns, WIDTH):
        end = min(begin + WIDTH, columns)
        for row in range(first, last + 1):
            start = max(begin, place - row * columns)
            stop = min(end, place + values.size - row * columns)
            if start < stop:
                total = room[: stop - start]
                total[:] = np.float32(0)
                for k in range(0, left.shape[1], UNROLL):
                    r0, r1 = right[k, start:stop], right[k + 1, start:stop]  # sliced so, they are contiguous
                    r2, r3 = right[k + 2, start:stop], right[k + 3, start:stop]
                    _add_four(left[row, k : k + UNROLL], r0, r1, r2, r3, total)
                offset = row * columns - place
                _add_scaled(scale, total, values[offset + start : offset + stop])


@compiled
def _add_four(factors: Floats, r0: Floats, r1: Floats, r2: Floats, r3: Floats, total: Floats) -> None:
    """Adds four rows, one after the other."""
    f0, f1, f2, f3 = factors[0], factors[1], factors[2], factors[3]
    for i in range(total.size):
        total[i] = fused(f3, r3[i], fused(f2, r2[i], fused(f1, r1[i], fused(f0, r0[i], total[i]))))


@compiled
def _add_scaled(scale: np.float32, total: Floats, values: Floats) -> None:
    for i in range(values.size):
        values[i] += scale * total[i]


@compiled
def multiply_rows(factors: Floats, columns: int, place: int, values: Floats) -> None:
    """Elements [place, place + n) of [R, columns], each times its row's factor: `factors` float32 [R]."""
    for row in range(place // columns, (place + values.size - 1) // columns + 1):
        start, stop = max(0, row * columns - place), min(values.size, (row + 1) * columns - place)
        factor = factors[row]
        for i in range(start, stop):
            values[i] *= factor


@compiled
def multiply_columns(factors: Floats, place: int, values: Floats) -> None:
    """Elements [place, place + n) of [R, C], each times its column's factor: `factors` float32 [C]."""
    done = 0
    while done < values.size:
        start = (place + done) % factors.size
        count = min(values.size - done, factors.size - start)
        part, piece = factors[start : start + count], values[done : done + count]
        for i in range(count):
            piece[i] *= part[i]
        done += count


@compiled
def add_row_squares(values: Floats, lanes: Doubles) -> None:
    """Adds the squares of `values` float32 [R · C] to the partial sums of their rows: `lanes` float64 [R, LANES].

    Column j belongs to lane j mod LANES, so a row may come in pieces that are multiples of LANES.
    """
    columns = values.size // lanes.shape[0]
    for row in range(lanes.shape[0]):
        sums = lanes[row]
        for begin in range(row * columns, (row + 1) * columns, LANES):
            piece = values[begin : min(begin + LANES, (row + 1) * columns)]
            for i in range(piece.size):
                sums[i] += np.float64(piece[i]) * np.float64(piece[i])


@compiled
def add_column_squares(values: Floats, sums: Doubles) -> None:
    """Adds the squares of `values` float32 [R · C], row by row, to the sums of their columns: `sums` float64 [C]."""
    for begin in range(0, values.size, sums.size):
        piece = values[begin : begin + sums.size]
        for i in range(piece.size):
            sums[i] += np.float64(piece[i]) * np.float64(piece[i])


@compiled
def norms(lanes: Doubles, out: Floats) -> None:
    """Square roots of the sums of partial sums `lanes` float64 [R, L], lane after lane; `out` float32 [R]."""
    for row in range(out.size):
        total = 0.0
        for lane in range(lanes.shape[1]):
            total += lanes[row, lane]
        out[row] = np.float32(np.sqrt(total))
