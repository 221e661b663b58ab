"""A small plan to begin with, made once a process, whose inputs lie in a directory that stands for the scratch one."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from pydantic import ValidationError

import cpimerge
from cpimerge.plan_file import COEFFICIENTS_FILE, PLAN_FILE, Plan

from .files import model, save_model

__all__ = ["PLACE", "WORDS", "inputs", "made", "resealed"]

PLACE = b"/scratch-of-the-fuzzer"
CONFIG = {"model_type": "test", "dtype": "float32", "vocab_size": 6}
WORDS = (
    *("format", "cpimerge plan", "version", "inputs", "path", "adapter", "shards", "size", "header_xxh3", "tensors"),
    *("tasks", "core_file", "core_xxh3", "elements", "stages", "backbone", "fold", "layers", "vocabulary", "joined"),
    *("shape", "dtype", "base_dtype", "action", "copy", "identical", "blend", "first_chunk", "first_row", "xxh3"),
    *("coefficients", "angles", "slerped", "claimed", "core", "F32", "BF16", "F16", "I64", "mode", "union", "rows"),
    *("conflict", "largest", "mean", "elect", "granularity", "row", "tensor", "space", "delta", "scope", "global"),
    *("cores/00.roaring", "cores/../00.roaring", "base", "math", "code", "chat_template", "base_rows", "tokens_xxh3"),
)


def inputs(directory: Path) -> Path:
    """The models of the plans, below `directory`; returns it."""
    for name, shift in (("base", 0.0), ("math", 0.5), ("code", -0.25)):
        save_model(directory / name, model(shift), CONFIG)
    return directory


@cache
def made(granularity: str) -> Mapping[str, bytes]:
    """The files of a plan, by their path in it."""
    with tempfile.TemporaryDirectory() as name:
        directory = inputs(Path(name))
        recipe = {
            "merge_method": "cpi",
            "base_model": "./base",
            "models": [{"model": "./math"}, {"model": "./code"}],
            "parameters": {"density": 0.4, "space": "delta", "granularity": granularity},
        }
        (directory / "recipe.yml").write_text(json.dumps(recipe), encoding="utf-8")
        cpimerge.plan(directory / "recipe.yml", directory / "plan", threads=1)
        files = [file for file in sorted((directory / "plan").rglob("*")) if file.is_file()]
        where = str(directory).encode()
        return {
            file.relative_to(directory / "plan").as_posix(): file.read_bytes().replace(where, PLACE) for file in files
        }


def resealed(files: Mapping[str, bytes], scratch: Path) -> dict[str, bytes]:
    """The files with the hashes that a stranger would put there; those that cannot have any are left as they are."""
    text = files.get(PLAN_FILE, b"").replace(PLACE, str(scratch).encode())
    fixed = {**files, PLAN_FILE: text}
    try:
        raw = json.loads(text)
        for task in raw["tasks"]:
            place = str(task["core_file"])
            offsets = str(Path(place).with_suffix(".npy"))
            if place in files and offsets in files:
                task["core_xxh3"] = xxhash.xxh3_128_hexdigest(files[place] + npy_data(files[offsets]))
        if COEFFICIENTS_FILE in files:
            raw["coefficients_xxh3"] = xxhash.xxh3_128_hexdigest(npy_data(files[COEFFICIENTS_FILE]))
    except (ValueError, KeyError, TypeError, RecursionError):
        return fixed
    return fixed | {PLAN_FILE: _sealed(raw)}


def _sealed(raw: Any) -> bytes:
    text = json.dumps(raw)
    try:
        plan = Plan.model_validate(json.loads(text)).sealed()
    except (ValidationError, RecursionError, ValueError):
        return text.encode()
    return plan.model_dump_json().encode()


def npy_data(raw: bytes) -> bytes:
    """What follows the header of a .npy file."""
    return raw[10 + int.from_bytes(raw[8:10], "little") :]


def npy(values: Any) -> bytes:
    """A .npy file, as `numpy.save` writes it."""
    with tempfile.TemporaryFile() as stream:
        np.save(stream, values)
        stream.seek(0)
        return stream.read()
