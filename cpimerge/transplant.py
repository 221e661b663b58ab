"""Writes the tasks' cores over the blend (METHOD §3).

All arrays cover one chunk of n elements; `bits` are unsigned integers holding values of the output dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .cores import Positions
from .kernels.mixing import copy_at
from .stream import Floats, decode, encode

__all__ = ["Claim", "Stored", "transplant"]

Bits = npt.NDArray[np.generic]


@dataclass(frozen=True)
class Stored:
    """What a checkpoint has: the bits [n] of a float dtype, as unsigned integers."""

    bits: Bits
    dtype: str

    def values_at(self, places: Positions) -> Floats:
        return decode(self.bits[places].view(np.uint8), self.dtype)

    def copy(self, places: Positions, out: Bits, dtype: str) -> None:
        """Write these places to `out` [n], bits of `dtype`."""
        if dtype == self.dtype:
            copy_at(places, self.bits, out)
        else:
            out[places] = self.bits_at(places, dtype)

    def bits_at(self, places: Positions, dtype: str) -> Bits:
        """As bits of `dtype`; the stored ones, where that is their own."""
        return self.bits[places] if dtype == self.dtype else encode(self.values_at(places), dtype)


@dataclass(frozen=True)
class Claim:
    """What one task claims: the ascending positions uint32 [k] of its core, and its values."""

    positions: Positions
    stored: Stored

    def holds(self, places: Positions) -> npt.NDArray[np.bool_]:
        """Which of `places` are claimed."""
        claimed = np.zeros(self.stored.bits.size, np.bool_)
        claimed[self.positions] = True
        return claimed[places]


def transplant(out: Bits, claims: Sequence[Claim], conflict: str, base: Stored, dtype: str) -> None:
    """Overwrite `out` at every core position, in place. `claims` are in stage order.

    An element that one task claims gets that task's stored value; `conflict` settles the others. `base` has the
    base's values, for `largest` and `elect`.
    """
    for claim in reversed(claims) if conflict == "first" else claims:
        claim.stored.copy(claim.positions, out, dtype)
    if conflict in SETTLE:
        contested = _contested(claims)
        if contested.size:
            out[contested] = SETTLE[conflict](contested, claims, base, dtype)


def _contested(claims: Sequence[Claim]) -> Positions:
    """Positions in more than one core, ascending."""
    every = np.sort(np.concatenate([claim.positions for claim in claims]))
    again = every[1:][every[1:] == every[:-1]]
    return np.concatenate([again[:1], again[1:][again[1:] != again[:-1]]])  # once each


def _largest(contested: Positions, claims: Sequence[Claim], base: Stored, dtype: str) -> Bits:
    """The value that moved most; of equals, the later."""
    origin = base.values_at(contested)
    largest = np.zeros(contested.size, np.float32)
    chosen = base.bits_at(contested, dtype)
    for claim in claims:
        moved = np.abs(claim.stored.values_at(contested) - origin)
        wins = claim.holds(contested) & (moved >= largest)
        largest[wins] = moved[wins]
        chosen[wins] = claim.stored.bits_at(contested[wins], dtype)
    return chosen


def _mean(contested: Positions, claims: Sequence[Claim], base: Stored, dtype: str) -> Bits:
    """Mean of the claimants' values: float32, in stage order, at each contested position."""
    total = np.full(contested.size, -0.0, np.float32)  # what adding changes nothing, not even −0
    count = np.zeros(contested.size, np.float32)
    for claim in claims:
        claimed = np.flatnonzero(claim.holds(contested))
        total[claimed] += claim.stored.values_at(contested[claimed])
        count[claimed] += 1
    return encode(total / count, dtype)


def _elect(contested: Positions, claims: Sequence[Claim], base: Stored, dtype: str) -> Bits:
    """Ties-merging among the claimants: base + the mean of the updates that have the sign of their sum."""
    origin = base.values_at(contested)
    updates = []
    for claim in claims:
        update = claim.stored.values_at(contested) - origin
        updates.append(np.where(claim.holds(contested), update, np.float32(0)))
    balance = np.zeros(contested.size, np.float32)
    for update in updates:  # not numpy's sum, whose order depends on the shape
        balance += update
    sign = np.sign(balance)
    total = np.zeros(contested.size, np.float32)
    count = np.zeros(contested.size, np.float32)
    for update in updates:
        agrees = (np.sign(update) == sign) & (sign != 0)
        total[agrees] += update[agrees]
        count += agrees
    return encode(np.where(sign == 0, origin, origin + total / np.maximum(count, np.float32(1))), dtype)


SETTLE: dict[str, Callable[[Positions, Sequence[Claim], Stored, str], Bits]] = {
    "largest": _largest,
    "mean": _mean,
    "elect": _elect,
}
