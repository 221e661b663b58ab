"""How two chunks differ, against lines of numpy over the whole chunk."""

from __future__ import annotations

import numpy as np
import pytest
from chunk_of_checkpoints import SHAPES, Stored, near_the_base, stored
from hypothesis import given, settings
from hypothesis import strategies as st

from cpimerge.kernels.arrays import TILE
from cpimerge.kernels.differences import Difference, compare
from cpimerge.kernels.scanning import Look, scratch

NEAR = np.float32(1e-5)
PRECISION = {0: (7, -126), 1: (10, -14), 2: (23, -126)}  # bits of a fraction, and the smallest exponent
SIZES = sorted({n for n, _ in SHAPES})
NOT_FINITE = [np.nan, -np.nan, np.inf, -np.inf]
KINDS = st.lists(st.integers(0, 2), min_size=2, max_size=2)


def look(n: int, kind: int) -> Look:
    fraction, exponent = PRECISION[kind]
    least, half = np.float32(2.0**exponent).view(np.uint32), np.float32(2.0 ** (-fraction - 1))
    return Look(n, n, 1, 0, False, NEAR.view(np.uint32), least, half)


def found(chunk: Stored, n: int) -> Difference:
    result = Difference(np.zeros(4, np.int64), np.zeros(1, np.uint32), np.full(1, -1), np.zeros(4))
    room = scratch(2)
    for rubbish in room:
        rubbish.fill(0x7FFFFFFF)
    compare(chunk.raw, chunk.kinds, look(n, int(chunk.kinds[0])), result, room)
    return result


def half_units(base: np.ndarray, kind: int) -> np.ndarray:
    """float64 [n]: half a unit in the last place of each base value, in its own dtype."""
    fraction, least = PRECISION[kind]
    _, exponents = np.frexp(base.astype(np.float64))
    units: np.ndarray = np.ldexp(1.0, np.where(base == 0, least, np.maximum(exponents - 1, least)) - fraction - 1)
    return units


def check(result: Difference, chunk: Stored) -> None:
    base, other = chunk.values
    with np.errstate(over="ignore", invalid="ignore"):
        change = other - base
    kept = np.isfinite(change)
    base, other, change = base[kept], other[kept], change[kept]
    size = np.abs(change)
    counts = [(size > 0).sum(), (size <= NEAR).sum(), (size <= half_units(base, int(chunk.kinds[0]))).sum()]
    assert result.counts.tolist() == [*counts, (~kept).sum()]
    assert result.peak.view(np.float32)[0] == (size.max() if size.size else 0)
    places = np.flatnonzero(kept)
    assert result.place[0] == (places[size.argmax()] if size.any() else -1)
    b, o, d = (x.astype(np.float64) for x in (base, other, change))
    wanted = np.array([b @ b, b @ o, o @ o, d @ d])
    assert (np.abs(result.sums - wanted) <= 1e-13 * np.array([b @ b, np.abs(b) @ np.abs(o), o @ o, d @ d])).all()


@pytest.mark.parametrize("n", SIZES)
@given(KINDS, st.integers(0, 2**32 - 1))
@settings(max_examples=15)
def test_finite_values(n: int, kinds: list[int], seed: int) -> None:
    chunk = stored(near_the_base(np.random.default_rng(seed), 2, n), kinds)
    check(found(chunk, n), chunk)


@pytest.mark.parametrize("n", [1, 64, TILE + 1, 2 * TILE + 904])
@given(KINDS, st.integers(0, 2**32 - 1))
@settings(max_examples=30)
def test_what_is_not_finite_is_only_counted(n: int, kinds: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = near_the_base(rng, 2, n)
    for c in rng.permutation(2)[: rng.integers(1, 3)]:
        some = rng.integers(0, n, rng.integers(1, 4))
        values[c, some] = rng.choice(NOT_FINITE, some.size)
    chunk = stored(values, kinds)
    result = found(chunk, n)
    assert result.counts[3] > 0
    check(result, chunk)


@pytest.mark.parametrize("kinds", [[0, 0], [0, 2], [2, 0], [2, 2]])
def test_a_difference_that_does_not_fit_float32_is_only_counted(kinds: list[int]) -> None:
    values = np.array([[3e38, 1, 2], [-3e38, 1.5, 2]], np.float32)
    chunk = stored(values, kinds)
    result = found(chunk, 3)
    check(result, chunk)
    assert (result.counts.tolist(), result.place[0]) == ([1, 1, 1, 1], 1)


def test_nothing_but_what_is_not_finite() -> None:
    result = found(stored(np.full((2, 100), np.inf, np.float32), [2, 0]), 100)
    assert result.counts.tolist() == [0, 0, 0, 100]
    assert (int(result.peak[0]), int(result.place[0])) == (0, -1)
    assert not result.sums.any()


def test_of_equal_magnitudes_the_first_counts_in_any_tile() -> None:
    values = np.zeros((2, 3 * TILE), np.float32)
    values[1, [TILE + 5, TILE + 9, 2 * TILE + 1]] = [-1, 1, 1]
    assert found(stored(values, [0, 0]), 3 * TILE).place[0] == TILE + 5


def test_it_adds_to_what_is_there() -> None:
    chunk = stored(near_the_base(np.random.default_rng(1), 2, 500), [0, 1])
    once, twice = found(chunk, 500), found(chunk, 500)
    compare(chunk.raw, chunk.kinds, look(500, 0), twice, scratch(2))
    assert (twice.counts == 2 * once.counts).all()
    assert np.allclose(twice.sums, 2 * once.sums, rtol=1e-15, atol=0)
    assert (twice.peak, twice.place) == (once.peak, once.place)
