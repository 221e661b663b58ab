"""The header of a safetensors file.

Oracle: what is accepted, safetensors' own reader accepts as well and sees the same in. What that accepts is refused
only where cpimerge is stricter on purpose: see `STRICTER`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, deserialize

from cpimerge.checkpoint import MAX_NAME, Shard, read_header
from cpimerge.errors import CheckpointError

from ..mutation import header
from ..target import Run, Target
from .files import WORDS, as_bytes, join_header, model, weights

# Parts of the messages for what safetensors' reader lets pass: keys that stand twice, of which it takes the last;
# longer names; further keys of an entry; and sizes above 2^63, which the size of a tensor of no elements may have.
STRICTER = (
    *("stands twice", f"Unicode of at most {MAX_NAME}", "must have exactly dtype", "is not a list of sizes"),
    *("are not a begin and an end", "is larger than any file"),
)


def _prepare(scratch: Path) -> Run:
    file = scratch / "model.safetensors"

    def run(data: bytes) -> None:
        file.write_bytes(data)
        shard, refusal = None, None
        try:
            shard = read_header(file)
        except CheckpointError as error:
            refusal = error
        try:
            theirs = deserialize(data)  # type: ignore[no-untyped-call]
        except SafetensorError:
            assert refusal is not None, "safetensors refuses what cpimerge accepts"
            raise refusal from None
        if shard is not None:
            _compare(shard, dict(theirs), data)
        elif refusal is not None:
            assert any(part in str(refusal) for part in STRICTER), "safetensors accepts what cpimerge refuses"
            raise refusal

    return run


def _compare(shard: Shard, theirs: Mapping[str, Mapping[str, object]], data: bytes) -> None:
    """Names, dtypes, shapes and bytes are the same."""
    assert {info.name for info in shard.tensors} == theirs.keys()
    for info in shard.tensors:
        entry = theirs[info.name]
        assert (info.dtype, list(info.shape)) == (entry["dtype"], entry["shape"])
        assert data[info.offset : info.offset + info.nbytes] == entry["data"]


def _seeds() -> Mapping[str, bytes]:
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    empty = {"a": {"dtype": "U8", "shape": [0, 4], "data_offsets": [0, 0]}, "b": entry}
    packed = {"x": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}
    escaped = b'{"\\u0077":' + json.dumps(entry).encode() + b"}"
    return {
        "model": weights(model()),
        "scalar": weights({"s": np.array(1.0, np.float32)}),
        "empty": join_header(as_bytes(empty), bytes(8)),
        "packed": join_header(as_bytes(packed), bytes(2)),
        "escaped": join_header(escaped, bytes(8)),
        "none": join_header(b"{}", b""),
        "pointer": b"version https://git-lfs.github.com/spec/v1\n",
    }


TARGET = Target(_prepare, _seeds, CheckpointError, header(WORDS), WORDS)
