"""What a base's own files say of its other files: modules.json and config.json.

Oracles: nothing outside the base's directory is taken over; a config with other dtypes is the same but for these.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from cpimerge.checkpoint import read_json_object
from cpimerge.companions import DTYPE_KEYS, companion_bytes, companion_files, config_with_dtype, unreadable
from cpimerge.errors import CheckpointError

from ..bundles import join, split, write
from ..mutation import bundle, json_text
from ..target import Run, Target
from .files import as_bytes

FILES = ("modules.json", "config.json")
WORDS = (
    *("path", "name", "type", "idx", "1_Pooling", "2_Dense", "onnx", "../outside", "outside", ".hidden", "2_Dense/.."),
    *("dtype", "torch_dtype", "torch.float16", "bfloat16", "float64", "auto", "text_config", "quantization_config"),
)


def _prepare(scratch: Path) -> Run:
    base = scratch / "base"
    for place in ("1_Pooling", "2_Dense", "onnx", ".hidden", "../outside"):
        (base / place).mkdir(parents=True)
        for name in ("config.json", "model.safetensors"):
            (base / place / name).write_bytes(b"{}")

    def run(data: bytes) -> None:
        write(split(data, FILES[0]), base, FILES)
        with suppress(CheckpointError, OSError):
            for file in companion_files(base):
                assert os.path.realpath(file).startswith(f"{os.path.realpath(base)}/")
            assert companion_bytes(base, 10, 3) > 0
            assert list(unreadable(base)) == []
        _check(base / "config.json")

    return run


def _check(file: Path) -> None:
    """`config_with_dtype`, where a checkpoint with this config can be opened."""
    if not file.is_file():
        return
    read_json_object(file)
    raw = file.read_bytes()
    for dtypes in (["bfloat16"], ["float32", "float16"], []):
        changed = config_with_dtype(raw, dtypes)
        before, after = json.loads(raw), json.loads(changed)
        _without_dtypes(before)
        _without_dtypes(after)
        assert repr(before) == repr(after)  # NaN is equal to itself here


def _without_dtypes(value: Any) -> None:
    waiting = [value]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            for key in DTYPE_KEYS:
                if isinstance(node.get(key), str):
                    del node[key]
        waiting.extend(node.values() if isinstance(node, dict) else node if isinstance(node, list) else ())


def _seeds() -> Mapping[str, bytes]:
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"},
    ]
    config = {"model_type": "x", "torch_dtype": "float16", "text_config": {"dtype": "float32"}, "parts": [{"dtype": 1}]}
    deep = b'{"a":' * 900 + b"1" + b"}" * 900
    return {
        "encoder": join({FILES[0]: as_bytes(modules), FILES[1]: as_bytes(config)}),
        "outside": join({FILES[0]: b'[{"path": "../outside"}, {"path": "/"}, {"path": 3}, 4]'}),
        "deep": join({FILES[0]: b"[" * 3000, FILES[1]: deep}),
    }


_JSON = json_text(WORDS)
TARGET = Target(_prepare, _seeds, CheckpointError, bundle(FILES[0], dict.fromkeys(FILES, _JSON)), WORDS)
