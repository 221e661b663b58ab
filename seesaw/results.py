"""What was measured, gathered from the scores of all seeds, and the figures that follow."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from . import staging
from .bench import Bench, Scores, Split
from .candidates import MERGES, OWN, chosen, key, make, validated
from .merging import Parameters
from .methods import ABLATIONS, TRAINED, UNSLERPED

Spread = tuple[float, float | None]
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, slots=True)
class Line:
    """One method: its test accuracies of every seed by task, 0 to 1, and the settings that were chosen for it."""

    name: str
    kind: str
    seeds: Sequence[Scores]
    settings: str = ""


def measure(benches: Sequence[Bench], encoders: Sequence[Bench], causals: Sequence[Bench]) -> Iterator[Line]:
    """Every method on the test rows of `benches`, with settings chosen on the validation rows of the encoders.

    Merges that are marked so have them chosen on those of both models, as levelling's constants were. What was measured
    before is read back.
    """
    yield Line("base model", "reference", [_base(bench) for bench in benches])
    yield Line("experts, each on its task", "reference", [expert_scores(bench, "test") for bench in benches])
    for name in MERGES:
        settings = chosen(encoders, causals, name)
        scores = [bench.scores(key(name, settings), "test", partial(make, bench, name, settings)) for bench in benches]
        yield Line(name, "merge", scores, _said(settings))
    for name, method in TRAINED.items():
        yield Line(name, "training", [bench.scores(name, "test", partial(method, bench)) for bench in benches])
    best = staging.chosen(encoders)
    yield Line("CPI-FT, chosen", "training", [staging.scored(bench, best, "test") for bench in benches], _said(best))


def _said(settings: Parameters) -> str:
    return ", ".join(f"{setting} {value}" for setting, value in settings.items())


def ablate(benches: Sequence[Bench]) -> Iterator[Line]:
    """Every ablation on the test rows: of CPI-FT, and of fusions their slerps."""
    for name, method in ABLATIONS.items():
        yield Line(name, "ablation", [bench.scores(name, "test", partial(method, bench)) for bench in benches])
    for fusion, method in UNSLERPED.items():
        name = f"{fusion}, no slerp"
        yield Line(name, "unslerped", [bench.scores(name, "test", partial(method, bench)) for bench in benches])


def sweep(benches: Sequence[Bench]) -> Iterator[Mapping[str, Any]]:
    """Every candidate of our own on the validation rows: mean accuracy, and that of the worst task against its expert.

    Both are means over the seeds, 0 to 1.
    """
    best = [expert_scores(bench, "validation") for bench in benches]
    done = set()
    for name in OWN:
        for settings in MERGES[name].settings:
            if key(name, settings) not in done:
                done.add(key(name, settings))
                scores = validated(benches, name, settings)
                worst = mean(min(of_experts(each, expert)) for each, expert in zip(scores, best, strict=True))
                yield {"settings": settings, "mean": mean(mean(each.values()) for each in scores), "worst": worst}


def _base(bench: Bench) -> Scores:
    return bench.scores("base", "test", lambda: bench.learner.base)


def expert_scores(bench: Bench, split: Split) -> Scores:
    """The score of every expert on its own task."""
    return {
        name: bench.scores(f"expert-{name}-on-{name}", split, partial(bench.expert, task), [name])[name]
        for name, task in bench.tasks.items()
    }


def of_experts(scores: Scores, best: Scores) -> list[float]:
    """Of each task the score divided by that of its expert; 1 is the expert's."""
    return [scores[task] / best[task] for task in best]


def save(lines: Sequence[Line], learner: str) -> None:
    """Keep the lines of a model."""
    content = [
        {"name": line.name, "kind": line.kind, "settings": line.settings, "seeds": list(line.seeds)} for line in lines
    ]
    write(learner, content)


def load(learner: str) -> list[Line]:
    """What `save` kept."""
    return [Line(**each) for each in read(learner)]


def write(name: str, content: Any) -> None:
    """Keep what was measured as JSON beside this module, for the tables and whoever reads them."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read(name: str) -> Any:
    """What `write` kept under that name."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


@dataclass(frozen=True, slots=True)
class Figures:
    """A method in numbers, each the mean and the standard deviation (None: one seed) over the seeds, in percent.

    `normalised`: mean over the tasks of its score divided by the expert's. `worst`: the least of these.
    `closed`: the share of the gap between the base and the experts that is closed, from means over the tasks.
    """

    normalised: Spread
    worst: Spread
    closed: Spread


def figures(line: Line, base: Line, experts: Line) -> Figures:
    """What the tables say of a line, over its seeds."""
    shares = [of_experts(scores, best) for scores, best in zip(line.seeds, experts.seeds, strict=True)]
    gaps = [
        (mean(scores.values()) - mean(start.values())) / (mean(best.values()) - mean(start.values()))
        for scores, start, best in zip(line.seeds, base.seeds, experts.seeds, strict=True)
    ]
    return Figures(spread(map(mean, shares)), spread(map(min, shares)), spread(gaps))


def spread(values: Iterable[float]) -> Spread:
    """The mean and the standard deviation (None: of one) of some shares, in percent."""
    percent = [100 * value for value in values]
    return mean(percent), stdev(percent) if len(percent) > 1 else None
