"""One `pytorch_model.bin`: its tensors as places in the file, without loading any of them.

Such a file is a zip archive of uncompressed records: a pickle that says what the tensors are called and made of, and
their bytes. Only PyTorch's `weights_only` loader reads the pickle, and only after every name in it was found on a
short list: nothing of a stranger's file is ever run. It is given a stand-in of the archive, whose records are empty,
and tells where in that each tensor's storage begins; the real record of the same name lies where `zipfile` says.
"""

from __future__ import annotations

import io
import logging
import os
import pickletools
import re
import struct
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import xxhash

from .checkpoint import AGAIN, ITEM_BYTES, MAX_NAME, Shard, StoredTensor, is_unicode, shown
from .errors import CheckpointError
from .plain_json import LONG_NUMBER

if TYPE_CHECKING:
    import torch

__all__ = ["read_pickled"]

CONVERT = "Load it with transformers and save it as safetensors"
# What the pickle of a state dict may name. PyTorch's own list is longer: it holds what no state dict needs.
ALLOWED = {
    ("collections", "OrderedDict"),
    *(("torch._utils", f"_rebuild_{what}") for what in ("tensor", "tensor_v2", "tensor_v3", "parameter")),
    ("torch.storage", "UntypedStorage"),
}
STORAGE_OR_DTYPE = re.compile(r"[A-Z][A-Za-z0-9]*Storage|(?:b?float|u?int|complex|bool)[a-z0-9_]*")
# Other ways to name things or to have them twice, which torch.save does not use.
NEVER = {"STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4", "DUP", "GET", "PUT", "MEMOIZE"}
PUTS, GETS = {"BINPUT", "LONG_BINPUT"}, {"BINGET", "LONG_BINGET"}
CONTAINERS = {"EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET", "LIST", "DICT", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"}
# torch's dtypes as safetensors spells them.
DTYPES = {
    **{"bool": "BOOL", "uint8": "U8", "int8": "I8", "uint16": "U16", "int16": "I16", "uint32": "U32", "int32": "I32"},
    **{"uint64": "U64", "int64": "I64", "float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64"},
    **{"complex64": "C64", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0"},
    **{"float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2fnuz": "F8_E5M2FNUZ"},
}
LEGACY = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # how PyTorch before 1.6 begins a file
MAX_DIRECTORY_BYTES = 1 << 24  # of the archive's directory: 200,000 records
MAX_PICKLE_BYTES = 1 << 24  # some 80,000 tensors; it is gone through step by step
LOCAL_HEADER = struct.Struct("<4s22xHH")


@dataclass(frozen=True)
class _Archive:
    """An archive's pickle, and its records `data/<key>` by key."""

    pickle: bytes
    records: Mapping[str, zipfile.ZipInfo]


def read_pickled(file: Path) -> Shard:
    """The tensors of one file that `torch.save` wrote; reads its pickle and no tensor.

    Raises CheckpointError listing all its problems, or OSError.
    """
    size = file.stat().st_size
    with open(file, "rb") as stream:
        _check_kind(file, stream, size)
        with _as_problems(file):
            archive = _archive(file, stream, size)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about what the file is; whether it will do is seen here
            problems = list(_forbidden(file, archive.pickle))
            if problems:
                raise CheckpointError(problems)
            content, keys = _load(file, archive)
        tensors: list[StoredTensor] = []
        firsts: dict[int, StoredTensor] = {}
        for name, value in content.items():
            try:
                tensors.append(_stored(file, stream, name, value, archive.records, keys))
                if (place := _place(value)) is not None:
                    _check_alone(firsts.setdefault(place, tensors[-1]), tensors[-1])
            except _Unfit as error:
                problems.append(f"{file}: tensor {shown(name)}: {error}")
    if problems:
        raise CheckpointError(problems)
    return Shard(file, size, xxhash.xxh3_128_hexdigest(archive.pickle), tuple(tensors))


class _Unfit(Exception):
    """What is wrong with one tensor, and what to do."""


@contextmanager
def _as_problems(file: Path) -> Iterator[None]:
    try:
        yield
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, ValueError, EOFError, struct.error) as error:
        raise CheckpointError(f"{file}: is no sound archive: {_line(error)}. {AGAIN}") from error


def _line(error: Exception) -> str:
    """The first sentence of what a library says, on one line and without colours."""
    if str(error).startswith(LONG_NUMBER):
        return "a number of more than 4300 digits"
    text = re.split(r"\.\s|\n", re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip(), maxsplit=1)[0]
    return " ".join(text.split())[:200].rstrip(".")


def _check_kind(file: Path, stream: BinaryIO, size: int) -> None:
    """That it is an archive whose directory is of a sane size: `zipfile` reads all of it."""
    start = stream.read(len(LEGACY))
    if start.startswith(b"version "):
        raise CheckpointError(f"{file}: is a Git LFS pointer, not the weights. Fetch them with `git lfs pull`")
    if start == LEGACY:
        raise CheckpointError(f"{file}: was written as PyTorch did before 1.6. {CONVERT}")
    if not start.startswith(b"PK\3\4"):
        raise CheckpointError(f"{file}: is not an archive as torch.save writes it. {AGAIN}, or {_lower(CONVERT)}")
    stream.seek(max(0, size - 42))
    end = stream.read(42)
    if end[-22:-18] != b"PK\5\6":
        raise CheckpointError(f"{file}: incomplete: {size} bytes, and no end of the archive. {AGAIN}")
    length = int.from_bytes(end[-10:-6], "little")
    if length == 0xFFFFFFFF:  # then it stands in the archive's 64-bit end, which the bytes before this one point at
        stream.seek(min(size, int.from_bytes(end[8:16], "little")))
        length = int.from_bytes(stream.read(56)[40:48], "little")
    if length > MAX_DIRECTORY_BYTES:
        raise CheckpointError(f"{file}: an archive of too many records: their list has {length} bytes. {CONVERT}")


def _lower(text: str) -> str:
    return text[0].lower() + text[1:]


def _archive(file: Path, stream: BinaryIO, size: int) -> _Archive:
    """Read the pickle. Raises CheckpointError, or what `zipfile` raises."""
    with zipfile.ZipFile(stream) as archive:
        infos = {info.filename: info for info in archive.infolist()}
        if len(infos) < len(archive.infolist()):
            raise CheckpointError(f"{file}: has two records of one name. {AGAIN}")
        if not all(0 <= info.header_offset < size for info in infos.values()):
            raise CheckpointError(f"{file}: has records outside the file. {AGAIN}")
        roots = [name.removesuffix("data.pkl") for name in infos if re.fullmatch(r"[^/]+/data\.pkl", name)]
        if len(roots) != 1:
            raise CheckpointError(f"{file}: is not an archive as torch.save writes it: it has no pickle. {CONVERT}")
        root = roots[0]
        if f"{root}constants.pkl" in infos:
            raise CheckpointError(f"{file}: is a TorchScript program, not weights. Give the weights it was made from")
        for name in ("data.pkl", "byteorder"):
            _check_record(file, infos.get(root + name))
        if f"{root}byteorder" in infos and archive.read(f"{root}byteorder") != b"little":
            raise CheckpointError(f"{file}: was saved on a big-endian machine. {CONVERT}")
        data = f"{root}data/"
        records = {name.removeprefix(data): info for name, info in infos.items() if name.startswith(data)}
        return _Archive(archive.read(f"{root}data.pkl"), records)


def _check_record(file: Path, info: zipfile.ZipInfo | None) -> None:
    """That a record which is read whole lies in the file as it is."""
    if info is not None and info.file_size > MAX_PICKLE_BYTES:
        raise CheckpointError(f"{file}: {shown(info.filename)} has {info.file_size} bytes. {CONVERT}")
    if info is not None and not _is_plain(info):
        raise CheckpointError(f"{file}: is compressed or encrypted. {CONVERT}")


def _is_plain(info: zipfile.ZipInfo) -> bool:
    stored = info.compress_type == zipfile.ZIP_STORED and info.compress_size == info.file_size
    return stored and not info.flag_bits & 1


def _forbidden(file: Path, pickle: bytes) -> Iterator[str]:
    """A problem for each thing that the pickle names or does and no state dict needs. Nothing is unpickled for it."""
    seen: set[Any] = set()
    containers: set[Any] = set()  # places in the pickle's memory
    before, last = "", ""  # the operations, memorising left out
    try:
        for operation, argument, _ in pickletools.genops(pickle):
            name = operation.name
            if name in NEVER or (name in GETS and argument in containers):
                what = name if name in NEVER else "one list in two places"  # of lists of lists: endless
                yield f"{file}: its pickle has {what}, which no state dict saved as usual has. {CONVERT}"
                return
            if name in PUTS and (last in CONTAINERS or (last == "REDUCE" and before in ("EMPTY_TUPLE", "TUPLE1"))):
                containers.add(argument)
            if name == "GLOBAL" and argument not in seen:
                seen.add(argument)
                if fault := _global_fault(str(argument)):
                    yield f"{file}: {fault}"
            if name not in PUTS:
                before, last = last, name
    except (ValueError, RecursionError) as error:
        yield f"{file}: its pickle is damaged: {_line(error)}. {AGAIN}"


def _global_fault(argument: str) -> str | None:
    """What is wrong with naming this; `argument` is "module name"."""
    module, _, name = argument.partition(" ")
    if (module, name) in ALLOWED or (module == "torch" and STORAGE_OR_DTYPE.fullmatch(name)):
        return None
    if name == "_rebuild_qtensor" or re.fullmatch("q(u?int).*|.*QInt.*", name):
        return "holds tensors that PyTorch quantised. Give the checkpoint in bfloat16 or float32 that it was made from"
    named = shown(f"{module}.{name}")
    return (
        f"its pickle wants {named}, which is no part of plain tensors; nothing of it was run. "
        "Take the safetensors of this model. Only if you trust the file: load it with transformers and save it"
    )


def _load(file: Path, archive: _Archive) -> tuple[dict[Any, Any], dict[int, str]]:
    """What the pickle holds, with tensors that have no data; and the key of the record at each offset they name."""
    try:
        import torch
        from torch._subclasses.fake_tensor import FakeTensorMode
    except ImportError as error:
        raise CheckpointError(
            f"{file}: is a pickle, which needs PyTorch to read. Install 'cpimerge[pickled]', "
            "or take the safetensors of this model"
        ) from error
    standin, keys = _standin(archive)
    try:
        with FakeTensorMode(), _unlogged():
            content = torch.load(standin, weights_only=True)
    except Exception as error:  # hostile input: whatever it makes of it, it was refused
        raise CheckpointError(f"{file}: PyTorch refuses it: {_line(error)}. {AGAIN}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: holds a {type(content).__name__}, not tensors by name. {CONVERT}")
    if nested := [key for key, value in content.items() if isinstance(value, dict)]:
        raise CheckpointError(
            f"{file}: is a training checkpoint, with its tensors inside {shown(nested[0])}. "
            "Take from it the state dict of the model alone, and save that"
        )
    return content, keys


@contextmanager
def _unlogged() -> Iterator[None]:
    """PyTorch logs tracebacks of shapes that cannot be; what is to be said is in the error."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    disabled, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = disabled


def _standin(archive: _Archive) -> tuple[io.BytesIO, dict[int, str]]:
    """The archive with empty records in place of the tensors' bytes, and the key of the one at each offset."""
    standin = io.BytesIO()
    with zipfile.ZipFile(standin, "w") as copy:
        copy.writestr("archive/data.pkl", archive.pickle)
        copy.writestr("archive/version", b"3")
        for key in archive.records:
            copy.writestr(f"archive/data/{key}", b"")
        written = copy.infolist()
    names = {_data_offset(standin, info): info.filename.removeprefix("archive/data/") for info in written}
    standin.seek(0)
    return standin, names


def _data_offset(stream: BinaryIO, info: zipfile.ZipInfo) -> int:
    """Where a record's bytes begin: after its local header, name and extra field."""
    stream.seek(info.header_offset)
    header = stream.read(LOCAL_HEADER.size)
    if len(header) < LOCAL_HEADER.size or not header.startswith(b"PK\3\4"):
        raise _Unfit(f"its record is not where the archive says. {AGAIN}")
    _, name, extra = LOCAL_HEADER.unpack(header)
    return info.header_offset + LOCAL_HEADER.size + int(name) + int(extra)


def _stored(
    file: Path, stream: BinaryIO, name: Any, value: Any, records: Mapping[str, zipfile.ZipInfo], keys: dict[int, str]
) -> StoredTensor:
    """A tensor of the state dict as a place in the file. Raises _Unfit."""
    import torch

    if not is_unicode(name) or len(name) > MAX_NAME:
        raise _Unfit(f"its name is not text of at most {MAX_NAME} characters. {CONVERT}")
    if not isinstance(value, torch.Tensor):
        raise _Unfit(f"is no tensor but a {type(value).__name__}. Remove it, and save the tensors alone")
    dtype = _dtype(value)
    if not _is_plain_layout(value):
        raise _Unfit(f"is not stored row by row (strides {shown(list(value.stride()))}). {CONVERT}")
    nbytes = value.numel() * ITEM_BYTES[dtype]
    if not nbytes:
        return StoredTensor(name, dtype, tuple(value.shape), 0, file, 0)
    key = keys.get(_place(value) or 0)
    if key is None:
        raise _Unfit("this PyTorch does not say where it lies in the file. Install torch>=2.7")
    record = records[key]
    begin = int(value.storage_offset()) * ITEM_BYTES[dtype]
    offset = _data_offset(stream, record)
    if not _is_plain(record):
        raise _Unfit(f"is stored compressed or encrypted. {CONVERT}")
    if begin + nbytes > record.file_size or offset + record.file_size > os.fstat(stream.fileno()).st_size:
        raise _Unfit(f"needs {begin + nbytes} bytes of a record that has {record.file_size}. {AGAIN}")
    return StoredTensor(name, dtype, tuple(value.shape), nbytes, file, offset + begin)


def _place(value: torch.Tensor) -> int | None:
    """Where in the stand-in the record of its storage begins; None: this PyTorch does not say."""
    return getattr(value.untyped_storage(), "_checkpoint_offset", None)


def _check_alone(first: StoredTensor, tensor: StoredTensor) -> None:
    """Raise _Unfit if a storage has two dtypes: without its bytes PyTorch does not see that, and with them it does."""
    if first.dtype != tensor.dtype:
        raise _Unfit(f"has another dtype than {first.name!r}, which is stored in the same place. {CONVERT}")


def _dtype(value: torch.Tensor) -> str:
    """The dtype as safetensors spells it. Raises _Unfit for one that it does not know."""
    name = str(value.dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise _Unfit(f"dtype {name} cannot be merged. Convert the checkpoint to bfloat16 or float32")
    return DTYPES[name]


def _is_plain_layout(value: torch.Tensor) -> bool:
    """Whether its elements lie one after the other, the last dimension fastest."""
    import torch

    return value.layout == torch.strided and value.is_contiguous() and not value.is_conj() and not value.is_neg()
