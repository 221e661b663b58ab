"""Training data as strangers write it: JSONL, an example a line, read strictly and with every problem listed.

    {"task": "math", "prompt": "2+2=", "completion": "4"}
    {"task": "chat", "messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]}

In a directory, `math.jsonl` holds the examples of the task `math`, and "task" may be left out.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import xxhash

from ..errors import DataError
from ..ordinary import read_ordinary
from ..plain_json import is_writable, parse_object, shown
from ..plain_text import printable
from ..yamltree import nearest

__all__ = ["Data", "Example", "Turn", "read_data", "read_task"]

SUFFIX = ".jsonl"
KEYS = ("task", "prompt", "completion", "messages")
MESSAGE_KEYS = ("role", "content")
ROLES = ("system", "user", "assistant")
MAX_FILE_BYTES = 2_000_000_000
MAX_LINE_BYTES = 16_000_000
MAX_PROBLEMS = 1_000  # of one file that are named one by one


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a conversation."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Example:
    """What a model shall answer: `completion` to `prompt`, or, where there are `turns`, each turn of the assistant.

    It stands in line `line`, counted from 1, of `file`.
    """

    file: Path
    line: int
    prompt: str = ""
    completion: str = ""
    turns: tuple[Turn, ...] = ()

    @property
    def content(self) -> tuple[object, ...]:
        """All that it says, wherever it stands."""
        return self.prompt, self.completion, self.turns

    @property
    def place(self) -> str:
        """`file:line`, as messages name it."""
        return f"{self.file}:{self.line}"


@dataclass(frozen=True)
class Data:
    """Examples by task, in the order of the files; `xxh3` is a hash of all that was read of them."""

    examples: Mapping[str, list[Example]]
    xxh3: str


@dataclass
class _Reading:
    """What is read, and what is wrong with it. `own`: the task of lines that name none; `alone`: no other may be."""

    examples: dict[str, list[Example]]
    own: str | None = None
    alone: bool = False
    unknown: Counter[str] = field(default_factory=Counter)
    first_unknown: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def read_data(path: Path, tasks: Collection[str]) -> Data:
    """Every example in `path`, a file or a directory of a file a task; each of `tasks` has some, and no other does.

    Raises DataError listing every line that is wrong, every task without examples and every task that is none.
    """
    digest = xxhash.xxh3_128()
    examples: dict[str, list[Example]] = {task: [] for task in tasks}
    problems: list[str] = []
    for file, own in _files(path):
        reading = _Reading(examples, own, alone=own is not None)
        if own is not None and own not in examples:
            problems.append(f"{file}: {_no_task(own, tasks)}")
            continue
        _read(file, reading, digest)
        problems += reading.problems
        for task, count in reading.unknown.items():
            lines = f"; {count} lines name it" if count > 1 else ""
            problems.append(f"{reading.first_unknown[task]}: {_no_task(task, tasks)}{lines}")
    if not problems:
        problems = [f"{path}: has no examples of the task {task!r}" for task in tasks if not examples[task]]
    if problems:
        raise DataError(problems)
    return Data(examples, digest.hexdigest())


def read_task(path: Path, task: str) -> Data:
    """The examples of one task in `path`; of a file, lines that name no task are its own, and others' are left.

    Raises DataError as `read_data` does.
    """
    digest = xxhash.xxh3_128()
    file = path / f"{task}{SUFFIX}" if path.is_dir() else path
    reading = _Reading({task: []}, task, alone=path.is_dir())
    _read(file, reading, digest)
    if not reading.problems and not reading.examples[task]:
        others = nearest(task, reading.unknown, "it has") if reading.unknown else "it is empty"
        reading.problems.append(f"{file}: has no examples of the task {task!r}; {printable(others)}")
    if reading.problems:
        raise DataError(reading.problems)
    return Data(reading.examples, digest.hexdigest())


def _no_task(name: str, tasks: Collection[str]) -> str:
    return f"{shown(name)} is no task of the plan; {nearest(name, tasks, 'its tasks are')}"


def _files(path: Path) -> Iterator[tuple[Path, str | None]]:
    """Every file of the data, and the task that its name gives it. Raises DataError where there is none."""
    if not path.is_dir():
        yield path, None
        return
    try:
        names = sorted(os.listdir(path))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    found = [name for name in names if name.endswith(SUFFIX) and not name.startswith(".")]
    if not found:
        raise DataError(f"{path}: holds no {SUFFIX} file. Give a file, or a directory with TASK{SUFFIX} for each task")
    yield from ((path / name, name.removesuffix(SUFFIX)) for name in found)


def _read(file: Path, reading: _Reading, digest: xxhash.xxh3_128) -> None:
    """Add the examples of one file, and what is wrong with it."""
    try:
        raw = read_ordinary(file, MAX_FILE_BYTES)
    except OSError as error:
        what = "no such file" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror}"
        reading.problems.append(f"{file}: {what}")
        return
    digest.update(
        b"%d " % len(raw) + raw if reading.own is None else b"%d %b " % (len(raw), reading.own.encode()) + raw
    )
    wrong = 0
    for number, line in enumerate(BytesIO(raw), 1):
        if not line.strip():
            continue  # holds nothing
        try:
            _add(_parsed(line), Example(file, number), reading)
        except ValueError as error:
            wrong += 1
            if wrong <= MAX_PROBLEMS:
                reading.problems.append(f"{file}:{number}: {error}")
    if wrong > MAX_PROBLEMS:
        reading.problems.append(f"{file}: and {wrong - MAX_PROBLEMS} more lines like these")


def _parsed(line: bytes) -> dict[str, Any]:
    """A line as a JSON object. Raises ValueError: what is wrong, in words."""
    if len(line) > MAX_LINE_BYTES:
        raise ValueError(f"a line of {len(line)} bytes; at most {MAX_LINE_BYTES} are read")
    value = parse_object(line)
    if not is_writable(line, value):
        raise ValueError("has text that is not Unicode: half a surrogate pair")
    return value


def _add(value: dict[str, Any], at: Example, reading: _Reading) -> None:
    """Add one line's example to its task. Raises ValueError: what is wrong with it."""
    _check_keys(value, KEYS)
    task = _task(value, reading)
    example = _conversation(value, at) if "messages" in value else _completion(value, at)
    if task in reading.examples:
        reading.examples[task].append(example)
        return
    if len(reading.unknown) < MAX_PROBLEMS or task in reading.unknown:
        reading.unknown[task] += 1
        reading.first_unknown.setdefault(task, at.place)


def _task(value: Mapping[str, Any], reading: _Reading) -> str:
    task = value.get("task", reading.own)
    if task is None and "task" not in value:
        raise ValueError("has no 'task'. Name it, or put the examples of each task into a file TASK.jsonl")
    if not isinstance(task, str) or not task:
        raise ValueError(f"'task' must be text, got {shown(task)}")
    if reading.alone and task != reading.own:
        raise ValueError(f"its 'task' is {shown(task)}, and the file is that of {shown(reading.own)}")
    return task


def _completion(value: Mapping[str, Any], at: Example) -> Example:
    missing = [key for key in ("prompt", "completion") if key not in value]
    if missing:
        raise ValueError(f"has no {missing[0]!r}. An example has 'prompt' and 'completion', or 'messages'")
    for key in ("prompt", "completion"):
        if not isinstance(value[key], str):
            raise ValueError(f"{key!r} must be text, got {shown(value[key])}")
    if not value["completion"]:
        raise ValueError("its 'completion' is empty: there is nothing to learn")
    return Example(at.file, at.line, value["prompt"], value["completion"])


def _conversation(value: Mapping[str, Any], at: Example) -> Example:
    for key in ("prompt", "completion"):
        if key in value:
            raise ValueError(f"has 'messages' and {key!r}, too. Leave one of them out")
    messages = value["messages"]
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"'messages' must be a list of messages, got {shown(messages)}")
    turns = tuple(_turn(number, message) for number, message in enumerate(messages, 1))
    if not any(turn.role == "assistant" for turn in turns):
        raise ValueError("no message is the assistant's: there is nothing to learn")
    return Example(at.file, at.line, turns=turns)


def _turn(number: int, message: Any) -> Turn:
    where = f"message {number}"
    if not isinstance(message, dict):
        raise ValueError(f"{where}: expected an object with 'role' and 'content', got {shown(message)}")
    _check_keys(message, MESSAGE_KEYS, f"{where}: ")
    for key in MESSAGE_KEYS:
        if not isinstance(message.get(key), str):
            raise ValueError(f"{where}: {key!r} must be text, got {shown(message.get(key))}")
    if message["role"] not in ROLES:
        raise ValueError(
            f"{where}: unknown role {shown(message['role'])}; {nearest(message['role'], ROLES, 'roles are')}"
        )
    return Turn(message["role"], message["content"])


def _check_keys(value: Mapping[str, Any], known: tuple[str, ...], where: str = "") -> None:
    for key in value:
        if key not in known:
            raise ValueError(f"{where}unknown key {shown(key)}; {nearest(key, known, 'the keys are')}")
