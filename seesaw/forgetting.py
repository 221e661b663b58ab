"""What a task keeps when another is trained after it, with and without its core frozen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cpimerge

from .bench import Bench, Scores
from .merging import recipe, written
from .training import Freeze

PAIRS = (("movies", "scripture"), ("scripture", "movies"))
DENSITIES = (0.01, 0.1)


@dataclass(frozen=True, slots=True)
class Kept:
    """Test accuracies of two tasks, 0 to 1, when `second` was trained after `first`."""

    first: str
    second: str
    when: str
    scores: Scores


def forgetting(bench: Bench) -> Iterator[Kept]:
    """Each pair in both orders: before the second task, after it, and after it with the first one's core frozen."""
    for first, second in PAIRS:
        start = bench.expert(bench.tasks[first])
        yield Kept(first, second, "before", _scores(bench, f"expert-{first}", start, (first, second)))
        for density in (None, *DENSITIES):
            freeze = Freeze(_plan(bench, (first, second), density), 2) if density else None
            name = f"{first}-then-{second}" + (f"-frozen-{density}" if density else "")
            path = bench.model(name, partial(bench.trained, start, [bench.tasks[second]], bench.schedule, freeze))
            held = f"core of {density} frozen" if density else "nothing frozen"
            yield Kept(first, second, held, _scores(bench, name, path, (first, second)))


def _scores(bench: Bench, name: str, path: Path, tasks: Sequence[str]) -> Scores:
    return bench.scores(f"{name}-on-{'-'.join(tasks)}", "test", lambda: path, tasks)


def _plan(bench: Bench, tasks: Sequence[str], density: float) -> Path:
    """A plan of two experts with a stage each."""
    folder = bench.folder / "plans" / f"{'-'.join(tasks)}-{density}"
    models = {task: bench.expert(bench.tasks[task]) for task in tasks}
    content = recipe(bench.learner.base, models, {"density": density, "stages": [[task] for task in tasks]})
    if not (folder / "plan.json").exists():
        cpimerge.plan(written(content, bench.folder / "scratch"), folder, force=True)
    return folder
