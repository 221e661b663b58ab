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
    """Examples of one task: those to train on, and those held out, none of which is in both."""

    train: list[Example]
    held_out: list[Example]


def draw(examples: Mapping[str, Sequence[Example]], settings: Settings) -> dict[str, Sample]:
    """As many examples of each task, drawn without repetition. Raises DataError naming each task that has too few."""
    rest = {task: len(found) - settings.holdout for task, found in examples.items()}
    samples = settings.samples or max(1, min(MOST_SAMPLES, *rest.values()))
    problems = [
        f"task {task!r}: has {len(found)} example{'s' * (len(found) != 1)}, and {samples} to train on and "
        f"{settings.holdout} to hold out are asked for. Give it more, or lower --samples or --holdout"
        for task, found in examples.items()
        if rest[task] < samples
    ]
    if problems:
        raise DataError(problems)
    return {task: _drawn(task, found, samples, settings) for task, found in examples.items()}


def _drawn(task: str, found: Sequence[Example], samples: int, settings: Settings) -> Sample:
    chosen = list(range(len(found)))
    Random(f"{settings.seed} draw {task}").shuffle(chosen)
    held_out, train = chosen[: settings.holdout], chosen[settings.holdout : settings.holdout + samples]
    return Sample([found[number] for number in sorted(train)], [found[number] for number in sorted(held_out)])


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
