"""Checkpoint directories, recipes and random cases for the tests."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from huggingface_hub import constants
from hypothesis import strategies as st
from reference import Settings
from safetensors.torch import save_file

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
DTYPE_NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
TASKS = ("alpha", "beta", "gamma", "delta", "epsilon")

# In this order the plain sort, the natural sort and the order of the file all differ.
NAMES = (
    "model.layers.10.mlp.weight",
    "model.layers.2.mlp.weight",
    "model.layers.2.mlp.bias",
    "model.embed.weight",
    "lm_head.weight",
    "model.layers.2.norm",
    "model.layers.10.norm",
)


# --- files ------------------------------------------------------------------------------------------


def save(
    directory: Path,
    tensors: Mapping[str, torch.Tensor],
    *,
    shards: int = 1,
    config: Mapping[str, Any] | None = None,
) -> Path:
    """Write a checkpoint as Hugging Face does; returns `directory`.

    One `model.safetensors`, or `shards` files (at most one per tensor) of consecutive tensors and their
    index. `config` replaces the minimal config.json.
    """
    directory.mkdir(parents=True, exist_ok=True)
    pieces = split(list(tensors), shards)
    files = [shard_name(i, len(pieces)) for i in range(len(pieces))]
    for file, names in zip(files, pieces, strict=True):
        piece = {name: tensors[name].detach().clone().contiguous() for name in names}
        save_file(piece, directory / file, metadata={"format": "pt"})
    if len(pieces) > 1:
        weight_map = {name: file for file, names in zip(files, pieces, strict=True) for name in names}
        write_json(directory / constants.SAFETENSORS_INDEX_FILE, index(tensors, weight_map))
    write_json(directory / "config.json", {"model_type": "test"} if config is None else config)
    return directory


def split(names: Sequence[str], shards: int) -> list[list[str]]:
    """`names` in at most `shards` consecutive pieces of nearly equal length; one piece of no names."""
    n = max(1, min(shards, len(names)))
    return [list(names[i * len(names) // n : (i + 1) * len(names) // n]) for i in range(n)]


def shard_name(i: int, n: int) -> str:
    """Hugging Face's name of shard i (from 0) of n."""
    suffix = "" if n == 1 else f"-{i + 1:05d}-of-{n:05d}"
    return constants.SAFETENSORS_WEIGHTS_FILE_PATTERN.format(suffix=suffix)


def index(tensors: Mapping[str, torch.Tensor], weight_map: Mapping[str, str]) -> dict[str, Any]:
    """The content of model.safetensors.index.json."""
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    count = sum(t.numel() for t in tensors.values())
    return {"metadata": {"total_parameters": count, "total_size": size}, "weight_map": dict(weight_map)}


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """As transformers formats its JSON files."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_recipe(path: Path, **settings: Any) -> Path:
    """Write the top-level keys `settings` (base_model, models, parameters, dtype) as YAML; returns `path`.

    `merge_method: cpi` is added. Paths become relative to the recipe's directory; Fractions become decimals
    and must be exact as such.
    """
    content = {"merge_method": "cpi"} | {key: plain(x, path.parent) for key, x in settings.items()}
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


def plain(x: Any, directory: Path) -> Any:
    """`x` in types that YAML knows."""
    if isinstance(x, Mapping):
        return {str(key): plain(item, directory) for key, item in x.items()}
    if isinstance(x, list | tuple):
        return [plain(item, directory) for item in x]
    if isinstance(x, Fraction):
        return decimal(x)
    return os.path.relpath(x, directory) if isinstance(x, Path) else x


def decimal(x: Fraction) -> int | float:
    """A number that prints as exactly `x`; ValueError if there is none."""
    number = x.numerator if x.denominator == 1 else float(x)
    if Fraction(repr(number)) != x:
        raise ValueError(f"{x} has no short decimal")
    return number


# --- random cases -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A base, its experts (task -> tensors, recipe order) and a checkpoint for an external backbone."""

    base: dict[str, torch.Tensor]
    experts: dict[str, dict[str, torch.Tensor]]
    extra: dict[str, torch.Tensor]


def write_case(directory: Path, case: Case, settings: Settings, *, shards: int = 1) -> Path:
    """Save every checkpoint of a case and its recipe below `directory`; returns the recipe's path."""
    save(directory / "base", case.base, shards=shards)
    for task, tensors in case.experts.items():
        save(directory / task, tensors, shards=shards)
    save(directory / "extra", case.extra, shards=shards)
    keys: dict[str, Any] = {
        "base_model": directory / "base",
        "models": [
            {"model": directory / task, "name": task, **own_parameters(task, case, settings)} for task in case.experts
        ],
        "parameters": parameters(settings, directory / "extra"),
    }
    if settings.dtype is not None:
        keys["dtype"] = DTYPE_NAMES[settings.dtype]
    return write_recipe(directory / "recipe.yml", **keys)


def own_parameters(task: str, case: Case, settings: Settings) -> dict[str, Any]:
    """A model's own `parameters`, if any: the settings that are functions, spelled out for every tensor."""
    functions = {key: x for key, x in vars(settings).items() if callable(x)}
    floats = [name for name, tensor in case.base.items() if tensor.is_floating_point()]
    own = {
        key: [{"filter": f"[{name[0]}]{name[1:]}", "value": of(task, name)} for name in floats]
        for key, of in functions.items()
    }
    return {"parameters": own} if own else {}


def parameters(settings: Settings, extra: Path) -> dict[str, Any]:
    """The recipe's `parameters` that say the same as `settings`, functions apart."""
    every = vars(settings).items()
    result = {key: x for key, x in every if key != "dtype" and x is not None and not callable(x)}
    if settings.stages is not None or settings.order == "recipe":
        del result["order"]
    else:
        result["order"] = {"seed": settings.order}
    if settings.backbone == "path":
        result["backbone"] = f"./{extra.name}"
    if settings.space == "weights":
        del result["rest"]
    if settings.t is not None:
        result.pop("weight", None)
    if not settings.exclude:
        del result["exclude"]
    return result


@st.composite
def cases(draw: st.DrawFn, *, max_tasks: int = 5, max_tensors: int = 5) -> Case:
    """A random case in which ties, zero updates, identical tensors, opposite updates and twins are common.

    Shapes: scalars, empty, one to three dimensions. Dtypes: the three floats, mixed over tensors and
    checkpoints, and int64 and bool tensors (equal everywhere). Values are finite and below 100 in size.
    """
    names = draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=max_tensors, unique=True))
    shapes = {name: draw(shape()) for name in names}
    mixed = draw(st.booleans())
    dtypes = {name: draw(st.sampled_from(FLOATS)) for name in names}
    counts = sorted(range(1, max_tasks + 1), key=lambda n: (n < 2, n))  # hypothesis prefers what comes first
    tasks = TASKS[: draw(st.sampled_from(counts))]
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    base = {name: base_tensor(rng, shapes[name], dtypes[name]) for name in names} | constants_of(rng, draw)
    experts: dict[str, dict[str, torch.Tensor]] = {}
    for task in tasks:
        twin = experts[str(rng.choice(list(experts)))] if experts and rng.random() < 0.15 else None
        experts[task] = dict(twin) if twin is not None else checkpoint(rng, base, list(experts.values()), mixed)
    return Case(base, experts, checkpoint(rng, base, [], mixed))


def shape() -> st.SearchStrategy[tuple[int, ...]]:
    """Shapes of up to three dimensions, some of them empty, of at most 120 elements, or matrices of a thousand."""
    vectors = st.tuples(length(40))
    matrices = st.tuples(length(6), length(20))
    sides = st.tuples(st.sampled_from([31, 32, 33]), st.sampled_from([31, 32, 40]))  # on both sides of what is levelled
    large = sides.flatmap(st.permutations).map(tuple)
    cubes = st.tuples(length(3), length(4), length(5))
    return st.one_of(matrices, matrices, vectors, cubes, st.just(()), large)


def length(top: int) -> st.SearchStrategy[int]:
    """A size up to `top`, now and then 0."""
    return st.sampled_from([*range(2, top + 1), 1, 0])


def constants_of(rng: np.random.Generator, draw: st.DrawFn) -> dict[str, torch.Tensor]:
    """Non-float tensors: none, some, or all of an int64 range, a bool mask and an int64 scalar."""
    numbers = torch.from_numpy(rng.integers(-(2**62), 2**62, size=(1, 5)))
    choices = {
        "model.position_ids": numbers,
        "model.layers.2.mask": numbers > 0,
        "model.steps": torch.tensor(int(rng.integers(0, 1000))),
    }
    return {name: choices[name] for name in draw(st.lists(st.sampled_from(sorted(choices)), unique=True))}


def base_tensor(rng: np.random.Generator, size: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """All zero, on a coarse grid (signed zeros included), normal, or of widely different magnitudes."""
    kind = rng.choice(["zero", "grid", "normal", "wide"], p=[0.1, 0.4, 0.35, 0.15])
    values = rng.normal(size=size)
    if kind == "zero":
        values = values * 0
    if kind == "grid":
        values = np.round(values * 4) / 4
    if kind == "wide":
        values = values * 2.0 ** rng.integers(-30, 4, size=size)
    return as_tensor(values, dtype)


def checkpoint(
    rng: np.random.Generator,
    base: Mapping[str, torch.Tensor],
    siblings: Sequence[Mapping[str, torch.Tensor]],
    mixed: bool,
) -> dict[str, torch.Tensor]:
    """A fine-tune of `base`; `mixed`: its dtypes may differ from the base's."""
    result = {}
    for name, tensor in base.items():
        if not tensor.is_floating_point():
            result[name] = tensor.clone()
            continue
        dtype = FLOATS[rng.integers(3)] if mixed and rng.random() < 0.3 else tensor.dtype
        result[name] = tuned(rng, tensor, [s[name] for s in siblings]).to(dtype)
    return result


def tuned(rng: np.random.Generator, base: torch.Tensor, siblings: Sequence[torch.Tensor]) -> torch.Tensor:
    """`base` plus an update: none, a few grid steps, normal noise, or a sibling's (the same or reversed)."""
    kind = rng.choice(["none", "grid", "normal", "same", "opposite"], p=[0.1, 0.45, 0.3, 0.1, 0.05])
    if kind == "none":
        return base.clone()
    if kind in ("same", "opposite") and siblings:
        sibling = siblings[int(rng.integers(len(siblings)))].double()
        return sibling if kind == "same" else base.double().mul(2).sub(sibling)
    size = tuple(base.shape)
    if kind == "normal":
        return base.double() + torch.from_numpy(np.asarray(rng.normal(size=size) * 2.0 ** rng.integers(-9, 1)))
    steps = rng.choice([-2, -1, 0, 1, 2, 3], p=[0.1, 0.15, 0.4, 0.15, 0.1, 0.1], size=size)
    return base.double() + torch.from_numpy(np.asarray(steps * 2.0**-6))


def as_tensor(values: Any, dtype: torch.dtype) -> torch.Tensor:
    """A fresh tensor of `dtype`, rounded once."""
    return torch.from_numpy(np.array(values, dtype=np.float64)).to(dtype)


@st.composite
def settings(draw: st.DrawFn, case: Case) -> Settings:
    """Settings that fit a case; density, weight and t are single numbers, so that a recipe can say them."""
    tasks = list(case.experts)
    space = draw(st.sampled_from(["weights", "delta"]))
    floats = sorted(name for name, tensor in case.base.items() if tensor.is_floating_point())
    choice: dict[str, list[Any]] = {
        "scope": ["tensor", "layer", "global"],
        "order": ["recipe", 0, 7],
        "stages": [None, None, [draw(st.permutations(tasks))], [[t] for t in draw(st.permutations(tasks))]],
        "backbone": ["last", "base", "path", *tasks],
        "conflict": ["last", "first", "largest", "mean", "elect"],
        "granularity": ["tensor", "row"],
        "exclude": [(), (), tuple(draw(st.lists(st.sampled_from(floats), max_size=1)))],
        "dtype": [None, None, *FLOATS],
    }
    return Settings(
        density=draw(numbers("0.29", "0.5", "0.1", "1", "0.01", "0")),
        weight=draw(numbers("1", "1", "0", "2.5")),
        t=draw(st.one_of(st.none(), st.none(), numbers("0", "0.3", "0.5", "1"))),
        tau=draw(st.one_of(st.just("auto"), numbers("0.1", "0", "0.5", "1"))),
        space=space,
        rest=draw(numbers("1", "1", "0", "0.3")) if space == "delta" else Fraction(1),
        singular_values=draw(st.sampled_from([None, "level", "keep"] if space == "delta" else [None, "keep"])),
        **{key: draw(st.sampled_from(values)) for key, values in choice.items()},
    )


def numbers(*decimals: str) -> st.SearchStrategy[Fraction]:
    """One of some decimals, exact."""
    return st.sampled_from([Fraction(x) for x in decimals])


def ulps(a: torch.Tensor, b: torch.Tensor) -> int:
    """The largest distance of two finite tensors of one dtype, in representable values; 0 if empty."""
    assert (a.dtype, a.shape) == (b.dtype, b.shape)
    kind = torch.int32 if a.dtype == torch.float32 else torch.int16
    bits = [x.contiguous().reshape(-1).view(kind).long() for x in (a, b)]
    top = math.prod([2] * (8 * a.element_size() - 1))
    ordered = [torch.where(x < 0, -(x + top), x) for x in bits]
    return int((ordered[0] - ordered[1]).abs().max()) if a.numel() else 0
