"""Training data in JSONL. Oracle: what is taken, written again by json, is taken again and is the same."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

from cpimerge.errors import DataError
from cpimerge.train.examples import ROLES, Data, Example, read_data, read_task

from ..mutation import json_text
from ..target import Havoc, Run, Target, accepted_before

TASKS = ("math", "chat")
WORDS = ("task", "prompt", "completion", "messages", "role", "content", *ROLES, *TASKS, "\\ud800", "\\u2028", "\u0085")
_CHANGE = json_text(WORDS)


def _prepare(scratch: Path) -> Run:
    file, again = scratch / "data.jsonl", scratch / "again.jsonl"

    def run(data: bytes) -> None:
        file.write_bytes(data)
        with suppress(DataError):
            read_task(file, "math")
        found = read_data(file, TASKS)
        lines = data.count(b"\n") + 1
        assert all(1 <= example.line <= lines for task in TASKS for example in found.examples[task])
        again.write_text("".join(_written(found)), encoding="utf-8")
        with accepted_before():
            assert _contents(read_data(again, TASKS)) == _contents(found)

    return run


def _written(data: Data) -> list[str]:
    return [
        json.dumps({"task": task, **content}) + "\n"
        for task, contents in _contents(data).items()
        for content in contents
    ]


def _contents(data: Data) -> dict[str, list[dict[str, Any]]]:
    return {task: [_content(example) for example in examples] for task, examples in data.examples.items()}


def _content(example: Example) -> dict[str, Any]:
    if example.turns:
        return {"messages": [{"role": turn.role, "content": turn.content} for turn in example.turns]}
    return {"prompt": example.prompt, "completion": example.completion}


def _mutate(data: bytes, random: Random, havoc: Havoc) -> bytes:
    """A line changed as JSON, doubled or dropped; or bytes."""
    rows = data.splitlines(keepends=True)
    if not rows or random.random() < 0.2:
        return havoc(data)
    place = random.randrange(len(rows))
    match random.randrange(6):
        case 0:
            rows.pop(place)
        case 1:
            rows.insert(place, rows[place])
        case _:
            rows[place] = _CHANGE(rows[place].rstrip(b"\n"), random, havoc) + b"\n"
    return b"".join(rows)


def _seeds() -> Mapping[str, bytes]:
    completion = {"task": "math", "prompt": "2+2=", "completion": "4"}
    turns = [{"role": role, "content": role} for role in ("system", "user", "assistant")]
    lines = [json.dumps(line).encode() for line in (completion, {"task": "chat", "messages": turns})]
    return {"both": b"\n".join(lines), "blank": b"\n\r\n".join([*lines, b" "]), "one": lines[0], "none": b""}


TARGET = Target(_prepare, _seeds, DataError, _mutate, WORDS)
