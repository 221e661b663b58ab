"""The k-th largest magnitude, exactly, against sorting."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpimerge import CheckpointError
from cpimerge.cores import NOTHING, Threshold
from cpimerge.selection import (
    LARGEST,
    LEAST,
    MOST,
    NO_CORE,
    RUN,
    WHOLE,
    Bracket,
    around,
    everything,
    narrow,
    pick,
    sample_size,
)

PATTERNS = st.one_of(
    st.integers(0, 6),  # ties
    st.integers(0, LARGEST),
    st.integers(2**30, 2**30 + 2**17),
    st.sampled_from([0, 1, LARGEST]),
)


def patterns(values: list[int]) -> np.ndarray:
    return np.array(values, np.uint32)


@st.composite
def tasks_and_sizes(draw: Any) -> tuple[list[np.ndarray], list[int]]:
    """Each task's magnitudes, and how many of those that are not 0 its core takes."""
    n, tasks = draw(st.integers(1, 60)), draw(st.integers(1, 3))
    rows = [patterns(draw(st.lists(PATTERNS, min_size=n, max_size=n))) for _ in range(tasks)]
    return rows, [draw(st.integers(0, int((row > 0).sum()))) for row in rows]


def core_by_sorting(magnitude: np.ndarray, size: int) -> list[int]:
    return sorted(sorted(range(magnitude.size), key=lambda i: (-int(magnitude[i]), i))[:size])


def core_of(magnitude: np.ndarray, threshold: Threshold) -> list[int]:
    ties = np.flatnonzero(magnitude == threshold.bits)[: threshold.ties].tolist()
    return sorted(np.flatnonzero(magnitude > threshold.bits).tolist() + ties)


def within(row: np.ndarray, low: int, high: int) -> np.ndarray:
    return row[(row >= low) & (row <= high)]


def bounds(bracket: Bracket) -> list[tuple[int, int]]:
    return list(zip(bracket.low.tolist(), bracket.high.tolist(), strict=True))


# --- the sample -------------------------------------------------------------------------------------


@given(st.integers(0, 2**40), st.integers(1, 200))
def test_sample_size(elements: int, tasks: int) -> None:
    size = sample_size(elements, tasks)
    if elements <= WHOLE:
        assert size == elements
    else:
        assert 0 < size < elements
        assert size % RUN == 0
        assert size * tasks <= MOST
        assert size >= min(WHOLE // 2, MOST // tasks) - RUN


@given(tasks_and_sizes(), st.data())
def test_a_whole_sample_gives_the_magnitude_itself(
    drawn: tuple[list[np.ndarray], list[int]], data: st.DataObject
) -> None:
    rows, _ = drawn
    n = rows[0].size
    sizes = [data.draw(st.integers(0, n)) for _ in rows]
    found = around(np.array(rows), sizes, n)
    assert found.is_exact
    for row, size, place in zip(rows, sizes, bounds(found), strict=True):
        kth = max(1, int(np.sort(row)[::-1][size - 1]))
        assert place == (NO_CORE if size == 0 else (kth, kth))
    above, between = (
        np.array([test(row, low, high) for row, (low, high) in zip(rows, bounds(found), strict=True)])
        for test in (lambda row, _, high: (row > high).sum(), lambda row, low, high: within(row, low, high).size)
    )
    wanted = np.array([min(size, int((row > 0).sum())) for row, size in zip(rows, sizes, strict=True)])
    assert found.holds(above, between, wanted)
    assert None not in found.known(wanted - above, between)


def test_no_core_is_above_every_finite_number() -> None:
    assert np.array(NO_CORE[0], np.uint32).view(np.float32) == np.inf
    assert np.array(LARGEST, np.uint32).view(np.float32) == np.finfo(np.float32).max


@given(st.integers(1, 5), st.integers(0, 2**32 - 1), st.floats(0, 1), st.sampled_from([2, 100, 2**30]))
def test_a_sample_gives_bounds_on_both_sides(runs: int, seed: int, density: float, top: int) -> None:
    sample = np.random.default_rng(seed).integers(0, top, (1, runs * RUN), np.uint32)
    elements = 128 * sample.size
    size = int(density * elements)
    [(low, high)] = bounds(around(sample, [size], elements))
    if size == 0:
        assert (low, high) == NO_CORE
        return
    rank = size * sample.size / elements
    descending = np.sort(sample[0])[::-1]
    assert LEAST <= low <= high <= LARGEST
    assert low <= max(LEAST, int(descending[min(sample.size, int(np.ceil(rank))) - 1]) if rank >= 1 else LARGEST)
    assert high >= descending[max(1, int(rank)) - 1]


@pytest.mark.parametrize("density", [0.0001, 0.01, 0.1, 0.5, 0.9, 0.9999, 1])
@pytest.mark.parametrize("alike", [1, RUN])
def test_a_bracket_holds_what_it_is_around(density: float, alike: int) -> None:
    """`alike` neighbours have the same scale: a sample of runs says less then, and the bracket must be wider."""
    rng = np.random.default_rng(11)
    elements = 1 << 20
    scales = np.repeat(np.exp(rng.normal(size=elements // alike)), alike)
    rows = np.abs(rng.normal(size=(2, elements)) * scales).astype(np.float32).view(np.uint32)
    starts = rng.choice(elements // RUN, sample_size(elements, 2) // RUN, replace=False) * RUN
    sample = rows[:, (starts[:, np.newaxis] + np.arange(RUN)).ravel()]
    size = int(density * elements)
    found = around(sample, [size, 0], elements)
    assert bounds(found)[1] == NO_CORE
    low, high = bounds(found)[0]
    assert low <= np.sort(rows[0])[elements - size] <= high
    share = within(rows[0], low, high).size / elements
    assert share < (0.1 if alike == 1 else 0.5)  # it is a guess worth having
    assert not found.is_exact


def test_an_empty_sample_says_nothing() -> None:
    found = around(np.empty((2, 0), np.uint32), [7, 0], 10**6)
    assert bounds(found) == [(LEAST, LARGEST), NO_CORE]
    assert bounds(everything(2)) == [(LEAST, LARGEST)] * 2


# --- brackets ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pairs", "exact"), [([], True), ([(5, 5)], True), ([(5, 4), (1, 1)], True), ([(5, 5), (5, 6)], False)]
)
def test_is_exact(pairs: list[tuple[int, int]], exact: bool) -> None:
    assert Bracket.at(pairs).is_exact == exact


@pytest.mark.parametrize(
    ("wanted", "holds"), [([3, 0], True), ([7, 2], True), ([2, 0], False), ([8, 0], False), ([5, 3], False)]
)
def test_holds(wanted: list[int], holds: bool) -> None:
    found = everything(2).holds(np.array([3, 0]), np.array([4, 2]), np.array(wanted))
    assert found == holds


@given(tasks_and_sizes(), st.data())
def test_what_counts_settle(drawn: tuple[list[np.ndarray], list[int]], data: st.DataObject) -> None:
    """A bracket around each k-th magnitude: what `known` says is its core, and it says it whenever it can."""
    rows, sizes = drawn
    pairs = []
    for row, size in zip(rows, sizes, strict=True):
        kth = int(np.sort(row)[::-1][size - 1]) if size else LARGEST
        wide = data.draw(st.booleans())
        low = data.draw(st.integers(1, kth)) if wide else kth
        pairs.append((low, data.draw(st.integers(kth, LARGEST)) if wide else kth))
    bracket = Bracket.at(pairs)
    above = np.array([(row > high).sum() for row, (_, high) in zip(rows, pairs, strict=True)])
    between = np.array([within(row, *pair).size for row, pair in zip(rows, pairs, strict=True)])
    missing = np.array(sizes) - above
    found = bracket.known(missing, between)
    for number, (row, size, (low, high)) in enumerate(zip(rows, sizes, pairs, strict=True)):
        threshold = found[number]
        if threshold is not None:
            assert core_of(row, threshold) == core_by_sorting(row, size)
        else:
            assert low < high
            assert 0 < missing[number] < between[number]


# --- exactly ----------------------------------------------------------------------------------------


@given(tasks_and_sizes(), st.sampled_from([0, 1, 3, 10, 1000]))
def test_narrow_and_pick(drawn: tuple[list[np.ndarray], list[int]], enough: int) -> None:
    rows, sizes = drawn
    calls = []

    def count(bracket: Bracket, shifts: np.ndarray, bins: int) -> np.ndarray:
        calls.append(bins)
        counts = np.zeros((len(rows), bins), np.int64)
        for t, (row, (low, high)) in enumerate(zip(rows, bounds(bracket), strict=True)):
            for m in within(row, low, high).tolist():
                counts[t, (m - low) >> int(shifts[t])] += 1
        return counts

    start = everything(len(rows))
    candidates = np.array([(row > 0).sum() for row in rows])
    narrower, left = narrow(start, np.array(sizes), candidates, count, enough)
    assert bounds(start) == [(LEAST, LARGEST)] * len(rows)  # nothing is changed in place
    assert len(calls) <= 2
    assert all(bins <= 1 << 16 for bins in calls)
    for row, size, wanted, (low, high) in zip(rows, sizes, left.tolist(), bounds(narrower), strict=True):
        found = within(row, low, high)
        if size == 0:
            assert (wanted, found.size) == (0, 0)
        else:
            assert wanted == size - (row > high).sum()
            assert 0 < wanted <= found.size
            assert low >= high or found.size <= enough
        assert core_of(row, pick(found.copy(), wanted)) == core_by_sorting(row, size)


@pytest.mark.parametrize(("enough", "calls"), [(1, 1), (0, 2), (10, 0)])
def test_narrow_stays_in_the_bracket_and_stops_when_few_are_left(enough: int, calls: int) -> None:
    row = patterns([5, 100_000, 200_000, 1_000_000, 1_000_001])
    start = Bracket.at([(5, 1_000_000)])
    seen = []

    def count(bracket: Bracket, shifts: np.ndarray, bins: int) -> np.ndarray:
        seen.append(bins)
        inside = within(row, *bounds(bracket)[0]).astype(np.int64) - int(bracket.low[0])
        return np.bincount(inside >> int(shifts[0]), minlength=bins)[np.newaxis]

    narrower, left = narrow(start, np.array([1]), np.array([4]), count, enough)
    [(low, high)] = bounds(narrower)
    assert low <= 1_000_000 == high
    assert left.tolist() == [1]
    assert len(seen) == calls


@given(st.lists(PATTERNS.filter(bool), min_size=1, max_size=50), st.data())
def test_pick(values: list[int], data: st.DataObject) -> None:
    wanted = data.draw(st.integers(0, len(values)))
    threshold = pick(patterns(values), wanted)
    assert core_of(patterns(values), threshold) == core_by_sorting(patterns(values), wanted)
    if wanted == 0:
        assert threshold == NOTHING
    if threshold.ties:  # ties are left to be counted only where not all of them are in
        assert threshold.ties < values.count(threshold.bits)


def test_nothing_is_no_magnitude() -> None:
    assert core_of(patterns([0, 1, LARGEST, LARGEST + 1]), NOTHING) == []


def test_fewer_than_were_counted_is_an_error() -> None:
    """An input that changes between two looks must not send the search out of its table."""

    def count(bracket: Bracket, shifts: np.ndarray, bins: int) -> np.ndarray:
        return np.zeros((1, bins), np.int64)

    with pytest.raises(CheckpointError, match="an input changed during the run"):
        narrow(everything(1), np.array([5]), np.array([5]), count, enough=0)
