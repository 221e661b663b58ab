"""When fusing does not pay: recipes drawn at random from experts alike and unlike, and what `plan` knew of each.

Beside the experts of the main comparison stand some that a careless person might take for one: trained at a far higher
rate, hardly at all, from another model than the base, or on labels in disorder.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

import cpimerge
from cpimerge.plan_file import Plan
from cpimerge.prospects import UNEQUAL, UNEQUAL_KEPT, size, unequal

from .bench import Bench, Scores
from .merging import AVERAGE, DEFAULTS, recipe, written
from .tasks import Row, Task
from .training import ENCODER, Schedule, accuracy

DRAWS = 12  # recipes of a seed
ROWS = 100  # of a task to score on, of its validation rows


@dataclass(frozen=True, slots=True)
class Odd:
    """How an expert is made that is unlike the others."""

    name: str
    task: str
    schedule: Schedule
    start: str | None = None  # the task whose expert it starts from, instead of the base
    shuffled: bool = False  # whether its labels are in disorder


ODD: Mapping[int, Sequence[Odd]] = {  # by seed
    0: (
        Odd("odd-news-rate-10", "news", replace(ENCODER, rate=1e-3)),
        Odd("odd-tweets-brief", "tweets", replace(ENCODER, steps=5)),
        Odd("odd-languages-from-docstrings", "languages", ENCODER, start="docstrings"),
    ),
    1: (
        Odd("odd-docstrings-brief", "docstrings", replace(ENCODER, steps=5)),
        Odd("odd-languages-rate-5", "languages", replace(ENCODER, rate=5e-4)),
        Odd("odd-scripture-shuffled", "scripture", ENCODER, shuffled=True),
        Odd("odd-movies-rate-10", "movies", replace(ENCODER, rate=1e-3)),
    ),
    2: (
        Odd("odd-news-brief", "news", replace(ENCODER, steps=5)),
        Odd("odd-scripture-rate-5", "scripture", replace(ENCODER, rate=5e-4)),
        Odd("odd-tweets-from-languages", "tweets", ENCODER, start="languages"),
    ),
}


def odd_expert(bench: Bench, odd: Odd) -> Path:
    """The directory of an expert that is unlike the others, trained where it is not there yet."""
    task = bench.tasks[odd.task]
    start = bench.expert(bench.tasks[odd.start]) if odd.start else bench.learner.base
    rows = disordered(task, bench.seed) if odd.shuffled else task
    return bench.model(odd.name, partial(bench.trained, start, [rows], odd.schedule))


def disordered(task: Task, seed: int) -> Task:
    """`task` with the labels of its rows to train on in another order."""
    labels = [row.label for row in task.train]
    random.Random(f"labels {seed}").shuffle(labels)
    rows = tuple(Row(row.text, label) for row, label in zip(task.train, labels, strict=True))
    return replace(task, train=rows)


@dataclass(frozen=True, slots=True)
class Trial:
    """A recipe: the model of each task, what its plan said, and scores on validation rows by task, 0 to 1.

    `sizes` are the mean magnitudes of the updates, `agreements` and `lifts` those of every pair of tasks.
    """

    seed: int
    experts: Mapping[str, str]
    sizes: Mapping[str, float]
    agreements: Sequence[float]
    lifts: Sequence[float]
    base: Scores
    expert: Scores
    fusion: Scores
    average: Scores

    @property
    def worst(self) -> float:
        """The least score of a task of the fusion beside the better of its expert and the base."""
        return min(self._beside(self.fusion))

    def share(self, scores: Scores) -> float:
        """The mean over the tasks of the score beside the better of the expert and the base."""
        return mean(self._beside(scores))

    def _beside(self, scores: Scores) -> list[float]:
        return [scores[task] / max(self.expert[task], self.base[task]) for task in self.experts]


OUTCOMES: Mapping[str, Callable[[Trial], bool]] = {
    "poor": lambda trial: trial.worst < 0.9,
    "harmful": lambda trial: any(trial.fusion[task] < trial.base[task] - 0.05 for task in trial.experts),
    "behind the average": lambda trial: mean(trial.fusion.values()) < mean(trial.average.values()) - 0.02,
}

SHIPPED = "largest update to the median of the others"  # what the plan's note goes by
PREDICTORS: Mapping[str, Callable[[Trial], float]] = {
    SHIPPED: lambda trial: unequal(list(trial.sizes.values())),
    "largest update to the second": lambda trial: unequal(sorted(trial.sizes.values())[-2:]),
    "largest update to the smallest": lambda trial: max(trial.sizes.values()) / min(trial.sizes.values()),
    "largest update": lambda trial: max(trial.sizes.values()),
    "number of tasks": lambda trial: len(trial.experts),
    "highest agreement of signs": lambda trial: max(trial.agreements),
    "lowest agreement of signs": lambda trial: -min(trial.agreements),
    "highest lift": lambda trial: max(trial.lifts),
    "mean lift": lambda trial: mean(trial.lifts),
}


def prospect_tables(trials: Sequence[Trial]) -> Mapping[str, Sequence[str]]:
    """The tables of docs/payoff.md by name, as lines of Markdown."""
    return {"prospects": [*foretold(trials)], "by-size": [*shares_by_size(trials)]}


def foretold(trials: Sequence[Trial]) -> Iterator[str]:
    """How well everything foretells every outcome, and how often the shipped rule is right: lines of Markdown."""
    yield f"| {len(trials)} recipes | " + " | ".join(OUTCOMES) + " |"
    yield "|---|" + "--:|" * len(OUTCOMES)
    rates = (mean(is_so(trial) for trial in trials) for is_so in OUTCOMES.values())
    yield "| of all recipes | " + " | ".join(f"{rate:.0%}" for rate in rates) + " |"
    for name, value in PREDICTORS.items():
        areas = (area([value(trial) for trial in trials], list(map(is_so, trials))) for is_so in OUTCOMES.values())
        yield f"| {name} | " + " | ".join("" if each is None else f"{each:.2f}" for each in areas) + " |"
    yield ""
    yield "| warned by | poor if warned | poor and warned | harmful if warned | harmful and warned |"
    yield "|---|--:|--:|--:|--:|"
    value = PREDICTORS[SHIPPED]
    ways = {"a limit from the other seeds": held_out(trials, value)}
    ways |= {
        f"the limit {limit:g}": [value(trial) >= limit for trial in trials] for limit in (3, UNEQUAL_KEPT, UNEQUAL)
    }
    for name, warned in ways.items():
        cells = (
            cell for outcome in ("poor", "harmful") for cell in right(warned, list(map(OUTCOMES[outcome], trials)))
        )
        yield f"| {name} | " + " | ".join(cells) + " |"


def shares_by_size(trials: Sequence[Trial]) -> Iterator[str]:
    """What fusion, average and base keep of the experts, by the size of the largest update: lines of Markdown."""
    yield f"| {SHIPPED} | recipes | fusion | plain average | base |"
    yield "|---|--:|--:|--:|--:|"
    value = PREDICTORS[SHIPPED]
    for name, low, high in (("below 4", 0.0, 4.0), ("4 to 8", 4.0, 8.0), ("8 and more", 8.0, math.inf)):
        those = [trial for trial in trials if low <= value(trial) < high]
        kept = [[trial.share(scores) for scores in (trial.fusion, trial.average, trial.base)] for trial in those]
        cells = (f"{mean(shares):.1%}" for shares in zip(*kept, strict=True))
        yield f"| {name} | {len(those)} | " + " | ".join(cells) + " |"


def right(warned: Sequence[bool], so: Sequence[bool]) -> tuple[str, str]:
    """Precision and recall, as counts."""
    both = sum(map(bool.__and__, warned, so))
    return f"{both} of {sum(warned)}", f"{both} of {sum(so)}"


def held_out(trials: Sequence[Trial], value: Callable[[Trial], float]) -> list[bool]:
    """Whether each trial is called poor by the limit that is best on the trials of the other seeds."""
    limits = {}
    for seed in {trial.seed for trial in trials}:
        others = [trial for trial in trials if trial.seed != seed]
        limits[seed] = best_limit([value(trial) for trial in others], list(map(OUTCOMES["poor"], others)))
    return [value(trial) >= limits[trial.seed] for trial in trials]


def best_limit(values: Sequence[float], so: Sequence[bool]) -> float:
    """Between two of `values`, where recall less the share of false alarms is largest."""

    def gain(limit: float) -> float:
        caught = mean(value >= limit for value, is_so in zip(values, so, strict=True) if is_so)
        return caught - mean(value >= limit for value, is_so in zip(values, so, strict=True) if not is_so)

    return max(((low + high) / 2 for low, high in pairwise(sorted(values))), key=gain)


def area(values: Sequence[float], so: Sequence[bool]) -> float | None:
    """The area under the ROC curve: how often a value of what is so is above one of what is not; None: all are one."""
    above = [value for value, is_so in zip(values, so, strict=True) if is_so]
    below = [value for value, is_so in zip(values, so, strict=True) if not is_so]
    if not above or not below:
        return None
    return mean((high > low) + (high == low) / 2 for high in above for low in below)


def draws(bench: Bench) -> Iterator[dict[str, str]]:
    """The experts of each recipe of a seed: the name of a model by task, of two to all tasks."""
    order = random.Random(f"prospects {bench.seed}")
    for _ in range(DRAWS):
        tasks = order.sample(list(bench.tasks), order.randint(2, len(bench.tasks)))
        yield {task: order.choice([f"expert-{task}", *_odd_names(bench, task)]) for task in tasks}


def _odd_names(bench: Bench, task: str) -> list[str]:
    return [odd.name for odd in ODD[bench.seed] if odd.task == task]


def measured(bench: Bench) -> Iterator[Trial]:
    """Each recipe of a seed; what was measured before is read back."""
    for odd in ODD[bench.seed]:
        odd_expert(bench, odd)
    base = kept(bench, "base", partial(scored, bench, bench.learner.base, list(bench.tasks)))
    for number, names in enumerate(draws(bench)):
        own = {
            task: kept(bench, name, partial(scored, bench, bench.folder / "models" / name, [task]))[task]
            for task, name in names.items()
        }
        found = kept(bench, f"{number:02d}", partial(measure, bench, names))
        yield Trial(bench.seed, names, base={task: base[task] for task in names}, expert=own, **found)


def kept(bench: Bench, name: str, make: Callable[[], Mapping[str, Any]]) -> Any:
    """What `make` gives, from the file where an earlier run left it, if there is one."""
    file = bench.folder / "prospects" / f"{name}.json"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(make()))
    return json.loads(file.read_text())


def measure(bench: Bench, names: Mapping[str, str]) -> dict[str, Any]:
    """The fusion and the plain average of a recipe: a `Trial` without the scores of base and experts."""
    folder = bench.folder.resolve()
    experts = {task: folder / "models" / name for task, name in names.items()}
    scratch, plans = folder / "prospects" / "scratch", list[Plan]()
    scores = {}
    for way, parameters in (("fusion", DEFAULTS), ("average", AVERAGE)):
        content = recipe(bench.learner.base, experts, parameters)
        cpimerge.merge(written(content, scratch), scratch / "model", force=True, planned=plans.append)
        scores[way] = scored(bench, scratch / "model", list(names))
    return seen(plans[0]) | scores


def scored(bench: Bench, model: Path, tasks: Sequence[str]) -> Scores:
    """The accuracy of a model on each of `tasks`, 0 to 1."""
    loaded = bench.learner.load(model)
    loaded.train(False)
    return {name: accuracy(bench.learner, loaded, name, bench.tasks[name].validation[:ROWS]) for name in tasks}


def seen(plan: Plan) -> dict[str, Any]:
    """What the plan says that may foretell how good the fusion is."""
    return {
        "sizes": {task.name: size(task) for task in plan.tasks},
        "agreements": [pair.aligned / pair.compared for pair in plan.pairs],
        "lifts": [pair.lift for pair in plan.pairs],
    }
