"""The one training loop of the benchmark, and the one way of scoring."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from transformers import PreTrainedModel, get_cosine_schedule_with_warmup

from cpimerge.train import FrozenCores

from .tasks import Row, Task


class Learner(Protocol):
    """A kind of model: how it is loaded, and how it learns and answers a task."""

    name: str
    base: Path
    dtype: torch.dtype  # in which models are saved
    limit: int  # rows of a task to score on, at most

    def companions(self) -> Sequence[Path]: ...
    def load(self, path: Path) -> PreTrainedModel: ...
    def loss(self, model: PreTrainedModel, task: str, rows: Sequence[Row]) -> torch.Tensor: ...
    def predict(self, model: PreTrainedModel, task: str, rows: Sequence[Row]) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True)
class Schedule:
    """`steps` of `batch` rows with AdamW at the peak rate `rate`: warmed up for a tenth of them, then a cosine.

    `again`: the model has been trained on these tasks before, and now gets their rows in another order. In the same one
    it would see only rows that it knows by heart.
    """

    steps: int
    batch: int
    rate: float
    again: bool = False


ENCODER = Schedule(steps=80, batch=16, rate=1e-4)  # a unit of steps of each model
CAUSAL = Schedule(steps=32, batch=8, rate=3e-4)


@dataclass(frozen=True, slots=True)
class Freeze:
    """The cores that stay as they are: those of the stages of a plan before `stage`."""

    plan: Path
    stage: int


def train(
    learner: Learner, start: Path, tasks: Sequence[Task], schedule: Schedule, seed: int, freeze: Freeze | None = None
) -> PreTrainedModel:
    """The model of `start` after `schedule`; every batch is of one task, the tasks take turns in shuffled rounds."""
    torch.manual_seed(seed)
    model = learner.load(start)
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=schedule.rate, weight_decay=0.01, fused=True)
    rates = get_cosine_schedule_with_warmup(optimizer, max(1, schedule.steps // 10), schedule.steps)
    if freeze:
        FrozenCores(freeze.plan, model, stage=freeze.stage).attach(optimizer)
    for task, rows in batches(tasks, schedule, seed):
        torch.autograd.backward(learner.loss(model, task, rows))
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        rates.step()
        optimizer.zero_grad()
    return model


def batches(tasks: Sequence[Task], schedule: Schedule, seed: int) -> Iterator[tuple[str, tuple[Row, ...]]]:
    """`schedule.steps` batches, the same number of every task up to one."""
    order = random.Random(f"{seed}{' again' * schedule.again} {' '.join(task.name for task in tasks)}")
    streams = {task.name: _rows(task, schedule.batch, order) for task in tasks}
    done = 0
    while True:
        for task in order.sample(list(tasks), len(tasks)):
            if done == schedule.steps:
                return
            yield task.name, next(streams[task.name])
            done += 1


def _rows(task: Task, batch: int, order: random.Random) -> Iterator[tuple[Row, ...]]:
    while True:
        rows = order.sample(task.train, len(task.train))
        for start in range(0, len(rows) - batch + 1, batch):
            yield tuple(rows[start : start + batch])


@torch.no_grad()
def accuracy(learner: Learner, model: PreTrainedModel, task: str, rows: Sequence[Row]) -> float:
    """The share of `rows` whose class is found, 0 to 1."""
    by_length = sorted(rows, key=lambda row: len(row.text))  # so that little is padded
    parts = [by_length[start : start + 64] for start in range(0, len(by_length), 64)]
    right = sum(
        int((learner.predict(model, task, part) == torch.tensor([row.label for row in part])).sum()) for part in parts
    )
    return right / len(rows)
