"""Other models than those of text, and files that are large or unaligned: planned, fused, compared with a few lines."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import save, write_recipe
from files import stored_bytes
from safetensors.torch import load_file
from test_checkpoint import read

import cpimerge
from cpimerge.checkpoint import read_header
from cpimerge.directory import open_checkpoint

Tensors = dict[str, torch.Tensor]


def convolutional() -> Tensors:
    """Tensors of four dimensions, statistics, a counter, and no number that is a part of a name."""
    return {
        "stem.conv.weight": torch.randn(8, 3, 3, 3),
        "stem.bn.weight": torch.ones(8),
        "stem.bn.running_var": torch.rand(8),
        "stem.bn.num_batches_tracked": torch.tensor(7),
        "layer1a.weight": torch.randn(4, 8, 1, 1),
        "fc.bias": torch.zeros(5),
    }


def diffusers() -> Tensors:
    """A U-Net of diffusers: numbers in numbers."""
    names = ("resnets.0.conv1", "resnets.1.conv1", "attentions.0.transformer_blocks.0.attn1.to_q")
    down = {f"down_blocks.{n}.{name}.weight": torch.randn(4, 3) for n in range(3) for name in names}
    up = {f"up_blocks.{n}.upsamplers.0.conv.weight": torch.randn(2, 2, 3, 3) for n in range(2)}
    return down | up | {"conv_in.weight": torch.randn(4, 4, 3, 3), "time_embedding.linear_1.weight": torch.randn(4, 4)}


def multimodal() -> Tensors:
    """A tower for pictures, one for text, and what joins them."""
    text = {f"model.language_model.layers.{n}.mlp.weight": torch.randn(5, 4) for n in range(4)}
    vision = {f"model.visual.blocks.{n}.attn.qkv.weight": torch.randn(6, 2) for n in range(2)}
    return text | vision | {"model.visual.merger.mlp.0.weight": torch.randn(3, 3), "lm_head.weight": torch.randn(7, 4)}


def bare() -> Tensors:
    """One tensor with a short name, in no layer."""
    return {"w": torch.randn(9)}


# The model; its layers by the patterns of their names.
FORMS: dict[str, tuple[Tensors, dict[str, int]]] = {
    "convolutions": (convolutional(), {}),
    "a diffusion model": (diffusers(), {"down_blocks.*": 3, "up_blocks.*": 2}),
    "several towers": (
        multimodal(),
        {"model.language_model.layers.*": 4, "model.visual.blocks.*": 2, "model.visual.merger.mlp.*": 1},
    ),
    "a vector": (bare(), {}),
}


def family(home: Path, base: Tensors) -> tuple[Path, dict[str, Tensors]]:
    """Checkpoints of a base and two fine-tunes, and a recipe without a gap that a name could fall into."""
    experts = {"base": base}
    for seed, name in enumerate(("a", "b")):
        generator = torch.Generator().manual_seed(seed)
        experts[name] = {
            key: tensor + torch.randn(tensor.shape, generator=generator) if tensor.is_floating_point() else tensor
            for key, tensor in base.items()
        }
    for name, tensors in experts.items():
        save(home / name, tensors)
    models = [{"model": home / "a"}, {"model": home / "b"}]
    return write_recipe(home / "recipe.yml", base_model=home / "base", models=models, parameters=PARAMETERS), experts


PARAMETERS: dict[str, Any] = {
    **{"density": [0.5, 0.1], "scope": "tensor", "conflict": "largest"},
    **{"rest": 0, "space": "delta"},
}


def core(update: np.ndarray[Any, Any], density: float) -> np.ndarray[Any, Any]:
    """Where the ⌊density·n⌋ largest magnitudes are; ties to the lower index."""
    flat = np.abs(update.astype(np.float32)).ravel()
    order = np.argsort(-flat, kind="stable")[: int(np.floor(density * flat.size + 1e-9))]
    mask = np.zeros(flat.size, bool)
    mask[order] = True
    mask &= flat > 0
    return mask.reshape(update.shape)


@pytest.mark.parametrize("form", FORMS)
def test_any_model(tmp_path: Path, form: str) -> None:
    """With a gradient over the layers as they are found, against a merge of a few lines."""
    base, layers = FORMS[form]
    recipe, experts = family(tmp_path, base)
    plan = cpimerge.plan(recipe, tmp_path / "plan", threads=1)
    assert plan.layers == layers
    cpimerge.fuse(tmp_path / "plan", tmp_path / "out", threads=1)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == base.keys()
    for name, tensor in base.items():
        expected = tensor.numpy().copy()
        stack = next((p for p in layers if name.startswith(p[:-1])), None)
        depth = 0.0
        if stack is not None:  # the only layer of a stack has the end of a gradient, as in mergekit
            number = int(name.removeprefix(stack[:-1]).split(".")[0])
            depth = number / (layers[stack] - 1) if layers[stack] > 1 else 1.0
        if tensor.is_floating_point():
            updates = [experts[task][name].numpy() - tensor.numpy() for task in ("a", "b")]
            masks = [core(update, 0.5 + (0.1 - 0.5) * depth) for update in updates]
            second = masks[1] & (~masks[0] | (np.abs(updates[1]) >= np.abs(updates[0])))
            for task, mask in (("a", masks[0] & ~second), ("b", second)):
                expected[mask] = experts[task][name].numpy()[mask]
        assert np.array_equal(found[name].numpy(), expected), name


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_budgets_of_any_model(tmp_path: Path, form: str, scope: str) -> None:
    """Each layer, the rest, or the whole model has exactly its share of core elements."""
    base, layers = FORMS[form]
    recipe, _ = family(tmp_path, base)
    text = recipe.read_text().replace("scope: tensor", f"scope: {scope}")
    recipe.write_text(text.replace("- 0.5\n", "- 0.25\n").replace("- 0.1\n", "- 0.25\n"))
    plan = cpimerge.plan(recipe, tmp_path / "plan", threads=1)
    pools: dict[str, list[int]] = {}
    for tensor in plan.tensors:
        stack = next((p for p in layers if tensor.name.startswith(p[:-1])), None)
        layer = "" if stack is None else ".".join(tensor.name.split(".")[: stack.count(".") + 1])
        if tensor.tasks:
            pool = pools.setdefault(layer if scope == "layer" else "all", [0, 0])
            pool[0] += tensor.output.elements
            pool[1] += tensor.tasks["a"].core
    assert {pool: chosen for pool, (_, chosen) in pools.items()} == {
        pool: elements // 4 for pool, (elements, _) in pools.items()
    }


# --- files ------------------------------------------------------------------------------------------


def unaligned(file: Path, tensors: Tensors, padding: int) -> Path:
    """A safetensors file whose data begin anywhere, one tensor after the other without a gap."""
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors.items():
        dtype = {torch.float32: "F32", torch.bfloat16: "BF16", torch.uint8: "U8", torch.int64: "I64"}[tensor.dtype]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
    raw = json.dumps(header).encode() + b" " * padding
    file.write_bytes(len(raw).to_bytes(8, "little") + raw + b"".join(map(stored_bytes, tensors.values())))
    return file


@pytest.mark.parametrize("padding", range(8))
def test_data_at_odd_places(tmp_path: Path, padding: int) -> None:
    """Plans and results do not depend on where a file's data begin; three bytes set what follows them off."""
    base = {"odd": torch.arange(3, dtype=torch.uint8)} | {f"layers.{n}.w": torch.randn(5, 7) for n in range(2)}
    base |= {"half": torch.randn(300_001).bfloat16(), "ids": torch.arange(5)}  # more than a chunk
    recipe, experts = family(tmp_path, base)
    cpimerge.plan(recipe, tmp_path / "plan", threads=2)
    cpimerge.fuse(tmp_path / "plan", tmp_path / "out", threads=2)
    expected = (tmp_path / "out" / "model.safetensors").read_bytes()
    for number, (name, tensors) in enumerate(experts.items()):
        file = unaligned(tmp_path / name / "model.safetensors", tensors, padding + 3 * number)
        for info in read_header(file).tensors:
            assert read(info) == stored_bytes(tensors[info.name])
    cpimerge.plan(recipe, tmp_path / "plan", threads=2, force=True)
    cpimerge.fuse(tmp_path / "plan", tmp_path / "out", threads=2, force=True)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == expected


def test_a_file_of_50_gb(tmp_path: Path) -> None:
    """Most of it is a hole in the file, where the file system has holes: offsets beyond 32 bits are read right."""
    big, last = 52 << 30, torch.arange(6, dtype=torch.float32)
    header = {
        "big": {"dtype": "BF16", "shape": [13 << 10, 1 << 20, 2], "data_offsets": [0, big]},
        "last": {"dtype": "F32", "shape": [2, 3], "data_offsets": [big, big + last.nbytes]},
    }
    raw = json.dumps(header).encode()
    file = tmp_path / "model.safetensors"
    with open(file, "wb") as stream:
        stream.write(len(raw).to_bytes(8, "little") + raw)
        try:
            stream.truncate(8 + len(raw) + big)
        except OSError:
            pytest.skip("no file of this size fits here")
        if os.fstat(stream.fileno()).st_blocks * 512 > 1 << 30:
            pytest.skip("this file system has no holes")
        stream.seek(0, os.SEEK_END)
        stream.write(stored_bytes(last))
    found = open_checkpoint(tmp_path).tensors
    assert (found["big"].nbytes, found["big"].elements) == (big, big // 2)
    assert read(found["last"]) == stored_bytes(last)
    assert read(found["last"], 8, 12) == stored_bytes(last)[12:20]
    assert read(found["big"], 1 << 16, big - (1 << 16)) == bytes(1 << 16)
