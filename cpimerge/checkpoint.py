"""A checkpoint directory as named tensors that can be read by byte range.

Only headers are read here. A header is validated at least as strictly as the safetensors reference reader does it,
and every problem of a checkpoint is listed at once.
"""

from __future__ import annotations

import math
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from .errors import CheckpointError
from .ordinary import read_ordinary
from .plain_json import is_deep, parse_object, says_minus_zero, shown

if TYPE_CHECKING:
    from .ties import Twins

__all__ = [
    "Checkpoint",
    "Shard",
    "StoredTensor",
    "Tensor",
    "collect",
    "forget_headers",
    "is_name",
    "is_unicode",
    "layer_of",
    "natural_key",
    "read_header",
    "read_json_object",
    "shown",
]

FLOAT_BYTES = {"F16": 2, "BF16": 2, "F32": 4}
COPIED_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "U16": 2, "I32": 4, "U32": 4, "I64": 8, "U64": 8}
# Known to the format, refused by preflight with the reason.
PACKED_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}  # elements that share bytes
REFUSED_BYTES = {
    **{"F64": 8, "C64": 8, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1},
    **dict.fromkeys(PACKED_BITS, 1),  # in name: they are never read
}
ITEM_BYTES = FLOAT_BYTES | COPIED_BYTES | REFUSED_BYTES
FLOAT_NAMES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}

HEADS = ("lm_head", "embed_out", "output", "decoder")  # what models call the layer that may be tied to the embeddings

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
MAX_HEADER_BYTES = 100_000_000  # the reference reader's own limit
MAX_JSON_BYTES = 64_000_000  # several times the largest index that is about
MAX_SIZE = 1 << 63
MAX_NAME = 1_000  # characters; no real name comes near it, and numbers in names stay small enough to compare
MAX_READ_BYTES = 1 << 30  # Linux transfers at most 2 GiB a call
AGAIN = "Download or save it again"
UNNAMED = f"its name is not Unicode of at most {MAX_NAME} characters. Save the checkpoint with another name for it"


_Entry = tuple[str, str, tuple[int, ...], int, int]  # name, dtype, shape, offset in the file, bytes


@dataclass(frozen=True, slots=True)
class Tensor(ABC):
    """One tensor of a checkpoint, readable by byte range: as it is stored, or computed as it is read.

    `dtype` as safetensors spells it: "BF16". `nbytes` are its bytes, row-major and little-endian.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def item_bytes(self) -> int:
        return ITEM_BYTES[self.dtype]

    @property
    def is_float(self) -> bool:
        return self.dtype in FLOAT_BYTES

    @property
    def scratch_bytes(self) -> int:
        """What a thread that reads it must hold at most beside the buffer it reads into."""
        return 0

    @abstractmethod
    def read_into(self, buffer: memoryview, start: int, handles: Handles) -> None:
        """Fill `buffer` (writable, contiguous bytes) from the tensor's bytes beginning at byte `start`.

        Both are whole elements. What is read does not depend on how a tensor is divided into reads, nor on the
        thread. Raises CheckpointError where a file ends early or cannot be read.
        """


@dataclass(frozen=True, slots=True)
class StoredTensor(Tensor):
    """A tensor whose bytes lie in `file` as they are, from byte `offset` on."""

    file: Path
    offset: int

    def read_into(self, buffer: memoryview, start: int, handles: Handles) -> None:
        """As for every `Tensor`. A file that ends early changed since its header was read."""
        try:
            handle = handles.of(self.file)
            done = 0
            while done < len(buffer):
                rest = buffer[done : done + MAX_READ_BYTES]
                count = os.preadv(handle, [rest], self.offset + start + done)
                if not count:
                    raise CheckpointError(
                        f"{self.file}: tensor {self.name!r}: the file ended {len(buffer) - done} bytes early. "
                        "It changed during the run: start again when nothing writes to it"
                    )
                done += count
        except OSError as error:
            raise CheckpointError(f"{self.file}: tensor {self.name!r}: cannot be read: {error.strerror}") from error


class Handles:
    """Files that one thread reads from, kept open: opening one takes longer than reading a small tensor."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._open: dict[Path, int] = {}

    def of(self, file: Path) -> int:
        """A handle of `file`, open for reading until `limit` others were asked for. Raises OSError."""
        return self.all([file])[0]

    def all(self, files: Sequence[Path]) -> list[int]:
        """Handles of all `files` at once, more than `limit` if need be. Raises OSError."""
        for file in files:  # those used last stand last
            handle = self._open.pop(file, None)
            self._open[file] = os.open(file, os.O_RDONLY | os.O_CLOEXEC) if handle is None else handle
        while len(self._open) > max(self._limit, len(set(files))):
            os.close(self._open.pop(next(iter(self._open))))
        return [self._open[file] for file in files]

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])


@dataclass(frozen=True)
class Shard:
    """One file with weights: its size in bytes and the xxh3-128 of its header (of its pickle, for `.bin`)."""

    file: Path
    size: int
    header_xxh3: str
    tensors: tuple[StoredTensor, ...]

    @property
    def sha256(self) -> str | None:
        """The file's sha256 where the Hugging Face cache already names it (its blobs are called by it)."""
        blob = Path(os.path.realpath(self.file))
        return blob.name if blob.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", blob.name) else None


@dataclass(frozen=True)
class Checkpoint:
    """A directory with a model's weights, perhaps with an adapter on it.

    `tensors` are in natural-sorted order of their names. `config` is config.json, empty where there is none.
    `adapter` is the directory of the adapter; `shards` holds its file too, then.
    """

    path: Path
    shards: tuple[Shard, ...]
    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any]
    adapter: Path | None = None
    notes: tuple[str, ...] = ()  # what was noticed when it was opened
    twins: tuple[Twins, ...] = ()  # what was taken to be equal when it was laid onto the base (see ties.py)

    @property
    def where(self) -> Path:
        """The directory that messages name: the adapter's, where there is one."""
        return self.adapter or self.path

    @property
    def directories(self) -> tuple[Path, ...]:
        """The model's and the adapter's."""
        return (self.path,) if self.adapter is None else (self.path, self.adapter)

    @property
    def scratch_bytes(self) -> int:
        """What a thread that reads it must hold at most beside the buffers that it reads into."""
        return max((info.scratch_bytes for info in self.tensors.values()), default=0)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(info.nbytes for info in self.tensors.values())

    @property
    def tied(self) -> bool | None:
        """Whether its config says that the output head is the input embedding; None: it does not say."""
        text = self.config.get("text_config")
        for config in (self.config, text if isinstance(text, dict) else {}):
            if isinstance(config.get("tie_word_embeddings"), bool):
                return config["tie_word_embeddings"] is True
        return None

    @property
    def ties_embeddings(self) -> bool:
        """Whether its config says that the output head is the input embedding."""
        return self.tied is True


@lru_cache(1 << 16)  # every checkpoint has the same names
def natural_key(name: str) -> tuple[tuple[tuple[int, int | str], ...], str]:
    """Sort key that orders `layers.2.` before `layers.10.`; equal numbers fall back to the plain string."""
    runs = (run for run in re.split(r"([0-9]+)", name) if run)
    return tuple((0, int(run)) if run.isdigit() and run.isascii() else (1, run) for run in runs), name


@lru_cache(1 << 16)
def layer_of(name: str) -> str:
    """The name up to and including its first all-digit component (`model.layers.3.`); '' where it has none."""
    parts = name.split(".")
    for count, part in enumerate(parts, 1):
        if part.isdigit() and part.isascii():
            return ".".join(parts[:count]) + "."
    return ""


@contextmanager
def collect(path: Path, problems: list[str]) -> Iterator[None]:
    """Errors of the block become problems, so that the search for others goes on."""
    try:
        yield
    except CheckpointError as error:
        problems.extend(error.problems)
    except OSError as error:
        problems.append(f"{path}: cannot be read: {error.strerror}")


def read_header(file: Path, size: int | None = None) -> Shard:
    """Read and validate one safetensors header. Raises CheckpointError listing all its problems, or OSError.

    `size` is the whole file's, in bytes, where `file` holds no more than its header.
    """
    size = file.stat().st_size if size is None else size
    with open(file, "rb") as stream:
        start = stream.read(8)
        length = int.from_bytes(start, "little")
        if start == b"version ":
            raise CheckpointError(f"{file}: is a Git LFS pointer, not the weights. Fetch them with `git lfs pull`")
        if length > size - 8:
            raise CheckpointError(f"{file}: incomplete: {size} bytes, shorter than its own header. {AGAIN}")
        if length > MAX_HEADER_BYTES:
            raise CheckpointError(f"{file}: header of {length} bytes; the format allows {MAX_HEADER_BYTES}. {AGAIN}")
        raw = stream.read(length)
    entries, problems = _parsed(raw, size)
    if problems:
        raise CheckpointError(f"{file}: {problem}" for problem in problems)
    tensors = (StoredTensor(name, dtype, shape, nbytes, file, begin) for name, dtype, shape, begin, nbytes in entries)
    return Shard(file, size, xxhash.xxh3_128_hexdigest(raw), tuple(tensors))


def forget_headers() -> None:
    """Models that are opened together share what was parsed; to be called when they are open."""
    _parsed.cache_clear()


@lru_cache(1 << 8)
def _parsed(raw: bytes, size: int) -> tuple[tuple[_Entry, ...], tuple[str, ...]]:
    """A header's tensors, and what is wrong with it, in a file of `size` bytes.

    Fine-tunes mostly have the very headers of their base, so that each is parsed once for all of them.
    """
    try:
        found = parse_object(raw)
    except ValueError as error:
        return (), (f"{error}. {AGAIN}",)
    problems = [f"-0 is not a size. {AGAIN}"] if says_minus_zero(raw) else []
    if not _is_metadata(found.pop("__metadata__", None)):
        problems.append(f"'__metadata__' must map text to text. {AGAIN}")
    faults = ((name, _entry_fault(name, entry)) for name, entry in found.items())
    problems += [f"tensor {shown(name)}: {fault}" for name, fault in faults if fault]
    entries = () if problems else tuple(_entry(name, entry, 8 + len(raw)) for name, entry in found.items())
    return entries, tuple(problems or _layout_problems(entries, 8 + len(raw), size))


def _is_metadata(value: Any) -> bool:
    return value is None or (isinstance(value, dict) and all(map(is_unicode, (*value.keys(), *value.values()))))


def _entry(name: str, entry: Mapping[str, Any], data_start: int) -> _Entry:
    begin, end = entry["data_offsets"]
    return name, entry["dtype"], tuple(entry["shape"]), data_start + begin, end - begin


def _entry_fault(name: str, entry: Any) -> str | None:
    """What is wrong with a header entry, and what to do."""
    if not is_name(name):
        return UNNAMED
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        return f"its header entry must have exactly dtype, shape and data_offsets. {AGAIN}"
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        return f"unsupported dtype {shown(dtype)}. Convert the checkpoint to bfloat16 or float32"
    if not _are_sizes(shape):
        return f"shape {shown(shape)} is not a list of sizes. {AGAIN}"
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        return f"data_offsets {shown(offsets)} are not a begin and an end. {AGAIN}"
    needed = _nbytes(shape, ITEM_BYTES[dtype])
    if needed is not None and dtype in PACKED_BITS:
        needed, rest = divmod(needed * PACKED_BITS[dtype], 8)
        if rest:
            return f"{dtype} {shown(shape)} does not end at a byte. {AGAIN}"
    if needed is None:
        return f"{dtype} {shown(shape)} is larger than any file. {AGAIN}"
    if needed != offsets[1] - offsets[0]:
        return f"{dtype} {shown(shape)} needs {needed} bytes, data_offsets give {offsets[1] - offsets[0]}. {AGAIN}"
    return None


def is_name(text: str) -> bool:
    """Whether a tensor may be called so."""
    return len(text) <= MAX_NAME and is_unicode(text)


def is_unicode(text: Any) -> bool:
    """Whether it is text, without half a surrogate pair: JSON can say that, and no file can hold it."""
    return isinstance(text, str) and (text.isascii() or not any("\ud800" <= char <= "\udfff" for char in text))


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < MAX_SIZE for size in value)


def _nbytes(shape: Iterable[int], item_bytes: int) -> int | None:
    """Bytes of a tensor; None beyond any file. Not `math.prod`, which takes forever over a hostile shape."""
    product = item_bytes
    for size in shape:
        product *= size
        if product >= MAX_SIZE:
            return None
    return product


def _layout_problems(entries: Iterable[_Entry], data_start: int, size: int) -> Iterator[str]:
    """Tensors must fill the data section without holes or overlaps."""
    end = data_start
    for name, _, _, begin, nbytes in sorted(entries, key=itemgetter(3, 4)):
        if begin != end:
            fault = "overlaps the tensor before it" if begin < end else f"{begin - end} unused bytes before it"
            yield f"tensor {name!r}: {fault}. {AGAIN}"
        end = max(end, begin + nbytes)
    if end > size:
        yield f"incomplete: {size} bytes, its header promises {end}. {AGAIN}"
    elif end < size:
        yield f"{size - end} bytes after the last tensor. {AGAIN}"


def read_json_object(file: Path) -> dict[str, Any]:
    """A file as a JSON object without duplicate keys, of sane depth. Raises CheckpointError, or OSError."""
    try:
        found = parse_object(read_ordinary(file, MAX_JSON_BYTES))
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}. {AGAIN}") from error
    if is_deep(found):
        raise CheckpointError(f"{file}: its JSON is nested too deeply. {AGAIN}")
    return found
