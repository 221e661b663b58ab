"""Sound files that targets begin with, made without PyTorch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save

__all__ = ["Arrays", "as_bytes", "join_header", "model", "save_model", "weights"]

Arrays = Mapping[str, npt.NDArray[Any]]
WORDS = ("dtype", "shape", "data_offsets", "__metadata__", "format", "pt", "F32", "BF16", "F16", "I64", "BOOL", "U8")


def as_bytes(value: Any) -> bytes:
    """JSON as programs write it."""
    return json.dumps(value, indent=1).encode()


def model(shift: float = 0.0) -> dict[str, npt.NDArray[Any]]:
    """A small model: two layers, embeddings, a head, and a tensor of integers."""
    floats: dict[str, npt.NDArray[Any]] = {
        "model.embed_tokens.weight": np.arange(12, dtype=np.float32).reshape(6, 2) + shift,
        "model.layers.0.w.weight": np.arange(6, dtype=np.float32).reshape(2, 3) + shift,
        "model.layers.1.w.weight": np.arange(6, dtype=np.float16).reshape(2, 3) / 4 + shift,
        "lm_head.weight": np.arange(12, dtype=np.float32).reshape(6, 2) - shift,
    }
    return floats | {"model.ids": np.arange(3)}


def weights(arrays: Arrays) -> bytes:
    """A safetensors file."""
    return save(dict(arrays), {"format": "pt"})


def save_model(directory: Path, arrays: Arrays, config: Mapping[str, Any]) -> Path:
    """A checkpoint in one file; returns `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "model.safetensors").write_bytes(weights(arrays))
    (directory / "config.json").write_bytes(as_bytes(config))
    return directory


def join_header(header: bytes, data: bytes) -> bytes:
    """A safetensors file of a header's JSON and data, right or wrong."""
    return len(header).to_bytes(8, "little") + header + data
