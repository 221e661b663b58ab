"""The journal of a run that was cut off. Oracle: what is whole stays, and what is appended then comes after it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from random import Random

import xxhash

from cpimerge.journal import Journal

from ..mutation import json_text
from ..target import Havoc, Run, Target

WORDS = ("plan", "shard", "size", "sha256", "written", "chunk", "\\u2028")
RECORD = {"again": True}
_CHANGE = json_text(WORDS)


def _prepare(scratch: Path) -> Run:
    file = scratch / "journal"

    def run(data: bytes) -> None:
        file.write_bytes(data)
        with closing(Journal(file)) as journal:
            earlier = journal.earlier
            assert all(isinstance(record, dict) for record in earlier)
            assert data.startswith(file.read_bytes())
            journal.append(RECORD)
        with closing(Journal(file)) as journal:
            assert repr(journal.earlier) == repr([*earlier, RECORD])

    return run


def _line(text: bytes) -> bytes:
    return b"%s %s\n" % (xxhash.xxh3_64_hexdigest(text).encode(), text)


def _mutate(data: bytes, random: Random, havoc: Havoc) -> bytes:
    """A line changed under a sum that is right, doubled or dropped; or bytes."""
    rows = data.splitlines(keepends=True)
    if not rows or random.random() < 0.3:
        return havoc(data)
    place = random.randrange(len(rows))
    match random.randrange(4):
        case 0:
            rows.pop(place)
        case 1:
            rows.insert(place, rows[place])
        case _:
            rows[place] = _line(_CHANGE(rows[place].partition(b" ")[2].rstrip(b"\n"), random, havoc))
    return b"".join(rows)


def _seeds() -> Mapping[str, bytes]:
    records = [{"plan": "0" * 32, "version": 1}, {"shard": "model.safetensors", "size": 80}, {"written": [0, 16]}]
    rows = [_line(json.dumps(record).encode()) for record in records]
    return {"whole": b"".join(rows), "torn": b"".join(rows)[:-7], "none": b"", "list": _line(b"[1]")}


TARGET = Target(_prepare, _seeds, (), _mutate, WORDS)
