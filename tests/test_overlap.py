"""Jaccard index, chance, groups and stages by hand-made numbers."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from cpimerge.overlap import chance, groups, jaccard, stages
from cpimerge.recipe import parse_recipe


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


def recipe_text(parameters: str) -> str:
    models = "".join(f"  - model: ./{name}\n" for name in "abcde")
    return f"merge_method: cpi\nbase_model: ./base\nmodels:\n{models}parameters: {{{parameters}}}\n"


@pytest.mark.parametrize(
    ("parameters", "wanted"),
    [
        ("tau: 0.1", [["a", "d", "e"], ["b"], ["c"]]),
        ("stages: [[c, b], [e, a, d]]", [["c", "b"], ["e", "a", "d"]]),
        # random.Random(7).random() three times: 0.32, 0.15, 0.65; of 1: 0.13, 0.85, 0.76.
        ("order: {seed: 7}", [["b"], ["a", "d", "e"], ["c"]]),
        ("order: {seed: 1}", [["a", "d", "e"], ["c"], ["b"]]),
    ],
)
def test_stages(parameters: str, wanted: list[list[str]]) -> None:
    recipe = parse_recipe(recipe_text(parameters), None, Path("/nowhere"))
    found = counts(11, {(0, 3): 2, (3, 4): 2}, 5)
    assert stages(recipe, found) == wanted
