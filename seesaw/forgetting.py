"""What a task keeps when another is trained after it, with and without its core frozen."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel

import cpimerge

from .bench import Bench, Scores
from .merging import recipe, written
from .training import Freeze

PAIRS = (("movies", "scripture"), ("scripture", "movies"))
FROZEN = (("core", 0.01), ("core", 0.1), ("core", 0.3), ("random draw", 0.1), ("random draw", 0.3))


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
        for what, density in FROZEN:
            yield Kept(
                *pair, f"{what} of {density} frozen", [_after(bench, *pair, (what, density)) for bench in benches]
            )


def _before(bench: Bench, first: str, second: str) -> Scores:
    return _scores(bench, f"expert-{first}", partial(bench.expert, bench.tasks[first]), (first, second))


def _after(bench: Bench, first: str, second: str, frozen: tuple[str, float] | None) -> Scores:
    suffix = "" if frozen is None else f"-{'frozen' if frozen[0] == 'core' else 'random'}-{frozen[1]}"
    name = f"{first}-then-{second}{suffix}"

    def make() -> PreTrainedModel:
        freeze = None
        if frozen:
            start = bench.expert(bench.tasks[first]) if frozen[0] == "core" else _moved_at_random(bench)
            models = {first: start, second: bench.expert(bench.tasks[second])}
            freeze = Freeze(_plan(bench, models, frozen), 2)
        return bench.trained(bench.expert(bench.tasks[first]), [bench.tasks[second]], bench.schedule, freeze)

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


def _plan(bench: Bench, models: Mapping[str, Path], frozen: tuple[str, float]) -> Path:
    """A plan of two experts with a stage each."""
    what, density = frozen
    folder = bench.folder / "plans" / "-".join((*models, *(() if what == "core" else ("random",)), str(density)))
    content = recipe(bench.learner.base, models, {"density": density, "stages": [[task] for task in models]})
    if not (folder / "plan.json").exists():
        cpimerge.plan(written(content, bench.folder / "scratch"), folder, force=True)
    return folder
