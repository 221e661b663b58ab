"""The log: what is kept of it, and what follows from it."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from cpimerge.train.training_log import TrainingLog, first_and_last


def test_what_is_not_kept_is_dropped(tmp_path: Path) -> None:
    with closing(TrainingLog(tmp_path / "log")) as log:
        log.append({"step": 1})
        kept = log.nbytes
        log.append({"step": 2, "held_out": {"ä": 0.5}})
        assert log.lines() == [{"step": 1}, {"step": 2, "held_out": {"ä": 0.5}}]
    with closing(TrainingLog(tmp_path / "log", kept)) as log:
        log.append({"step": 3})
        log.copy_to(tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b'{"step": 1}\n{"step": 3}\n'


def step(stage: int, **tasks: tuple[float, int]) -> dict[str, Any]:
    return {"stage": stage, "tasks": {task: {"loss": loss, "tokens": count} for task, (loss, count) in tasks.items()}}


def test_the_first_and_the_last_tenth() -> None:
    lines = [step(1, a=(9.0, 1))]
    lines += [step(2, a=(float(number), 1), **({"b": (4.0, 3)} if number == 5 else {})) for number in range(20)]
    lines += [{"stage": 2, "held_out": {"a": 1.0}}, step(3, a=(7.0, 1))]
    assert first_and_last(lines, 2) == {"a": {"first": 0.5, "last": 18.5}, "b": {"first": 4.0, "last": 4.0}}
    assert first_and_last(lines, 4) == {}


def test_a_tenth_is_a_mean_of_tokens() -> None:
    lines = [step(1, a=(1.0, 1)), step(1, a=(4.0, 3)), *[step(1, a=(2.0, 5))] * 10]
    assert first_and_last(lines, 1)["a"] == {"first": pytest.approx(13 / 4), "last": 2.0}
