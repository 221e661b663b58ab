"""The plan directory: read back as written, obeyed where edited, refused where it makes no sense, documented."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import save, write_recipe
from safetensors.torch import load_file

import cpimerge
from cpimerge.errors import PlanError
from cpimerge.plan_file import (
    PLAN_FILE,
    Blend,
    Input,
    JoinedToken,
    Pair,
    Plan,
    Settings,
    ShardIdentity,
    Task,
    TaskTensor,
    TensorPlan,
    Vocabulary,
)

DOCS = Path(__file__).parent.parent / "docs" / "plan.md"


@pytest.fixture
def planned(tmp_path: Path) -> Path:
    """A plan of two tasks on two tensors, with nothing in any core."""
    rng = np.random.default_rng(0)
    base = {name: torch.from_numpy(rng.normal(size=(3, 2))).float() for name in ("w", "v")}
    save(tmp_path / "base", base)
    for task in "ab":
        save(tmp_path / task, {name: x + torch.from_numpy(rng.normal(size=(3, 2))).float() for name, x in base.items()})
    recipe = write_recipe(
        tmp_path / "recipe.yml",
        base_model="./base",
        models=[{"model": "./a"}, {"model": "./b"}],
        parameters={"density": 0, "space": "weights"},
    )
    cpimerge.plan(recipe, tmp_path / "plan")
    return tmp_path / "plan"


def edit(plan: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads((plan / PLAN_FILE).read_text())
    change(content)
    (plan / PLAN_FILE).write_text(json.dumps(content))


def test_a_plan_comes_back_as_it_was_saved(planned: Path) -> None:
    plan = Plan.load(planned)
    text = (planned / PLAN_FILE).read_text()
    plan.save(planned)
    assert (planned / PLAN_FILE).read_text() == text
    lines = text.splitlines()
    assert [json.loads(line.rstrip(","))["name"] for line in lines if line.startswith('  {"name"')][-2:] == ["v", "w"]


def test_the_order_of_keys_is_nobodys_business(planned: Path) -> None:
    """As after `jq --sort-keys`, or the reverse."""
    plan = Plan.load(planned)
    for reverse in (False, True):

        def ordered(value: Any, reverse: bool = reverse) -> Any:
            if isinstance(value, dict):
                return {key: ordered(value[key]) for key in sorted(value, reverse=reverse)}
            return [ordered(entry) for entry in value] if isinstance(value, list) else value

        content = json.loads((planned / PLAN_FILE).read_text())
        (planned / PLAN_FILE).write_text(json.dumps(ordered(content)))
        assert Plan.load(planned) == plan


def test_edited_coefficients_are_obeyed(planned: Path) -> None:
    def change(plan: dict[str, Any]) -> None:
        plan["tensors"][1]["blend"]["coefficients"] = [0.0, 2.0]

    edit(planned, change)
    cpimerge.fuse(planned, planned.parent / "out")
    out = load_file(planned.parent / "out" / "model.safetensors")
    a = load_file(planned.parent / "a" / "model.safetensors")
    assert torch.equal(out["w"], 2 * a["w"])  # the fold starts at the backbone b, then comes a
    assert not torch.equal(out["v"], 2 * a["v"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.update(stages=[["a"]]), "plan.json: `stages` must have each task once"),
        (lambda p: p.update(fold=["a", "b"]), "plan.json: `fold` must be the backbone and then each other task once"),
        (lambda p: p.update(inputs=p["inputs"][1:]), "`inputs` must be the base and the members of `fold`"),
        (lambda p: p["tensors"][0]["blend"].update(coefficients=[1.0]), "tensor 'v': 1 coefficients for 2 members"),
        (lambda p: p["tensors"][0]["blend"].update(coefficients=[1.0, float("nan")]), "finite number"),
        (lambda p: p["tensors"][0]["blend"].update(coefficients=None), "coefficients belong here or into"),
        (lambda p: p["tensors"][0].update(blend=None), "`blend` belongs to the action blend"),
        (lambda p: p["tensors"][0].update(dtype="I64"), "F32 cannot become I64"),
        (lambda p: p["tensors"][0]["xxh3"].pop("a"), "tensor 'v': `xxh3` must have every input"),
        (lambda p: p["settings"].update(conflict="lats"), "settings.conflict: Input should be 'last', "),
        (lambda p: p.update(extra=1), "extra: Extra inputs are not permitted"),
        (lambda p: p.update(version=2), "plan version 2, this cpimerge reads version 1. Run `cpimerge plan` again"),
        (lambda p: p.update(format="other"), "plan.json: is not a cpimerge plan"),
    ],
)
def test_a_senseless_edit_is_refused(planned: Path, change: Callable[[dict[str, Any]], None], message: str) -> None:
    edit(planned, change)
    with pytest.raises(PlanError, match=re.escape(message)):
        cpimerge.fuse(planned, planned.parent / "out")
    assert not (planned.parent / "out").exists()


def test_a_plan_of_other_tensors_is_refused(planned: Path) -> None:
    edit(planned, lambda p: p["tensors"][0].update(shape=[2, 3]))
    with pytest.raises(PlanError, match="entries were edited that must not be"):
        cpimerge.fuse(planned, planned.parent / "out")


@pytest.mark.parametrize(
    "model",
    [Plan, TensorPlan, Blend, Pair, Task, TaskTensor, Settings, Input, ShardIdentity, Vocabulary, JoinedToken],
    ids=lambda m: m.__name__,
)
def test_every_field_is_documented(model: Any) -> None:
    assert set(model.model_fields) <= set(re.findall(r"\w+", DOCS.read_text(encoding="utf-8")))
