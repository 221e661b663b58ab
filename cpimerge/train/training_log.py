"""`training_log.jsonl`: a line a step with the loss of every task in it, and a line for each look at held-out examples.

    {"stage": 1, "step": 3, "steps": 63, "learning_rate": 1e-05, "loss": 2.1,
     "tasks": {"math": {"loss": 2.1, "tokens": 96}}}
    {"stage": 1, "held_out": {"math": 1.9, "code": 2.4}}

No times are in it: the same run writes the same bytes. Stage 0 is before the training.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..disk import flush_data, open_to_write, write_at

__all__ = ["LOG", "TrainingLog", "first_and_last"]

LOG = "training_log.jsonl"
Line = Mapping[str, Any]


class TrainingLog:
    """Appends to `file`, of which the first `keep` bytes are taken over from an earlier run, the rest is dropped."""

    def __init__(self, file: Path, keep: int = 0) -> None:
        self._file = file
        self._handle = open_to_write(file)
        os.ftruncate(self._handle, keep)
        self.nbytes = keep

    def append(self, line: Line) -> None:
        """Raises OSError."""
        text = json.dumps(line, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        write_at(self._handle, memoryview(text), self.nbytes)
        self.nbytes += len(text)

    def flush(self) -> None:
        """Have the disk take it. Raises OSError."""
        flush_data(self._handle)

    def close(self) -> None:
        """Once is enough."""
        handle, self._handle = self._handle, -1
        if handle >= 0:
            os.close(handle)

    def copy_to(self, file: Path) -> None:
        """All that was appended, as a file of its own. Raises OSError."""
        shutil.copyfile(self._file, file)

    def lines(self) -> list[dict[str, Any]]:
        """All that was appended."""
        return [json.loads(line) for line in self._file.read_bytes().splitlines()]


def first_and_last(lines: Iterable[Line], stage: int) -> dict[str, dict[str, float]]:
    """By task, the mean loss of a token in the first and in the last tenth of the stage's steps that have the task."""
    of_task: dict[str, list[Mapping[str, float]]] = {}
    for line in lines:
        if line["stage"] == stage and "tasks" in line:
            for task, tally in line["tasks"].items():
                of_task.setdefault(task, []).append(tally)
    ends = {}
    for task, tallies in of_task.items():
        tenth = math.ceil(len(tallies) / 10)
        ends[task] = {"first": _mean(tallies[:tenth]), "last": _mean(tallies[-tenth:])}
    return ends


def _mean(tallies: Iterable[Mapping[str, float]]) -> float:
    """Of tokens, not of steps."""
    weighted = [(tally["loss"], tally["tokens"]) for tally in tallies]
    return math.fsum(loss * tokens for loss, tokens in weighted) / sum(tokens for _, tokens in weighted)
