"""Directories that appear only when all of them is on the disk, and what a run that was cut off leaves for the next.

A target `out` is filled beside itself, on the same disk:

    .out.partial/journal    what is done, and what for (journal.py)
    .out.partial/files/     becomes `out` by one rename
    .out.partial/…          whatever else the run needs until then
    .out.lock               held by the run that writes there

A run that is killed or fails leaves this, and the same run goes on with it. What a run of another kind left is not
touched until somebody says so.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from . import __version__
from .disk import flush, held_bytes
from .errors import ChangedInputError, IncompatibleError, OutputError, PlanError
from .journal import Journal, Record, read_records
from .places import beside, is_directory, locked, output_errors, real_path, remove
from .writer import MAX_SHARD_BYTES

__all__ = [
    "Staging",
    "Target",
    "Watch",
    "Work",
    "check_target",
    "forget",
    "is_published",
    "private_directory",
    "resumable_directory",
    "staged_bytes",
    "staged_directory",
]

FORMAT = {"format": "cpimerge journal", "version": 1, "cpimerge": __version__}
# The inputs must change before the same work can be done, so what was done of it is worth nothing.
VERDICTS = (ChangedInputError, IncompatibleError, PlanError)
ADDED_TO_NAMES = 24  # bytes, at most, of what is put around a target's name
MAX_NAME = 255  # bytes, of every file system in use
GO_ON = "what is done so far is kept: the same command goes on from there, --restart begins anew"


Progress = Callable[[str, int, int], None]  # phase, bytes done, bytes in all
Resumed = Callable[[int, int], None]  # bytes that an earlier run has done, bytes in all


@dataclass(frozen=True)
class Watch:
    """Who is told how far a run is, and once, before, if it goes on where an earlier one was cut off."""

    progress: Progress
    resumed: Resumed


@dataclass(frozen=True)
class Work:
    """What is being done: runs of one `kind` ("plan", "fuse", "merge") and `identity`, a hash, end in the same bytes.

    `parts`, hashes by name, say which of the things that decide it are others, where it is another.
    """

    kind: str
    identity: str
    parts: Mapping[str, str] = field(default_factory=dict)

    @property
    def opening(self) -> Record:
        """The first record of its journal."""
        return {**FORMAT, "kind": self.kind, "identity": self.identity, "parts": dict(self.parts)}


@dataclass(frozen=True)
class Target:
    """Where an output goes.

    `force`: it replaces what is there. `restart`: what an earlier run left unfinished is deleted. `shard_bytes`: of
    tensors, the most in one file of a model. `keep_journal`: it stays beside the output, so that the next run sees
    that the output is there already. `work`: what is being done, where that is more than making this output.
    """

    directory: Path
    force: bool = False
    restart: bool = False
    shard_bytes: int = MAX_SHARD_BYTES
    keep_journal: bool = False
    work: Work | None = None


@dataclass(frozen=True)
class Staging:
    """An output in the making: `files` becomes the target; whatever else lies in `root` does not.

    `done` are the records of earlier runs of this work, whose files are still there. `is_published`: an earlier run
    came to its end, but for cleaning up: the target is there, and there is nothing to do.
    """

    root: Path
    journal: Journal
    done: list[Record]
    is_published: bool = False

    @property
    def files(self) -> Path:
        return _files(self.root)


@contextmanager
def staged_directory(target: Target, inputs: Iterable[Path], work: Work) -> Iterator[Staging]:
    """A directory to fill, which becomes the target when the block ends without an exception, and never otherwise.

    What is in it then stays for the next run of the same `work`, unless nothing was recorded in the journal or the
    exception is a verdict on the inputs. A non-empty target is replaced only with `force`, and never where an input
    lies in it. Raises OutputError, also where something else was left unfinished there.
    """
    inputs = tuple(inputs)
    check_target(target, inputs)
    real = real_path(target.directory)
    with output_errors(target.directory), locked(real):
        _restore_replaced(real)
        with _opened(real, target, work) as staging:
            if not staging.is_published:
                check_target(target, inputs)
            with output_errors(target.directory):
                yield staging
            if not staging.is_published:
                check_target(target, inputs)  # much may have happened since
                _publish(staging.files, real)
        if not target.keep_journal:
            shutil.rmtree(beside(real, "partial"), ignore_errors=True)


@contextmanager
def _opened(real: Path, target: Target, work: Work) -> Iterator[Staging]:
    """The staging directory: new, or what an earlier run of this work left."""
    root = beside(real, "partial")
    done = [] if target.restart else _left_over(root, target.directory, work)
    is_published = bool(done) and _was_published(root, real)
    if not is_published and (len(done) < 2 or not is_directory(_files(root))):
        _discard(root)
        done = []
        _files(root).mkdir(parents=True)
    journal = Journal(root / "journal")
    recorded = journal.records
    try:
        if not done:
            journal.append(work.opening)
            recorded += 1
            for directory in (root, root.parent):
                flush(directory)  # that the journal is there
        yield Staging(root, journal, done[1:], is_published)
    except BaseException as error:
        if (done[1:] or journal.records > recorded) and not isinstance(error, VERDICTS):
            error.add_note(GO_ON)
        else:
            with suppress(OSError):
                _discard(root)
        raise
    finally:
        journal.close()


def _discard(root: Path) -> None:
    """Delete a staging directory, its journal first: one without `files` would say that they were published."""
    if is_directory(root):
        remove(root / "journal")
        with suppress(OSError):
            flush(root)
    remove(root)


class _OtherWorkError(OutputError):
    """What lies there is other work than this."""


def _left_over(root: Path, target: Path, work: Work) -> list[Record]:
    """The records that an earlier run of this work left, the opening first; none where there is nothing to go on with.

    Raises OutputError where it was other work, of which something was done.
    """
    if not is_directory(root) or not (root / "journal").is_file() or (root / "journal").is_symlink():
        return []
    done = read_records(root / "journal")
    if not done or done[0] == work.opening:
        return done
    if len(done) == 1:
        return []
    raise _OtherWorkError(
        f"{target}: {root} holds the beginning of {_described(done[0], work)}. Finish that with the command that began "
        "it, give another output directory, or delete what was done of it with --restart"
    )


def _was_published(root: Path, real: Path) -> bool:
    """Whether the run that left `root` had put its output in place."""
    return (root / "journal").is_file() and not os.path.lexists(_files(root)) and real.exists()


def _files(root: Path) -> Path:
    return root / "files"


def _described(opening: Record, work: Work) -> str:
    """How the work that was left differs from `work`."""
    if {key: opening.get(key) for key in ("format", "version")} != {key: FORMAT[key] for key in ("format", "version")}:
        return "something that this cpimerge does not know"
    if opening.get("cpimerge") != __version__:
        return f"a {work.kind} by cpimerge {opening.get('cpimerge')}, and this is {__version__}"
    if opening.get("kind") != work.kind:
        return f"a {opening.get('kind')}, and this is a {work.kind}"
    changed = _changed(opening.get("parts"), work.parts)
    return f"another {work.kind}: {changed} since" if changed else f"another {work.kind}: of other inputs or settings"


def _changed(then: object, now: Mapping[str, str]) -> str:
    """Which part of the work is not what it was; '' where that is not known."""
    if not isinstance(then, dict):
        return ""
    parts = [part for part in {**now, **then} if then.get(part) != now.get(part)]
    more = f" and {len(parts) - 1} more" if len(parts) > 1 else ""
    return f"{parts[0]}{more} changed" if parts else ""


def is_published(target: Target) -> bool:
    """Whether an earlier run of the target's work has put it in place, and was cut off then. Raises OutputError.

    Such a run leaves its journal, which `forget` deletes.
    """
    if target.restart or target.work is None:
        return False
    real = real_path(target.directory)
    root = beside(real, "partial")
    with output_errors(target.directory), locked(real, target.directory):
        return bool(_left_over(root, target.directory, target.work)) and _was_published(root, real)


def forget(target: Path) -> None:
    """Delete what a run with `keep_journal` left beside its target, its lock included. Raises OutputError."""
    real = real_path(target)
    with output_errors(target), locked(real, target):
        shutil.rmtree(beside(real, "partial"), ignore_errors=True)


def staged_bytes(target: Path) -> int:
    """What an earlier run holds of the disk for this target. Raises OutputError."""
    real = real_path(target)
    root = beside(real, "partial")
    with output_errors(target):
        return held_bytes(root) + (held_bytes(real) if _was_published(root, real) else 0)


@contextmanager
def private_directory(target: Path, suffix: str) -> Iterator[Path]:
    """An empty directory for this run alone, hidden on the disk where `target` will be; gone afterwards.

    Its name is fixed, so that what a killed run left there is replaced by the next. Raises OutputError.
    """
    with _beside_target(target, suffix) as directory:
        try:
            remove(directory)
            directory.mkdir()
            yield directory
        finally:
            shutil.rmtree(directory, ignore_errors=True)


@contextmanager
def resumable_directory(target: Target, suffix: str) -> Iterator[Path]:
    """As `private_directory`, for what the next run may go on with: it stays where one is killed, or fails midway.

    An exception that is a verdict on the inputs deletes it, and so does `restart` at the start.
    """
    with _parents_made(target.directory), _beside_target(target.directory, suffix) as directory:
        if target.restart:
            remove(directory)
        directory.mkdir(exist_ok=True)
        try:
            yield directory
        except BaseException as error:
            if isinstance(error, VERDICTS) or not any(directory.iterdir()):
                shutil.rmtree(directory, ignore_errors=True)
            elif GO_ON not in getattr(error, "__notes__", ()) and not isinstance(error, _OtherWorkError):
                error.add_note(GO_ON)
            raise
        shutil.rmtree(directory, ignore_errors=True)


@contextmanager
def _parents_made(target: Path) -> Iterator[None]:
    """Make the directories above `target` at once, so that the next run looks in the same place as this one.

    Those that are empty go again where the run fails.
    """
    real = real_path(target)
    with output_errors(target):
        missing = [parent for parent in real.parents if not parent.exists()]
        real.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        with suppress(OSError):
            for parent in missing:
                parent.rmdir()
        raise


@contextmanager
def _beside_target(target: Path, suffix: str) -> Iterator[Path]:
    """The place of a hidden directory in the nearest parent of `target` that is there, locked."""
    real = real_path(target)
    parent = next(place for place in real.parents if place.is_dir())
    directory = parent / f".{real.name}{suffix}"
    with output_errors(target), locked(directory, target):
        yield directory


def check_target(goal: Target, inputs: Iterable[Path]) -> None:
    """Raise OutputError where `goal` must not be written: it holds files or an input, or an input holds it."""
    target, inputs = goal.directory, tuple(inputs)
    real = real_path(target)
    kept = list(inputs)
    with suppress(FileNotFoundError):  # a working directory that is gone lies nowhere
        kept.append(Path.cwd())
    for path in kept:
        if real_path(path).is_relative_to(real):
            raise OutputError(f"{target}: holds {path}, which would be lost. Give another output directory")
    for path in inputs:
        if real.is_relative_to(real_path(path)):
            raise OutputError(f"{target}: lies in {path}, which is an input. Give a directory outside of it")
    with output_errors(target):
        room = MAX_NAME - ADDED_TO_NAMES
        if len(os.fsencode(real.name)) > room:
            raise OutputError(f"{target}: its name is too long: {room} bytes at most. Give another output directory")
        nearest = next(place for place in (real, *real.parents) if place.exists())
        if not nearest.is_dir():
            raise OutputError(f"{target}: cannot be made, as {nearest} is no directory. Give another output directory")
        if os.path.ismount(real):
            raise OutputError(f"{target}: is a mount point, which cannot be replaced. Give a new directory in it")
        is_kept = not goal.restart and _was_published(beside(real, "partial"), real)
        if real.is_dir() and not goal.force and any(real.iterdir()) and not is_kept:
            raise OutputError(f"{target}: not empty. Give another output directory, or --force to replace all of it")


def _publish(files: Path, real: Path) -> None:
    """Flush everything, then rename. A target that is replaced steps aside first and goes last."""
    for directory, _, names in os.walk(files):
        for name in (*names, "."):
            flush(Path(directory, name))
    replaced = beside(real, "replaced")
    try:
        if real.exists():
            os.rename(real, replaced)
        os.rename(files, real)
        flush(real.parent)
    except BaseException:  # also of somebody who does not want to wait
        _restore_replaced(real)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def _restore_replaced(real: Path) -> None:
    """Bring back what stepped aside where a run was killed before its output took the place; or remove it."""
    replaced = beside(real, "replaced")
    if real.exists() or not replaced.is_dir():
        remove(replaced)
    else:
        os.rename(replaced, real)
