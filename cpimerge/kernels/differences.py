"""The read of `inspect`: how the elements of a chunk differ between two checkpoints."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from .arrays import TILE, Bits, Counts, Doubles, Floats, Stored, compiled
from .scanning import ALL, INFINITE, Look, Scratch, decode_tile, half_units
from .vectors import gram


class Difference(NamedTuple):
    """What `compare` adds to; see there. "Those" are the elements whose difference is finite."""

    counts: Counts  # [4]: of those changed, m ≤ near, within half a unit of the base; and how many are not those
    peak: Bits  # [1]: the largest magnitude of those
    place: Counts  # [1]: the first index that has it; −1 where nothing has changed
    sums: Doubles  # [4], of those: ⟨base, base⟩, ⟨base, other⟩, ⟨other, other⟩, ⟨Δ, Δ⟩


@compiled
def compare(raw: Stored, kinds: Counts, look: Look, found: Difference, room: Scratch) -> None:
    """How the second checkpoint of a chunk differs from the first, the base; `found` begins as zeros and place −1.

    `raw` uint8 [2, ≥ begin + 4n] holds the chunk's bytes from both, of `kinds` [2]. Of `look`, rows and members do not
    matter. An element that is NaN or Inf in either, or whose difference does not fit float32, is only counted.
    """
    changes = room.magnitude.reshape((1, TILE))
    for begin in range(0, look.size, TILE):
        count = min(TILE, look.size - begin)
        decode_tile(raw, kinds, look, begin, count, room)
        half_units(room.values[0, :count], look, room.half)
        known = found.peak[0]
        _look_at(room.values[1, :count].view(np.float32), room, look.near, found.counts, found.peak)
        if found.peak[0] >= INFINITE:
            found.peak[0] = max(known, _leave_out(room, count, found.counts))
        if found.peak[0] > known:
            found.place[0] = begin + _first(room.magnitude[:count], found.peak[0])
        gram(room.values, room.keep, 0, count, found.sums[:3])
        gram(changes, room.keep, 0, count, found.sums[3:])


@compiled
def _look_at(values: Floats, room: Scratch, near: np.uint32, counts: Counts, peak: Bits) -> None:
    """The magnitudes of the other's `values` [n], which of them are finite, and what can be counted of them.

    `room` holds the base's values and half units. Sets its magnitudes and `keep`, adds to `counts`, raises `peak` [1].
    """
    base, half = room.values[0, : values.size].view(np.float32), room.half[: values.size]
    magnitude, keep = room.magnitude[: values.size], room.keep[: values.size]
    changed = nearly = rounding = np.uint32(0)
    most = peak[0]
    for i in range(values.size):
        m = np.float32(abs(values[i] - base[i])).view(np.uint32)
        magnitude[i] = m
        keep[i] = ALL if m < INFINITE else np.uint32(0)
        most = max(most, m)
        # uint32 again after each sum, or half as many fit into a register
        changed = np.uint32(changed + np.uint32(m != 0))
        nearly = np.uint32(nearly + np.uint32(m <= near))
        rounding = np.uint32(rounding + np.uint32(m <= half[i]))
    counts[0] += changed
    counts[1] += nearly
    counts[2] += rounding
    peak[0] = most


@compiled
def _leave_out(room: Scratch, count: int, counts: Counts) -> Any:
    """Take back what was counted of the elements of a tile that `keep` leaves out; the largest other magnitude."""
    most = np.uint32(0)
    for i in range(count):
        m = room.magnitude[i]
        if room.keep[i] == 0:
            counts[0] -= 1
            counts[2] -= m <= room.half[i]
            counts[3] += 1
        else:
            most = max(most, m)
    return most


@compiled
def _first(magnitude: Bits, wanted: np.uint32) -> int:
    for i in range(magnitude.size):
        if magnitude[i] == wanted:
            return i
    return -1
