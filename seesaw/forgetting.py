"""What a task keeps when another is trained after it, with and without its core frozen."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from transformers import PreTrainedModel

import cpimerge

from .bench import Bench, Scores
from .merging import recipe, written
from .training import Freeze

PAIRS = (("movies", "scripture"), ("scripture", "movies"))
DENSITIES = (0.01, 0.1, 0.3)


@dataclass(frozen=True, slots=True)
class Kept:
    """Test accuracies of two tasks for each seed, 0 to 1, when `second` was trained after `first`."""

    first: str
    second: str
    when: str
    seeds: Sequence[Scores]


def forgetting(benches: Sequence[Bench]) -> Iterator[Kept]:
    """Each pair in both orders: before the second task, after it, and after it with the first one's core frozen."""
    for pair in PAIRS:
        yield Kept(*pair, "before", [_before(bench, *pair) for bench in benches])
        for density in (None, *DENSITIES):
            held = f"core of {density} frozen" if density else "nothing frozen"
            yield Kept(*pair, held, [_after(bench, *pair, density) for bench in benches])


def _before(bench: Bench, first: str, second: str) -> Scores:
    return _scores(bench, f"expert-{first}", partial(bench.expert, bench.tasks[first]), (first, second))


def _after(bench: Bench, first: str, second: str, density: float | None) -> Scores:
    name = f"{first}-then-{second}" + (f"-frozen-{density}" if density else "")

    def make() -> PreTrainedModel:
        freeze = Freeze(_plan(bench, (first, second), density), 2) if density else None
        return bench.trained(bench.expert(bench.tasks[first]), [bench.tasks[second]], bench.schedule, freeze)

    return _scores(bench, name, lambda: bench.model(name, make), (first, second))


def _scores(bench: Bench, name: str, get: Callable[[], Path], tasks: Sequence[str]) -> Scores:
    return bench.scores(f"{name}-on-{'-'.join(tasks)}", "test", get, tasks)


def _plan(bench: Bench, tasks: Sequence[str], density: float) -> Path:
    """A plan of two experts with a stage each."""
    folder = bench.folder / "plans" / f"{'-'.join(tasks)}-{density}"
    models = {task: bench.expert(bench.tasks[task]) for task in tasks}
    content = recipe(bench.learner.base, models, {"density": density, "stages": [[task] for task in tasks]})
    if not (folder / "plan.json").exists():
        cpimerge.plan(written(content, bench.folder / "scratch"), folder, force=True)
    return folder
