"""Every way of making one model of all tasks that is compared, at the same number of training steps.

An expert is trained for one unit of steps, and there are T tasks. What trains may use 4T/3 units in all: full
fine-tuning and the stages of a fixed order have them at once; DPI makes probes of a third each and trains for T;
CPI-FT makes experts for T, fuses them, and trains on for T/3. What only merges uses the T of the experts.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
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


def unslerped(bench: Bench, parameters: Parameters) -> Path:
    """The experts fused with `parameters`, but what is outside the cores is averaged.

    So it would be if every slerp were a lerp. The plan says what is blended how, and is obeyed when it is edited.
    """
    plan = _scratch(bench) / "plan"
    shutil.copytree(planned(bench, experts(bench), parameters), plan, dirs_exist_ok=True)
    content = json.loads((plan / "plan.json").read_text())
    for tensor in content["tensors"]:
        if tensor["blend"]:
            tensor["blend"]["coefficients"] = [1 / len(content["fold"])] * len(content["fold"])
    (plan / "plan.json").write_text(json.dumps(content))
    return fused_by_plan(bench, plan)


def fused_by_plan(bench: Bench, plan: Path) -> Path:
    """The model that cpimerge makes by the plan of a directory; an earlier one in its place is replaced."""
    model = _scratch(bench) / "model"
    cpimerge.fuse(plan, model, force=True)
    return model


@dataclass(frozen=True, slots=True)
class Start:
    """What CPI-FT with some parameters trains on from instead of its own fusion; `name` is a part of the result's."""

    name: str
    make: Callable[[Bench, Parameters], Path]


FROM_AVERAGE = Start("average", lambda bench, _: average(bench))
FROM_UNSLERPED = Start("unslerped", unslerped)


def cpi_ft(bench: Bench, parameters: Parameters, start: Start | None = None, freeze: bool = True) -> Path:
    """The experts fused with `parameters`, trained on in the stages of that plan; or what `start` makes, trained so.

    Unless `freeze` is False, the cores of earlier stages are frozen.
    """
    origin = start.make(bench, parameters) if start else merged(bench, parameters)
    plan = planned(bench, experts(bench), parameters) if freeze else None
    name = cpi_ft_name(bench, parameters, start, freeze)
    return staged(bench, name, origin, stages_of(bench, parameters), THIRD, plan)


def cpi_ft_name(bench: Bench, parameters: Parameters, start: Start | None = None, freeze: bool = True) -> str:
    """The name of the model of `cpi_ft`: the same for the same stages and cores, whatever made the stages."""
    cores = {name: value for name, value in parameters.items() if name not in ("tau", "stages")}
    parts = ["cpi-ft", spelled(cores), spelled_stages(stages_of(bench, parameters))]
    if start:
        parts.append(f"from-{start.name}")
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
    "no transplant: from the plain average": lambda bench: cpi_ft(bench, PAPER, FROM_AVERAGE),
    "no slerp: the rest averaged": lambda bench: cpi_ft(bench, PAPER, FROM_UNSLERPED),
    "cpimerge's fusion, singular values kept": lambda bench: cpi_ft(bench, DEFAULTS | KEPT | {"tau": 1}),
    "cpimerge's fusion": lambda bench: cpi_ft(bench, DEFAULTS | {"tau": 1}),
    "groups at random": lambda bench: cpi_ft(bench, PAPER | {"stages": random_groups(bench)}),
    "one group": lambda bench: cpi_ft(bench, TOGETHER),
    "one group, from the plain average": lambda bench: cpi_ft(bench, TOGETHER, FROM_AVERAGE),
    "density 0.3": lambda bench: cpi_ft(bench, DENSE),
    "density 0.3, no freezing": lambda bench: cpi_ft(bench, DENSE, freeze=False),
}

UNSLERPED = {  # fusions without a slerp, by the name of the one that has them
    "fusion as in the paper": lambda bench: unslerped(bench, PAPER),
    "fusion, singular values kept": lambda bench: unslerped(bench, DEFAULTS | KEPT),
    "fusion, cpimerge's defaults": lambda bench: unslerped(bench, DEFAULTS),
}
