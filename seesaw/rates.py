"""How far fine-tunes may move: experts trained at several times the usual rate, and what merges keep of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import mean

from .bench import Bench
from .candidates import chosen, key, make
from .results import expert_scores, of_experts

MULTIPLES = (0.3, 1, 3, 8)  # of the rate of the main comparison
MERGES = (
    "plain average",
    "singular vectors: Iso-C, chosen on both",
    "fusion, singular values kept",
    "fusion, cpimerge's defaults",
)


@dataclass(frozen=True, slots=True)
class Row:
    """A merge of experts trained at `multiple` times the rate: of each seed, the mean over tasks of its test accuracy
    divided by the expert's, and the least of these. Shares, 1 is the expert's."""

    multiple: float
    merge: str
    means: Sequence[float]
    worst: Sequence[float]


def rates(benches: Sequence[Bench], causals: Sequence[Bench]) -> Iterator[Row]:
    """Every merge at every rate, with the settings that it has in the main comparison."""
    for multiple in MULTIPLES:
        faster = [at_rate(bench, multiple) for bench in benches]
        own = [expert_scores(bench, "test") for bench in faster]
        for name in MERGES:
            settings = chosen(benches, causals, name)
            merged = [
                bench.scores(key(name, settings), "test", partial(make, bench, name, settings)) for bench in faster
            ]
            shares = [of_experts(scores, best) for scores, best in zip(merged, own, strict=True)]
            yield Row(multiple, name, list(map(mean, shares)), list(map(min, shares)))


def at_rate(bench: Bench, multiple: float) -> Bench:
    """The same bench with experts trained at `multiple` times its rate."""
    if multiple == 1:
        return bench
    schedule = replace(bench.schedule, rate=bench.schedule.rate * multiple)
    return replace(bench, schedule=schedule, folder=bench.folder / f"rate-{multiple}")
