"""The write of `fuse`: the blend of a chunk."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .arrays import TILE, Bits, Counts, Floats, Stored, compiled
from .floats import decode, encode, item_bytes
from .scanning import Scratch


class Mix(NamedTuple):
    """How a chunk of `size` elements in rows of `row` is blended: checkpoint number `base` is the base, values are
    differences from it if `delta`, to which it is added again if `based`, and the result is stored as `kind`."""

    size: int
    row: int
    base: int
    delta: bool
    based: bool
    kind: int


@compiled
def blend(raw: Stored, kinds: Counts, mix: Mix, coefficients: Floats, out: Stored, room: Scratch) -> None:
    """Σ_v c_v·vector_v in float32, in the order of v, rounded once into `out` uint8 [n · item bytes].

    `raw` uint8 [C, ≥ 4n] holds the chunk's bytes from every checkpoint, of `kinds` [C]; its first V are the vectors.
    `coefficients` float32 [R, V] has a line for each row. With `mix.based` the base is added last.
    """
    members = coefficients.shape[1]
    item = item_bytes(mix.kind)
    total = room.magnitude.view(np.float32)
    for begin in range(0, mix.size, TILE):
        end = min(begin + TILE, mix.size)
        count = end - begin
        for c in range(kinds.size):
            if c < members or mix.delta:
                width = item_bytes(kinds[c])
                decode(raw[c, width * begin : width * end], kinds[c], room.values[c, :count])
        place = begin
        while place < end:
            r = place // mix.row
            stop = min(end, (r + 1) * mix.row)
            _blend_row(room.values, place - begin, stop - begin, mix, coefficients[r], total)
            place = stop
        encode(room.magnitude[:count], mix.kind, out[item * begin : item * end])


@compiled
def _blend_row(values: Bits, start: int, stop: int, mix: Mix, coefficients: Floats, total: Floats) -> None:
    """Elements [start, stop) of a tile, of one row."""
    out, base = total[start:stop], values[mix.base, start:stop].view(np.float32)  # sliced so, they are contiguous
    for v in range(coefficients.size):
        vector = values[v, start:stop].view(np.float32)
        if mix.delta:
            if v == 0:
                _scale_difference(coefficients[0], vector, base, out)
            else:
                _add_difference(coefficients[v], vector, base, out)
        elif v == 0:
            _scale(coefficients[0], vector, out)
        else:
            _add_scaled(coefficients[v], vector, out)
    if mix.based:
        _add(base, out)


@compiled
def _scale(factor: np.float32, values: Floats, out: Floats) -> None:
    for i in range(out.size):
        out[i] = factor * values[i]


@compiled
def _add_scaled(factor: np.float32, values: Floats, out: Floats) -> None:
    for i in range(out.size):
        out[i] += factor * values[i]


@compiled
def _scale_difference(factor: np.float32, values: Floats, base: Floats, out: Floats) -> None:
    for i in range(out.size):
        out[i] = factor * (values[i] - base[i])


@compiled
def _add_difference(factor: np.float32, values: Floats, base: Floats, out: Floats) -> None:
    for i in range(out.size):
        out[i] += factor * (values[i] - base[i])


@compiled
def _add(values: Floats, out: Floats) -> None:
    for i in range(out.size):
        out[i] += values[i]


@compiled
def copy_at(places: Bits, source: npt.NDArray[Any], target: npt.NDArray[Any]) -> None:
    """target[p] = source[p] at `places` uint32 [k]; both are [n] of one dtype."""
    for i in range(places.size):
        target[places[i]] = source[places[i]]
