"""What a task keeps when another is trained after it, with and without its core frozen."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel

from .bench import Bench, Scores
from .methods import planned
from .training import Freeze

PAIRS = (("movies", "scripture"), ("scripture", "movies"))


@dataclass(frozen=True, slots=True)
class Frozen:
    """What is frozen of every tensor: the first task's core, or as many elements drawn at random."""

    density: float
    at_random: bool = False

    def __str__(self) -> str:
        return f"{'random draw' if self.at_random else 'core'} of {self.density} frozen"


FROZEN = (Frozen(0.01), Frozen(0.1), Frozen(0.3), Frozen(0.1, at_random=True), Frozen(0.3, at_random=True))


@dataclass(frozen=True, slots=True)
class Kept:
    """Test accuracies of two tasks for each seed, 0 to 1, when `second` was trained after `first`."""

    first: str
    second: str
    when: str
    seeds: Sequence[Scores]


def forgetting(benches: Sequence[Bench]) -> Iterator[Kept]:
    """Each pair in both orders: before the second task, after it, and after it with the first one's core frozen.

    Also with as many elements frozen that were drawn at random: what the choice of elements is worth.
    """
    for pair in PAIRS:
        yield Kept(*pair, "before", [_before(bench, *pair) for bench in benches])
        yield Kept(*pair, "nothing frozen", [_after(bench, *pair, None) for bench in benches])
        for frozen in FROZEN:
            yield Kept(*pair, str(frozen), [_after(bench, *pair, frozen) for bench in benches])


def _before(bench: Bench, first: str, second: str) -> Scores:
    return _scores(bench, f"expert-{first}", partial(bench.expert, bench.tasks[first]), (first, second))


def _after(bench: Bench, first: str, second: str, frozen: Frozen | None) -> Scores:
    name = f"{first}-then-{second}"
    if frozen:
        name += f"-{'random' if frozen.at_random else 'frozen'}-{frozen.density}"

    def make() -> PreTrainedModel:
        start = bench.expert(bench.tasks[first])
        freeze = None
        if frozen:
            moved = {first: _moved_at_random(bench) if frozen.at_random else start}
            moved[second] = bench.expert(bench.tasks[second])
            parameters = {"density": frozen.density, "stages": [[first], [second]]}
            freeze = Freeze(planned(bench, moved, parameters), 2)
        return bench.trained(start, [bench.tasks[second]], bench.schedule, freeze)

    return _scores(bench, name, lambda: bench.model(name, make), (first, second))


def _moved_at_random(bench: Bench) -> Path:
    """The base with noise added to every weight: what moved most of each tensor is drawn at random."""

    def make() -> PreTrainedModel:
        model = bench.learner.load(bench.learner.base)
        torch.manual_seed(bench.seed)
        with torch.no_grad():
            for weights in model.parameters():
                weights.add_(0.01 * torch.randn_like(weights))
        return model

    return bench.model("moved-at-random", make)


def _scores(bench: Bench, name: str, get: Callable[[], Path], tasks: Sequence[str]) -> Scores:
    return bench.scores(f"{name}-on-{'-'.join(tasks)}", "test", get, tasks)
