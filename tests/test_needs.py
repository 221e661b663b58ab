"""What is asked of memory before a step begins: of `plan` alone, no room for what only `fuse` levels."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoints import save, write_recipe

import cpimerge
from cpimerge import examination, needs, preflight
from cpimerge.budget import RUNTIME_BYTES
from cpimerge.plan_file import Plan
from cpimerge.stream import PENDING

SHAPE = (1100, 1300)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """Two experts that both moved one matrix, which is levelled."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(SHAPE, generator=generator)
    save(tmp_path / "base", {"model.layers.0.w": base})
    for task in ("a", "b"):
        save(tmp_path / task, {"model.layers.0.w": base + 1e-3 * torch.randn(SHAPE, generator=generator)})
    models = [{"model": tmp_path / task} for task in ("a", "b")]
    return write_recipe(tmp_path / "recipe.yml", base_model=tmp_path / "base", models=models)


def test_a_plan_needs_no_room_for_levelled_matrices(recipe: Path, tmp_path: Path) -> None:
    inputs = preflight.check(cpimerge.load_recipe(recipe))
    least = RUNTIME_BYTES + needs.worker_bytes(inputs, levels=False)
    with pytest.raises(cpimerge.ResourceError, match="is too little for 1 thread") as refusal:
        cpimerge.plan(recipe, tmp_path / "plan", threads=1, memory=least - 1)
    assert "singular_values" not in str(refusal.value)
    told: list[needs.Needs] = []
    plan = cpimerge.plan(recipe, tmp_path / "plan", threads=1, memory=least, announce=told.append)
    assert plan.tensors[0].is_levelled
    assert [found.memory_bytes for found in told] == [least]
    with pytest.raises(cpimerge.ResourceError, match=r"Levelled matrices take .* \(singular_values\)"):
        cpimerge.fuse(tmp_path / "plan", tmp_path / "out", threads=1, memory=least)


def test_a_merge_and_an_estimate_ask_for_both_at_once(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = preflight.check(cpimerge.load_recipe(recipe))
    least = RUNTIME_BYTES + needs.worker_bytes(inputs) + needs.matrix_bytes(inputs)
    monkeypatch.setattr("cpimerge.probe.seconds", lambda *_: (1.0, 1.0))
    with pytest.raises(cpimerge.ResourceError, match="Levelled matrices take"):
        cpimerge.estimate(recipe, threads=1, memory=least - 1)
    assert cpimerge.estimate(recipe, threads=1, memory=least).memory_bytes == least

    def planned(_: Plan) -> None:
        raise AssertionError

    with pytest.raises(cpimerge.ResourceError, match="Levelled matrices take"):
        cpimerge.merge(recipe, tmp_path / "out", threads=1, memory=least - 1, planned=planned)
    cpimerge.merge(recipe, tmp_path / "out", threads=1, memory=least)


def test_what_levelling_adds_to_a_thread(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole results that wait, where they are what is most needed."""
    inputs = preflight.check(cpimerge.load_recipe(recipe))
    monkeypatch.setattr(needs, "_plan_worker_bytes", lambda _: 0)
    waiting = PENDING * 4 * SHAPE[0] * SHAPE[1]
    assert needs.worker_bytes(inputs) - needs.worker_bytes(inputs, levels=False) == waiting


def test_what_one_worker_examines_in_memory(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pool counts with what all of its three checkpoints have; a larger one waits on the disk instead."""
    inputs = preflight.check(cpimerge.load_recipe(recipe))
    stored = 3 * SHAPE[0] * SHAPE[1]
    monkeypatch.setattr(examination, "SMALL", stored)
    assert examination.is_small(list(inputs.tensors), "tensor")
    assert needs.plan_room(inputs).shelf == 0
    monkeypatch.setattr(examination, "SMALL", stored - 1)
    assert not examination.is_small(list(inputs.tensors), "tensor")
    assert needs.plan_room(inputs).shelf > 0
