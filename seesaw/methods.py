"""Every way of making one model of all tasks that is compared, at the same number of training steps.

An expert is trained for one unit of steps, and there are T tasks. What trains may use 4T/3 units in all: full
fine-tuning and the stages of a fixed order have them at once; DPI makes probes of a third each and trains for T;
CPI-FT makes experts for T, fuses them, and trains on for T/3. What only merges uses the T of the experts.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedModel

import cpimerge
from cpimerge.plan_file import Plan

from .bench import Bench
from .merging import (
    AVERAGE,
    DEFAULTS,
    KEPT,
    PAPER,
    Parameters,
    Stages,
    fused,
    mergekits,
    recipe,
    save_like,
    spelled,
    spelled_stages,
    written,
)
from .spectral import spectral
from .training import Freeze

THIRD = 1 / 3


def experts(bench: Bench, share: float = 1.0) -> dict[str, Path]:
    """The expert of every task, by task."""
    return {name: bench.expert(task, share) for name, task in bench.tasks.items()}


def merged(bench: Bench, parameters: Parameters) -> Path:
    """The experts fused by a recipe with `parameters`."""
    return fused(recipe(bench.learner.base, experts(bench), parameters), _scratch(bench))


def by_mergekit(bench: Bench, method: str, parameters: Parameters) -> Path:
    """The experts merged by a method of mergekit."""
    tensors = mergekits(method, bench.learner.base, experts(bench), parameters)
    return save_like(tensors, bench.learner.base, _scratch(bench) / "model")


def by_singular_vectors(bench: Bench, method: str, parameters: Parameters) -> Path:
    """The experts merged by a method of spectral.py."""
    tensors = spectral(method, bench.learner.base, experts(bench), parameters)
    return save_like(tensors, bench.learner.base, _scratch(bench) / "model")


def full(bench: Bench) -> Path:
    """Full multi-task fine-tuning: every round has a batch of every task."""
    return staged(bench, "full", bench.learner.base, [list(bench.tasks)], 4 * THIRD)


def random_stages(bench: Bench) -> Path:
    """As many stages as a person would make, of tasks drawn at random, in random order."""
    return staged(bench, "random-stages", bench.learner.base, random_groups(bench), 4 * THIRD)


def random_groups(bench: Bench) -> Stages:
    """Groups of the sizes that a person would make, drawn with the bench's seed."""
    order = random.Random(f"stages {bench.seed}").sample(list(bench.tasks), len(bench.tasks))
    sizes = [len(stage) for stage in by_hand(bench)]
    starts = [sum(sizes[:place]) for place in range(len(sizes))]
    return [order[start : start + size] for start, size in zip(starts, sizes, strict=True)]


def by_hand(bench: Bench) -> Stages:
    """The groups that a person would make: opinions; subjects; style and language."""
    groups = (("movies", "tweets"), ("news", "docstrings"), ("scripture", "languages"))
    return [[name for name in group if name in bench.tasks] for group in groups]


def heuristic_stages(bench: Bench) -> Path:
    """Stages of tasks that a person would call alike."""
    return staged(bench, "heuristic-stages", bench.learner.base, by_hand(bench), 4 * THIRD)


def dpi(bench: Bench) -> Path:
    """Short probes, their cores and groups, then training from the base with the cores of earlier stages frozen."""
    plan = planned(bench, experts(bench, THIRD), PAPER)
    return staged(bench, "dpi", bench.learner.base, Plan.load(plan).stages, 1.0, plan)


def average(bench: Bench) -> Path:
    """The plain average of the experts."""
    return merged(bench, AVERAGE)


def cpi_ft(bench: Bench, parameters: Parameters, start: Parameters | None = None, freeze: bool = True) -> Path:
    """The experts fused with `parameters`, or with `start`, and trained on in the stages of the plan of `parameters`.

    Unless `freeze` is False, the cores of earlier stages are frozen.
    """
    fused = merged(bench, start or parameters)
    plan = planned(bench, experts(bench), parameters)
    name = cpi_ft_name(bench, parameters, start, freeze)
    return staged(bench, name, fused, Plan.load(plan).stages, THIRD, plan if freeze else None)


def cpi_ft_name(bench: Bench, parameters: Parameters, start: Parameters | None = None, freeze: bool = True) -> str:
    """The name of the model of `cpi_ft`: the same for the same stages and cores, whatever made the stages."""
    cores = {name: value for name, value in parameters.items() if name not in ("tau", "stages")}
    parts = ["cpi-ft", spelled(cores), spelled_stages(stages_of(bench, parameters))]
    if start:
        parts.append(f"from-{spelled(start)}")
    if not freeze:
        parts.append("unfrozen")
    return "-".join(parts)


def stages_of(bench: Bench, parameters: Parameters) -> Stages:
    """The stages that a plan of the experts with `parameters` has."""
    return Plan.load(planned(bench, experts(bench), parameters)).stages


def staged(bench: Bench, name: str, start: Path, stages: Stages, share: float, plan: Path | None = None) -> Path:
    """`start` trained stage by stage, for `share` of an expert's steps a task, with earlier cores of `plan` frozen."""

    def make() -> PreTrainedModel:
        at = start
        for number, stage in enumerate(stages, 1):
            held = Freeze(plan, number) if plan else None
            schedule = replace(bench.steps(share * len(stage)), again=start != bench.learner.base)
            model = bench.trained(at, [bench.tasks[task] for task in stage], schedule, held)
            if number < len(stages):
                at = _scratch(bench) / "stage"
                model.save_pretrained(at)  # float32: what is frozen is so across stages
        return model

    return bench.model(name, make)


def planned(bench: Bench, models: Mapping[str, Path], parameters: Parameters) -> Path:
    """The directory of a plan of `models`, by task."""
    folder = bench.folder / "plans" / "-".join((*(path.name for path in models.values()), spelled(parameters)))
    content = recipe(bench.learner.base, models, parameters)
    if not (folder / "plan.json").exists():
        cpimerge.plan(written(content, _scratch(bench)), folder, force=True)
    return folder


def _scratch(bench: Bench) -> Path:
    return bench.folder / "scratch"


TOGETHER = PAPER | {"tau": 0}
DENSE = PAPER | {"density": 0.3, "tau": 1}

TRAINED = {  # by the name in the tables
    "full multi-task fine-tuning": full,
    "stages at random": random_stages,
    "stages by hand": heuristic_stages,
    "DPI": dpi,
    "CPI-FT": lambda bench: cpi_ft(bench, PAPER),
}

ABLATIONS = {  # of CPI-FT
    "no transplant: from the plain average": lambda bench: cpi_ft(bench, PAPER, AVERAGE),
    "cpimerge's fusion, singular values kept": lambda bench: cpi_ft(bench, DEFAULTS | KEPT | {"tau": 1}),
    "cpimerge's fusion": lambda bench: cpi_ft(bench, DEFAULTS | {"tau": 1}),
    "groups at random": lambda bench: cpi_ft(bench, PAPER | {"stages": random_groups(bench)}),
    "one group": lambda bench: cpi_ft(bench, TOGETHER),
    "one group, from the plain average": lambda bench: cpi_ft(bench, TOGETHER, AVERAGE),
    "density 0.3": lambda bench: cpi_ft(bench, DENSE),
    "density 0.3, no freezing": lambda bench: cpi_ft(bench, DENSE, freeze=False),
}
