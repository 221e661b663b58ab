"""The arithmetic of the measurement behind `tau: auto`, by hand-made numbers."""

from __future__ import annotations

from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from seesaw.relation_tables import relation_tables
from seesaw.relations import (
    CLASSES,
    DENSITIES,
    SCOPES,
    Expert,
    adjusted_rand,
    components,
    draws,
    experts,
    relation,
    row,
    score,
)


def expert(name: str) -> Expert:
    task, _, seed = name.partition(".")
    return Expert(task, int(seed), Path(name))


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ("movies.0", "movies.1", "same task"),
        ("movies-a.0", "movies-b.0", "halves"),
        ("movies-a.0", "movies.2", "half and whole"),
        ("movies-a.0", "tweets.0", "sisters"),
        ("movies.0", "news.0", "unrelated"),
    ],
)
def test_relations(a: str, b: str, expected: str) -> None:
    assert relation(expert(a), expert(b)) == relation(expert(b), expert(a)) == expected


def together(*groups: str) -> set[tuple[int, int]]:
    return {pair for group in groups for pair in combinations(sorted(map(int, group)), 2)}


@pytest.mark.parametrize(
    ("wanted", "found", "expected"),
    [
        (together("012", "345"), together("012", "345"), 1.0),
        (together(), together(), 1.0),
        (together("012345"), together(), 0.0),
        # scikit-learn's adjusted_rand_score([0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 2, 2])
        (together("012", "345"), together("01", "23", "45"), 0.24242424242424243),
    ],
)
def test_adjusted_rand(wanted: set[tuple[int, int]], found: set[tuple[int, int]], expected: float) -> None:
    assert adjusted_rand(wanted, found, 6) == pytest.approx(expected)


def test_a_row_says_how_well_a_class_is_told_from_the_unrelated() -> None:
    those = [expert(name) for name in ("movies.0", "movies.1", "news.0", "news.1")]
    values = np.full((4, 4), 0.1)
    values[0, 1] = 0.5
    values[2, 3] = 0.05
    values[0, 3] = 0.2
    found = row(those, "m", "tensor", "0.01", values)
    assert found["unrelated"] == {"least": 0.1, "mean": 0.125, "most": 0.2}
    assert found["same task"] == {"least": 0.05, "mean": 0.275, "most": 0.5, "auc": 0.5, "ratio": 0.25}


def test_components() -> None:
    values = np.zeros((4, 4))
    values[0, 2] = values[2, 3] = 0.5
    assert components(values, 0.5)([0, 1, 2, 3]) == [[0, 2, 3], [1]]
    assert components(values, 0.6)([0, 2]) == [[0], [1]]
    assert components(values, 0.4)([2, 3]) == [[0, 1]]


def test_scores_of_a_perfect_rule_and_of_none() -> None:
    those = [expert(f"{task}.{seed}") for task in ("movies", "news", "tweets") for seed in range(3)]
    truth = np.array([[float(a.family == b.family) for b in those] for a in those])
    assert score(those, components(truth, 0.5)) == (1.0, 1.0, 1.0)
    index, f1, exact = score(those, lambda some: [[number] for number in range(len(some))])
    assert index == exact < 0.1  # where all are unrelated, it is right
    assert f1 == 0.0
    assert {len(some) for some in draws(those)} == {*range(2, 10)}
    assert all(some == sorted(set(some)) for some in draws(those))


def test_experts_are_those_of_all_steps(tmp_path: Path) -> None:
    for name in ("1/models/expert-news", "0/models/expert-news-a", "0/models/expert-news-0.33", "0/models/full"):
        (tmp_path / name).mkdir(parents=True)
    assert [(one.task, one.seed) for one in experts(tmp_path)] == [("news-a", 0), ("news", 1)]


def test_tables() -> None:
    """Every cell is that of its class, rule, kind, scope and density."""
    found = {kind: found_of(place) for place, kind in enumerate(("encoder", "causal"))}
    tables = relation_tables(found)
    assert tables["classes"][0] == (
        "| measure | density | same task (10) | half and whole (11) | halves (12) | sisters (13) | unrelated (14) |"
    )
    assert tables["classes"][3] == ("| | 1% | 1.0 … 51.0% | 1.1 … 51.1% | 1.2 … 51.2% | 1.3 … 51.3% | 1.4 … 51.4% |")
    assert tables["classes"][6].startswith("| agreement | 0.1% | −0.10 … 0.50 | −0.10 … 0.50 |")
    assert tables["exact"][2:4] == [
        "| `tau: auto` | encoder | tensor | 10% | 11% | 12% | 13% |",
        "| | | global | 14% | 15% | 16% | 17% |",
    ]
    assert tables["exact"][8] == "| | causal | tensor | 60% | 61% | 62% | 63% |"
    assert tables["twos"][2] == "| tensor | 0.1% | 2 of 12 | 3 of 13 | 4 of 14 | 4 of 14 |"
    assert tables["twos"][8] == "| | 5% | 62 | 63 | 64 | 64 |"
    assert [len(rows) for rows in tables.values()] == [10, 10, 10]


def found_of(kind: int) -> dict[str, Any]:
    """What relations.py might find of a kind of experts: a number for every place."""
    cases = list(product(SCOPES, DENSITIES))

    def values(measure: str, density: str, number: int) -> dict[str, float]:
        if measure == "agreement":
            return {"least": -0.1, "most": 0.5}
        least = DENSITIES.index(density) / 100 + number / 1000
        return {"least": least, "most": least + 0.5}

    return {
        "pairs": {name: 10 + number for number, name in enumerate(CLASSES)},
        "measures": [
            {"measure": measure, "scope": scope, "density": density}
            | {name: values(measure, density, number) for number, name in enumerate(CLASSES)}
            for (scope, density), measure in product(cases, ("Jaccard", "agreement"))
        ],
        "cuts": [
            {"rule": rule, "scope": scope, "density": density, "exact": (10 + place + 40 * late + 10 * kind) / 100}
            for place, (scope, density) in enumerate(cases)
            for late, rule in enumerate(("tau: auto", "tau: 0.1"))
        ],
        "pairs grouped": [
            {"scope": scope, "density": density} | {name: 10 * place + number for number, name in enumerate(CLASSES)}
            for place, (scope, density) in enumerate(cases)
        ],
    }
