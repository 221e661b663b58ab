"""An output directory as `verify` reads it, with the hashes in its manifest that a stranger would put there.

Oracle: only the bytes that `fuse` wrote pass.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import cpimerge
from cpimerge.companions import MANIFEST
from cpimerge.errors import CpimergeError
from cpimerge.plan_file import plan_hash

from ..bundles import join, split, write
from ..mutation import bundle, header, json_text
from ..target import Run, Target
from . import files
from .plan_files import inputs, made, resealed

WEIGHTS = "model.safetensors"
FILES = (MANIFEST, WEIGHTS, "config.json", "README.md")
WORDS = (
    *(
        "format",
        "cpimerge manifest",
        "version",
        "plan_xxh3",
        "recipe",
        "inputs",
        "stages",
        "backbone",
        "shards",
        "files",
    ),
    *("tensors", "size", "sha256", "action", "lerp", "slerp", "copy", "angles", "transplanted", *FILES, "../plan"),
)


def _prepare(scratch: Path) -> Run:
    plan, out = _planned(inputs(scratch)), scratch / "out"
    out.mkdir()
    right = split(_seeds()["output"], MANIFEST)

    def run(data: bytes) -> None:
        found = split(data, MANIFEST)
        found[MANIFEST] = _with_hashes(found.get(MANIFEST, b""), found, plan_hash(plan))
        write(found, out, FILES)
        result = cpimerge.verify(out, plan, threads=1)
        if result.failures:
            raise CpimergeError([str(failure) for failure in result.failures])
        assert found[WEIGHTS] == right[WEIGHTS], "other weights pass"

    return run


def _planned(directory: Path) -> Path:
    """The plan of the seeds, whose inputs lie in `directory`."""
    for name, content in resealed(made("tensor"), directory).items():
        (directory / "plan" / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / "plan" / name).write_bytes(content)
    return directory / "plan"


def _with_hashes(raw: bytes, found: Mapping[str, bytes], plan_xxh3: str) -> bytes:
    """The manifest with the hashes of the files as they are; as it is, where it cannot have any."""
    try:
        manifest: dict[str, Any] = json.loads(raw)
        manifest["plan_xxh3"] = plan_xxh3
        for kind in ("shards", "files"):
            for name in found.keys() & manifest[kind].keys():
                digest = hashlib.sha256(found[name]).hexdigest()
                manifest[kind][name] = {"size": len(found[name]), "sha256": digest}
        return (json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return raw


@cache
def _fused() -> Mapping[str, bytes]:
    """What `fuse` makes of the plan."""
    with tempfile.TemporaryDirectory() as name:
        plan = _planned(inputs(Path(name)))
        cpimerge.fuse(plan, Path(name, "out"), threads=1)
        return {file: Path(name, "out", file).read_bytes() for file in FILES}


def _seeds() -> Mapping[str, bytes]:
    return {"output": join(_fused()), "bare": join({MANIFEST: _fused()[MANIFEST]})}


TARGET = Target(
    _prepare,
    _seeds,
    CpimergeError,
    bundle(MANIFEST, {MANIFEST: json_text(WORDS), WEIGHTS: header(files.WORDS), "config.json": json_text(WORDS)}),
    WORDS,
    max_bytes=16384,
    memory=40_000_000,
)
