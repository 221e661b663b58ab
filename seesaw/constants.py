"""The constants of levelling over ranges, on validation rows: the evidence for those of cpimerge/levelling.py.

Gain, cap and limit are tried together, on both models and on experts that moved less and farther; the cap of low rank
on experts whose updates are cut to a low rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any
from unittest.mock import patch

import torch
from transformers import PreTrainedModel

from cpimerge import levelling
from cpimerge.checkpoint import layer_of
from cpimerge.levelling import can_level

from .bench import Bench
from .merging import DEFAULTS
from .methods import experts, fused_by_plan, planned
from .rates import MULTIPLES, at_rate
from .results import expert_scores, of_experts
from .tasks import Task

RANK = 1  # that updates are cut to: to 384 rows what a LoRA's is to those of a large model
GAINS, CAPS, LIMITS = (5.0, 12.0), (5.0, 8.0), (0.03, 0.05)
CAPS_OF_LOW_RANK = (1.0, 1.5, 2.0, 3.0)


@dataclass(frozen=True, slots=True)
class Constants:
    """Those of cpimerge/levelling.py, and what they are there unless said."""

    gain: float = levelling.GAIN
    cap: float = levelling.CAP
    limit: float = levelling.LIMIT
    cap_of_low_rank: float = levelling.CAP_OF_LOW_RANK


USUAL = [Constants(*these) for these in product(GAINS, CAPS, LIMITS)]
LOW_RANK = [Constants(cap_of_low_rank=cap) for cap in CAPS_OF_LOW_RANK]


def constants(encoders: Sequence[Bench], causals: Sequence[Bench]) -> Iterator[Mapping[str, Any]]:
    """What is kept of the experts with each of USUAL, and with LOW_RANK of experts whose updates are cut to that.

    `means` and `worst` are of each seed, over the tasks: the accuracy divided by the expert's, 1 is the expert's.
    """
    kinds = {"encoder": encoders, "language model": causals}
    low = {f"encoder, rank {RANK}": list(map(of_low_rank, encoders))}
    for multiple in MULTIPLES:
        if multiple != 1:
            kinds[f"encoder, rate × {multiple}"] = [at_rate(bench, multiple) for bench in encoders]
    for tried, about in ((USUAL, kinds), (LOW_RANK, low)):
        for kind, benches in about.items():
            for these in tried:
                shares = [_kept(bench, these) for bench in benches]
                row = {"means": list(map(mean, shares)), "worst": list(map(min, shares))}
                yield {"experts": kind, "constants": asdict(these), **row}


def _kept(bench: Bench, these: Constants) -> Sequence[float]:
    """Of each task, the share of its expert's accuracy on the validation rows that a fusion with the defaults has."""
    name = "levelled-" + "-".join(f"{value:g}" for value in asdict(these).values())
    found = bench.scores(name, "validation", partial(fused_with, bench, these))
    return of_experts(found, expert_scores(bench, "validation"))


def fused_with(bench: Bench, these: Constants) -> Path:
    """The experts fused with the defaults, but for these constants."""
    plan = planned(bench, experts(bench), DEFAULTS)  # knows what is levelled, and how far, but not to what
    with patch.multiple(levelling, **{name.upper(): value for name, value in asdict(these).items()}):
        return fused_by_plan(bench, plan)


def of_low_rank(bench: Bench) -> Bench:
    """The same bench with experts whose updates of layers' matrices have a rank of RANK at most, and no others."""
    low = replace(bench, folder=bench.folder / f"rank-{RANK}")
    for task in bench.tasks.values():
        low.model(f"expert-{task.name}", partial(_cut, bench, task))
    return low


def _cut(bench: Bench, task: Task) -> PreTrainedModel:
    """The expert of a task with every update cut to its strongest directions, as float32."""
    model = bench.learner.load(bench.expert(task))
    base = bench.learner.load(bench.learner.base).state_dict()
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if can_level(weights.shape, layer_of(name)):
                left, values, right = torch.linalg.svd(weights - base[name], full_matrices=False)
                weights.copy_(base[name] + (left[:, :RANK] * values[:RANK]) @ right[:RANK])
            else:
                weights.copy_(base[name])
    return model
