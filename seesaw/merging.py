"""Models merged from experts without data: with cpimerge by a recipe, and with mergekit's own methods."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file

import cpimerge

Parameters = dict[str, Any]
Stages = Sequence[Sequence[str]]
DEFAULTS: Parameters = {  # cpimerge's; a test holds them to that
    "density": 0.01,
    "conflict": "mean",
    "space": "delta",
    "singular_values": "level",
}
KEPT: Parameters = {"singular_values": "keep"}
AVERAGE: Parameters = {"density": 0, "space": "weights"}
PAPER: Parameters = {"density": 0.01, "scope": "global", "tau": 0.1, "conflict": "last", "space": "weights"}


def spelled(parameters: Parameters) -> str:
    """`parameters` as a part of a file's name; equal for equal ones."""
    said = parameters | ({"stages": spelled_stages(parameters["stages"])} if "stages" in parameters else {})
    return "-".join(f"{setting}={value}" for setting, value in sorted(said.items()))


def spelled_stages(stages: Stages) -> str:
    """`stages` as a part of a file's name."""
    return "+".join("-".join(stage) for stage in stages)


def recipe(base: Path, experts: Mapping[str, Path], parameters: Parameters) -> dict[str, Any]:
    """The recipe of a merge of `experts`, by task."""
    return {
        "merge_method": "cpi",
        "base_model": str(base),
        "models": [{"model": str(path), "name": task} for task, path in experts.items()],
        "parameters": dict(parameters),
    }


def written(content: Mapping[str, Any], folder: Path) -> Path:
    """The path of a recipe file with `content`, in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recipe.yml"
    path.write_text(yaml.safe_dump(dict(content), sort_keys=False))
    return path


def fused(content: Mapping[str, Any], folder: Path) -> Path:
    """The model that cpimerge makes of a recipe, in `folder`; an earlier one there is replaced."""
    cpimerge.merge(written(content, folder), folder / "model", force=True)
    return folder / "model"


def mergekits(method: str, base: Path, experts: Mapping[str, Path], parameters: Parameters) -> dict[str, torch.Tensor]:
    """The tensors that a method of mergekit gives, computed in float32 by mergekit's own code, a tensor at a time.

    Its planning knows decoders only, so its methods are called below that. `parameters` are those of its recipes.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from mergekit.merge_methods import registry
        from mergekit.merge_methods.base import TensorGroup

    merge = registry.get(method)
    names = list(experts)
    settings = {
        "int8_mask": False,
        "rescale": method.startswith("dare"),
        "normalize": False,
        "lambda": 1.0,
        **parameters,
    }
    for key in ("weight", "density"):  # each model has its own; all are alike here
        settings[key] = dict.fromkeys(names, settings.get(key, 1.0))
    torch.manual_seed(0)  # dare draws
    held = [load_file(path / "model.safetensors") for path in (base, *experts.values())]
    result = {}
    for name, start in held[0].items():
        if start.is_floating_point():
            tensors = [tensors[name].float() for tensors in held]
            group = TensorGroup.from_tensors(tensors, ids=["base", *names], base_index=0, name=name)
            result[name] = merge.merge_group(group, **settings).to(start.dtype)
        else:
            result[name] = start
    return result


def save_like(tensors: dict[str, torch.Tensor], model: Path, folder: Path) -> Path:
    """`tensors` as a checkpoint with the small files of `model`, in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in model.iterdir():
        if file.is_file() and file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    return folder
