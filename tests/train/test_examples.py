"""Training data, by hand: what is taken, and what is wrong with the rest."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from worlds import write_lines

from cpimerge import DataError
from cpimerge.train.examples import Example, Turn, read_data, read_task

GOOD: dict[str, Any] = {"task": "a", "prompt": "2+2=", "completion": "4"}
CHAT: dict[str, Any] = {
    "task": "b",
    "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}],
}


def problems(path: Path, *tasks: str) -> list[str]:
    with pytest.raises(DataError) as raised:
        read_data(path, tasks)
    return [problem.replace(f"{path.parent}/", "") for problem in raised.value.problems]


def test_a_file_whose_lines_name_their_task(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text(f"{json.dumps(GOOD)}\n\n  \n{json.dumps(CHAT)}\r\n{json.dumps(GOOD | {'prompt': ''})}", "utf-8")
    data = read_data(file, ("b", "a"))
    assert data.examples == {
        "a": [Example(file, 1, "2+2=", "4"), Example(file, 5, "", "4")],
        "b": [Example(file, 4, turns=(Turn("user", "Hi"), Turn("assistant", "Ho")))],
    }
    assert list(data.examples) == ["b", "a"]
    assert data.examples["b"][0].place == f"{file}:4"


def test_a_directory_of_a_file_a_task(tmp_path: Path) -> None:
    without = {key: value for key, value in GOOD.items() if key != "task"}
    write_lines(tmp_path / "a.jsonl", [without, GOOD])
    write_lines(tmp_path / "b.jsonl", [CHAT])
    for name in ("README.md", ".c.jsonl", "c.json"):
        (tmp_path / name).write_text("no data", encoding="utf-8")
    data = read_data(tmp_path, ("a", "b"))
    assert [example.line for example in data.examples["a"]] == [1, 2]
    assert len(data.examples["b"]) == 1


def test_the_hash_is_that_of_the_content(tmp_path: Path) -> None:
    first = read_data(write_lines(tmp_path / "x.jsonl", [GOOD]), ("a",)).xxh3
    assert read_data(write_lines(tmp_path / "y.jsonl", [GOOD]), ("a",)).xxh3 == first
    assert read_data(write_lines(tmp_path / "y.jsonl", [GOOD, GOOD]), ("a",)).xxh3 != first


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "not valid JSON: Expecting property name"),
        ("[1]", "expected a JSON object, got list"),
        ('{"task": "a", "task": "a"}', "'task' stands twice"),
        ("\ufeff" + json.dumps(GOOD), "not valid JSON"),
        (json.dumps(GOOD | {"promt": "x"}), "unknown key 'promt'; did you mean 'prompt'?"),
        (json.dumps(GOOD | {"x": 1}), "unknown key 'x'; the keys are: task, prompt, completion, messages"),
        (json.dumps({"prompt": "x", "completion": "y"}), "has no 'task'. Name it, or put the examples"),
        (json.dumps(GOOD | {"task": 1}), "'task' must be text, got 1"),
        (json.dumps(GOOD | {"task": ""}), "'task' must be text, got ''"),
        (json.dumps({"task": "a", "prompt": "x"}), "has no 'completion'. An example has"),
        (json.dumps({"task": "a", "completion": "x"}), "has no 'prompt'. An example has"),
        (json.dumps({"task": "a"}), "has no 'prompt'. An example has"),
        (json.dumps(GOOD | {"completion": ""}), "its 'completion' is empty"),
        (json.dumps(GOOD | {"completion": None}), "'completion' must be text, got None"),
        (json.dumps(GOOD | {"prompt": ["x"]}), "'prompt' must be text, got ['x']"),
        (json.dumps(GOOD | {"messages": []}), "has 'messages' and 'prompt', too"),
        (json.dumps({"task": "a", "messages": []}), "'messages' must be a list of messages, got []"),
        (json.dumps({"task": "a", "messages": "Hi"}), "'messages' must be a list of messages, got 'Hi'"),
        (json.dumps({"task": "a", "messages": ["Hi"]}), "message 1: expected an object with 'role' and 'content'"),
        (json.dumps({"task": "a", "messages": [{"role": "user", "content": "x"}]}), "no message is the assistant's"),
        (
            json.dumps({"task": "a", "messages": [{"role": "asistant", "content": "x"}]}),
            "message 1: unknown role 'asistant'; did you mean 'assistant'?",
        ),
        (
            json.dumps({"task": "a", "messages": [{"role": "user", "content": "x"}, {"role": "assistant"}]}),
            "message 2: 'content' must be text, got None",
        ),
        (
            json.dumps({"task": "a", "messages": [{"role": "assistant", "content": "x", "contents": "y"}]}),
            "message 1: unknown key 'contents'; did you mean 'content'?",
        ),
        ('{"task": "a", "prompt": "\\ud800", "completion": "x"}', "not Unicode: half a surrogate pair"),
        ('{"task": "a", "prompt": ' + "[" * 5000 + "]" * 5000 + "}", "nested too deeply"),
        ('{"task": "a", "prompt": "' + "x" * 16_000_000 + '", "completion": "y"}', "at most 16000000 are read"),
    ],
)
def test_what_is_wrong_with_a_line(tmp_path: Path, line: str, problem: str) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text(f"{json.dumps(GOOD)}\n{line}\n", encoding="utf-8")
    (found,) = problems(file, "a")
    assert found.startswith(f"data.jsonl:2: {problem}") or (found.startswith("data.jsonl:2: ") and problem in found)


def test_text_that_is_no_utf8(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_bytes(b'{"task": "a", "prompt": "\xff", "completion": "x"}\n')
    (found,) = problems(file, "a")
    assert found.startswith("data.jsonl:1: not valid JSON: 'utf-8' codec")


def test_everything_at_once(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [
        GOOD,
        GOOD | {"task": "aa"},
        {"task": "a"},
        GOOD | {"task": "aa"},
        GOOD | {"task": "zebra"},
        {"x": 1},
    ]
    assert problems(write_lines(tmp_path / "d.jsonl", lines), "a", "b") == [
        "d.jsonl:3: has no 'prompt'. An example has 'prompt' and 'completion', or 'messages'",
        "d.jsonl:6: unknown key 'x'; the keys are: task, prompt, completion, messages",
        "d.jsonl:2: 'aa' is no task of the plan; did you mean 'a'?; 2 lines name it",
        "d.jsonl:5: 'zebra' is no task of the plan; its tasks are: a, b",
    ]


def test_tasks_without_examples(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "d.jsonl", [GOOD])
    assert problems(file, "b", "a", "c") == [
        "d.jsonl: has no examples of the task 'b'",
        "d.jsonl: has no examples of the task 'c'",
    ]


def test_a_file_of_another_task(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    write_lines(tmp_path / "data" / "a.jsonl", [GOOD, CHAT])
    write_lines(tmp_path / "data" / "maths.jsonl", [GOOD])
    assert problems(tmp_path / "data", "a", "math") == [
        "data/a.jsonl:2: its 'task' is 'b', and the file is that of 'a'",
        "data/maths.jsonl: 'maths' is no task of the plan; did you mean 'math'?",
    ]


def test_endless_problems_are_counted(tmp_path: Path) -> None:
    file = tmp_path / "d.jsonl"
    file.write_text("x\n" * 2500, encoding="utf-8")
    found = problems(file, "a")
    assert len(found) == 1001
    assert found[-1] == "d.jsonl: and 1500 more lines like these"


def test_what_is_no_file(tmp_path: Path) -> None:
    assert problems(tmp_path / "d.jsonl", "a") == ["d.jsonl: no such file"]
    os.mkfifo(tmp_path / "pipe")
    assert problems(tmp_path / "pipe", "a") == ["pipe: cannot be read: is no ordinary file"]
    (tmp_path / "empty").mkdir()
    assert problems(tmp_path / "empty", "a")[0].startswith("empty: holds no .jsonl file. Give a file, or a directory")


def test_one_task_of_a_file_of_many(tmp_path: Path) -> None:
    without = {key: value for key, value in GOOD.items() if key != "task"}
    file = write_lines(tmp_path / "d.jsonl", [GOOD, CHAT, without])
    assert {task: [e.line for e in found] for task, found in read_task(file, "a").examples.items()} == {"a": [1, 3]}
    with pytest.raises(DataError, match=r"d.jsonl: has no examples of the task 'c'; it has: a, b$"):
        read_task(write_lines(tmp_path / "d.jsonl", [GOOD, CHAT]), "c")
    with pytest.raises(DataError, match=r"d.jsonl:2: 'task' must be text"):
        read_task(write_lines(tmp_path / "d.jsonl", [GOOD, GOOD | {"task": 1}]), "a")
    with pytest.raises(DataError, match=r"d.jsonl: has no examples of the task 'c'; it is empty$"):
        read_task(write_lines(tmp_path / "d.jsonl", []), "c")


def test_one_task_of_a_directory(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", [GOOD])
    write_lines(tmp_path / "b.jsonl", [{"damaged": 1}])
    assert len(read_task(tmp_path, "a").examples["a"]) == 1
    with pytest.raises(DataError, match=r"c.jsonl: no such file"):
        read_task(tmp_path, "c")
