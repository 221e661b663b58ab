"""An output's files as `verify` reads them: manifest, hashes, headers, index. By the formats' rules, with own code."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from .errors import OutputError
from .ordinary import open_ordinary, read_ordinary
from .plain_json import is_deep, is_writable
from .plan_file import Plan, TensorPlan
from .verify_numbers import SIZES
from .verify_results import Findings

__all__ = [
    "MANIFEST",
    "Manifest",
    "OutputFile",
    "OutputTensor",
    "check_files",
    "check_index",
    "has_size",
    "is_inside",
    "read_manifest",
    "sha256",
    "weights",
]

MANIFEST = "cpimerge_manifest.json"
INDEX = "model.safetensors.index.json"
ONE_FILE = "model.safetensors"
SHARD_NAME = re.compile(r"model-([0-9]{5})-of-([0-9]{5})\.safetensors")
READ_BYTES = 1 << 20
MAX_HEADER_BYTES = 100_000_000
MAX_JSON_BYTES = 1_000_000_000  # of the manifest or the index; a tensor takes a few hundred


class _Model(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class File(_Model):
    """A file of the output, as the manifest describes it."""

    size: int
    sha256: str


class Manifest(_Model):
    """cpimerge_manifest.json; what is compared whole has any type here."""

    format: Literal["cpimerge manifest"]
    version: Literal[1]
    cpimerge: Any
    plan_xxh3: str
    recipe: Any
    inputs: Any
    stages: Any
    backbone: Any
    shards: dict[str, File]
    files: dict[str, File]
    tensors: dict[str, Any]


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """Where a planned tensor lies in its file."""

    planned: TensorPlan
    offset: int


@dataclass(frozen=True)
class OutputFile:
    """A file of weights. `tensors` in the order of their bytes, which begin behind `header` and leave no hole."""

    name: str
    file: Path
    size: int
    header: bytes
    tensors: tuple[OutputTensor, ...]


def read_manifest(out: Path) -> tuple[Manifest, bytes]:
    """The manifest, and its bytes. Raises OutputError where there is none, or one that nobody can compare with."""
    file = out / MANIFEST
    try:
        raw = read_ordinary(file, MAX_JSON_BYTES)
        return Manifest.model_validate(_parsed(raw)), raw
    except FileNotFoundError as error:
        raise OutputError(
            f"{out}: has no {MANIFEST}. Give a directory that `cpimerge fuse` or `merge` wrote"
        ) from error
    except OSError as error:
        raise OutputError(f"{file}: cannot be read: {error.strerror}") from error
    except ValidationError as error:
        where = "; ".join(f"{'.'.join(map(str, entry['loc']))}: {entry['msg']}" for entry in error.errors()[:5])
        raise OutputError(f"{file}: is not a manifest that this cpimerge reads: {where}") from error
    except (ValueError, RecursionError) as error:
        raise OutputError(f"{file}: is not a manifest: {error}") from error


def _parsed(raw: bytes) -> Any:
    """JSON of a few levels, without duplicate keys, that can be written again. Raises ValueError or RecursionError."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a key stands there twice")
        return dict(pairs)

    value = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    if is_deep(value):
        raise ValueError("it is nested too deeply")
    if not is_writable(raw, value):
        raise ValueError("it has text that is not Unicode")
    return value


def sha256(file: Path) -> str:
    """Of a whole file, in hex. Raises OSError."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(READ_BYTES))
    with os.fdopen(open_ordinary(file), "rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def check_files(out: Path, manifest: Manifest, findings: Findings) -> int:
    """Compare sizes, and the hashes of all but the weights, with the manifest; returns how many hashes agree."""
    agree = 0
    for name, described in (manifest.shards | manifest.files).items():
        if not is_inside(name):
            findings.fail(out / MANIFEST, f"describes {name!r}, which is no file of the output")
        elif (fault := _size_fault(out / name, described.size)) is not None:
            findings.fail(out / name, fault)
        elif name not in manifest.shards:
            agree += _agrees(out / name, described, findings)
    for name in sorted(manifest.shards.keys() & manifest.files.keys()):
        findings.fail(out / MANIFEST, f"describes {name!r} twice")
    known = {*manifest.shards, *manifest.files, MANIFEST}
    findings.notes.extend(f"{out / name}: is not of the merge" for name in sorted({*_files(out)} - known))
    return agree


def _size_fault(file: Path, expected: int) -> str | None:
    """What is wrong with a file that should have so many bytes, before it is opened."""
    try:
        found = file.stat()
    except (FileNotFoundError, NotADirectoryError):
        return "missing, though the manifest names it"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if not stat.S_ISREG(found.st_mode):
        return "missing, though the manifest names it: what is there is no file"
    return None if found.st_size == expected else f"{found.st_size} bytes, {expected} in the manifest"


def has_size(file: Path, expected: int) -> bool:
    """Whether it is there, and has so many bytes."""
    return _size_fault(file, expected) is None


def _agrees(file: Path, described: File, findings: Findings) -> bool:
    try:
        agrees = sha256(file) == described.sha256
    except OSError as error:
        findings.fail(file, f"cannot be read: {error.strerror}")
        return False
    if not agrees:
        findings.fail(file, "its sha256 is not the manifest's: it was edited or damaged since it was written")
    return agrees


def is_inside(name: str) -> bool:
    """Whether a file that the manifest names lies in the output, by its name."""
    parts = name.split("/")
    return "\0" not in name and not {"", ".", ".."} & {*parts}


def _files(out: Path) -> Iterator[str]:
    for folder, folders, files in os.walk(out):
        links = [name for name in folders if Path(folder, name).is_symlink()]
        yield from (Path(folder, name).relative_to(out).as_posix() for name in (*files, *links))


# --- weights -------------------------------------------------------------------------------------


def weights(out: Path, manifest: Manifest, plan: Plan, findings: Findings) -> list[OutputFile]:
    """The files of weights whose headers are right; together they must have every planned tensor once."""
    planned = {tensor.name: tensor for tensor in plan.tensors}
    _check_names([*manifest.shards], out, findings)
    seen: dict[str, str] = {}
    result = []
    unread = False
    for name in manifest.shards:
        before = len(findings.failures)
        found = _read_header(out, name, findings) if is_inside(name) else None
        if found is None:
            unread = True
            continue
        for key in found[1]:
            if key in seen:
                findings.fail(out / name, f"is in {seen[key]}, too", key)
            seen[key] = name
        opened = _layout(out, name, found, planned, findings)
        unread |= opened is None
        if opened is not None and len(findings.failures) == before:
            result.append(opened)
    for key in [] if unread else sorted(planned.keys() - seen.keys()):
        findings.fail(out, "missing: no file of weights has it", key)
    return result


def _check_names(names: list[str], out: Path, findings: Findings) -> None:
    count = len(names)
    expected = [ONE_FILE] if count == 1 else [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    if sorted(names) != expected:
        findings.fail(out / MANIFEST, f"its files of weights are called {', '.join(sorted(names)[:5]) or 'nothing'}")


def _read_header(out: Path, name: str, findings: Findings) -> tuple[bytes, dict[str, Any], int] | None:
    """The header's bytes with its length, its entries, and the file's size; None where there is no reading it."""
    file = out / name
    try:
        with os.fdopen(open_ordinary(file), "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            first = stream.read(8)
            length = int.from_bytes(first, "little")
            if len(first) < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                findings.fail(file, "its header does not fit it")
                return None
            raw = stream.read(length)
        entries = _parsed(raw)
    except OSError as error:
        if not isinstance(error, FileNotFoundError):  # which is told already
            findings.fail(file, f"cannot be read: {error.strerror}")
        return None
    except (ValueError, RecursionError) as error:
        findings.fail(file, f"its header is no JSON object: {error}")
        return None
    if not isinstance(entries, dict) or entries.pop("__metadata__", None) != {"format": "pt"}:
        findings.fail(file, 'its header has not the metadata {"format": "pt"}')
        return None
    return first + raw, entries, size


def _layout(
    out: Path,
    name: str,
    found: tuple[bytes, dict[str, Any], int],
    planned: Mapping[str, TensorPlan],
    findings: Findings,
) -> OutputFile | None:
    """The tensors of a file, which lie as the safetensors reference writer lays them: by dtype, then by name."""
    header, entries, size = found
    file = out / name
    if unknown := [key for key in entries if key not in planned]:
        for key in unknown:
            findings.fail(file, "is not in the plan", key)
        return None
    order = {dtype: rank for rank, dtype in enumerate(SIZES)}
    tensors = sorted((planned[key] for key in entries), key=lambda tensor: (order[tensor.dtype], tensor.name))
    expected: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    placed = []
    for tensor in tensors:
        begin, end = end, end + math.prod(tensor.shape) * SIZES[tensor.dtype]
        entry = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [begin, end]}
        expected[tensor.name] = entry
        placed.append(OutputTensor(tensor, len(header) + begin))
        if entries[tensor.name] != entry:
            findings.fail(file, f"its header says {_brief(entries[tensor.name])}, not {_brief(entry)}", tensor.name)
    text = json.dumps(expected, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if header != len(text).to_bytes(8, "little") + text:
        findings.fail(file, "its header is not written as safetensors writes it")
    if size != len(header) + end:
        findings.fail(file, f"{size} bytes, its tensors end at {len(header) + end}")
    return OutputFile(name, file, size, header, tuple(placed))


def _brief(entry: Any) -> str:
    text = json.dumps(entry)
    return text if len(text) <= 200 else f"{text[:200]}…"


def check_index(out: Path, manifest: Manifest, files: list[OutputFile], findings: Findings) -> None:
    """The index of several files says where each tensor lies, and how much there is; one file has none."""
    file = out / INDEX
    if len(manifest.shards) <= 1:
        if INDEX in manifest.files:
            findings.fail(file, "there is one file of weights, which needs no index")
        return
    if INDEX not in manifest.files:
        findings.fail(file, "is not in the manifest, and there are several files of weights")
        return
    if len(files) < len(manifest.shards):
        return  # told already
    try:
        found = _parsed(read_ordinary(file, MAX_JSON_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        findings.fail(file, f"cannot be read: {error}")
        return
    every = [(one.name, tensor.planned) for one in files for tensor in one.tensors]
    elements = {tensor.name: math.prod(tensor.shape) for _, tensor in every}
    expected = {
        "metadata": {
            "total_parameters": sum(elements.values()),
            "total_size": sum(elements[tensor.name] * SIZES[tensor.dtype] for _, tensor in every),
        },
        "weight_map": {tensor.name: name for name, tensor in every},
    }
    for key, value in expected.items():
        if not isinstance(found, dict) or found.get(key) != value:
            findings.fail(file, f"its {key} is not that of the files")
    if isinstance(found, dict) and found.keys() - expected.keys():
        findings.fail(file, "has more keys than metadata and weight_map")
