"""What every method of the benchmark starts from: a learner, its tasks, a seed, a budget, and experts made once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedModel

from .tasks import Row, Task
from .training import Freeze, Learner, Schedule, accuracy, train

Scores = dict[str, float]
Split = Literal["validation", "test"]


@dataclass(frozen=True, slots=True)
class Bench:
    """One seed of the benchmark on one learner; all that it makes lies under `folder`.

    `schedule` is that of one expert; a method that trains on all tasks gets a multiple of its steps.
    """

    learner: Learner
    tasks: dict[str, Task]
    schedule: Schedule
    seed: int
    folder: Path

    def expert(self, task: Task, share: float = 1.0) -> Path:
        """The base fine-tuned on `task` alone, for `share` of an expert's steps."""
        suffix = "" if share == 1 else f"-{share:.2f}"
        schedule = self.steps(share)
        return self.model(f"expert-{task.name}{suffix}", lambda: self.trained(self.learner.base, [task], schedule))

    def steps(self, experts: float) -> Schedule:
        """The schedule with as many steps as so many experts take together."""
        return replace(self.schedule, steps=round(self.schedule.steps * experts))

    def trained(
        self, start: Path, tasks: Sequence[Task], schedule: Schedule, freeze: Freeze | None = None
    ) -> PreTrainedModel:
        """The model of `start` trained on `tasks` with this seed."""
        return train(self.learner, start, tasks, schedule, self.seed, freeze)

    def model(self, name: str, make: Callable[[], PreTrainedModel]) -> Path:
        """The directory of the model `name`, made and saved where it is not there yet."""
        path = self.folder / "models" / name
        if not path.exists():
            partial = path.with_name(f".{name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            model = make()
            torch.nn.Module.to(model, self.learner.dtype)
            model.save_pretrained(partial)
            for file in self.learner.companions():
                shutil.copy(file, partial)
            partial.rename(path)
        return path

    def scores(self, name: str, split: Split, get: Callable[[], Path], tasks: Sequence[str] = ()) -> Scores:
        """The accuracy per task (all unless `tasks` says which) of the model that `get` gives, 0 to 1.

        It is kept in a file once it is known. Raises ValueError where that is of another schedule or other rows.
        """
        path = self.folder / "scores" / f"{name}.{split}.json"
        made = {"schedule": asdict(self.schedule), "rows": self.learner.limit}
        if not path.exists():
            found = self.measured(self.learner.load(get()), split, tasks or list(self.tasks))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(made | {"scores": found}, indent=1))
        kept = json.loads(path.read_text())
        if made != {key: kept.get(key) for key in made}:
            raise ValueError(f"{path}: of another schedule or other rows. Remove what was measured so")
        scores: Scores = kept["scores"]
        return scores

    def measured(self, model: PreTrainedModel, split: Split, tasks: Sequence[str]) -> Scores:
        """The accuracy of a model on each of `tasks`, 0 to 1."""
        model.train(False)
        return {name: accuracy(self.learner, model, name, self.rows(self.tasks[name], split)) for name in tasks}

    def rows(self, task: Task, split: Split) -> Sequence[Row]:
        """The rows to score on."""
        rows = task.validation if split == "validation" else task.test
        return rows[: self.learner.limit]
