"""What the read of `plan` finds out about each tensor, and how that is put into few bytes."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from .preflight import TensorSpec
from .stream import chunks

__all__ = ["Findings", "content_hash", "pack", "unpack"]

Counts = npt.NDArray[np.int64]


@dataclass
class Findings:
    """What the read found out about one tensor; shapes and meanings as in `kernels.scanning.Found` and `Settled`.

    `first_chunk` and `first_row`: which of the core files' chunks and of the Gram matrices are its first; −1: it has
    none.
    """

    identical: bool
    digests: list[array[int]]
    updates: Counts
    pairs: Counts
    aligned: Counts
    inwards: Counts
    claimed: int
    sums: npt.NDArray[np.float64]
    first_chunk: int = -1
    first_row: int = -1

    @classmethod
    def empty(cls, spec: TensorSpec, tasks: int) -> Findings:
        """Nothing found yet."""
        digests = [array("Q") for _ in spec.sources]
        pairs, aligned, inwards = (np.zeros((tasks, tasks), np.int64) for _ in range(3))
        return cls(True, digests, np.zeros((tasks, 3), np.int64), pairs, aligned, inwards, 0, np.zeros((tasks, 2)))

    @property
    def hashes(self) -> list[str]:
        """For each checkpoint the xxh3-64 of its chunks' digests: identifies the tensor's content."""
        return [content_hash(digests) for digests in self.digests]


def content_hash(digests: Sequence[int]) -> str:
    """xxh3-64, in hex, of the xxh3-64 digests of a tensor's chunks, little-endian and in order."""
    return xxhash.xxh3_64_hexdigest(np.array(digests, "<u8").tobytes())


def pack(findings: Sequence[Findings], tasks: int) -> tuple[bytes, bytes]:
    """Everything but the digests of the chunks, a line of a table for each tensor; and these, one after the other."""
    table = np.zeros(len(findings), _line(tasks))
    for name in table.dtype.names or () if findings else ():
        table[name] = [getattr(found, name) for found in findings]
    digests = np.array([digest for found in findings for some in found.digests for digest in some], "<u8")
    return table.tobytes(), digests.tobytes()


def unpack(table: bytes, digests: bytes, specs: Sequence[TensorSpec], granularity: str) -> list[Findings]:
    """What `pack` was given, of these tensors. Raises ValueError where it cannot be theirs."""
    tasks = len(specs[0].density) if specs else 0
    lines = np.frombuffer(table, _line(tasks)).copy()
    values = array("Q", np.frombuffer(digests, "<u8").tolist())
    found, place = [], 0
    for spec, line in zip(specs, lines, strict=True):
        count, own = len(chunks(spec.shape, granularity)), []
        for _ in spec.sources:
            own.append(values[place : place + count])
            place += count
        found.append(Findings(digests=own, **{name: _plain(line[name]) for name in lines.dtype.names or ()}))
    if place != len(values):
        raise ValueError(f"{len(values)} digests, expected {place}")
    return found


def _line(tasks: int) -> np.dtype[np.void]:
    return np.dtype(
        [
            ("identical", "?"),
            ("updates", "<i8", (tasks, 3)),
            ("pairs", "<i8", (tasks, tasks)),
            ("aligned", "<i8", (tasks, tasks)),
            ("inwards", "<i8", (tasks, tasks)),
            ("claimed", "<i8"),
            ("sums", "<f8", (tasks, 2)),
            ("first_chunk", "<i8"),
            ("first_row", "<i8"),
        ]
    )


def _plain(value: Any) -> Any:
    """Numbers as Python's own; arrays as they are."""
    return value if isinstance(value, np.ndarray) else value.item()
