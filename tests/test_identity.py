"""What decides a plan: nothing else makes it another, and nothing of it is forgotten."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import save, write_json
from safetensors.torch import save_file

from cpimerge import CheckpointError, preflight
from cpimerge.identity import Files, merge_work, plan_work
from cpimerge.preflight import Inputs
from cpimerge.recipe import load_recipe
from cpimerge.staging import Work

RECIPE = """merge_method: cpi
base_model: ./base
models: [{model: ./full}, {model: ./adapter}]
parameters: {density: 0.5}
"""
NAME = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A base, a whole model and a LoRA adapter."""
    config = {"model_type": "llama"}
    save(tmp_path / "base", {NAME: torch.zeros(6, 4)}, config=config)
    save(tmp_path / "full", {NAME: torch.ones(6, 4)}, config=config)
    (tmp_path / "adapter").mkdir()
    part = f"base_model.model.{NAME.removesuffix('.weight')}"
    parts = {f"{part}.lora_A.weight": torch.ones(2, 4), f"{part}.lora_B.weight": torch.ones(6, 2)}
    save_file(parts, tmp_path / "adapter" / "adapter_model.safetensors")
    write_adapter(tmp_path, lora_alpha=4)
    (tmp_path / "recipe.yml").write_text(RECIPE)
    return tmp_path


def write_adapter(home: Path, **settings: Any) -> None:
    config = {"peft_type": "LORA", "r": 2, "target_modules": ["up_proj"], "bias": "none"}
    write_json(home / "adapter" / "adapter_config.json", config | settings)


def inputs(home: Path) -> Inputs:
    return preflight.check(load_recipe(home / "recipe.yml"))


def work(home: Path) -> Work:
    found = inputs(home)
    return plan_work(found, Files.of(found))


def later(file: Path) -> None:
    now = file.stat()
    os.utime(file, ns=(now.st_atime_ns, now.st_mtime_ns + 1))


def edit(home: Path, old: str, new: str) -> None:
    text = (home / "recipe.yml").read_text()
    assert old in text
    (home / "recipe.yml").write_text(text.replace(old, new))


CHANGES: dict[str, tuple[Callable[[Path], object], str | None]] = {
    "density": (lambda home: edit(home, "0.5", "0.25"), "the recipe"),
    "scope": (lambda home: edit(home, "density", "scope: layer, density"), "the recipe"),
    "seed": (lambda home: edit(home, "density", "order: {seed: 3}, density"), "the recipe"),
    "tau": (lambda home: edit(home, "density", "tau: 0.2, density"), "the recipe"),
    "a comment, which the plan holds": (lambda home: edit(home, "merge_method", "# mine\nmerge_method"), "the recipe"),
    "dtype": (lambda home: edit(home, "parameters", "dtype: bfloat16\nparameters"), "the recipe"),
    "scaling of the adapter": (lambda home: write_adapter(home, lora_alpha=8), "adapter"),
    "config": (lambda home: write_json(home / "full" / "config.json", {"model_type": "llama", "a": 1}), "full"),
    "a shard's time": (lambda home: later(home / "full" / "model.safetensors"), "full/model.safetensors"),
    "the adapter's": (
        lambda home: later(home / "adapter" / "adapter_model.safetensors"),
        "adapter/adapter_model.safetensors",
    ),
    "another dtype": (
        lambda home: save(home / "full", {NAME: torch.ones(6, 4).half()}, config={"model_type": "llama"}),
        "full/model.safetensors",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_makes_another_plan(home: Path, change: str) -> None:
    before = work(home)
    assert work(home) == before
    make, part = CHANGES[change]
    make(home)
    after = work(home)
    assert after.identity != before.identity
    changed = [name for name in after.parts if after.parts[name] != before.parts.get(name)]
    assert changed == [part if part == "the recipe" else f"{home}/{part}"]


def test_what_does_not(home: Path) -> None:
    before = work(home)
    (home / "full" / "README.md").write_text("# A model")
    (home / "recipe.yml").rename(home / "other.yml")
    found = preflight.check(load_recipe(home / "other.yml"))
    assert plan_work(found, Files.of(found)) == before
    json.dumps(before.opening)  # as a journal begins


def test_the_order_of_tasks_makes_another_plan(home: Path) -> None:
    before = work(home)
    edit(home, "{model: ./full}, {model: ./adapter}", "{model: ./adapter}, {model: ./full}")
    assert work(home).identity != before.identity


def test_a_merge_is_its_plan_and_the_size_of_its_files(home: Path) -> None:
    found = inputs(home)
    assert merge_work(found, 5) == merge_work(found, 5)
    assert merge_work(found, 5).identity != merge_work(found, 6).identity


def test_every_shard_that_is_gone_is_named(home: Path) -> None:
    found = inputs(home)
    shutil.rmtree(home / "full")
    (home / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError) as raised:
        Files.of(found)
    assert raised.value.problems == (
        f"{home}/full/model.safetensors: cannot be read: No such file or directory",
        f"{home}/adapter/adapter_model.safetensors: cannot be read: No such file or directory",
    )
