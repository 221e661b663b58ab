"""Directories that appear only when all of them is on the disk, and what the next run finds of one that was cut off."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from checkpoints import save, write_recipe
from files import tree
from safetensors.torch import load_file

from cpimerge import OutputError, fuse, plan, staging
from cpimerge.staging import Target, Work, check_target, staged_directory

WORK = Work("plan", "this")


def produce(
    target: Path, text: str = "new", *, force: bool = False, meanwhile: Callable[[], object] = lambda: None
) -> None:
    """Write a directory with one file; `meanwhile` is called before it is published."""
    with staged_directory(Target(target, force), [], WORK) as made:
        (made.files / "file").write_text(text)
        meanwhile()


@contextmanager
def working_directory(directory: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(directory)
    try:
        yield
    finally:
        os.chdir(before)


def test_a_directory_appears_at_the_end(tmp_path: Path) -> None:
    with staged_directory(Target(tmp_path / "a" / "out"), [], WORK) as made:
        (made.files / "deep").mkdir()
        (made.files / "deep" / "file").write_text("new")
        assert made.root == tmp_path / "a" / ".out.partial"
        assert not (tmp_path / "a" / "out").exists()
    assert tree(tmp_path) == {"a": None, "a/out": None, "a/out/deep": None, "a/out/deep/file": b"new"}


def test_an_empty_directory_is_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    produce(tmp_path / "out")
    assert tree(tmp_path) == {"out": None, "out/file": b"new"}


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("force", [False, True])
def test_nothing_is_left_of_a_failure(tmp_path: Path, error: type[BaseException], force: bool) -> None:
    if force:
        produce(tmp_path / "out", "old")
    before = tree(tmp_path)

    def fail() -> None:
        raise error

    with pytest.raises(error):
        produce(tmp_path / "out", force=force, meanwhile=fail)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("failing", ["os.fsync", "os.rename"])
def test_nothing_is_left_where_publishing_fails(tmp_path: Path, failing: str) -> None:
    error = OSError(5, "Input/output error", "somewhere")
    with mock.patch(failing, side_effect=error), pytest.raises(OutputError) as raised:
        produce(tmp_path / "out")
    assert str(raised.value) == f"{tmp_path}/out: cannot be written: somewhere: Input/output error"
    assert tree(tmp_path) == {}


def test_what_was_there_comes_back_where_publishing_fails(tmp_path: Path) -> None:
    produce(tmp_path / "out", "old")
    before = tree(tmp_path)
    rename = os.rename

    def fail_once(source: Path, target: Path) -> None:
        if source.name == "files":
            raise OSError(28, "No space left on device")
        rename(source, target)

    with mock.patch("os.rename", fail_once), pytest.raises(OutputError) as raised:
        produce(tmp_path / "out", force=True)
    assert str(raised.value) == f"{tmp_path}/out: cannot be written: No space left on device"
    assert tree(tmp_path) == before


def test_everything_is_flushed_before_it_is_published(tmp_path: Path) -> None:
    events: list[tuple[str, str]] = []

    def flushed(handle: int) -> None:
        events.append(("flush", os.path.relpath(os.readlink(f"/proc/self/fd/{handle}"), tmp_path)))

    def renamed(source: Path, target: Path) -> None:
        events.append(("rename", target.name))
        source.replace(target)

    with mock.patch("os.fsync", flushed), mock.patch("os.rename", renamed):
        produce(tmp_path / "out")
    files = [("flush", ".out.partial/files/file"), ("flush", ".out.partial/files")]
    assert events == [("flush", ".out.partial"), ("flush", "."), *files, ("rename", "out"), ("flush", ".")]


def test_force_replaces_everything(tmp_path: Path) -> None:
    produce(tmp_path / "out", "old")
    (tmp_path / "out" / "other").write_text("old")
    with pytest.raises(OutputError) as raised:
        produce(tmp_path / "out")
    problem = "not empty. Give another output directory, or --force to replace all of it"
    assert str(raised.value) == f"{tmp_path}/out: {problem}"
    produce(tmp_path / "out", force=True)
    assert tree(tmp_path) == {"out": None, "out/file": b"new"}


def test_what_came_in_meanwhile_is_not_replaced(tmp_path: Path) -> None:

    def another() -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "file").write_text("another's")

    with pytest.raises(OutputError, match="not empty"):
        produce(tmp_path / "out", meanwhile=another)
    assert tree(tmp_path) == {"out": None, "out/file": b"another's"}


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk/out")
    for text in ("old", "new"):
        produce(tmp_path / "out", text, force=True)
        assert (tmp_path / "out").is_symlink()
        assert tree(tmp_path / "disk") == {"out": None, "out/file": text.encode()}


def test_relative_and_home_directories(tmp_path: Path) -> None:
    with working_directory(tmp_path), mock.patch.dict(os.environ, {"HOME": str(tmp_path / "home")}):
        produce(Path("a/../b"))
        produce(Path("~/c"))
    assert sorted(tree(tmp_path)) == ["b", "b/file", "home", "home/c", "home/c/file"]


@pytest.mark.parametrize(
    ("target", "inputs", "problem"),
    [
        (".", [], "holds {cwd}, which would be lost. Give another output directory"),
        ("..", [], "holds {cwd}, which would be lost. Give another output directory"),
        ("/", [], "holds {cwd}, which would be lost. Give another output directory"),
        ("/proc", [], "is a mount point, which cannot be replaced. Give a new directory in it"),
        ("../base", ["../base"], "holds ../base, which would be lost. Give another output directory"),
        ("../base/x", ["../base"], "lies in ../base, which is an input. Give a directory outside of it"),
    ],
)
def test_targets_that_cannot_be(tmp_path: Path, target: str, inputs: list[str], problem: str) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "base").mkdir()
    with working_directory(tmp_path / "work"), pytest.raises(OutputError) as raised:
        check_target(Path(target), True, map(Path, inputs))
    assert str(raised.value) == f"{target}: {problem.format(cwd=tmp_path / 'work')}"


# --- several runs -----------------------------------------------------------------------------------


def test_a_second_run_is_refused(tmp_path: Path) -> None:
    with staged_directory(Target(tmp_path / "out"), [], WORK) as made:
        (made.files / "file").write_text("first")
        with pytest.raises(OutputError) as raised:
            produce(tmp_path / "out", "second", force=True)
        (tmp_path / "link").symlink_to("out")
        with pytest.raises(OutputError):
            produce(tmp_path / "link", "third")
    problem = "another run is writing it. Wait for it, or give another directory"
    assert str(raised.value) == f"{tmp_path}/out: {problem}"
    assert tree(tmp_path / "out") == {"file": b"first"}
    produce(tmp_path / "out", "fourth", force=True)
    assert sorted(tree(tmp_path)) == ["link", "out", "out/file"]


def test_a_lock_that_its_owner_removes_is_no_lock(tmp_path: Path) -> None:
    """Between opening the lock file and locking it, the run that held it may have ended and removed it."""
    os_open, opened = os.open, []

    def open_and_lose(path: Any, *arguments: Any) -> int:
        opened.append(path)
        handle = os_open(path, *arguments)
        if len(opened) == 1:
            os.unlink(path)
        return handle

    with mock.patch("os.open", open_and_lose):
        handle = staging._lock(tmp_path / "lock")
    assert len(opened) == 2
    assert os.path.samestat(os.fstat(handle), os.stat(tmp_path / "lock"))
    os.close(handle)


KILLED = """
import os, signal, sys
from pathlib import Path
from cpimerge.staging import Target, Work, staged_directory
with staged_directory(Target(Path(sys.argv[1]), True), [], Work("plan", "this")) as made:
    (made.files / "deep").mkdir()
    (made.files / "deep" / "model.safetensors").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_leftovers_of_a_killed_run(tmp_path: Path) -> None:
    """A killed run leaves nothing under the final name, and the next one removes what it left elsewhere."""
    produce(tmp_path / "out", "old")
    run = subprocess.run([sys.executable, "-c", KILLED, tmp_path / "out"], check=False)
    assert run.returncode == -signal.SIGKILL
    assert tree(tmp_path / "out") == {"file": b"old"}
    assert (tmp_path / ".out.partial" / "files" / "deep" / "model.safetensors").read_text() == "half"
    produce(tmp_path / "out", force=True)
    assert tree(tmp_path) == {"out": None, "out/file": b"new"}


@pytest.mark.parametrize("leftover", ["file", "link"])
def test_other_leftovers(tmp_path: Path, leftover: str) -> None:
    """Only what lies under the hidden name goes, not what a link there points to."""
    produce(tmp_path / "precious", "old")
    if leftover == "file":
        (tmp_path / ".out.partial").write_text("x")
    else:
        (tmp_path / ".out.partial").symlink_to("precious")
    produce(tmp_path / "out")
    assert sorted(tree(tmp_path)) == ["out", "out/file", "precious", "precious/file"]


# --- a real run -------------------------------------------------------------------------------------

KILLED_FUSE = """
import os, signal, sys
import cpimerge
def progress(phase, done, total):
    if done >= total / 2:
        os.kill(os.getpid(), signal.SIGKILL)
cpimerge.fuse(sys.argv[1], sys.argv[2], threads=1, progress=progress)
"""


def test_a_killed_fuse_and_the_next(tmp_path: Path) -> None:
    names = [f"layers.{number}.w" for number in range(8)]
    for shift, directory in enumerate(("base", "math", "code")):
        save(tmp_path / directory, {name: torch.full((50, 3), float(shift)) for name in names})
    models = [{"model": tmp_path / "math"}, {"model": tmp_path / "code"}]
    plan(write_recipe(tmp_path / "recipe.yml", base_model=tmp_path / "base", models=models), tmp_path / "plan")
    run = subprocess.run([sys.executable, "-c", KILLED_FUSE, tmp_path / "plan", tmp_path / "out"], check=False)
    assert run.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert (tmp_path / ".out.partial" / "files" / "model.safetensors").stat().st_size > 4 * 600
    manifest = fuse(tmp_path / "plan", tmp_path / "out", threads=1)
    assert sorted(path.name for path in tmp_path.glob(".*")) == []
    fused = tmp_path / "out" / "model.safetensors"
    digest = hashlib.sha256(fused.read_bytes()).hexdigest()
    assert manifest["shards"] == {fused.name: {"size": fused.stat().st_size, "sha256": digest}}
    assert load_file(fused).keys() == set(names)
