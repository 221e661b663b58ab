"""Every kept input of the fuzz targets, past findings among them, and a few new ones; without a fuzzing engine."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random

import pytest

from fuzz import bundles, guard
from fuzz.mutation import bundle, header, json_text, lines, simple_havoc
from fuzz.target import CORPUS, NAMES, Target, corpus_of, load

MUTANTS = 40  # of a target, the same ones every time


@cache
def target(name: str) -> Target:
    return load(name)


@pytest.mark.parametrize("name", NAMES)
def test_kept_inputs_and_new_ones_find_nothing(name: str, tmp_path: Path) -> None:
    it = target(name)
    run = guard.warmed(it, tmp_path)
    seeds = it.seeds()
    accepted = 0
    for label, data in {**seeds, **{file.name: file.read_bytes() for file in corpus_of(name)}}.items():
        try:
            accepted += guard.run_checked(it, run, data, tmp_path)
        except Exception as error:
            raise AssertionError(f"{name}: {label}") from error
    assert accepted > 0  # or nothing is tested but the first line of the parser
    for data in _mutants(it, list(seeds.values()), Random(name)):
        try:
            guard.checked(it, run, data, tmp_path)
        except Exception as error:
            raise AssertionError(f"{name}: {data!r}") from error


def _mutants(it: Target, inputs: list[bytes], random: Random) -> list[bytes]:
    havoc = simple_havoc(random)
    for _ in range(MUTANTS):
        data = random.choice(inputs)
        inputs.append(it.mutate(data, random, havoc) if it.mutate else havoc(data))
    return inputs[-MUTANTS:]


def test_every_target_and_its_corpus_is_listed() -> None:
    modules = {file.stem for file in (CORPUS.parent / "targets").glob("*.py")}
    assert set(NAMES) == modules - {"__init__", "files", "plan_files"}
    assert {folder.name for folder in CORPUS.iterdir()} <= set(NAMES)


def test_the_corpus_stays_small() -> None:
    assert sum(file.stat().st_size for file in CORPUS.rglob("*") if file.is_file()) < 500_000


# --- the harness itself -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("deed", "event"),
    [
        (lambda outside: outside.write_bytes(b""), "open"),
        (lambda outside: outside.mkdir(), "os.mkdir"),
        (lambda outside: exec(compile("1 + 1", "<evil>", "exec")), "exec"),
        (lambda outside: eval("1 + 1"), "exec"),
        (lambda outside: __import__("subprocess").run(["true"], check=True), "subprocess.Popen"),
        (lambda outside: __import__("pickle").loads(b"cos\nsystem\n."), "pickle.find_class"),
        (lambda outside: __import__("socket").socket().close(), "socket.__new__"),
    ],
)
def test_what_no_parser_may_do_is_a_finding(deed: Callable[[Path], object], event: str, tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    with pytest.raises(guard.Finding, match=event), guard.watched(inside):
        deed(outside)
    with guard.watched(inside):
        (inside / "file").write_bytes(b"")
        (inside / "file").unlink()


def test_memory_that_grows_beyond_the_input_is_a_finding(tmp_path: Path) -> None:
    it = Target(
        prepare=lambda _: lambda data: bytearray(1_000_000), seeds=dict, refusal=(), memory=10_000, memory_per_byte=10
    )
    with pytest.raises(guard.Finding, match=r"takes 1[0-9]{6} bytes of memory for 1, more than 10010"):
        guard.run_checked(it, it.prepare(tmp_path), b"x", tmp_path)


def test_files_of_an_input_are_taken_apart_and_put_together() -> None:
    files = {"a/b.json": b"{}", "c": b"\n-----\n\0", "d": b""}
    assert bundles.split(bundles.join(files), "first") == files
    assert bundles.split(b"alone", "first") == {"first": b"alone"}


def test_changes_keep_the_structure_and_reach_all_of_it() -> None:
    random = Random(0)
    havoc = simple_havoc(random)
    raw = b'{"a": [1, {"b": 2}], "c": "x"}'
    changed = {json_text(["word"])(raw, random, havoc) for _ in range(500)}
    assert len(changed) > 300
    assert any(text.count(b'"a"') == 2 for text in changed)  # a key twice
    assert any(b"word" in text for text in changed)
    headers = {header([])(len(raw).to_bytes(8, "little") + raw + b"data", random, havoc) for _ in range(500)}
    assert sum(int.from_bytes(it[:8], "little") <= len(it) - 8 for it in headers) > 200
    assert len({lines(["w"])(b"a: 1\nb: 2\nc: 3", random, havoc) for _ in range(200)}) > 50
    both = bundles.join({"x": raw, "y": b"1"})
    changed = {bundle("x", {"x": json_text([]), "y": json_text([])})(both, random, havoc) for _ in range(300)}
    assert {"x", "y"} in [set(bundles.split(it, "x")) for it in changed]
    assert {"x"} in [set(bundles.split(it, "x")) for it in changed]
