"""What `plan` writes to its journal: records of pools that are settled, and of the first look at a large one.

Tables travel as base64 of little-endian bytes, so that tens of thousands of tensors stay cheap.
"""

from __future__ import annotations

from base64 import b64decode, b64encode
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import accumulate
from typing import Annotated

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, Strict, TypeAdapter, ValidationError

from .examination import Begun
from .journal import Record
from .kernels.scanning import Found
from .passes import Block, Scanned, nothing_found
from .preflight import TensorSpec
from .selection import Bracket
from .shelf import Shelved
from .stream import Chunk

__all__ = ["CoreRecord", "PoolsRecord", "ScanRecord", "begun_of", "blob", "parse_records", "raw", "scan_record"]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


Count = Annotated[int, Field(ge=0)]
Numbers = Annotated[tuple[int, int, int], Strict(False)]  # JSON has lists only
Problem = Annotated[tuple[int, int, str], Strict(False)]


class CoreRecord(_Record):
    """Of a task's core file: `ends` of the chunks since the last record (uint64), xxh3-128 of all before the last."""

    ends: str
    xxh3: str


class PoolsRecord(_Record):
    """Pools [first, last) are settled.

    `chunks` and `rows`: how many the core files and the Gram file have by then, `grams_xxh3` the latter's xxh3-128.
    `table` and `digests` are of the pools' tensors, as `findings.pack` gives them. `problems` are those of these
    tensors: [tensor's number among them, checkpoint, text].
    """

    first: Count
    last: Count
    chunks: Count
    rows: Count
    cores: list[CoreRecord]
    grams_xxh3: str
    table: str
    digests: str
    problems: list[Problem]


class ScanRecord(_Record):
    """The chunks [first, last) of pool number `pool` were scanned, with the bracket [low, high].

    `table` is as `scan_record` makes it. `faults` and `overflows`: [chunk's number in the table, checkpoint, index].
    """

    pool: Count
    first: Count
    last: Count
    low: list[int]
    high: list[int]
    table: str
    faults: list[Numbers]
    overflows: list[Numbers]


_RECORDS: TypeAdapter[PoolsRecord | ScanRecord] = TypeAdapter(PoolsRecord | ScanRecord)


def parse_records(done: Iterable[Record]) -> tuple[list[PoolsRecord], list[ScanRecord]]:
    """Those that still hold, in order. A run that took over less than was recorded did the rest again."""
    pools: list[PoolsRecord] = []
    scans: list[ScanRecord] = []
    for entry in done:
        with suppress(ValidationError):
            record = _RECORDS.validate_python(entry)
            if isinstance(record, ScanRecord):
                scans.append(record)
                continue
            while pools and pools[-1].last > record.first:
                pools.pop()
            pools.append(record)
    return pools, scans


def blob(data: bytes) -> str:
    """Bytes as text."""
    return b64encode(data).decode()


def raw(text: str) -> bytes:
    """What `blob` was given. Raises ValueError."""
    return b64decode(text, validate=True)


def scan_record(pool: int, first: int, bracket: Bracket, scanned: Sequence[Scanned]) -> ScanRecord:
    """Of so many chunks, whose arrays are on the shelf."""
    table = np.array([_values(one) for one in scanned], _line(len(scanned[0].counts), len(scanned[0].digests)))
    return ScanRecord(
        pool=pool,
        first=first,
        last=first + len(scanned),
        low=bracket.low.tolist(),
        high=bracket.high.tolist(),
        table=blob(table.tobytes()),
        faults=[(n, *fault) for n, one in enumerate(scanned) for fault in (one.faults or {}).items()],
        overflows=[(n, *fault) for n, one in enumerate(scanned) for fault in (one.overflows or {}).items()],
    )


def _line(tasks: int, checkpoints: int) -> np.dtype[np.void]:
    return np.dtype(
        [
            ("offset", "<u8"),
            ("xxh3", "<u8"),
            ("opened", "<u4"),
            ("identical", "?"),
            ("is_crowded", "?"),
            ("digests", "<u8", (checkpoints,)),
            ("counts", "<i8", (tasks, 5)),
        ]
    )


def _values(one: Scanned) -> tuple[object, ...]:
    """A line of the table."""
    kept = one.kept
    assert isinstance(kept, Shelved)
    opened = kept.kinds[PLACES][1][0]
    return kept.offset, kept.xxh3, opened, one.identical, one.is_crowded, one.digests, one.counts


def begun_of(records: Iterable[ScanRecord], blocks: Iterable[Block], member: int) -> Begun | None:
    """What the records of one pool, which has these blocks, say of it; None where that is nothing.

    As many whole blocks as make sense. Whether the arrays still are on the shelf is left to see.
    """
    blocks = list(blocks)
    chunks = [(block.spec, chunk) for block in blocks for chunk in block.chunks]
    bracket, bounds, known = None, None, list[Scanned]()
    with suppress(ValueError, OverflowError):
        for record in records:
            if record.first == 0:
                bracket, bounds, known = _bracket(record), (record.low, record.high), []
            if bounds != (record.low, record.high) or record.first > len(known):
                break
            known[record.first :] = _scanned(record, chunks[record.first :], member)
    if bracket is None:
        return None
    ends = [0, *accumulate(len(block.chunks) for block in blocks)]
    return Begun(bracket, known[: ends[bisect_right(ends, len(known)) - 1]])


def _bracket(record: ScanRecord) -> Bracket:
    """Raises OverflowError where these are no magnitudes."""
    return Bracket(np.array(record.low, np.uint32), np.array(record.high, np.uint32))


def _scanned(record: ScanRecord, chunks: Sequence[tuple[TensorSpec, Chunk]], member: int) -> list[Scanned]:
    """What a record says of some of these chunks, the first of them. Raises ValueError where it cannot be theirs."""
    tasks, checkpoints = len(chunks[0][0].density), len(chunks[0][0].sources)
    if len(record.low) != tasks or len(record.high) != tasks:
        raise ValueError("a bracket for other tasks")
    table = np.frombuffer(raw(record.table), _line(tasks, checkpoints))
    faults, overflows = (_by_chunk(some) for some in (record.faults, record.overflows))
    if not len(table) == record.last - record.first <= len(chunks):
        raise ValueError("more chunks than there are")
    return [
        Scanned(
            spec=spec,
            chunk=chunk,
            digests=line["digests"].tolist(),
            identical=bool(line["identical"]),
            counts=line["counts"].copy(),
            kept=_shelved(line, chunk, member),
            is_crowded=bool(line["is_crowded"]),
            faults=faults.get(number),
            overflows=overflows.get(number),
        )
        for number, ((spec, chunk), line) in enumerate(zip(chunks, table, strict=False))
    ]


def _shelved(line: np.void, chunk: Chunk, member: int) -> Shelved:
    opened, tasks, checkpoints = int(line["opened"]), len(line["counts"]), len(line["digests"])
    if opened > chunk.size:
        raise ValueError("more open elements than there are")
    values = np.empty((opened, checkpoints), np.float32)
    found = nothing_found(chunk, tasks, member, np.empty(opened, np.uint32), values)
    kinds = tuple((array.dtype, array.shape) for array in found)
    return Shelved(int(line["offset"]), kinds, int(line["xxh3"]))


def _by_chunk(some: Iterable[tuple[int, int, int]]) -> dict[int, dict[int, int]]:
    found: dict[int, dict[int, int]] = {}
    for number, checkpoint, place in some:
        found.setdefault(number, {})[checkpoint] = place
    return found


PLACES = Found._fields.index("places")
