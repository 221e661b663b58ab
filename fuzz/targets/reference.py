"""What a recipe or a plan calls a model, and where it then lies.

Oracles: a path is absolute and stands for itself; what is not there is a CheckpointError.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from cpimerge.errors import CheckpointError
from cpimerge.models import locate
from cpimerge.references import Reference, parse_reference, planned_path, planned_place

from ..mutation import lines
from ..target import Run, Target

COMMIT = "0123456789abcdef" * 2 + "01234567"
WORDS = (
    *("org/name", "@main", "+", "~", "~root", "/", "..", "./", "models--org--name/snapshots/", COMMIT, "@" + COMMIT),
    *(".stream", "org/name@refs/pr/1", "--", "\0", "é", "x" * 300),
)


def _prepare(scratch: Path) -> Run:
    def run(data: bytes) -> None:
        text = data.decode("utf-8", "surrogateescape")
        if not text:
            return
        for reference in (parse_reference(text, scratch / "recipes"), Reference(planned_place(text))):
            _check(reference)
            with suppress(CheckpointError):
                locate(reference)

    return run


def _check(reference: Reference) -> None:
    assert isinstance(reference.name, str)
    for place in (reference.model, reference.adapter):
        if place is None:
            continue
        assert place.path.is_absolute()
        assert str(place.path) in (os.path.normpath(place.path), "/" + os.path.normpath(place.path))
        planned = planned_path(place.path)
        assert planned_place(planned).path == (place.path if planned == str(place.path) else Path("/", planned))


def _seeds() -> Mapping[str, bytes]:
    return {
        "hub": b"org/name@main",
        "both": b"org/base+./adapter",
        "directory": b"../models/base",
        "home": b"~/models/base",
        "cached": f"/cache/models--org--name/snapshots/{COMMIT}".encode(),
        "planned": f"org/name@{COMMIT}".encode(),
        "streamed": f"/x/out.abc.stream/models--org--name/snapshots/{COMMIT}".encode(),
    }


TARGET = Target(_prepare, _seeds, CheckpointError, lines(WORDS), WORDS, max_bytes=512)
