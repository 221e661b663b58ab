"""Writes safetensors shards byte by byte, and directories that appear only when all of them is on disk.

A shard has the bytes that the safetensors reference writer gives it: tensors by falling dtype rank, then by name;
the header padded with spaces to 8 bytes.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .budget import parse_size
from .checkpoint import ITEM_BYTES
from .errors import OutputError

__all__ = [
    "OutputTensor",
    "ShardLayout",
    "ShardWriter",
    "Target",
    "check_target",
    "index_json",
    "private_directory",
    "shard_layouts",
    "shard_limit",
    "staged_directory",
]

FLUSH_BYTES = 64_000_000  # written before the disk is asked to take them
MAX_SHARD_BYTES = 5_000_000_000  # as Hugging Face's "5GB"
# The reference writer's order of dtypes within a file.
RANK = ("U64", "I64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16", "I8", "U8", "BOOL")


_flush_data = getattr(os, "fdatasync", os.fsync)  # macOS has only the latter


@dataclass(frozen=True)
class Target:
    """Where an output goes. `force`: it replaces what is there. `shard_bytes`: of tensors, the most in one file."""

    directory: Path
    force: bool = False
    shard_bytes: int = MAX_SHARD_BYTES


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


class ShardWriter:
    """Writes one file. What was written goes to the disk while more is being made, not all of it at the end."""

    def __init__(self, file: Path, header: bytes) -> None:
        self.data_begin = len(header)
        self._handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        self._sha256 = hashlib.sha256()
        self._end = 0
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
        while data:
            count = os.pwrite(self._handle, data, offset)
            data, offset = data[count:], offset + count

    def hash(self, data: memoryview) -> None:
        """The next bytes of the file, which have been written."""
        self._sha256.update(data)
        self._end += len(data)
        if self._end >= self._flush_at and (self._flushing is None or self._flushing.done()):
            self._check_flushed()
            self._flush_at = self._end + FLUSH_BYTES
            self._flushing = self._flusher.submit(_flush_data, self._handle)

    def close(self) -> None:
        """Close the file; once is enough."""
        self._flusher.shutdown(wait=True)
        handle, self._handle = self._handle, -1
        if handle >= 0:
            os.close(handle)

    def finish(self) -> str:
        """Flush to the disk and close; returns the file's sha256 in hex."""
        self._check_flushed()
        os.fsync(self._handle)
        self.close()
        return self._sha256.hexdigest()

    def _check_flushed(self) -> None:
        if self._flushing is not None:
            self._flushing.result()  # an error of the disk is reported once


@contextmanager
def staged_directory(target: Path, force: bool, inputs: Iterable[Path]) -> Iterator[Path]:
    """A directory to fill, which becomes `target` when the block ends without an exception, and never otherwise.

    It is `.<name>.partial` beside the target. A non-empty target is replaced only with `force`, and never where an
    input lies in it. Raises OutputError.
    """
    inputs = tuple(inputs)
    check_target(target, force, inputs)
    real = _real(target)
    staging = _beside(real, "partial")
    with _output_errors(target), _locked(real):
        try:
            _remove(staging)  # what a killed run left
            staging.mkdir()
            yield staging
            check_target(target, force, inputs)  # much may have happened since
            _publish(staging, real)
        finally:
            shutil.rmtree(staging, ignore_errors=True)  # gone already where it was published


@contextmanager
def private_directory(target: Path, suffix: str) -> Iterator[Path]:
    """An empty directory for this run alone, hidden on the disk where `target` will be; gone afterwards.

    Its name is fixed, so that what a killed run left there is replaced by the next. Raises OutputError.
    """
    real = _real(target)
    parent = next(place for place in real.parents if place.is_dir())
    directory = parent / f".{real.name}{suffix}"
    with _output_errors(directory), _locked(directory):
        try:
            _remove(directory)
            directory.mkdir()
            yield directory
        finally:
            shutil.rmtree(directory, ignore_errors=True)


def check_target(target: Path, force: bool, inputs: Iterable[Path]) -> None:
    """Raise OutputError where `target` must not be written: it holds files or an input, or an input holds it."""
    real, inputs = _real(target), tuple(inputs)
    for path in (*inputs, Path.cwd()):
        if _real(path).is_relative_to(real):
            raise OutputError(f"{target}: holds {path}, which would be lost. Give another output directory")
    for path in inputs:
        if real.is_relative_to(_real(path)):
            raise OutputError(f"{target}: lies in {path}, which is an input. Give a directory outside of it")
    with _output_errors(target):
        nearest = next(place for place in (real, *real.parents) if place.exists())
        if not nearest.is_dir():
            raise OutputError(f"{target}: cannot be made, as {nearest} is no directory. Give another output directory")
        if os.path.ismount(real):
            raise OutputError(f"{target}: is a mount point, which cannot be replaced. Give a new directory in it")
        if real.is_dir() and not force and any(real.iterdir()):
            raise OutputError(f"{target}: not empty. Give another output directory, or --force to replace all of it")


def _real(path: Path) -> Path:
    """Absolute and without links: what is written lands where a link points, not in the place of the link."""
    return Path(os.path.realpath(os.path.expanduser(path)))


def _beside(real: Path, purpose: str) -> Path:
    """A hidden neighbour of the target, on the same disk."""
    return real.with_name(f".{real.name}.{purpose}")


@contextmanager
def _output_errors(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        cause = error.strerror or str(error)
        place = f"{error.filename}: " if error.filename else ""
        raise OutputError(f"{target}: cannot be written: {place}{cause}") from error


@contextmanager
def _locked(real: Path) -> Iterator[None]:
    """Hold `.<name>.lock` beside the target, so that no other run writes there. Raises OutputError where one does."""
    real.parent.mkdir(parents=True, exist_ok=True)
    file = _beside(real, "lock")
    try:
        handle = _lock(file)
    except BlockingIOError as error:
        raise OutputError(f"{real}: another run is writing it. Wait for it, or give another directory") from error
    try:
        yield
    finally:
        file.unlink(missing_ok=True)
        os.close(handle)


def _lock(file: Path) -> int:
    """An open handle that holds the lock, on the file that is there now: its last owner may have unlinked it.

    Raises BlockingIOError where another run holds it.
    """
    while True:
        handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(handle, file):
                return handle
        except OSError:
            os.close(handle)
            raise
        os.close(handle)


def _is_at(handle: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(file))
    except FileNotFoundError:
        return False


def _publish(staging: Path, real: Path) -> None:
    """Flush everything, then rename. A target that is replaced steps aside first and goes last."""
    for directory, _, files in os.walk(staging):
        for name in (*files, "."):
            _flush(Path(directory, name))
    replaced = _beside(real, "replaced")
    _remove(replaced)
    if real.exists():
        os.rename(real, replaced)
    try:
        os.rename(staging, real)
    except OSError:
        if replaced.exists():
            os.rename(replaced, real)
        raise
    _flush(real.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
