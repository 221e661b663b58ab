"""Dot products: right, and in the order that makes them the same on every machine."""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from order_of_sums import in_halves

from cpimerge.kernels import vectors
from cpimerge.kernels.arrays import WORD
from cpimerge.kernels.vectors import LANES, gram

kernels: Any = vectors

# The intrinsics can be called from compiled code only.
population: Any = numba.njit(lambda word: kernels.population(word))
lowest: Any = numba.njit(lambda word: kernels.lowest(word))
above: Any = numba.njit(lambda magnitude, place, limit: kernels.above(magnitude, place, limit))
at_least: Any = numba.njit(lambda magnitude, place, limit: kernels.at_least(magnitude, place, limit))

SPANS = [(0, 0), (0, 1), (0, 7), (0, 8), (0, 9), (3, 3), (3, 10), (3, 11), (5, 64), (1, 98), (0, 100)]


def pairs(count: int) -> list[tuple[int, int]]:
    return [(i, j) for i in range(count) for j in range(i, count)]


def dot_in_order(a: np.ndarray, b: np.ndarray, before: float) -> float:
    """The partial sums of LANES lanes, folded, go to what was there before; then the rest, one after another."""
    products = [float(x) * float(y) for x, y in zip(a, b, strict=True)]
    whole = len(products) // LANES * LANES
    lanes = [0.0] * LANES
    for place, product in enumerate(products[:whole]):
        lanes[place % LANES] += product
    total = before + in_halves(lanes) if whole else before
    for product in products[whole:]:
        total += product
    return total


@pytest.mark.parametrize("count", range(1, 10))
@pytest.mark.parametrize(("start", "stop"), SPANS)
def test_gram(count: int, start: int, stop: int) -> None:
    rng = np.random.default_rng(count * 1000 + stop)
    values = rng.normal(size=(count, 100)).astype(np.float32)
    values[:, ::3] *= np.float32(1e10)  # so that another order of the additions shows
    before = rng.normal(size=len(pairs(count)))
    out = before.copy()
    keep = np.where(rng.random(100) < 0.8, np.uint32(0xFFFFFFFF), np.uint32(0))
    gram(values.view(np.uint32), keep, start, stop, out)
    values = np.where(keep > 0, values, np.float32(0))
    for number, (i, j) in enumerate(pairs(count)):
        a, b = values[i, start:stop], values[j, start:stop]
        assert out[number] == dot_in_order(a, b, before[number])
        products = [float(x) * float(y) for x, y in zip(a, b, strict=True)]
        slack = 1e-14 * (math.fsum(map(abs, products)) + abs(before[number]))
        assert out[number] == pytest.approx(math.fsum([before[number], *products]), rel=0, abs=slack)


def test_gram_is_numpys() -> None:
    values = np.random.default_rng(0).normal(size=(6, 10_007)).astype(np.float32)
    out = np.zeros(21)
    gram(values.view(np.uint32), np.full(10_007, 0xFFFFFFFF, np.uint32), 0, 10_007, out)
    wide = values.astype(np.float64)
    np.testing.assert_allclose(out, (wide @ wide.T)[np.triu_indices(6)], rtol=0, atol=1e-9)


@given(st.integers(0, 2**64 - 1))
def test_bits_of_a_word(word: int) -> None:
    assert population(np.uint64(word)) == word.bit_count()
    if word:
        assert lowest(np.uint64(word)) == f"{word:b}"[::-1].index("1")


@pytest.mark.parametrize("bit", range(64))
def test_each_bit_of_a_word(bit: int) -> None:
    assert lowest(np.uint64(1 << bit)) == bit
    assert lowest(np.uint64(2**64 - (1 << bit))) == bit
    assert population(np.uint64(1 << bit)) == 1


@given(st.integers(0, 2**32 - 1), st.integers(0, 70), st.integers(0, 2**32 - 1))
def test_comparisons_are_unsigned(limit: int, place: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 2**32, 2 * WORD + 7, np.uint32)
    near = np.clip(limit + rng.integers(-1, 2, values.size), 0, 2**32 - 1).astype(np.uint32)
    values = np.where(rng.random(values.size) < 0.6, near, values)
    part = values[place : place + WORD]
    for found, wanted in (
        (above(values, place, np.uint32(limit)), part > limit),
        (at_least(values, place, np.uint32(limit)), part >= limit),
    ):
        assert int(found) == sum(1 << i for i in np.flatnonzero(wanted).tolist())
