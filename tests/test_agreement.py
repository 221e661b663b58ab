"""`tau: auto`: agreement by numbers worked out by hand, and groups against the reference's."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st

from cpimerge.agreement import agreements, clusters
from cpimerge.verify_fold import Overlaps, _standing_out


def matrix(tasks: int, values: dict[tuple[int, int], float], rest: float = 0.1) -> np.ndarray:
    found = np.full((tasks, tasks), rest)
    for (a, b), value in values.items():
        found[a, b] = found[b, a] = value
    return found


def of_two(compared: int, aligned: int) -> float:
    both = agreements(*(np.array([[count, count], [count, count]]) for count in (compared, aligned)))
    return float(both[0, 1])


@pytest.mark.parametrize(
    ("compared", "aligned", "expected"),
    [
        (10_000, 9_000, 0.8 - 0.03),
        (10_000, 5_000, 0.1),  # chance
        (10_000, 1_000, 0.1),  # against each other
        (100, 100, 0.7),
        (9, 9, 0.1),  # too few to say
        (0, 0, 0.1),
        (4 * 10**16, 4 * 10**16, 1 - 1.5e-8),
    ],
)
def test_agreement_of_two(compared: int, aligned: int, expected: float) -> None:
    assert of_two(compared, aligned) == pytest.approx(expected, rel=1e-12)


def test_one_task() -> None:
    assert clusters(matrix(1, {})) == [[0]]


@pytest.mark.parametrize(("value", "expected"), [(1.0, [[0, 1]]), (0.32, [[0, 1]]), (0.31, [[0], [1]])])
def test_two_tasks_are_a_group_from_the_root_of_the_floor_on(value: float, expected: list[list[int]]) -> None:
    assert clusters(matrix(2, {(0, 1): value})) == expected


def test_all_alone_and_all_together() -> None:
    assert clusters(matrix(5, {})) == [[0], [1], [2], [3], [4]]
    assert clusters(matrix(5, {}, rest=0.9)) == [[0, 1, 2, 3, 4]]
    assert clusters(matrix(5, {}, rest=0.31)) == [[0], [1], [2], [3], [4]]


def test_groups_stand_out_from_a_background() -> None:
    """What is 0.3 between groups and 0.9 within: the fall from 0.9 to 0.3 is as steep as from 0.3 to 0.1, and first."""
    pairs = {(0, 3): 0.9, (1, 4): 0.91}
    assert clusters(matrix(5, pairs, rest=0.3)) == [[0, 3], [1, 4], [2]]
    assert clusters(matrix(5, pairs, rest=0.31)) == [[0, 1, 2, 3, 4]]


def test_the_mean_decides_not_the_nearest() -> None:
    """A chain: neighbours agree, the ends do not. The Jaccard rule's components would make it one group."""
    chain = matrix(4, {(0, 1): 0.8, (1, 2): 0.8, (2, 3): 0.8})
    assert clusters(chain) == [[0, 1], [2, 3]]


def test_groups_are_in_order_of_their_first_tasks() -> None:
    assert clusters(matrix(5, {(4, 1): 0.9, (0, 3): 0.8})) == [[0, 3], [1, 4], [2]]


counts = st.integers(0, 60).flatmap(lambda both: st.tuples(st.just(both), st.integers(0, both)))
scaled = st.tuples(counts, st.sampled_from([1, 10, 1000])).map(lambda it: (it[0][0] * it[1], it[0][1] * it[1]))


@given(st.integers(1, 7), st.data())
def test_groups_are_the_references_and_verifys(tasks: int, data: st.DataObject) -> None:
    """Many counts are drawn from few, so that equal agreements are frequent."""
    compared, aligned = (np.zeros((tasks, tasks), np.int64) for _ in range(2))
    few = data.draw(st.lists(scaled, min_size=1, max_size=3))
    for a, b in combinations(range(tasks), 2):
        both, same = data.draw(st.one_of(st.sampled_from(few), scaled))
        compared[a, b] = compared[b, a] = both
        aligned[a, b] = aligned[b, a] = same
    names = [f"t{number}" for number in range(tasks)]
    agree = {
        (names[a], names[b]): reference.agreement(int(compared[a, b]), int(aligned[a, b]))
        for a in range(tasks)
        for b in range(tasks)
    }
    found = clusters(agreements(compared, aligned))
    assert [[names[task] for task in group] for group in found] == reference.clusters(names, agree)
    firsts = _standing_out(Overlaps(compared, compared, aligned))
    assert sorted(found) == [[t for t in range(tasks) if firsts[t] == first] for first in sorted({*firsts})]


@given(st.integers(2, 6), st.integers(0, 2**32 - 1))
def test_groups_do_not_depend_on_the_order_of_tasks(tasks: int, seed: int) -> None:
    """Where no two agreements are equal."""
    rng = np.random.default_rng(seed)
    upper = np.triu(rng.uniform(0.1, 1, (tasks, tasks)), 1)
    similarity = upper + upper.T
    order = rng.permutation(tasks)
    permuted = clusters(similarity[np.ix_(order, order)])
    assert sorted(sorted(int(order[task]) for task in group) for group in permuted) == sorted(clusters(similarity))


def test_hundreds_of_tasks_are_quick() -> None:
    blocks = np.kron(np.eye(50), np.full((4, 4), 0.8)) + 0.1
    assert clusters(np.minimum(blocks, 1)) == [list(range(first, first + 4)) for first in range(0, 200, 4)]


def test_the_floor_is_a_tenth() -> None:
    """The one number of the rule, which docs/grouping.md explains: half of a group of two starts at its root."""
    assert of_two(10**9, 10**9 // 2) == 0.1
    assert math.sqrt(0.1) == pytest.approx(0.316, abs=1e-3)
