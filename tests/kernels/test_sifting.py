"""What one pass over a task's tile finds, against lines of numpy; sums in the order that makes them the same."""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from order_of_sums import in_halves

from cpimerge.kernels import sifting
from cpimerge.kernels.arrays import TILE, WORD
from cpimerge.kernels.sifting import SUM_LANES

kernels: Any = sifting
NEAR = np.float32(1e-5).view(np.uint32)
SPECIAL = np.array([0, -0.0, 1e-45, -1e-45, 1e-5, 3e38, -3e38, math.inf, -math.inf, math.nan], np.float32)

# The intrinsics can be called from compiled code only.
sift: Any = numba.njit(
    lambda values, base, half, limits, words, counts, sums, peak: kernels.sift(
        values, base, half, limits, words, counts, sums, peak
    )
)
clear_where: Any = numba.njit(lambda words, out: kernels.clear_where(words, out))


def words_of(members: np.ndarray) -> np.ndarray:
    """bool [n] as the words that have these bits."""
    return np.packbits(members, bitorder="little").view(np.uint64)


def patterns(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float32).view(np.uint32)


def in_lanes(magnitude: np.ndarray, taken: np.ndarray) -> float:
    """The partial sums of SUM_LANES lanes, folded."""
    lanes = [0.0] * SUM_LANES
    for place, (m, is_taken) in enumerate(zip(magnitude.tolist(), taken.tolist(), strict=True)):
        lanes[place % SUM_LANES] += m if is_taken else 0.0
    return in_halves(lanes)


@pytest.mark.parametrize("size", [0, WORD, 3 * WORD, TILE])
@pytest.mark.parametrize(("low", "high"), [(0.5, 1.5), (1e-45, 9e9), (9.0, 9.0), (1.0, 1.0), (1.5, 0.5)])
def test_sift(size: int, low: float, high: float) -> None:
    rng = np.random.default_rng(size)
    base = rng.normal(size=size).astype(np.float32)
    values = (base + rng.normal(size=size)).astype(np.float32)
    values[::7] *= np.float32(1e12)  # so that another order of the additions shows
    base[::5], values[::5] = 0, 1
    values[1::9] = base[1::9]
    values[2::9] = base[2::9] + np.float32(1e-6)
    half = rng.random(size).astype(np.float32)
    half[::5] = 1
    words = size // WORD
    bits, inward, opened, reached = rng.integers(0, 2**64, (4, words), np.uint64)
    counts, sums, peak = np.arange(5), np.array([0.25, 3.5]), np.full(1, 5, np.uint32)
    before = opened.copy(), reached.copy()
    limits = np.float32(low).view(np.uint32), np.float32(high).view(np.uint32), NEAR
    sift(patterns(values), patterns(base), patterns(half), limits, (bits, inward, opened, reached), counts, sums, peak)
    m = np.abs(values - base)
    above, below = m > np.float32(high), m < np.float32(low)
    assert bits.tolist() == words_of(above).tolist()
    assert inward.tolist() == words_of(above & ((values < base) != (base < 0))).tolist()
    assert opened.tolist() == (before[0] | words_of(~above & ~below)).tolist()
    assert reached.tolist() == (before[1] | words_of(~below)).tolist()
    groups = (m != 0, m <= np.float32(1e-5), m <= half, above, ~above & ~below)
    assert counts.tolist() == [number + int(group.sum()) for number, group in enumerate(groups)]
    assert peak.tolist() == [max(5, int(m.view(np.uint32).max(initial=0)))]
    for found, start, taken in zip(sums, (0.25, 3.5), (above, below), strict=True):
        assert found == start + in_lanes(m, taken)
        assert found == pytest.approx(math.fsum([start, *map(float, m[taken])]), rel=1e-14)


@given(st.integers(0, 2**32 - 1), st.integers(1, 0x7FFFFFFF), st.integers(0, 0x7FFFFFFF))
def test_sift_compares_patterns(seed: int, low: int, high: int) -> None:
    """Of magnitudes near the limits, and of what is special: −0, what is not finite, the smallest differences."""
    rng = np.random.default_rng(seed)
    base, values = rng.choice(SPECIAL, (2, 4 * WORD))
    near = np.clip(rng.choice([low, high], base.size) + rng.integers(-1, 2, base.size), 0, 0x7F7FFFFF)
    replaced = rng.random(base.size) < 0.5
    base = np.where(replaced, np.float32(0), base)
    values = np.where(replaced, near.astype(np.uint32).view(np.float32), values)
    with np.errstate(all="ignore"):
        m = np.abs(values - base).view(np.uint32)
    words = tuple(np.zeros((4, 4), np.uint64))
    counts, peak = np.zeros(5, np.int64), np.zeros(1, np.uint32)
    half = rng.choice(m, m.size)
    limits = np.uint32(low), np.uint32(high), NEAR
    sift(patterns(values), patterns(base), half, limits, words, counts, np.zeros(2), peak)
    above, from_low = m > high, m >= low
    inward = (values < base) != (base < 0)  # −0 is no less than 0
    for found, wanted in zip(words, (above, above & inward, from_low & ~above, from_low), strict=True):
        assert found.tolist() == words_of(wanted).tolist()
    assert counts.tolist() == [int(g.sum()) for g in (m != 0, m <= NEAR, m <= half, above, from_low & ~above)]
    assert peak[0] == m.max()


@given(st.lists(st.integers(0, 2**64 - 1), max_size=5))
def test_clear_where(words: list[int]) -> None:
    out = np.full(len(words) * WORD, 5, np.uint32)
    clear_where(np.array(words, np.uint64), out)
    assert out.tolist() == [0 if word >> bit & 1 else 0xFFFFFFFF for word in words for bit in range(WORD)]
