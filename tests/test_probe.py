"""The predicted time of levelling: as many matrices at a time as are held, and never less than the largest takes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoints import save, write_recipe

import cpimerge
from cpimerge import preflight, probe
from cpimerge.budget import Budget
from cpimerge.levelling import level_work

SECONDS = 7e6  # of levelling on one thread: next to it, all else is nothing


def checked(home: Path, shapes: list[tuple[int, int]]) -> preflight.Inputs:
    """Models whose matrices have these shapes, each in a layer of its own."""
    base = {f"model.layers.{number}.w": torch.ones(shape) for number, shape in enumerate(shapes)}
    save(home / "base", base)
    for task in ("a", "b"):
        save(home / task, {name: values + 1 for name, values in base.items()})
    models = [{"model": home / task} for task in ("a", "b")]
    recipe = write_recipe(home / "recipe.yml", base_model=home / "base", models=models)
    return preflight.check(cpimerge.load_recipe(recipe))


@pytest.mark.parametrize(
    ("shapes", "threads", "matrices", "parts"),
    [
        ([(40, 50)] * 6, 4, 4, 4.0),
        ([(40, 50)] * 6, 4, 2, 2.0),  # two are held at a time, whatever the threads
        ([(40, 50)] * 3, 8, 8, 3.0),  # there are no more
        ([(40, 50)], 4, 4, 1.0),
        ([(40, 50), (80, 90)], 2, 2, 1 + level_work((40, 50)) / level_work((80, 90))),  # the larger alone
        ([(40, 50), (80, 90)], 2, 1, 1.0),
    ],
)
def test_the_time_of_levelling(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    shapes: list[tuple[int, int]],
    threads: int,
    matrices: int,
    parts: float,
) -> None:
    inputs = checked(tmp_path, shapes)
    monkeypatch.setattr(probe, "_disk_rate", lambda _: 1e15)  # so that the disk decides nothing
    monkeypatch.setattr(probe, "_level_seconds", lambda _: SECONDS)
    found = probe.seconds(inputs, Budget(threads, 10**9, matrices), tmp_path)[1]
    assert found == pytest.approx(SECONDS / parts, rel=1e-3)


def test_nothing_to_level(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_disk_rate", lambda _: None)
    inputs = checked(tmp_path, [(8, 9)])
    assert probe._level_seconds(inputs) == 0
    assert probe.seconds(inputs, Budget(2, 10**9, 2), tmp_path)[1] is None
