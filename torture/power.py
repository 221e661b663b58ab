"""A disk that loses power: what was not flushed is gone, stale, zero or garbage, and names that were not flushed too.

It promises as little as POSIX does. A flush of a file saves its bytes, not its name; names of a directory are saved
when that directory is flushed, and before that any first few of the changes to them may have been. A rename is whole.
"""

from __future__ import annotations

import fcntl
import os
import random
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from calls import Call

SECTOR = 512
Identity = tuple[int, int]
FINDS = {"nothing": "old", "names": "zeros", "bytes": "kept"}


@dataclass
class _Unflushed:
    """What was done to a file since it was flushed: its size then, and what stood where it was written since."""

    handle: int
    size: int
    old: list[tuple[int, bytes, int]] = field(default_factory=list)  # offset, bytes, how many were written


@dataclass(frozen=True)
class _Change:
    """A change to a name in a directory, and how to take it back in that directory, given as an open one."""

    number: int
    name: str
    undo: Callable[[str, int], None]


@dataclass
class _Directory:
    """An open directory, and what was done to its names since it was flushed."""

    handle: int
    changes: list[_Change] = field(default_factory=list)


class PowerLoss:
    """Follows the calls of a process; `cut` leaves the disk as it might be after a loss of power.

    `mode`: "nothing" keeps nothing that was not flushed, "names" keeps all names and loses all bytes, "bytes" the
    other way round, "some" is anything between. `grave` is a directory on the same disk, for what is deleted meanwhile.
    """

    MODES = (*FINDS, "some")

    def __init__(self, grave: Path, mode: str, seed: int) -> None:
        self.grave = grave
        self.mode = mode
        self.random = random.Random(seed)
        self.files: dict[Identity, _Unflushed] = {}
        self.names: dict[Identity, _Directory] = {}
        self.changes = 0
        self.done: Callable[[], None] | None = None  # notes the call, once it has succeeded

    def before(self, call: Call) -> None:
        """Keep what the call is about to change."""
        self.done = None
        if call.writes or call.name in ("ftruncate", "posix_fallocate"):
            self._keep(call.arguments[0], *_range(call))
        elif call.name == "open":
            self._before_open(call)
        elif call.name in ("unlink", "remove"):
            self._before_unlink(call.path)
        elif call.name == "rmdir":
            self._before_rmdir(call.path)
        elif call.name == "mkdir":
            self._later(call.path, lambda name, parent: shutil.rmtree(name, ignore_errors=True, dir_fd=parent))
        elif call.name in ("rename", "replace"):
            self._before_rename(call.path, call.target or "")
        elif call.name not in ("fsync", "fdatasync", "fallocate"):
            raise NotImplementedError(f"{call.name}: teach the torture what a loss of power does to it")

    def after(self, call: Call) -> None:
        """The call has succeeded."""
        if self.done is not None:
            self.done()
        if call.name in ("fsync", "fdatasync"):
            identity = _identity(os.fstat(call.arguments[0]))
            if identity in self.names:
                self.names[identity].changes.clear()
            flushed = self.files.pop(identity, None)
            if flushed is not None:
                os.close(flushed.handle)

    def cut(self) -> None:
        """Lose the power."""
        for file in self.files.values():
            self._lose(file)
        self._take_back([(change, names) for names in self.names.values() for change in self._lost(names)])

    def _lost(self, names: _Directory) -> list[_Change]:
        count = len(names.changes)
        kept = {"nothing": 0, "names": count, "bytes": 0}.get(self.mode, self.random.randint(0, count))
        return names.changes[kept:]

    def _take_back(self, lost: Iterable[tuple[_Change, _Directory]]) -> None:
        for change, names in sorted(lost, key=lambda pair: -pair[0].number):
            with suppress(OSError):  # what it undoes may be gone with something else
                change.undo(change.name, names.handle)

    def _before_open(self, call: Call) -> None:
        flags = call.arguments[1]
        there = os.path.lexists(call.path)
        if there and flags & os.O_TRUNC and os.path.isfile(call.path):
            handle = os.open(call.path, os.O_RDWR | os.O_CLOEXEC)
            self._keep(handle, 0, os.fstat(handle).st_size)
            os.close(handle)
        if not there and flags & os.O_CREAT:
            self._later(call.path, lambda name, parent: os.unlink(name, dir_fd=parent))

    def _before_unlink(self, path: str) -> None:
        kept = self._kept(path)
        self._later(path, lambda name, parent: os.link(kept, name, dst_dir_fd=parent))

    def _before_rmdir(self, path: str) -> None:
        gone = _identity(os.stat(path))  # which another directory may get
        names = self.names.get(gone, _Directory(-1))

        def undo(name: str, parent: int) -> None:
            os.mkdir(name, dir_fd=parent)
            names.handle = os.open(name, os.O_RDONLY, dir_fd=parent)
            self._take_back((change, names) for change in self._lost(names))

        self._later(path, undo, gone)

    def _before_rename(self, source: str, target: str) -> None:
        kept = self._kept(target) if os.path.isfile(target) else None
        origin = os.open(os.path.dirname(source), os.O_RDONLY | os.O_CLOEXEC)

        def undo(name: str, parent: int) -> None:
            os.rename(name, os.path.basename(source), src_dir_fd=parent, dst_dir_fd=origin)
            if kept is not None:
                os.link(kept, name, dst_dir_fd=parent)

        self._later(target, undo)

    def _kept(self, path: str) -> str:
        """A second name for a file that is about to lose its own."""
        kept = str(self.grave / str(self.changes))
        os.link(path, kept, follow_symlinks=False)
        return kept

    def _later(self, path: str, undo: Callable[[str, int], None], gone: Identity | None = None) -> None:
        """Note a change to the name at the end of `path`, once it has been made; `gone` is a directory that goes."""
        folder, name = os.path.split(path)
        identity = _identity(os.stat(folder))
        if identity not in self.names:
            self.names[identity] = _Directory(os.open(folder, os.O_RDONLY | os.O_CLOEXEC))
        self.changes += 1
        change = _Change(self.changes, name, undo)

        def done() -> None:
            self.names[identity].changes.append(change)
            if gone is not None:
                self.names.pop(gone, None)

        self.done = done

    def _keep(self, handle: int, offset: int, count: int) -> None:
        status = os.fstat(handle)
        identity = _identity(status)
        if identity not in self.files:
            own = os.open(f"/proc/self/fd/{handle}", os.O_RDWR | os.O_CLOEXEC)
            self.files[identity] = _Unflushed(own, status.st_size)
        file = self.files[identity]
        file.old.append((offset, os.pread(file.handle, count, offset), count))

    def _lose(self, file: _Unflushed) -> None:
        """The bytes that were not flushed: as they were, or zeros, or garbage, or torn between them and the new."""
        finds = FINDS.get(self.mode) or self.random.choice(("old", "zeros", "garbage", "torn", "kept"))
        end = os.fstat(file.handle).st_size
        for offset, old, count in reversed(file.old):
            if finds in ("old", "torn"):
                self._put_back(file.handle, offset, old, finds == "torn")
            elif finds != "kept":
                length = max(0, min(count, end - offset))
                os.pwrite(file.handle, bytes(length) if finds == "zeros" else self.random.randbytes(length), offset)
        if finds == "old":
            os.ftruncate(file.handle, file.size)
        elif finds == "torn" and self.random.random() < 0.5:
            os.ftruncate(file.handle, self.random.randint(min(file.size, end), end))

    def _put_back(self, handle: int, offset: int, old: bytes, torn: bool) -> None:
        for place in range(0, len(old), SECTOR):
            if not torn or self.random.random() < 0.5:
                os.pwrite(handle, old[place : place + SECTOR], offset + place)


def _range(call: Call) -> tuple[int, int]:
    """Where a call is about to write, and how many bytes at most."""
    handle = call.arguments[0]
    size = os.fstat(handle).st_size
    if call.name == "posix_fallocate":
        return size, 0
    if call.name == "ftruncate":
        return min(size, call.arguments[1]), max(0, size - call.arguments[1])
    if call.name == "pwrite":
        return call.arguments[2], memoryview(call.arguments[1]).nbytes
    appends = fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_APPEND
    place = size if appends else os.lseek(handle, 0, os.SEEK_CUR)
    if call.name == "write":
        return place, memoryview(call.arguments[1]).nbytes
    if call.name == "sendfile":
        return place, os.fstat(call.arguments[1]).st_size
    raise NotImplementedError(f"{call.name}: teach the torture what a loss of power does to it")


def _identity(status: os.stat_result) -> Identity:
    return status.st_dev, status.st_ino
