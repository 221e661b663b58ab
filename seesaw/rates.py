"""How far fine-tunes may move: experts trained at several times the usual rate, and what merges keep of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean

from .bench import Bench, Scores
from .merging import AVERAGE, DEFAULTS, KEPT, Parameters, fused, recipe

MULTIPLES = (1, 3, 8)  # of the rate of the main comparison
MERGES: Mapping[str, Parameters] = {
    "plain average": AVERAGE,
    "fusion, singular values kept": DEFAULTS | KEPT,
    "fusion, cpimerge's defaults": DEFAULTS,
}


@dataclass(frozen=True, slots=True)
class Row:
    """A merge of experts trained at `multiple` times the rate: of each seed, the mean over tasks of its test accuracy
    divided by the expert's, and the least of these. Shares, 1 is the expert's."""

    multiple: int
    merge: str
    means: Sequence[float]
    worst: Sequence[float]


def rates(benches: Sequence[Bench]) -> Iterator[Row]:
    """Every merge at every rate."""
    for multiple in MULTIPLES:
        own = [_own(bench, multiple) for bench in benches]
        for name, parameters in MERGES.items():
            merged = [
                bench.scores(f"rate-{multiple}-{name}", "test", partial(_merged, bench, multiple, parameters))
                for bench in benches
            ]
            shares = [[scores[task] / best[task] for task in best] for scores, best in zip(merged, own, strict=True)]
            yield Row(multiple, name, list(map(mean, shares)), list(map(min, shares)))


def _experts(bench: Bench, multiple: int) -> dict[str, Path]:
    if multiple == 1:
        return {name: bench.expert(task) for name, task in bench.tasks.items()}
    schedule = replace(bench.schedule, rate=bench.schedule.rate * multiple)
    return {
        name: bench.model(f"rate-{multiple}-{name}", partial(bench.trained, bench.learner.base, [task], schedule))
        for name, task in bench.tasks.items()
    }


def _own(bench: Bench, multiple: int) -> Scores:
    """The score of every expert on its own task."""
    return {
        name: bench.scores(f"rate-{multiple}-{name}-on-{name}", "test", partial(Path, path), [name])[name]
        for name, path in _experts(bench, multiple).items()
    }


def _merged(bench: Bench, multiple: int, parameters: Parameters) -> Path:
    content = recipe(bench.learner.base, _experts(bench, multiple), parameters)
    return fused(content, bench.folder / "scratch")
