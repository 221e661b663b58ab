"""Places on the disk that a run writes: what they really are, what lies beside them, and that one run has them."""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import OutputError

__all__ = ["beside", "is_directory", "keep_only", "locked", "output_errors", "real_path", "remove"]


def real_path(path: Path) -> Path:
    """Absolute and without links: what is written lands where a link points, not in the place of the link.

    Raises OutputError for a relative path in a working directory that is gone.
    """
    try:
        return Path(os.path.realpath(os.path.expanduser(path)))
    except FileNotFoundError as error:
        raise OutputError(
            f"{path}: the working directory is gone. Change to another, or give an absolute path"
        ) from error


def beside(real: Path, purpose: str) -> Path:
    """A hidden neighbour of the target, on the same disk."""
    return real.with_name(f".{real.name}.{purpose}")


@contextmanager
def output_errors(target: Path) -> Iterator[None]:
    """What the system objects to is an OutputError that names the target; what was noted on it stays."""
    try:
        yield
    except OSError as error:
        cause = error.strerror or str(error)
        place = f"{error.filename}: " if error.filename else ""
        raised = OutputError(f"{target}: cannot be written: {place}{cause}")
        for note in getattr(error, "__notes__", ()):
            raised.add_note(note)
        raise raised from error


@contextmanager
def locked(real: Path, target: Path | None = None) -> Iterator[None]:
    """Hold `.<name>.lock` beside a place, so that no other run writes there.

    Raises OutputError where one does; it names `target`, where the place is no more than a part of what is written.
    """
    real.parent.mkdir(parents=True, exist_ok=True)
    file = beside(real, "lock")
    try:
        handle = _lock(file)
    except BlockingIOError as error:
        raise OutputError(
            f"{target or real}: another run is writing it. Wait for it, or give another directory"
        ) from error
    try:
        yield
    finally:
        file.unlink(missing_ok=True)
        os.close(handle)


def _lock(file: Path) -> int:
    """An open handle that holds the lock, on the file that is there now: its last owner may have unlinked it.

    Raises BlockingIOError where another run holds it.
    """
    while True:
        handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(handle, file):
                return handle
        except OSError:
            os.close(handle)
            raise
        os.close(handle)


def _is_at(handle: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(file))
    except FileNotFoundError:
        return False


def is_directory(path: Path) -> bool:
    """And no link to one, which might lead anywhere."""
    return path.is_dir() and not path.is_symlink()


def remove(path: Path) -> None:
    """Delete a file, a link or a directory with all that is in it, if it is there. Raises OSError."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def keep_only(directory: Path, names: Collection[str], directories: Collection[str] = ()) -> None:
    """Remove all but the ordinary files, or directories, that are called so."""
    for entry in os.scandir(directory):
        mode = entry.stat(follow_symlinks=False).st_mode
        is_kind = stat.S_ISDIR(mode) if entry.name in directories else stat.S_ISREG(mode)
        if entry.name not in names or not is_kind:
            remove(Path(entry.path))
