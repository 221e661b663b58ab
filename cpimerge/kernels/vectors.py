"""Loops over explicit vector registers, for what the compiler does not vectorise by itself.

Each is an intrinsic: it writes LLVM's vector instructions, which every processor has in some width. The number of
lanes of a sum is a constant, so the order of its additions is, too.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from llvmlite import ir

from .arrays import WORD, Bits, Doubles, Words, compiled, intrinsic
from .registers import INDEX, SHORT, add_to, folded, load, loop, pointer, splat, variable

LANES = 8  # independent partial sums of a dot product


def _dots(rows: int, columns: int) -> Any:
    """Adds dot products of a block of vectors to `out`, for elements [start, stop), a multiple of LANES.

    The block is vectors i, i+1, … (`rows`) by j, j+1, … (`columns`); with no columns, the rows among themselves.
    """

    @intrinsic
    def dots(typing, values, keep, i, j, start, stop, out):  # type: ignore[no-untyped-def]
        """`values` uint32 [V, n], `keep` uint32 [n], `out` float64 [P]."""
        signature = numba.types.void(values, keep, i, j, start, stop, out)

        def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
            array = context.make_array(signature.args[0])(context, builder, args[0])
            count, length = (builder.extract_value(array.shape, axis) for axis in (0, 1))
            patterns, stored, wide = (ir.VectorType(kind, LANES) for kind in (SHORT, ir.FloatType(), ir.DoubleType()))
            keep = pointer(context, builder, signature.args[1], args[1])
            left = [builder.add(args[2], ir.Constant(INDEX, a)) for a in range(rows)]
            right = [builder.add(args[3], ir.Constant(INDEX, b)) for b in range(columns)]
            pairs = [(a, b) for a in range(rows) for b in (range(columns) if columns else range(a, rows))]
            sums = [variable(builder, wide) for _ in pairs]
            with loop(builder, args[4], args[5], LANES) as (place, _):
                mask = load(builder, keep, place, patterns)

                def vector(row: Any) -> Any:
                    offset = builder.add(builder.mul(row, length), place)
                    kept = builder.and_(load(builder, array.data, offset, patterns), mask)
                    return builder.fpext(builder.bitcast(kept, stored), wide)

                a_values = [vector(row) for row in left]
                b_values = [vector(row) for row in right] or a_values
                for (a, b), total in zip(pairs, sums, strict=True):
                    product = builder.fmul(a_values[a], b_values[b], flags=("contract",))
                    builder.store(builder.fadd(builder.load(total), product, flags=("contract",)), total)
            target = pointer(context, builder, signature.args[6], args[6])
            for (a, b), total in zip(pairs, sums, strict=True):
                row, column = left[a], (right or left)[b]
                # Pair (i, j) of V vectors is number i·(2V − i − 1)/2 + j.
                twice = builder.sub(builder.shl(count, ir.Constant(INDEX, 1)), builder.add(row, ir.Constant(INDEX, 1)))
                before = builder.lshr(builder.mul(row, twice), ir.Constant(INDEX, 1))
                value = folded(builder, builder.load(total), builder.fadd)
                add_to(builder, builder.gep(target, [builder.add(before, column)]), value, builder.fadd)
            return context.get_dummy_value()

        return signature, generate

    return dots


_triangle1, _triangle2, _triangle3, _triangle4 = (_dots(rows, 0) for rows in range(1, 5))
_block1, _block2, _block3, _block4 = (_dots(4, columns) for columns in range(1, 5))


def _compares(operator: str) -> Any:
    @intrinsic
    def compares(typing, magnitude, place, limit):  # type: ignore[no-untyped-def]
        """The word of those among `magnitude` uint32 [place, place + WORD) that compare so to `limit` uint32."""
        signature = numba.types.uint64(magnitude, place, limit)

        def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
            vector = ir.VectorType(SHORT, WORD)
            values = load(builder, pointer(context, builder, signature.args[0], args[0]), args[1], vector)
            mask = builder.icmp_unsigned(operator, values, splat(builder, args[2], vector))
            return builder.bitcast(mask, INDEX)

        return signature, generate

    return compares


above = _compares(">")
at_least = _compares(">=")


@intrinsic
def lowest(typing, word):  # type: ignore[no-untyped-def]
    """The number of the lowest bit set in a word that is not 0."""
    return numba.types.int64(numba.types.uint64), lambda _context, builder, _signature, args: builder.cttz(
        args[0], ir.Constant(ir.IntType(1), 1)
    )


@intrinsic
def population(typing, word):  # type: ignore[no-untyped-def]
    """How many bits of a word are set."""
    return numba.types.int64(numba.types.uint64), lambda _context, builder, _signature, args: builder.ctpop(args[0])


@compiled
def union(bits: Words, word: int) -> Any:
    """A word of all rows of `bits` uint64 [T, W] together."""
    together = np.uint64(0)
    for t in range(bits.shape[0]):
        together |= bits[t, word]
    return together


@compiled
def gram(vectors: Bits, keep: Bits, start: int, stop: int, out: Doubles) -> None:
    """Add the dot products of elements [start, stop) of `vectors` to `out` float64 [P].

    `vectors` uint32 [V, n] are bit patterns of float32, of which those bits count that `keep` uint32 [n] has set.
    """
    count = vectors.shape[0]
    whole = start + (stop - start) // LANES * LANES
    if whole > start:
        for i in range(0, count, 4):
            _triangle(vectors, keep, i, start, whole, out)
            for j in range(i + 4, count, 4):
                _block(vectors, keep, i, j, start, whole, out)
    for place in range(whole, stop):
        pair = 0
        for i in range(count):
            left = np.float64(np.uint32(vectors[i, place] & keep[place]).view(np.float32))
            for j in range(i, count):
                out[pair] += left * np.float64(np.uint32(vectors[j, place] & keep[place]).view(np.float32))
                pair += 1


@compiled
def _triangle(vectors: Bits, keep: Bits, i: int, start: int, stop: int, out: Doubles) -> None:
    left = vectors.shape[0] - i
    if left == 1:
        _triangle1(vectors, keep, i, i, start, stop, out)
    elif left == 2:
        _triangle2(vectors, keep, i, i, start, stop, out)
    elif left == 3:
        _triangle3(vectors, keep, i, i, start, stop, out)
    else:
        _triangle4(vectors, keep, i, i, start, stop, out)


@compiled
def _block(vectors: Bits, keep: Bits, i: int, j: int, start: int, stop: int, out: Doubles) -> None:
    left = vectors.shape[0] - j
    if left == 1:
        _block1(vectors, keep, i, j, start, stop, out)
    elif left == 2:
        _block2(vectors, keep, i, j, start, stop, out)
    elif left == 3:
        _block3(vectors, keep, i, j, start, stop, out)
    else:
        _block4(vectors, keep, i, j, start, stop, out)
