"""A checkpoint's directory: which files its weights are in, and whether all of them are there and agree."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .checkpoint import (
    AGAIN,
    CONFIG,
    INDEX,
    UNNAMED,
    WEIGHTS,
    Checkpoint,
    Shard,
    collect,
    is_name,
    is_unicode,
    natural_key,
    read_header,
    read_json_object,
    shown,
)
from .errors import CheckpointError
from .pickled import read_pickled

__all__ = ["CHECKPOINT_FILES", "PICKLED_INDEX", "PICKLED_WEIGHTS", "open_checkpoint"]

PICKLED_WEIGHTS = "pytorch_model.bin"
PICKLED_INDEX = "pytorch_model.bin.index.json"
DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class _Format:
    """A single file or the index of several, and how one file is read."""

    weights: str
    index: str
    read: Callable[[Path], Shard]


FORMATS = (_Format(WEIGHTS, INDEX, read_header), _Format(PICKLED_WEIGHTS, PICKLED_INDEX, read_pickled))
CHECKPOINT_FILES = tuple(name for form in FORMATS for name in (form.weights, form.index))  # one of them there is


def open_checkpoint(path: Path, read: Callable[[Path], Shard] | None = None) -> Checkpoint:
    """Read every header of the checkpoint in `path`. Raises CheckpointError listing all that is wrong with it.

    `read` reads one file instead of the format's own function.
    """
    problems: list[str] = []
    shards: list[Shard] = []
    weight_map: dict[str, str] = {}
    index = path / INDEX
    with collect(path, problems):
        has_config = (path / CONFIG).is_file()
        present = [form for form in FORMATS if any((path / name).is_file() for name in (form.weights, form.index))]
        form = (present or FORMATS)[0]  # safetensors where both are there, as transformers does
        index = path / form.index
        with collect(index, problems):
            weight_map = _weight_map(path, form, problems)
            for file in _files(path, form, weight_map, problems):
                with collect(file, problems):
                    shards.append((read or form.read)(file))
        with collect(path / CONFIG, problems):
            config = read_json_object(path / CONFIG) if has_config else {}
    if weight_map and not problems:
        problems.extend(_index_problems(index, weight_map, shards))
    if not problems and not any(shard.tensors for shard in shards):
        problems.append(f"{path}: holds no tensors. Give the directory of a whole checkpoint")
    if problems:
        raise CheckpointError(problems)
    infos = sorted((info for shard in shards for info in shard.tensors), key=lambda info: natural_key(info.name))
    notes = (f"{path}: {PICKLED_WEIGHTS} is not read, because {WEIGHTS} is there, too",) if len(present) > 1 else ()
    return Checkpoint(path, tuple(shards), {info.name: info for info in infos}, config, notes=notes)


def _weight_map(path: Path, form: _Format, problems: list[str]) -> dict[str, str]:
    """The index's tensor name -> shard name; empty where the checkpoint is a single file."""
    index = path / form.index
    if (path / form.weights).is_file() or not index.is_file():  # transformers prefers the single file, too
        return {}
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: has no 'weight_map' of tensor names to shards. {AGAIN}")
    unfit = sorted({shown(shard) for shard in weight_map.values() if not _is_file_name(shard)})
    problems.extend(f"{index}: shard {shard} is not the name of a file beside it. {AGAIN}" for shard in unfit)
    unnamed = {name: None for name in weight_map if not is_name(name)}
    problems.extend(f"{index}: tensor {shown(name)}: {UNNAMED}" for name in unnamed)
    return {name: shard for name, shard in weight_map.items() if _is_file_name(shard) and name not in unnamed}


def _is_file_name(shard: Any) -> bool:
    return is_unicode(shard) and shard == os.path.basename(shard) and shard not in ("", ".", "..")


def _files(path: Path, form: _Format, weight_map: Mapping[str, str], problems: list[str]) -> list[Path]:
    """The files with weights that are there; appends what is missing."""
    if not weight_map and problems:
        return []
    if not weight_map and not (path / form.weights).is_file():
        raise CheckpointError(_why_no_weights(path))
    files = [path / shard for shard in sorted(set(weight_map.values()))] or [path / form.weights]
    missing = {file: None for file in files if not file.is_file()}
    problems.extend(f"{file}: missing, though {form.index} names it. Complete the download" for file in missing)
    return [file for file in files if file not in missing]


def _why_no_weights(path: Path) -> str:
    """What `path` is instead of a checkpoint, and the way out."""
    if not path.exists():
        return f"{path}: no such directory. Correct the path; a model on the Hugging Face Hub is written org/name"
    if not path.is_dir():
        return f"{path}: not a directory. Give the directory that holds {WEIGHTS}"
    if (path / "adapter_config.json").exists():
        return f"{path}: holds an adapter, not a full model. Give the model that it was trained on, or `model+adapter`"
    if (path / "model_index.json").exists():
        return f"{path}: is a pipeline of several models (diffusers). Merge its folders, such as unet, one by one"
    if (path / DIFFUSERS_WEIGHTS).exists():
        return (
            f"{path}: has its weights in {DIFFUSERS_WEIGHTS}, as diffusers calls them. "
            f"Link or rename it to {WEIGHTS}, and the merged one back"
        )
    return _why_other_files(path)


def _why_other_files(path: Path) -> str:
    """What a directory holds that is no checkpoint under the usual names."""
    if odd := [name for name in CHECKPOINT_FILES if os.path.lexists(path / name)]:
        return f"{path / odd[0]}: is no ordinary file, nor a link to one. Download it again"
    if others := sorted(file.name for file in path.glob("*.safetensors")):
        return (
            f"{path}: neither {WEIGHTS} nor {INDEX} in it, only {others[0]!r}. "
            f"Complete the download, or call it {WEIGHTS} if it is the whole model"
        )
    if others := sorted(file.name for file in path.glob("pytorch_model*.bin")):
        return f"{path}: neither {PICKLED_WEIGHTS} nor {PICKLED_INDEX} in it, only {others[0]!r}. Complete the download"
    if any(path.glob("*.gguf")):
        return f"{path}: holds GGUF, which is quantised. Give the safetensors checkpoint that it was made from"
    if others := sorted(file.name for pattern in ("*.pt", "*.pth", "*.ckpt") for file in path.glob(pattern)):
        return f"{path}: holds {others[0]!r}, not safetensors. Load it in PyTorch and save its tensors as {WEIGHTS}"
    return f"{path}: neither {WEIGHTS} nor {INDEX} in it. Give the directory of a checkpoint in safetensors"


def _index_problems(index: Path, weight_map: Mapping[str, str], shards: Iterable[Shard]) -> Iterator[str]:
    """Every tensor must lie in the one shard that the index names for it."""
    found: dict[str, list[str]] = defaultdict(list)
    for shard in shards:
        for info in shard.tensors:
            found[info.name].append(shard.file.name)
    for name in sorted(weight_map.keys() | found.keys(), key=natural_key):
        if found.get(name) != [weight_map.get(name)]:
            listed = f"listed in {weight_map[name]!r}" if name in weight_map else "not listed"
            where = " and ".join(map(repr, found.get(name, []))) or "no shard"
            yield f"{index}: tensor {name!r}: {listed}, found in {where}. Download or save all of them again"
