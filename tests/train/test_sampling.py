"""Which examples are drawn, and in what order they come."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, reject
from hypothesis import strategies as st

from cpimerge import DataError
from cpimerge.train.examples import Example, Turn
from cpimerge.train.sampling import draw, ordered
from cpimerge.train.settings import Settings


def examples(count: int) -> list[Example]:
    """Of different content, none of which another list has."""
    return [Example(Path("d"), line, f"p{next(NUMBERS)}", "c") for line in range(1, count + 1)]


NUMBERS = itertools.count()


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
    a, b, c = examples(50), examples(50), examples(9)
    drawn = draw({"a": a, "b": b}, settings)
    assert drawn["a"] == draw({"c": c, "a": a}, settings)["a"]
    assert [example.line for example in drawn["a"].train] != [example.line for example in drawn["b"].train]
    assert drawn["a"] != draw({"a": a}, Settings(samples=5, holdout=3, seed=2))["a"]


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


def repeated(file: str, contents: Sequence[int]) -> list[Example]:
    """An example a line of `file`, the same where the number is."""
    return [Example(Path(file), line, str(number), "c") for line, number in enumerate(contents, 1)]


@given(
    contents=st.lists(st.lists(st.integers(0, 12), min_size=4, max_size=20), min_size=1, max_size=3),
    holdout=st.integers(0, 2),
    seed=st.integers(0, 99),
)
def test_what_is_held_out_is_trained_on_by_no_task(contents: list[list[int]], holdout: int, seed: int) -> None:
    """Where it stands in several lines, or in several tasks; all else that a task has may be drawn."""
    found = {str(task): repeated(str(task), numbers) for task, numbers in enumerate(contents)}
    try:
        drawn = draw(found, Settings(holdout=holdout, seed=seed))
    except DataError:
        reject()  # nothing is left to train on
    held_out = {example.prompt for sample in drawn.values() for example in sample.held_out}
    rest = {
        task: sum(example.prompt not in held_out for example in examples if example not in drawn[task].held_out)
        for task, examples in found.items()
    }
    for task, sample in drawn.items():
        assert len(sample.held_out) == holdout
        assert len(sample.train) == min(rest.values())
        assert len({example.line for example in sample.train}) == len(sample.train)
        assert not held_out & {example.prompt for example in sample.train}
        assert sample.left_out == len(found[task]) - holdout - rest[task]


def test_conversations_are_compared_by_what_is_said() -> None:
    turns = [(Turn("user", word), Turn("assistant", "c")) for word in ("a", "b")]
    found = [Example(Path("d"), line, turns=turns[line % 4 == 0]) for line in range(1, 13)]  # a a a b ...
    drawn = draw({"a": found}, Settings(holdout=1))["a"]
    assert drawn.left_out == [2, 8][drawn.held_out[0].turns == turns[0]]
    assert {example.turns for example in drawn.train} == set(turns) - {drawn.held_out[0].turns}


def test_examples_like_those_held_out_may_leave_too_few() -> None:
    with pytest.raises(DataError) as raised:
        draw({"a": repeated("a", [7] * 10)}, Settings(samples=4, holdout=2))
    assert raised.value.problems == (
        "task 'a': has 10 examples, 8 of them like one held out, and 4 to train on and 2 to hold out are asked for. "
        "Give it more, or lower --samples or --holdout",
    )
    assert draw({"a": repeated("a", [7] * 10)}, Settings(samples=4, holdout=0))["a"].left_out == 0


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
