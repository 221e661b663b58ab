"""Which examples are drawn, and in what order they come."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpimerge import DataError
from cpimerge.train.examples import Example
from cpimerge.train.sampling import draw, ordered
from cpimerge.train.settings import Settings


def examples(count: int) -> list[Example]:
    return [Example(Path("d"), line, "p", "c") for line in range(1, count + 1)]


@given(
    counts=st.lists(st.integers(5, 30), min_size=1, max_size=4),
    samples=st.integers(1, 3),
    holdout=st.integers(0, 2),
    seed=st.integers(0, 1000),
)
def test_each_task_gives_as_many_and_none_twice(counts: list[int], samples: int, holdout: int, seed: int) -> None:
    given = {str(number): examples(count) for number, count in enumerate(counts)}
    drawn = draw(given, Settings(samples=samples, holdout=holdout, seed=seed))
    assert list(drawn) == list(given)
    for task, sample in drawn.items():
        assert (len(sample.train), len(sample.held_out)) == (samples, holdout)
        chosen = [example.line for example in sample.train + sample.held_out]
        assert len(set(chosen)) == samples + holdout
        assert set(chosen) <= {example.line for example in given[task]}


def test_the_same_seed_draws_the_same_whatever_other_tasks_have() -> None:
    settings = Settings(samples=5, holdout=3, seed=1)
    drawn = draw({"a": examples(50), "b": examples(50)}, settings)
    assert drawn["a"] == draw({"c": examples(9), "a": examples(50)}, settings)["a"]
    assert drawn["a"] != drawn["b"]
    assert drawn["a"] != draw({"a": examples(50)}, Settings(samples=5, holdout=3, seed=2))["a"]


def test_the_order_is_that_of_every_machine() -> None:
    """No hash of this process, and no state of anybody's generator, is in it."""
    code = (
        "from cpimerge.train.sampling import ordered; from cpimerge.train.settings import Settings; "
        "print(ordered(range(9), 2, Settings(epochs=2, seed=3)))"
    )
    runs = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert runs == {f"{ordered(range(9), 2, Settings(epochs=2, seed=3))}\n".encode()}
    assert ordered(range(9), 2, Settings(epochs=2, seed=3)) == EXPECTED


# Written down when it was first computed: a change would change every result that was ever trained.
EXPECTED = [4, 3, 8, 0, 7, 5, 2, 1, 6, 0, 5, 4, 1, 3, 8, 7, 2, 6]


def test_what_is_drawn_all_the_time() -> None:
    drawn = draw({"a": examples(20)}, Settings(samples=4, holdout=2, seed=0))["a"]
    assert [example.line for example in drawn.train] == DRAWN[0]
    assert [example.line for example in drawn.held_out] == DRAWN[1]


DRAWN = ([7, 12, 15, 20], [3, 19])


def test_without_a_number_the_smallest_task_decides() -> None:
    given = {"a": examples(40), "b": examples(12)}
    drawn = draw(given, Settings(holdout=2))
    assert {task: len(sample.train) for task, sample in drawn.items()} == {"a": 10, "b": 10}
    many = draw({"a": examples(1500)}, Settings(holdout=2))
    assert len(many["a"].train) == 1000


def test_too_few_examples_are_an_error_that_says_how_many() -> None:
    given = {"a": examples(40), "b": examples(11), "c": examples(1)}
    with pytest.raises(DataError) as raised:
        draw(given, Settings(samples=10, holdout=2))
    assert raised.value.problems == (
        "task 'b': has 11 examples, and 10 to train on and 2 to hold out are asked for. "
        "Give it more, or lower --samples or --holdout",
        "task 'c': has 1 example, and 10 to train on and 2 to hold out are asked for. "
        "Give it more, or lower --samples or --holdout",
    )
    with pytest.raises(DataError, match="task 'c': has 1 example, and 1 to train on and 2 to hold out"):
        draw(given, Settings(holdout=2))


@given(count=st.integers(1, 20), epochs=st.integers(1, 4), stage=st.integers(1, 3))
def test_an_epoch_has_each_example_once(count: int, epochs: int, stage: int) -> None:
    order = ordered(range(count), stage, Settings(epochs=epochs))
    assert len(order) == epochs * count
    for epoch in range(epochs):
        assert sorted(order[epoch * count :][:count]) == list(range(count))


@given(count=st.integers(1, 20), steps=st.integers(1, 9), batch=st.integers(1, 4), accumulation=st.integers(1, 3))
def test_steps_take_as_many_as_they_need_and_all_about_as_often(
    count: int, steps: int, batch: int, accumulation: int
) -> None:
    settings = Settings(steps=steps, batch_size=batch, gradient_accumulation=accumulation)
    order = ordered(range(count), 1, settings)
    assert len(order) == steps * batch * accumulation
    seen = Counter(order)
    assert max(seen.values()) - min(seen[item] for item in range(count)) <= 1


def test_epochs_and_stages_have_orders_of_their_own() -> None:
    order = ordered(range(20), 1, Settings(epochs=2))
    assert order[:20] != order[20:]
    assert order != ordered(range(20), 2, Settings(epochs=2))
    assert order != ordered(range(20), 1, Settings(epochs=2, seed=1))
