"""Files for the tests: safetensors with every dtype, odd names, and headers that no writer would write."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

# As safetensors spells them -> torch's.
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "I64": torch.int64,
    "U64": torch.uint64,
}


def stored_bytes(tensor: torch.Tensor) -> bytes:
    """A tensor's bytes as safetensors stores them."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def write_raw(file: Path, header: Mapping[str, Any] | str | bytes, data: bytes = b"") -> Path:
    """A safetensors file with this header (as JSON, text or bytes) and data, right or wrong; returns `file`."""
    raw = json.dumps(header) if isinstance(header, Mapping) else header
    encoded = raw.encode() if isinstance(raw, str) else raw
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)
    return file


def tree(directory: Path) -> dict[str, bytes | None]:
    """Everything below a directory, hidden files included: path -> bytes, None for what is no file."""
    everything = sorted(directory.rglob("*"))
    return {str(path.relative_to(directory)): path.read_bytes() if path.is_file() else None for path in everything}


def names() -> st.SearchStrategy[str]:
    """Names of tensors: plain ones, and any text that JSON can hold, control characters included."""
    plain = st.sampled_from(["model.layers.10.w", "model.layers.2.w", "lm_head.weight", "w", "W", 'quo"te', "back\\"])
    anything = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
    return st.one_of(plain, anything).filter(lambda name: name != "__metadata__")


def tensors(*, min_size: int = 1, max_size: int = 6) -> st.SearchStrategy[dict[str, torch.Tensor]]:
    """Named tensors of every supported dtype: scalars, empty ones and small ones, of random bits."""
    return st.dictionaries(names(), tensor(), min_size=min_size, max_size=max_size)


@st.composite
def tensor(draw: st.DrawFn) -> torch.Tensor:
    """One tensor of random bits."""
    dtype = DTYPES[draw(st.sampled_from(sorted(DTYPES)))]
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    numbers = torch.from_numpy(rng.integers(0, 2 if dtype == torch.bool else 256, (*shape, dtype.itemsize), np.uint8))
    return numbers.reshape(-1).view(dtype).reshape(shape)
