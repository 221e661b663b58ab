"""The kernels of adapters against numpy in float64, and their rounding against exact arithmetic."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpimerge.kernels import lowrank

SHAPES = [(1, 1), (3, 5), (2, 1023), (2, 1024), (3, 1025), (70, 130), (5, 2500)]


def padded(values: np.ndarray, axis: int) -> np.ndarray:
    missing = -values.shape[axis] % lowrank.UNROLL
    return np.pad(values, [(0, missing if axis == i else 0) for i in range(2)]).astype(np.float32)


@pytest.mark.parametrize("shape", SHAPES)
@given(st.integers(1, 9), st.data())
@settings(max_examples=15)
def test_add_low_rank(shape: tuple[int, int], rank: int, data: st.DataObject) -> None:
    rows, columns = shape
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    place = data.draw(st.integers(0, columns - 1))
    count = data.draw(st.integers(1, rows * columns - place))
    left, right = (rng.normal(size=size).astype(np.float32) for size in ((rows, rank), (rank, columns)))
    before = rng.normal(size=count).astype(np.float32)
    values = before.copy()
    room = np.empty(lowrank.WIDTH, np.float32)
    lowrank.add_low_rank(padded(left, 1), padded(right, 0), np.float32(0.75), place, values, room)
    part = slice(place, place + count)
    delta = 0.75 * (left.astype(float) @ right).ravel()[part]
    size = np.abs(before) + 0.75 * (np.abs(left).astype(float) @ np.abs(right)).ravel()[part]
    assert (np.abs(values - (before + delta)) <= (rank + 2) * 2**-24 * size).all()


@given(st.lists(st.floats(-100, 100, width=32), min_size=4, max_size=4), st.floats(-100, 100, width=32))
def test_each_step_is_rounded_once(numbers: list[float], factor: float) -> None:
    """Whatever the processor: the sum of products is what exact arithmetic, rounded after each step, gives."""
    total = np.float32(0)
    for number in numbers:
        exact = Fraction(factor) * Fraction(number) + Fraction(float(total))
        total = nearest(exact)
    right = np.array(numbers, np.float32).reshape(4, 1)
    values = np.zeros(1, np.float32)
    left = np.full((1, 4), factor, np.float32)
    lowrank.add_low_rank(left, right, np.float32(1), 0, values, np.empty(lowrank.WIDTH, np.float32))
    assert values[0] == total


def nearest(exact: Fraction) -> np.float32:
    """To nearest, ties to even, without the rounding to float64 between."""
    guess = np.float32(float(exact))
    near = [np.nextafter(guess, np.float32(-np.inf)), guess, np.nextafter(guess, np.float32(np.inf))]
    return min(near, key=lambda x: (abs(Fraction(float(x)) - exact), int(x.view(np.uint32)) & 1))


@pytest.mark.parametrize("shape", SHAPES)
@given(st.data())
@settings(max_examples=15)
def test_factors_of_rows_and_columns(shape: tuple[int, int], data: st.DataObject) -> None:
    rows, columns = shape
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    place = data.draw(st.integers(0, columns - 1))
    count = data.draw(st.integers(1, rows * columns - place))
    values, by_row, by_column = (rng.normal(size=size).astype(np.float32) for size in (count, rows, columns))
    row, column = np.divmod(np.arange(place, place + count), columns)
    scaled = values.copy()
    lowrank.multiply_rows(by_row, columns, place, scaled)
    assert np.array_equal(scaled, values * by_row[row])
    scaled = values.copy()
    lowrank.multiply_columns(by_column, place, scaled)
    assert np.array_equal(scaled, values * by_column[column])


@pytest.mark.parametrize("shape", SHAPES)
def test_norms(shape: tuple[int, int]) -> None:
    rows, columns = shape
    values = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    lanes, sums = np.zeros((rows, lowrank.LANES)), np.zeros(columns)
    lowrank.add_row_squares(values.ravel(), lanes)
    norms = np.empty(rows, np.float32)
    lowrank.norms(lanes, norms)
    np.testing.assert_allclose(norms, np.linalg.norm(values.astype(float), axis=1), rtol=2**-23)
    lowrank.add_column_squares(values.ravel(), sums)
    np.testing.assert_allclose(sums, (values.astype(float) ** 2).sum(axis=0), rtol=1e-12)
    pieces = np.zeros((rows, lowrank.LANES))
    cut = columns // 2 // lowrank.LANES * lowrank.LANES
    for row in range(rows):
        for piece in (values[row, :cut], values[row, cut:]):
            lowrank.add_row_squares(np.ascontiguousarray(piece), pieces[row : row + 1])
    assert np.array_equal(pieces, lanes)
