"""Which examples are trained on, and in what order: decided by the seed alone, the same on every machine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import TypeVar

from ..errors import DataError
from .examples import Example
from .settings import Settings

__all__ = ["Sample", "draw", "ordered"]

MOST_SAMPLES = 1_000  # of a task, where nobody says how many
Item = TypeVar("Item")


@dataclass(frozen=True)
class Sample:
    """Examples of one task: those to train on, and those held out.

    Those to train on are the same as none held out, of whatever task; `left_out`: how many were, and are in neither.
    """

    train: list[Example]
    held_out: list[Example]
    left_out: int


def draw(examples: Mapping[str, Sequence[Example]], settings: Settings) -> dict[str, Sample]:
    """As many examples of each task, no line twice. Raises DataError naming each task that has too few."""
    orders = {task: _shuffled(task, len(found), settings.seed) for task, found in examples.items()}
    held_out = {task: order[: settings.holdout] for task, order in orders.items()}
    known = {examples[task][number].content for task, numbers in held_out.items() for number in numbers}
    others = {task: order[settings.holdout :] for task, order in orders.items()}
    train = {task: [n for n in numbers if examples[task][n].content not in known] for task, numbers in others.items()}
    left_out = {task: len(others[task]) - len(numbers) for task, numbers in train.items()}
    samples = settings.samples or max(1, min(MOST_SAMPLES, *map(len, train.values())))
    problems = [
        f"task {task!r}: {_has(len(examples[task]), left_out[task])}, and {samples} to train on and "
        f"{settings.holdout} to hold out are asked for. Give it more, or lower --samples or --holdout"
        for task, numbers in train.items()
        if len(numbers) < samples
    ]
    if problems:
        raise DataError(problems)
    return {
        task: Sample(
            [found[number] for number in sorted(train[task][:samples])],
            [found[number] for number in sorted(held_out[task])],
            left_out[task],
        )
        for task, found in examples.items()
    }


def _has(count: int, left_out: int) -> str:
    same = f", {left_out} of them like one held out" if left_out else ""
    return f"has {count} example{'s' * (count != 1)}{same}"


def _shuffled(task: str, count: int, seed: int) -> list[int]:
    order = list(range(count))
    Random(f"{seed} draw {task}").shuffle(order)
    return order


def ordered(items: Sequence[Item], stage: int, settings: Settings) -> list[Item]:
    """All items of a stage as often and in the order in which they are trained on: each once, anew every epoch."""
    steps = settings.steps_of(len(items))
    total = settings.epochs * len(items) if settings.steps is None else steps * settings.step_examples
    return [item for item, _ in zip(_endless(items, stage, settings.seed), range(total), strict=False)]


def _endless(items: Sequence[Item], stage: int, seed: int) -> Iterator[Item]:
    epoch = 0
    while True:
        order = list(range(len(items)))
        Random(f"{seed} stage {stage} epoch {epoch}").shuffle(order)
        yield from (items[number] for number in order)
        epoch += 1
