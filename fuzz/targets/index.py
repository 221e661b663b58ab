"""The index of a checkpoint in several files, and how they agree: `open_checkpoint`.

Oracle: of what is accepted, every tensor lies in the directory, in the file that the index names for it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from cpimerge.checkpoint import INDEX
from cpimerge.directory import open_checkpoint
from cpimerge.errors import CheckpointError

from ..bundles import join, split, write
from ..mutation import bundle, header, json_text
from ..target import Run, Target
from .files import WORDS, as_bytes, model, weights

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
FILES = (INDEX, FIRST, SECOND, "config.json")
INDEX_WORDS = ("weight_map", "metadata", "total_size", *FILES, f"../{FIRST}", f"/dev/shm/{FIRST}", *model())


def _prepare(scratch: Path) -> Run:
    path = scratch / "model"
    path.mkdir()

    def run(data: bytes) -> None:
        files = split(data, INDEX)
        write(files, path, FILES)
        checkpoint = open_checkpoint(path)
        weight_map = json.loads(files[INDEX])["weight_map"]
        assert checkpoint.tensors.keys() == weight_map.keys()
        for shard in checkpoint.shards:
            assert shard.file.parent == path
            assert {weight_map[info.name] for info in shard.tensors} <= {shard.file.name}

    return run


def _seeds() -> Mapping[str, bytes]:
    arrays = model()
    names = sorted(arrays)
    first, second = names[:2], names[2:]
    weight_map = dict.fromkeys(first, FIRST) | dict.fromkeys(second, SECOND)
    index = as_bytes({"metadata": {"total_size": 1}, "weight_map": weight_map})
    shards = {
        FIRST: weights({name: arrays[name] for name in first}),
        SECOND: weights({name: arrays[name] for name in second}),
    }
    long = as_bytes({"weight_map": {"9" * 5000: FIRST} | dict.fromkeys(first, FIRST)})
    return {
        "two": join({INDEX: index, **shards, "config.json": b"{}"}),
        "missing": join({INDEX: index, FIRST: shards[FIRST]}),
        "long": join({INDEX: long, FIRST: shards[FIRST]}),
        "outside": join({INDEX: as_bytes({"weight_map": {"x": "../x.safetensors", "y": "/y", "z": ".."}})}),
    }


_JSON = json_text(INDEX_WORDS)
TARGET = Target(
    _prepare,
    _seeds,
    CheckpointError,
    bundle(INDEX, {INDEX: _JSON, "config.json": _JSON, FIRST: header(WORDS), SECOND: header(WORDS)}),
    INDEX_WORDS,
    max_bytes=8192,
)
