"""Which elements a stage leaves as they are: the cores of other groups' tasks, as the plan has them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from ..cores import CoreReader
from ..errors import PlanError
from ..plan_arrays import chunks_of
from ..plan_file import Plan, TensorPlan
from ..stream import chunks

__all__ = ["Freeze", "Positions", "StageCores"]

Freeze = Literal["prior", "all"]
Positions = npt.NDArray[np.int64]


class StageCores:
    """What stage number `stage` of the plan in `directory` freezes: METHOD §5.

    prior: the cores of all tasks of earlier stages. all: those of all tasks of other stages. An element of such a core
    is frozen, also where a task of the stage itself has it in its core.
    """

    def __init__(self, directory: Path, stage: int, freeze: Freeze) -> None:
        """Reads plan.json. Raises PlanError where it is damaged, or has no such stage.

        ValueError where `stage` is no whole number, or `freeze` is another word.
        """
        if type(stage) is not int:
            raise ValueError(f"stage: {stage!r}: expected a whole number from 1 on")
        plan = Plan.load(directory)
        if not 1 <= stage <= len(plan.stages):
            raise PlanError(f"{directory}: stage {stage}: its stages are numbered 1 to {len(plan.stages)}")
        if freeze not in ("prior", "all"):
            raise ValueError(f"freeze: {freeze!r}: expected 'prior' or 'all'")
        self.directory = directory
        self._plan = plan
        others = plan.stages[: stage - 1] + (plan.stages[stage:] if freeze == "all" else [])
        self.tasks = tuple(task for group in others for task in group)

    @property
    def tensors(self) -> list[TensorPlan]:
        """Those with frozen elements."""
        return [t for t in self._plan.tensors if any(t.tasks[task].core for task in self.tasks if task in t.tasks)]

    @contextmanager
    def opened(self) -> Iterator[_Reading]:
        """The cores, compared with the plan. Raises PlanError where they are not those that it was saved with."""
        count = chunks_of(self._plan)
        with ExitStack() as stack:
            readers = []
            for task in self._plan.tasks:
                if task.name in self.tasks:
                    reader = CoreReader(self.directory / task.core_file, task.core_xxh3, count)
                    stack.callback(reader.close)
                    readers.append(reader)
            yield _Reading(readers, self._plan.settings.granularity)


class _Reading:
    """The open cores of the tasks whose elements are frozen."""

    def __init__(self, readers: list[CoreReader], granularity: str) -> None:
        self._readers = readers
        self._granularity = granularity

    def positions(self, tensor: TensorPlan) -> Positions:
        """Ascending row-major indices int64 [k] of the tensor's frozen elements. Raises PlanError."""
        found = [np.empty(0, np.int64)]
        for number, chunk in enumerate(chunks(tuple(tensor.shape), self._granularity), tensor.first_chunk):
            cores = [reader.positions(number, chunk.size) for reader in self._readers]
            found.append(np.unique(np.concatenate(cores)).astype(np.int64) + chunk.start)
        return np.concatenate(found)
