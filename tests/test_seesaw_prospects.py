"""The arithmetic of the figures in docs/payoff.md."""

from __future__ import annotations

import pytest

from seesaw.prospects import Trial, area, best_limit, held_out, right, shares_by_size


def trial(seed: int, large: float, fusion: float) -> Trial:
    """Two tasks, the second with a large update; experts score 0.8, the base 0.5, the average 0.7."""
    both = {"a": "expert-a", "b": "expert-b"}
    sizes = {"a": 1.0, "b": large}
    scores = (dict.fromkeys(both, score) for score in (0.5, 0.8, fusion, 0.7))
    return Trial(seed, both, sizes, [0.5], [2.0], *scores)


def test_shares_by_size() -> None:
    """Of each task beside the better of expert (0.8) and base (0.5), the mean over tasks and then recipes."""
    lines = list(shares_by_size([trial(0, 2, 0.8), trial(0, 3.9, 0.4), trial(0, 4, 0.6), trial(1, 8, 0.2)]))
    assert [line.removeprefix("| ") for line in lines[2:]] == [
        "below 4 | 2 | 75.0% | 87.5% | 62.5% |",
        "4 to 8 | 1 | 75.0% | 87.5% | 62.5% |",
        "8 and more | 1 | 25.0% | 87.5% | 62.5% |",
    ]


def test_area() -> None:
    assert area([1, 2, 3, 4], [False, False, True, True]) == 1
    assert area([1, 2, 3, 4], [True, False, True, False]) == pytest.approx(1 / 4)
    assert area([1, 1], [True, False]) == 0.5


def test_best_limit_lies_between() -> None:
    assert best_limit([5, 1, 2, 9], [True, False, False, True]) == 3.5


def test_right() -> None:
    assert right([True, True, False, False], [True, False, True, True]) == ("1 of 2", "1 of 3")


def test_limits_come_from_other_seeds() -> None:
    """Seed 0 would call nothing poor below 5; by seed 1 the limit is 2.5."""
    trials = [
        trial(0, 2, 0.8),
        trial(0, 3, 0.8),
        trial(0, 7, 0.5),
        trial(1, 1.5, 0.8),
        trial(1, 2, 0.8),
        trial(1, 3, 0),
    ]
    assert held_out(trials, lambda each: each.sizes["b"]) == [False, True, True, False, False, False]


def test_worst_is_beside_the_better_of_expert_and_base() -> None:
    assert trial(0, 2, 0.6).worst == pytest.approx(0.75)
    below = Trial(0, {"a": "x"}, {"a": 1.0}, [], [], {"a": 0.8}, {"a": 0.2}, {"a": 0.4}, {"a": 0.4})
    assert below.worst == pytest.approx(0.5)
