"""Jaccard index, chance, groups and stages by hand-made numbers."""

from __future__ import annotations

from fractions import Fraction
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cpimerge.overlap import chance, groups, jaccard, stages, tau_notes
from cpimerge.plan_file import Pair
from cpimerge.recipe import Recipe, parse_recipe


def counts(size: int, shared: dict[tuple[int, int], int], tasks: int) -> np.ndarray:
    result = np.diag([size] * tasks)
    for (a, b), count in shared.items():
        result[a, b] = result[b, a] = count
    return result


def test_jaccard() -> None:
    assert jaccard(counts(11, {(0, 1): 2}, 2), 0, 1) == Fraction(2, 20)
    assert jaccard(counts(0, {}, 2), 0, 1) == 0


@pytest.mark.parametrize("p", ["0.01", "0.1", "0.5", "1"])
def test_chance_of_one_density_is_p_over_2_minus_p(p: str) -> None:
    density = Fraction(p)
    assert chance([3, 1000, 17], [density] * 3, [density] * 3) == density / (2 - density)


def test_chance_of_several_densities() -> None:
    half, all_, none = Fraction(1, 2), Fraction(1), Fraction(0)
    # Of 10 elements 5 meet all; of 20, 10 meet none.
    assert chance([10, 20], [half, half], [all_, none]) == Fraction(5, 10 + 10)
    assert chance([10], [none], [none]) == 0


def test_groups_are_transitive_and_tau_is_inclusive() -> None:
    found = counts(11, {(0, 3): 2, (3, 4): 2, (1, 2): 1}, 5)  # J = 0.1, 0.1 and 1/21
    assert groups(found, Fraction(1, 10)) == [[0, 3, 4], [1], [2]]
    assert groups(found, Fraction(101, 1000)) == [[0], [1], [2], [3], [4]]
    assert groups(found, Fraction(1, 21)) == [[0, 3, 4], [1, 2]]
    assert groups(found, Fraction(0)) == [[0, 1, 2, 3, 4]]


def recipe(parameters: str, tasks: str = "abcde") -> Recipe:
    models = "".join(f"  - model: ./{name}\n" for name in tasks)
    text = f"merge_method: cpi\nbase_model: ./base\nmodels:\n{models}parameters: {{{parameters}}}\n"
    return parse_recipe(text, None, Path("/nowhere"))


@pytest.mark.parametrize(
    ("parameters", "wanted"),
    [
        ("tau: 0.1", [["a", "d", "e"], ["b"], ["c"]]),
        ("tau: auto", [["a"], ["b", "c"], ["d"], ["e"]]),
        ("", [["a"], ["b", "c"], ["d"], ["e"]]),
        ("tau: auto, order: {seed: 1}", [["a"], ["e"], ["d"], ["b", "c"]]),  # random: 0.13, 0.85, 0.76, 0.26
        ("stages: [[c, b], [e, a, d]]", [["c", "b"], ["e", "a", "d"]]),
        # random.Random(7).random() three times: 0.32, 0.15, 0.65; of 1: 0.13, 0.85, 0.76.
        ("tau: 0.1, order: {seed: 7}", [["b"], ["a", "d", "e"], ["c"]]),
        ("tau: 0.1, order: {seed: 1}", [["a", "d", "e"], ["c"], ["b"]]),
    ],
)
def test_stages(parameters: str, wanted: list[list[str]]) -> None:
    found = counts(11, {(0, 3): 2, (3, 4): 2}, 5)
    similarity = np.full((5, 5), 0.2)
    similarity[1, 2] = similarity[2, 1] = 0.9
    assert stages(recipe(parameters), found, similarity) == wanted


def pair(a: str, b: str, sizes: tuple[int, int], shared: int, **changes: Any) -> Pair:
    """Of two cores of 100 elements where nothing else is said: chance is 1%."""
    union = sum(sizes) - shared
    fields: dict[str, Any] = {"jaccard": shared / union if union else 0.0, "chance": 0.01, "lift": None, "layers": {}}
    fields |= {"shared": shared, "union": union, "compared": shared, "aligned": shared // 2, "expected": shared / 2}
    return Pair(a=a, b=b, **(fields | changes))


def notes(parameters: str, sizes: tuple[int, int, int], pairs: list[Pair], groups: int) -> list[str]:
    return list(tau_notes(recipe(parameters, "abc"), pairs, sizes, groups))


def three(sizes: tuple[int, int, int], shared: tuple[int, int, int], **changes: Any) -> list[Pair]:
    """The pairs of a, b and c."""
    every = zip(combinations("abc", 2), combinations(sizes, 2), shared, strict=True)
    return [pair(*names, its, both, **changes) for names, its, both in every]


EQUAL = (100, 100, 100)


def test_tau_above_every_overlap() -> None:
    assert notes("tau: 0.1", EQUAL, three(EQUAL, (2, 6, 4)), 3) == [
        "tau = 0.1 groups nothing: at most, the cores of 'a' and 'c' overlap by 3.09%, 1.00% by chance. "
        "Write tau: auto, or a smaller number"
    ]


def test_tau_that_groups_something() -> None:
    assert notes("tau: 0.03", EQUAL, three(EQUAL, (2, 6, 4)), 2) == []


def test_tau_and_cores_of_other_sizes() -> None:
    sizes = (100, 5, 1)
    assert notes("tau: 0.3", sizes, three(sizes, (5, 1, 0)), 3) == [
        "tau = 0.3 cannot group anything: cores of so different sizes overlap by 20.00% at most. "
        "Write tau: auto, a smaller number, or densities that are nearer to each other"
    ]
    assert notes("tau: 0.2", sizes, three(sizes, (4, 1, 0)), 3) == [
        "tau = 0.2 groups nothing: at most, the cores of 'a' and 'b' overlap by 3.96%, 1.00% by chance. "
        "Write tau: auto, or a smaller number"
    ]


@pytest.mark.parametrize("sizes", [(0, 0, 0), (0, 7, 0)])
def test_tau_without_cores(sizes: tuple[int, int, int]) -> None:
    assert notes("tau: 0.1", sizes, three(sizes, (0, 0, 0)), 3) == [
        "tau = 0.1 cannot group anything: no two tasks have a core. Give them a density above 0"
    ]
    assert notes("density: 0", sizes, three(sizes, (0, 0, 0)), 3) == []  # who asks for no cores asks for no groups


def test_tau_below_chance() -> None:
    by_chance = three(EQUAL, (20, 20, 20), chance=1 / 9)
    said = [
        "tau = 0.1 groups by chance: independent cores of the sizes of 'a' and 'b' overlap by 11.11%. "
        "Write tau: auto, or a number well above that"
    ]
    assert notes("tau: 0.1", EQUAL, by_chance, 1) == said
    assert notes("tau: 0.12", EQUAL, by_chance, 1) == []
    assert notes("tau: 0", EQUAL, by_chance, 1) == []  # which asks for one group


def test_stages_by_hand_and_one_task_leave_tau_unused() -> None:
    assert notes("stages: [[a, b], [c]]", EQUAL, three(EQUAL, (0, 0, 0)), 2) == []
    assert list(tau_notes(recipe("tau: 0.1", "a"), [], [100], 1)) == []


def test_tau_auto_that_groups_nothing() -> None:
    pairs = three(EQUAL, (40, 60, 0))
    pairs[0] = pair("a", "b", (100, 100), 40, aligned=23)
    pairs[1] = pair("a", "c", (100, 100), 60, aligned=50, expected=49.6)  # more, and less beyond chance
    assert notes("tau: auto", EQUAL, pairs, 3) == [
        "tau: auto groups nothing: no tasks stand out; at most, 'a' and 'b' move 57.5% of 40 shared elements in the "
        "same direction, 50.0% by chance"
    ]
    assert notes("tau: auto", EQUAL, pairs, 2) == []
    assert notes("", EQUAL, pairs, 3) == []  # nobody asked
    assert notes("tau: auto", EQUAL, three(EQUAL, (9, 9, 9), compared=0, aligned=0, expected=0.0), 3) == [
        "tau: auto groups nothing: in no layer do the cores of two tasks share an element"
    ]
