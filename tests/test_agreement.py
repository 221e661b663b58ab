"""`tau: auto`: agreement by numbers worked out by hand, and groups against the reference's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import combinations, product

import numpy as np
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st

from cpimerge.agreement import FLOOR, agreements, by_chance, clusters
from cpimerge.verify_fold import Overlaps, _standing_out, expected_of


def matrix(tasks: int, values: dict[tuple[int, int], float], rest: float = FLOOR) -> np.ndarray:
    found = np.full((tasks, tasks), rest)
    for (a, b), value in values.items():
        found[a, b] = found[b, a] = value
    return found


def of_two(compared: int, aligned: int, expected: float) -> float:
    both = agreements(*(np.array([[count, count], [count, count]]) for count in (compared, aligned, float(expected))))
    return float(both[0, 1])


@pytest.mark.parametrize(
    ("compared", "aligned", "expected", "wanted"),
    [
        (10_000, 9_000, 5_000, 0.8 - 0.03),
        (10_000, 5_000, 5_000, FLOOR),
        (10_000, 1_000, 5_000, FLOOR),  # against each other
        (100, 100, 50, 0.7),
        (9, 9, 4.5, FLOOR),  # too few to say
        (0, 0, 0, FLOOR),
        (4 * 10**16, 4 * 10**16, 2 * 10**16, 1 - 1.5e-8),
        (10_000, 9_500, 9_000, 0.5 - 0.09),  # deviation: √(9000 · 1000 / 10000) of 1000
        (10_000, 9_010, 9_000, FLOOR),
        (10_000, 10_000, 10_000, FLOOR),  # all moved one way
        (10_000, 10_000, 0, 1),  # by chance, none would agree
        (10_000, 9_999, 10_000.000_000_1, FLOOR),  # a rounding
    ],
)
def test_agreement_of_two(compared: int, aligned: int, expected: float, wanted: float) -> None:
    assert of_two(compared, aligned, expected) == pytest.approx(wanted, rel=1e-12)


@given(st.integers(1, 10**12), st.fractions(0, 1))
def test_where_chance_is_a_half_it_is_the_share_beyond_it(compared: int, share: Fraction) -> None:
    """Less three deviations of a coin that is thrown so often."""
    aligned = int(share * compared)
    simple = (2 * aligned - compared) / compared - 3 / math.sqrt(compared)
    assert of_two(compared, aligned, compared / 2) == pytest.approx(max(FLOOR, simple), rel=1e-9, abs=1e-12)


def test_chance_by_hand() -> None:
    """Of 10 shared elements one task moves 9 inward and the other 8: 0.9 · 0.8 + 0.1 · 0.2 of them agree by chance."""
    pairs, inwards = np.array([[20, 10], [10, 30]]), np.array([[20, 9], [8, 0]])
    assert by_chance(pairs, inwards).tolist() == [[20, pytest.approx(7.4)], [pytest.approx(7.4), 30]]
    assert by_chance(np.zeros((2, 2), np.int64), np.zeros((2, 2), np.int64)).tolist() == [[0, 0], [0, 0]]


@given(st.integers(0, 5), st.integers(1, 4), st.data())
def test_verify_adds_up_the_same_chance(tensors: int, tasks: int, data: st.DataObject) -> None:
    pairs, inwards = [], []
    for _ in range(tensors):
        drawn = data.draw(st.lists(st.integers(0, 10**9), min_size=tasks * tasks, max_size=tasks * tasks))
        both = np.array(drawn, np.int64).reshape(tasks, tasks)
        both = np.maximum(both, both.T)
        pairs.append(both)
        shares = data.draw(st.lists(st.fractions(0, 1), min_size=tasks * tasks, max_size=tasks * tasks))
        inwards.append(
            np.array([int(int(n) * q) for n, q in zip(both.flat, shares, strict=True)]).reshape(tasks, tasks)
        )
    found = sum(map(by_chance, pairs, inwards), np.zeros((tasks, tasks)))
    for a in range(tasks):
        for b in range(tasks):
            exact = Fraction(0)
            for n, x, y in ((int(p[a, b]), int(i[a, b]), int(i[b, a])) for p, i in zip(pairs, inwards, strict=True)):
                exact += Fraction(x * y + (n - x) * (n - y), max(n, 1))
            assert found[a, b] == pytest.approx(float(exact), rel=1e-12)
            assert expected_of(pairs, inwards, tasks)[a, b] == pytest.approx(float(exact), rel=1e-10)


def test_one_task() -> None:
    assert clusters(matrix(1, {})) == [[0]]


@pytest.mark.parametrize(("value", "expected"), [(1.0, [[0, 1]]), (0.45, [[0, 1]]), (0.44, [[0], [1]])])
def test_two_tasks_are_a_group_from_the_root_of_the_floor_on(value: float, expected: list[list[int]]) -> None:
    assert clusters(matrix(2, {(0, 1): value})) == expected


def test_all_alone_and_all_together() -> None:
    assert clusters(matrix(5, {})) == [[0], [1], [2], [3], [4]]
    assert clusters(matrix(5, {}, rest=0.9)) == [[0, 1, 2, 3, 4]]
    assert clusters(matrix(5, {}, rest=0.44)) == [[0], [1], [2], [3], [4]]


def test_groups_stand_out_from_a_background() -> None:
    """From 0.9 within groups to 0.42 between them is a steeper fall than from there to 0.2; to 0.43 it is not."""
    pairs = {(0, 3): 0.9, (1, 4): 0.91}
    assert clusters(matrix(5, pairs, rest=0.42)) == [[0, 3], [1, 4], [2]]
    assert clusters(matrix(5, pairs, rest=0.43)) == [[0, 1, 2, 3, 4]]


def test_the_mean_decides_not_the_nearest() -> None:
    """A chain: neighbours agree, the ends do not. The Jaccard rule's components would make it one group."""
    chain = matrix(4, {(0, 1): 0.8, (1, 2): 0.8, (2, 3): 0.8})
    assert clusters(chain) == [[0, 1], [2, 3]]


def test_groups_are_in_order_of_their_first_tasks() -> None:
    assert clusters(matrix(5, {(4, 1): 0.9, (0, 3): 0.8})) == [[0, 3], [1, 4], [2]]


counts = st.integers(0, 60).flatmap(lambda n: st.tuples(st.just(n), *[st.integers(0, n)] * 2))
scaled = st.tuples(counts, st.sampled_from([1, 10, 1000])).map(lambda it: tuple(count * it[1] for count in it[0]))


@given(st.integers(1, 7), st.data())
def test_groups_are_the_references_and_verifys(tasks: int, data: st.DataObject) -> None:
    """Many counts are drawn from few, so that equal agreements are frequent."""
    compared, aligned, expected = (np.zeros((tasks, tasks), np.int64) for _ in range(3))
    few = data.draw(st.lists(scaled, min_size=1, max_size=3))
    for a, b in combinations(range(tasks), 2):
        both, same, chance = data.draw(st.one_of(st.sampled_from(few), scaled))
        compared[a, b] = compared[b, a] = both
        aligned[a, b] = aligned[b, a] = same
        expected[a, b] = expected[b, a] = chance
    names = [f"t{number}" for number in range(tasks)]
    agree = {
        (names[a], names[b]): reference.agreement(int(compared[a, b]), int(aligned[a, b]), float(expected[a, b]))
        for a in range(tasks)
        for b in range(tasks)
    }
    found = clusters(agreements(compared, aligned, expected.astype(np.float64)))
    assert [[names[task] for task in group] for group in found] == reference.clusters(names, agree)
    firsts = _standing_out(Overlaps(compared, compared, aligned, expected.astype(np.float64)))
    assert sorted(found) == [[t for t in range(tasks) if firsts[t] == first] for first in sorted({*firsts})]


@given(st.integers(2, 6), st.integers(0, 2**32 - 1))
def test_groups_do_not_depend_on_the_order_of_tasks(tasks: int, seed: int) -> None:
    """Where no two agreements are equal."""
    rng = np.random.default_rng(seed)
    upper = np.triu(rng.uniform(FLOOR, 1, (tasks, tasks)), 1)
    similarity = upper + upper.T
    order = rng.permutation(tasks)
    permuted = clusters(similarity[np.ix_(order, order)])
    assert sorted(sorted(int(order[task]) for task in group) for group in permuted) == sorted(clusters(similarity))


def test_hundreds_of_tasks_are_quick() -> None:
    blocks = np.kron(np.eye(50), np.full((4, 4), 0.8)) + FLOOR
    assert clusters(np.minimum(blocks, 1)) == [list(range(first, first + 4)) for first in range(0, 200, 4)]


def test_the_floor_is_a_fifth() -> None:
    """The one number of the rule, which docs/grouping.md explains: a group of two starts at its root."""
    assert of_two(10**9, 10**9 // 2, 10**9 / 2) == FLOOR == 0.2
    assert math.sqrt(0.2) == pytest.approx(0.447, abs=1e-3)


# --- weight decay ------------------------------------------------------------------------------------

BASE = np.random.default_rng(0).normal(0, 0.02, (12, 40_000))  # tensors by elements
STEP = 1e-4


def counted(updates: Sequence[np.ndarray], density: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What `agreements` takes, of updates like BASE, whose cores are a share of each tensor."""
    size = int(density * BASE.shape[1])
    cores = [np.zeros(BASE.shape, bool) for _ in updates]
    for core, update in zip(cores, updates, strict=True):
        np.put_along_axis(core, np.argsort(-np.abs(update), axis=1)[:, :size], True, axis=1)
    inward = [(update < 0) != (BASE < 0) for update in updates]
    shape = (len(updates), len(updates))
    compared, aligned, expected = np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.zeros(shape)
    for tensor in range(len(BASE)):
        pairs, inwards = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        for a, b in product(range(len(updates)), repeat=2):
            both = cores[a][tensor] & cores[b][tensor]
            pairs[a, b], inwards[a, b] = both.sum(), (both & inward[a][tensor]).sum()
            aligned[a, b] += (both & (np.sign(updates[a][tensor]) == np.sign(updates[b][tensor]))).sum()
        compared += pairs
        expected += by_chance(pairs, inwards)
    return compared, aligned, expected


def beyond_half(compared: np.ndarray, aligned: np.ndarray) -> np.ndarray:
    """The share in the same direction less that in the other."""
    share: np.ndarray = (2 * aligned - compared) / compared
    return share


@pytest.mark.parametrize("decay", [0, 1e-3, 3e-3])
def test_tasks_that_shrink_alike_are_alone(decay: float) -> None:
    """Independent updates, and two runs of one task among them; all weights get smaller by `decay`."""
    rng = np.random.default_rng(1)
    updates = [rng.normal(0, STEP, BASE.shape) for _ in range(4)]
    updates[3] = 0.9 * updates[2] + math.sqrt(1 - 0.9**2) * updates[3]
    found = counted([update - decay * BASE for update in updates], 0.05)
    raw = beyond_half(*found[:2])[0, 1]
    assert raw > 0.85 if decay == 3e-3 else raw < 0.2
    pair = [count[:2, :2] for count in found]
    assert clusters(agreements(*pair)) == [[0], [1]]
    assert clusters(agreements(*(count[:3, :3] for count in found))) == [[0], [1], [2]]
    assert clusters(agreements(*found)) == [[0], [1], [2, 3]]


def test_experts_that_no_task_uses_only_decay() -> None:
    """A mixture: half of the tensors are trained, the others shrink, in every task with slight roundings of its own."""
    rng = np.random.default_rng(2)
    updates = []
    for _ in range(3):
        trained, left = rng.normal(0, STEP, BASE.shape), rng.normal(0, STEP / 100, BASE.shape)
        used = np.arange(len(BASE))[:, np.newaxis] % 2 == 0
        updates.append(np.where(used, trained, left) - 3e-4 * BASE)
    found = counted(updates, 0.05)
    assert (beyond_half(*found[:2])[np.triu_indices(3, 1)] > 0.8).all()  # most of what they share is there
    assert clusters(agreements(*found)) == [[0], [1], [2]]
    copies = counted([updates[0], updates[0], updates[1]], 0.05)
    assert clusters(agreements(*copies)) == [[0, 1], [2]]
