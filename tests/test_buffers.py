"""Buffers that only one of two models saved: the base's list of tensors decides, and a note says what was done."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoints import save
from safetensors.torch import load_file

import cpimerge
from cpimerge import IncompatibleError
from cpimerge.buffers import COMPUTED
from cpimerge.plan_file import Plan

FREQUENCIES = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.arange(4.0) / 7 for layer in range(3)}
POSITIONS = {"embeddings.position_ids": torch.arange(8)[None]}
WEIGHTS = {"model.layers.0.w": torch.zeros(3, 5), "model.layers.2.w": torch.ones(4)}


def merge(home: Path, base: dict[str, torch.Tensor], math: dict[str, torch.Tensor]) -> tuple[Plan, Path]:
    """The plan and the output of a merge in which `math` has moved every weight."""
    save(home / "base", base)
    moved = {name: values + 1 if name in WEIGHTS else values for name, values in math.items()}
    save(home / "math", moved)
    save(home / "code", {name: values + 2 if name in WEIGHTS else values for name, values in base.items()})
    recipe = "merge_method: cpi\nbase_model: ./base\nmodels:\n  - model: ./math\n  - model: ./code\n"
    (home / "recipe.yml").write_text(recipe)
    plan = cpimerge.plan(home / "recipe.yml", home / "plan")
    cpimerge.fuse(home / "plan", home / "out")
    return plan, home / "out"


@pytest.mark.parametrize("buffers", [FREQUENCIES, POSITIONS, FREQUENCIES | POSITIONS])
def test_the_bases_serve(tmp_path: Path, buffers: dict[str, torch.Tensor]) -> None:
    plan, out = merge(tmp_path, WEIGHTS | buffers, WEIGHTS)
    fused = load_file(out / "model.safetensors")
    assert fused.keys() == (WEIGHTS | buffers).keys()
    assert all(torch.equal(fused[name], values) for name, values in buffers.items())
    assert {t.action for t in plan.tensors if t.name in buffers} <= {"copy", "identical"}
    more = f" and {len(buffers) - 1} more" if len(buffers) > 1 else ""
    first = min(buffers)
    what = "buffers that are computed, not trained: does not have them; the base's serve"
    assert f"{tmp_path}/math: {first}{more}: {what}" in plan.notes


@pytest.mark.parametrize("buffers", [FREQUENCIES, POSITIONS])
def test_more_of_them_are_left_out(tmp_path: Path, buffers: dict[str, torch.Tensor]) -> None:
    plan, out = merge(tmp_path, WEIGHTS, WEIGHTS | buffers)
    assert load_file(out / "model.safetensors").keys() == WEIGHTS.keys()
    more = f" and {len(buffers) - 1} more" if len(buffers) > 1 else ""
    what = "buffers that are computed, not trained: has them, unlike the base; they are left out"
    assert f"{tmp_path}/math: {min(buffers)}{more}: {what}" in plan.notes


def test_those_that_all_have_are_merged_like_any_tensor(tmp_path: Path) -> None:
    plan, _ = merge(tmp_path, WEIGHTS | FREQUENCIES, WEIGHTS | FREQUENCIES)
    assert {t.action for t in plan.tensors if t.name in FREQUENCIES} == {"identical"}
    assert not [note for note in plan.notes if "buffers" in note]


def test_what_is_trained_is_missed(tmp_path: Path) -> None:
    with pytest.raises(IncompatibleError) as caught:
        merge(tmp_path, WEIGHTS | FREQUENCIES | {"norm.bias": torch.zeros(3)}, WEIGHTS)
    assert [line.split("tensor ")[1][:11] for line in caught.value.problems] == ["'norm.bias'"]


@pytest.mark.parametrize(
    ("name", "computed"),
    [
        ("model.layers.3.self_attn.rotary_emb.inv_freq", True),
        ("rotary_pos_emb.inv_freq", True),
        ("bert.embeddings.position_ids", True),
        ("transformer.h.0.attn.masked_bias", True),
        ("transformer.h.0.attn.bias", False),
        ("embeddings.position_embeddings.weight", False),
        ("my_position_ids", False),
        ("inv_freq", False),
    ],
)
def test_which_names_are_meant(name: str, computed: bool) -> None:
    assert (COMPUTED.fullmatch(name) is not None) == computed


def test_the_plan_names_the_bases_bytes_for_both(tmp_path: Path) -> None:
    merge(tmp_path, WEIGHTS | POSITIONS, WEIGHTS)
    plan = json.loads((tmp_path / "plan" / "plan.json").read_bytes())
    (entry,) = [tensor for tensor in plan["tensors"] if tensor["name"] in POSITIONS]
    assert len(set(entry["xxh3"].values())) == 1
