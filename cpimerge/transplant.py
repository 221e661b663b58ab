"""Writes the tasks' cores over the blend (METHOD §3).

All arrays cover one chunk of n elements; `bits` are unsigned integers holding values of the output dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from . import kernels
from .cores import Positions
from .stream import Floats, encode

__all__ = ["Claim", "transplant"]

Bits = npt.NDArray[np.generic]


@dataclass(frozen=True)
class Claim:
    """What one task claims: its core's positions uint32 [k], its values float32 [n] and as output bits [n]."""

    positions: Positions
    values: Floats
    bits: Bits


def transplant(out: Bits, claims: Sequence[Claim], conflict: str, base: Floats, dtype: str) -> None:
    """Overwrite `out` at every core position, in place. `claims` are in stage order.

    An element that one task claims gets that task's stored value; `conflict` settles the others. `base` float32 [n]
    has the base's values, for `largest` and `elect`.
    """
    if conflict == "largest":
        return _largest(out, claims, base)
    for claim in reversed(claims) if conflict == "first" else claims:
        kernels.copy_at(claim.positions, claim.bits, out)
    if conflict in ("mean", "elect"):
        contested = _contested(len(out), claims)
        if contested.size:
            settle: Callable[..., Floats] = _mean if conflict == "mean" else _elect
            out[contested] = encode(settle(contested, claims, base), dtype)
    return None


def _largest(out: Bits, claims: Sequence[Claim], base: Floats) -> None:
    largest = np.zeros(len(out), np.uint32)
    magnitude = np.empty(len(out), np.float32)
    for claim in claims:
        kernels.magnitude(base, claim.values, magnitude)
        kernels.claim_largest(claim.positions, magnitude.view(np.uint32), claim.bits, largest, out)


def _contested(elements: int, claims: Sequence[Claim]) -> npt.NDArray[np.intp]:
    """Positions in more than one core."""
    claimants = np.zeros(elements, np.uint16)
    for claim in claims:
        claimants[claim.positions] += 1  # positions of one core are distinct
    return np.flatnonzero(claimants > 1)


def _claimed(contested: npt.NDArray[np.intp], claim: Claim, elements: int) -> npt.NDArray[np.bool_]:
    inside = np.zeros(elements, np.bool_)
    inside[claim.positions] = True
    return inside[contested]


def _mean(contested: npt.NDArray[np.intp], claims: Sequence[Claim], base: Floats) -> Floats:
    """Mean of the claimants' values: float32, in stage order, at each contested position."""
    total = np.full(contested.size, -0.0, np.float32)  # what adding changes nothing, not even −0
    count = np.zeros(contested.size, np.float32)
    for claim in claims:
        claimed = _claimed(contested, claim, len(claim.values))
        total[claimed] += claim.values[contested[claimed]]
        count += claimed
    return total / count


def _elect(contested: npt.NDArray[np.intp], claims: Sequence[Claim], base: Floats) -> Floats:
    """Ties-merging among the claimants: base + the mean of the updates that have the sign of their sum."""
    origin = base[contested]
    updates = []
    for claim in claims:
        claimed = _claimed(contested, claim, len(claim.values))
        updates.append(np.where(claimed, claim.values[contested] - origin, np.float32(0)))
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
    return np.where(sign == 0, origin, origin + total / np.maximum(count, 1))
