"""Writes safetensors shards byte by byte, so that a run that is cut off can be gone on with.

A shard has the bytes that the safetensors reference writer gives it: tensors by falling dtype rank, then by name;
the header padded with spaces to 8 bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import xxhash
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from .budget import parse_size
from .checkpoint import ITEM_BYTES
from .disk import flush_all, flush_data, open_to_write, write_at
from .errors import OutputError
from .journal import Record

__all__ = [
    "BegunShard",
    "FinishedShard",
    "OutputTensor",
    "ShardLayout",
    "ShardRecord",
    "ShardWriter",
    "index_json",
    "shard_layouts",
    "shard_limit",
    "shard_records",
]

FLUSH_BYTES = 64_000_000  # written before the disk is asked to take them
REREAD_BYTES = 1 << 20
MAX_SHARD_BYTES = 5_000_000_000  # as Hugging Face's "5GB"
# The reference writer's order of dtypes within a file.
RANK = ("U64", "I64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16", "I8", "U8", "BOOL")


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """One tensor of the output; `dtype` as safetensors spells it."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.elements * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class ShardLayout:
    """One output file: its name, and its tensors in the order of their bytes."""

    filename: str
    tensors: Sequence[OutputTensor]

    def header(self) -> bytes:
        """The length of the header and the header, as they open the file."""
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for tensor in self.tensors:
            begin, end = end, end + tensor.nbytes
            entries[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
        text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text


def shard_limit(size: int | str | None) -> int:
    """What a user wrote (bytes, or text such as "5GB") → bytes; None: the default. Raises OutputError."""
    try:
        limit = MAX_SHARD_BYTES if size is None else parse_size(size)
    except ValueError as error:
        raise OutputError(f"shard_size: {error}") from error
    if not limit:
        raise OutputError("shard_size: a file of 0 bytes holds nothing: write it like 5GB")
    return limit


def shard_layouts(tensors: Iterable[OutputTensor], max_shard_bytes: int = MAX_SHARD_BYTES) -> list[ShardLayout]:
    """Split tensors into shards as Hugging Face does; one `model.safetensors` where they fit into it.

    Only a tensor that is larger by itself makes a shard larger than `max_shard_bytes`, which do not count the header.
    """
    from huggingface_hub import split_state_dict_into_shards_factory  # which a mistake in the recipe need not wait for

    by_name = {tensor.name: tensor for tensor in tensors}
    split = split_state_dict_into_shards_factory(
        by_name,
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_bytes,
    )
    return [
        ShardLayout(filename, sorted((by_name[name] for name in names), key=lambda t: (RANK.index(t.dtype), t.name)))
        for filename, names in split.filename_to_tensors.items()
    ]


def index_json(layouts: Sequence[ShardLayout]) -> str:
    """The text of `model.safetensors.index.json`."""
    everything = [(tensor, layout.filename) for layout in layouts for tensor in layout.tensors]
    metadata = {
        "total_parameters": sum(tensor.elements for tensor, _ in everything),
        "total_size": sum(tensor.nbytes for tensor, _ in everything),
    }
    weight_map = {tensor.name: filename for tensor, filename in everything}
    return json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n"


class FinishedShard(BaseModel):
    """A record of a shard that is all on the disk: sizes in bytes, its sha256, and when it was last written."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    shard: str
    size: int
    mtime_ns: int
    sha256: str

    def holds(self, file: Path) -> bool:
        """Whether `file` still is what was recorded, as far as its entry in the directory tells. Raises OSError."""
        try:
            found = os.lstat(file)
        except FileNotFoundError:
            return False
        return stat.S_ISREG(found.st_mode) and (found.st_size, found.st_mtime_ns) == (self.size, self.mtime_ns)


class BegunShard(BaseModel):
    """A record of a shard whose first `tensors` are on the disk: the file's first `end` bytes, and their xxh3-64."""

    model_config = FinishedShard.model_config

    shard: str
    tensors: int
    end: int
    xxh3: str

    def fits(self, layout: ShardLayout) -> bool:
        """Whether so many tensors of the shard end there."""
        sizes = [tensor.nbytes for tensor in layout.tensors[: self.tensors]]
        return 0 < self.tensors == len(sizes) and self.end == len(layout.header()) + sum(sizes)


ShardRecord = FinishedShard | BegunShard
_RECORDS: TypeAdapter[ShardRecord] = TypeAdapter(ShardRecord)


def shard_records(done: Iterable[Record]) -> dict[str, ShardRecord]:
    """The last that is known of each shard, by filename. What is no record of a shard is left out."""
    records: dict[str, ShardRecord] = {}
    for entry in done:
        with suppress(ValidationError):
            record = _RECORDS.validate_python(entry)
            records[record.shard] = record
    return records


class ShardWriter:
    """Writes one file. What was written goes to the disk while more is being made, not all of it at the end.

    `record` is told, on any thread, what has arrived there.
    """

    def __init__(self, file: Path, header: bytes, record: Callable[[Record], None] = lambda record: None) -> None:
        self.data_begin = len(header)
        self._file = file
        self._record = record
        self._handle = open_to_write(file)
        self._sha256 = hashlib.sha256()
        self._xxh3 = xxhash.xxh3_64()
        self._end = 0
        self._mark: BegunShard | None = None
        self._recorded: BegunShard | None = None
        self._flusher = ThreadPoolExecutor(1, thread_name_prefix="cpimerge-flush")
        self._flushing: Future[None] | None = None
        self._flush_at = FLUSH_BYTES
        try:
            self.append(memoryview(header))
        except OSError:
            self.close()
            raise

    def append(self, data: memoryview) -> None:
        """Write `data`, contiguous bytes, behind what was hashed so far, and hash it."""
        self.write(data, self._end)
        self.hash(data)

    def write(self, data: memoryview, offset: int) -> None:
        """Write `data` at `offset`, in any order and on any thread; `hash` must be given the same, in order."""
        write_at(self._handle, data, offset)

    def hash(self, data: memoryview) -> None:
        """The next bytes of the file, which have been written."""
        self._sha256.update(data)
        self._xxh3.update(data)
        self._end += len(data)
        if self._end >= self._flush_at and (self._flushing is None or self._flushing.done()):
            self._check_flushed()
            self._flush_at = self._end + FLUSH_BYTES
            self._flushing = self._flusher.submit(self._flush)

    def mark(self, tensors: int) -> None:
        """What was hashed so far are so many tensors, whole ones, from where a later run may go on."""
        self._mark = BegunShard(shard=self._file.name, tensors=tensors, end=self._end, xxh3=self._xxh3.hexdigest())

    def go_on(self, begun: BegunShard) -> bool:
        """Take over what an earlier run wrote, in a new writer. False, and nothing is taken, where it is not there.

        It is read again: for the sha256, and because a disk may lose what it said it had.
        """
        sha256, xxh3 = self._sha256.copy(), self._xxh3.copy()
        buffer = memoryview(bytearray(REREAD_BYTES))
        place = self._end
        while place < begun.end:
            count = os.preadv(self._handle, [buffer[: begun.end - place]], place)
            if not count:
                return False
            sha256.update(buffer[:count])
            xxh3.update(buffer[:count])
            place += count
        if xxh3.hexdigest() != begun.xxh3:
            return False
        self._sha256, self._xxh3, self._end = sha256, xxh3, place
        self._mark = self._recorded = begun
        return True

    def close(self) -> None:
        """Close the file, and keep what is whole of it for a later run; once is enough."""
        self._flusher.shutdown(wait=True)
        handle = self._handle
        if handle < 0:
            return
        with suppress(OSError):  # what cannot be kept is done again
            self._flush()
        self._handle = -1
        os.close(handle)

    def finish(self) -> str:
        """Flush to the disk and close; returns the file's sha256 in hex."""
        self._check_flushed()
        self._flusher.shutdown(wait=True)
        os.ftruncate(self._handle, self._end)
        flush_all(self._handle)
        written = os.fstat(self._handle)
        handle, self._handle = self._handle, -1
        os.close(handle)
        sha256 = self._sha256.hexdigest()
        finished = FinishedShard(
            shard=self._file.name, size=written.st_size, mtime_ns=written.st_mtime_ns, sha256=sha256
        )
        self._record(finished.model_dump())
        return sha256

    def _flush(self) -> None:
        mark = self._mark  # before the flush: all that it speaks of was written
        flush_data(self._handle)
        if mark is not None and mark is not self._recorded:
            self._record(mark.model_dump())
            self._recorded = mark

    def _check_flushed(self) -> None:
        if self._flushing is not None:
            self._flushing.result()  # an error of the disk is reported once
