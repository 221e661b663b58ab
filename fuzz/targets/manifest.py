"""cpimerge_manifest.json as `push` reads it. Oracle: what may be uploaded lies in the directory and is described."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from cpimerge.companions import MANIFEST
from cpimerge.errors import OutputError
from cpimerge.uploading import _checked

from ..mutation import json_text
from ..target import Run, Target
from .files import as_bytes

CONTENTS = {"model.safetensors": b"weights", "README.md": b"card", "1_Pooling/config.json": b"{}"}
WORDS = ("format", "cpimerge manifest", "version", "shards", "files", "size", "sha256", *CONTENTS, "../outside", "/etc")


def _prepare(scratch: Path) -> Run:
    out = scratch / "out"
    for name, content in CONTENTS.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(content)
    (scratch / "outside").write_bytes(b"secret")

    def run(data: bytes) -> None:
        (out / MANIFEST).write_bytes(data)
        upload, sha256 = _checked(out, "org/name", lambda *_: None)
        assert upload.files.keys() == {*CONTENTS, MANIFEST}
        assert sha256["README.md"] == _described("README.md")["sha256"] or "README.md" in upload.edited

    return run


def _described(name: str) -> dict[str, object]:
    return {"size": len(CONTENTS[name]), "sha256": hashlib.sha256(CONTENTS[name]).hexdigest()}


def _seeds() -> Mapping[str, bytes]:
    weights, *others = CONTENTS
    return {
        "manifest": as_bytes(
            {
                "format": "cpimerge manifest",
                "version": 1,
                "shards": {weights: _described(weights)},
                "files": {name: _described(name) for name in others},
            }
        )
    }


TARGET = Target(_prepare, _seeds, OutputError, json_text(WORDS), WORDS)
