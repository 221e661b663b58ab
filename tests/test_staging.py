"""Directories that appear only when all of them is on the disk, and what the next run finds of one that was cut off."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from checkpoints import save, write_recipe
from files import tree
from safetensors.torch import load_file

import cpimerge
from cpimerge import CpimergeError, IncompatibleError, OutputError, PlanError, fuse, places, plan, staging
from cpimerge.journal import Journal
from cpimerge.staging import Target, Work, check_target, resumable_directory, staged_directory

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
        check_target(Target(Path(target), force=True), map(Path, inputs))
    assert str(raised.value) == f"{target}: {problem.format(cwd=tmp_path / 'work')}"


def test_a_working_directory_that_is_gone(tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    with working_directory(tmp_path / "gone"):
        (tmp_path / "gone").rmdir()
        produce(tmp_path / "out")
        with pytest.raises(OutputError) as raised:
            produce(Path("out"))
    assert str(raised.value) == "out: the working directory is gone. Change to another, or give an absolute path"
    assert tree(tmp_path) == {"out": None, "out/file": b"new"}


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
        handle = places._lock(tmp_path / "lock")
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


# --- what is gone on with ---------------------------------------------------------------------------


def cut_off(target: Path, work: Work = WORK, error: BaseException | None = None) -> BaseException:
    """Write half of a directory, record that, and fail; returns what was raised."""
    error = error or KeyboardInterrupt()

    def run() -> None:
        with staged_directory(Target(target), [], work) as made:
            (made.files / "half").write_text("half")
            made.journal.append({"done": "half"})
            raise error

    with pytest.raises(type(error)) as raised:
        run()
    return raised.value


def test_what_was_recorded_is_gone_on_with(tmp_path: Path) -> None:
    error = cut_off(tmp_path / "out")
    assert error.__notes__ == [staging.GO_ON]
    assert sorted(tree(tmp_path)) == [
        ".out.partial",
        ".out.partial/files",
        ".out.partial/files/half",
        ".out.partial/journal",
    ]
    with staged_directory(Target(tmp_path / "out"), [], WORK) as made:
        assert (made.done, made.is_published) == ([{"done": "half"}], False)
        (made.files / "other").write_text("half")
    assert tree(tmp_path) == {"out": None, "out/half": b"half", "out/other": b"half"}


def test_a_run_that_did_nothing_more_leaves_what_was_there(tmp_path: Path) -> None:
    cut_off(tmp_path / "out")
    before = tree(tmp_path)
    with pytest.raises(ZeroDivisionError) as raised, staged_directory(Target(tmp_path / "out"), [], WORK):
        _ = 1 / 0
    assert raised.value.__notes__ == [staging.GO_ON]
    assert tree(tmp_path) == before


def test_restart_begins_anew(tmp_path: Path) -> None:
    cut_off(tmp_path / "out")
    with staged_directory(Target(tmp_path / "out", restart=True), [], WORK) as made:
        assert (made.done, list(made.files.iterdir())) == ([], [])
    assert tree(tmp_path) == {"out": None}


@pytest.mark.parametrize("verdict", [PlanError, IncompatibleError])
def test_nothing_stays_of_what_can_never_be_done(tmp_path: Path, verdict: type[CpimergeError]) -> None:
    error = cut_off(tmp_path / "out", error=verdict("the inputs are not what they were"))
    assert not hasattr(error, "__notes__")
    assert tree(tmp_path) == {}


@pytest.mark.parametrize(
    ("kind", "identity", "version", "found"),
    [
        ("plan", "that", None, "another plan: of other inputs or settings"),
        ("fuse", "this", None, "a fuse, and this is a plan"),
        ("plan", "this", "0.0.1", f"a plan by cpimerge 0.0.1, and this is {cpimerge.__version__}"),
        ("plan", "this", 2, "something that this cpimerge does not know"),
    ],
)
def test_other_work_is_not_touched(
    tmp_path: Path, kind: str, identity: str, version: str | int | None, found: str
) -> None:
    key = "version" if isinstance(version, int) else "cpimerge"
    with mock.patch.dict(staging.FORMAT, {} if version is None else {key: version}):
        cut_off(tmp_path / "out", Work(kind, identity))
    before = tree(tmp_path)
    with pytest.raises(OutputError) as raised:
        produce(tmp_path / "out", force=True)
    assert str(raised.value) == (
        f"{tmp_path}/out: {tmp_path}/.out.partial holds the beginning of {found}. Finish that with the command that "
        "began it, give another output directory, or delete what was done of it with --restart"
    )
    assert tree(tmp_path) == before
    produce(tmp_path / "elsewhere")
    with staged_directory(Target(tmp_path / "out", restart=True), [], WORK):
        pass
    assert sorted(tree(tmp_path)) == ["elsewhere", "elsewhere/file", "out"]


def test_other_work_of_which_nothing_was_done_is_replaced(tmp_path: Path) -> None:
    root = tmp_path / ".out.partial"
    (root / "files").mkdir(parents=True)
    with closing(Journal(root / "journal")) as journal:
        journal.append(Work("plan", "that").opening)
    produce(tmp_path / "out")
    assert tree(tmp_path) == {"out": None, "out/file": b"new"}


@pytest.mark.parametrize("planted", ["files", "root", "journal"])
def test_links_in_the_place_of_what_was_left_are_not_followed(tmp_path: Path, planted: str) -> None:
    cut_off(tmp_path / "out")
    root = tmp_path / ".out.partial"
    place = {"files": root / "files", "root": root, "journal": root / "journal"}[planted]
    (tmp_path / "precious").mkdir()
    place.rename(tmp_path / "precious" / "it")
    place.symlink_to(tmp_path / "precious" / "it")
    before = tree(tmp_path / "precious")
    produce(tmp_path / "out")
    assert tree(tmp_path / "out") == {"file": b"new"}
    assert tree(tmp_path / "precious") == before


# --- killed at the end ------------------------------------------------------------------------------


class Killed(BaseException):
    """In place of SIGKILL: nothing is cleaned up after it, as the test sees to."""


def killed_at(target: Path, call: str, source: str, force: bool = False) -> None:
    """Write "new" to a directory, and die just before the rename, or the removal, of `source`."""
    dead: list[Path] = []

    def patched(real: Callable[..., None]) -> Callable[..., None]:
        def run(path: Path, *arguments: Any, **keywords: Any) -> None:
            if dead or (real.__name__, Path(path).name) == (call, source):
                dead.append(path)
                raise Killed
            real(path, *arguments, **keywords)

        return run

    def publish() -> None:
        with staged_directory(Target(target, force), [], WORK) as made:
            (made.files / "file").write_text("new")
            made.journal.append({"done": "all"})

    rename, rmtree = patched(os.rename), patched(shutil.rmtree)
    with mock.patch("os.rename", rename), mock.patch("shutil.rmtree", rmtree), pytest.raises(Killed):
        publish()


@pytest.mark.parametrize(
    ("call", "source", "old", "published"),
    [
        ("rename", "files", False, False),  # before the output took its place
        ("rename", "out", True, False),  # before what was there steps aside
        ("rename", "files", True, False),  # after that
        ("rmtree", ".out.partial", False, True),  # after the output took its place
        ("rmtree", ".out.replaced", True, True),
        ("rmtree", ".out.partial", True, True),
    ],
)
def test_killed_at_the_end(tmp_path: Path, call: str, source: str, old: bool, published: bool) -> None:
    if old:
        produce(tmp_path / "out", "old")
    killed_at(tmp_path / "out", call, source, force=old)
    assert tree(tmp_path).get("out/file", b"old" if old else None) == (b"new" if published else b"old" if old else None)
    with staged_directory(Target(tmp_path / "out", force=old), [], WORK) as made:
        assert made.is_published == published
        assert made.done == [{"done": "all"}]
    assert tree(tmp_path) == {"out": None, "out/file": b"new"}


@pytest.mark.parametrize("restart", [False, True])
def test_killed_while_it_deletes_what_was_done(tmp_path: Path, restart: bool) -> None:
    """What lies under the final name then is still the old output, and no sign that the new one is complete."""
    produce(tmp_path / "out", "old")
    target, rmtree = Target(tmp_path / "out", force=True), shutil.rmtree

    def run(target: Target, error: BaseException) -> None:
        with staged_directory(target, [], WORK) as made:
            made.journal.append({"done": "half"})
            raise error

    def half(path: Path, *_: Any, **__: Any) -> None:
        rmtree(path / "files")
        raise Killed

    if restart:
        with pytest.raises(KeyboardInterrupt):
            run(target, KeyboardInterrupt())
    with mock.patch("shutil.rmtree", half), pytest.raises(Killed):
        run(replace(target, restart=restart), PlanError("changed"))
    assert tree(tmp_path / "out") == {"file": b"old"}
    with staged_directory(target, [], WORK) as made:
        assert (made.done, made.is_published) == ([], False)
        (made.files / "file").write_text("new")
    assert tree(tmp_path) == {"out": None, "out/file": b"new"}


@pytest.mark.parametrize("after", ["out", "files"])
def test_an_interrupt_between_the_renames(tmp_path: Path, after: str) -> None:
    """What was there comes back at once, or the new output is complete."""
    produce(tmp_path / "out", "old")
    rename = os.rename

    def interrupted(source: Path, target: Path) -> None:
        rename(source, target)
        if source.name == after:
            raise KeyboardInterrupt

    def publish() -> None:
        with staged_directory(Target(tmp_path / "out", force=True), [], WORK) as made:
            if not made.is_published:
                (made.files / "file").write_text("new")
                made.journal.append({"done": "all"})

    with mock.patch("os.rename", interrupted), pytest.raises(KeyboardInterrupt):
        publish()
    assert tree(tmp_path / "out") == {"file": b"old" if after == "out" else b"new"}
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.partial", "out"]
    publish()
    assert tree(tmp_path) == {"out": None, "out/file": b"new"}


def test_a_restart_of_what_is_in_place_needs_force(tmp_path: Path) -> None:
    """Which shows before any work is done."""
    killed_at(tmp_path / "out", "rmtree", ".out.partial")
    check_target(Target(tmp_path / "out"), ())
    before = tree(tmp_path)
    with pytest.raises(OutputError, match="not empty"):
        check_target(Target(tmp_path / "out", restart=True), ())
    with pytest.raises(OutputError, match="not empty"):
        staged_directory(Target(tmp_path / "out", restart=True), [], WORK).__enter__()
    assert tree(tmp_path) == before
    check_target(Target(tmp_path / "out", force=True, restart=True), ())


def test_what_is_asked_of_a_run_at_work_does_not_disturb_it(tmp_path: Path) -> None:
    target = Target(tmp_path / "out", work=WORK)
    with staged_directory(target, [], WORK) as made:
        made.journal.append({"done": "half"})
        journal = made.root / "journal"
        with open(journal, "ab") as file:
            file.write(b"a line that is being writ")
        before = journal.read_bytes()
        with pytest.raises(OutputError, match="another run is writing it"):
            staging.is_published(target)
        assert journal.read_bytes() == before


def test_what_other_work_published_is_not_this(tmp_path: Path) -> None:
    killed_at(tmp_path / "out", "rmtree", ".out.partial")
    with pytest.raises(OutputError, match="of other inputs or settings"):
        cut_off(tmp_path / "out", Work("plan", "that"))
    assert tree(tmp_path / "out") == {"file": b"new"}


def test_a_journal_that_is_to_stay(tmp_path: Path) -> None:
    for expected in (False, True, True):
        with staged_directory(Target(tmp_path / "out", force=True, keep_journal=True), [], WORK) as made:
            assert made.is_published == expected
            if not expected:
                (made.files / "file").write_text("new")
                made.journal.append({"done": "all"})
    assert sorted(tree(tmp_path)) == [".out.partial", ".out.partial/journal", "out", "out/file"]


def test_what_is_held_for_a_target(tmp_path: Path) -> None:
    assert staging.staged_bytes(tmp_path / "out") == 0
    with staged_directory(Target(tmp_path / "out", keep_journal=True), [], WORK) as made:
        (made.files / "file").write_bytes(bytes(100_000))
        assert 100_000 <= staging.staged_bytes(tmp_path / "out") < 150_000
    assert 100_000 <= staging.staged_bytes(tmp_path / "out") < 150_000


@pytest.mark.parametrize("length", [231, 232, 255])
def test_names_that_leave_no_room(tmp_path: Path, length: int) -> None:
    target = tmp_path / ("é" * (length // 2) + "x" * (length % 2))
    if length == 231:
        produce(target)
        assert list(tmp_path.iterdir()) == [target]
        return
    with pytest.raises(OutputError) as raised:
        produce(target)
    assert str(raised.value) == f"{target}: its name is too long: 231 bytes at most. Give another output directory"
    assert not list(tmp_path.iterdir())


# --- beside an output -------------------------------------------------------------------------------


def test_what_a_run_keeps_beside_its_output(tmp_path: Path) -> None:
    target = Target(tmp_path / "deep" / "out")

    def run(error: BaseException, keep: bool, restart: bool = False) -> None:
        with resumable_directory(replace(target, restart=restart), ".merge") as directory:
            assert tree(directory) == kept
            if keep:
                (directory / "kept").write_text("kept")
            raise error

    def notes(error: BaseException, keep: bool, restart: bool = False) -> list[str]:
        with pytest.raises(type(error)) as raised:
            run(error, keep, restart)
        return getattr(raised.value, "__notes__", [])

    kept: dict[str, bytes | None] = {}
    assert notes(KeyboardInterrupt(), keep=False) == []
    assert tree(tmp_path) == {}
    assert notes(KeyboardInterrupt(), keep=True) == [staging.GO_ON]
    kept = {"kept": b"kept"}
    assert tree(tmp_path / "deep") == {".out.merge": None, ".out.merge/kept": b"kept"}
    assert notes(KeyboardInterrupt(), keep=False) == [staging.GO_ON]
    assert notes(PlanError("changed"), keep=False) == []
    assert tree(tmp_path) == {"deep": None}
    kept = {}
    notes(KeyboardInterrupt(), keep=True)
    assert notes(KeyboardInterrupt(), keep=False, restart=True) == []
    assert tree(tmp_path) == {"deep": None}  # which an earlier run has made


def test_other_work_does_not_go_on_with_the_same_command(tmp_path: Path) -> None:
    cut_off(tmp_path / "out")

    def run() -> None:
        with resumable_directory(Target(tmp_path / "out"), ".merge") as directory:
            (directory / "kept").write_text("kept")
            cut_off(tmp_path / "out", Work("plan", "that"))

    with pytest.raises(OutputError, match="of other inputs or settings") as raised:
        run()
    assert not hasattr(raised.value, "__notes__")
    assert tree(tmp_path / ".out.merge") == {"kept": b"kept"}


def test_what_a_run_keeps_belongs_to_one_run(tmp_path: Path) -> None:
    with resumable_directory(Target(tmp_path / "out"), ".merge"):
        second = resumable_directory(Target(tmp_path / "out"), ".merge")
        with pytest.raises(OutputError, match="another run is writing it"):
            second.__enter__()
    assert tree(tmp_path) == {}


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
