"""The calls by which a program changes a disk: each is numbered, and one of them can be made to fail, or be the last.

Installed before cpimerge is imported, the layer does nothing until a process arms it. Files that Python would write
in C are written by its own slow twin of that code, so that their writes are seen as well.
"""

from __future__ import annotations

import builtins
import ctypes
import errno
import importlib
import io
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

WRITES = ("write", "pwrite", "sendfile", "copy_file_range")
BY_HANDLE = (*WRITES, "fsync", "fdatasync", "ftruncate", "posix_fallocate")
BY_PATH = ("open", "mkdir", "rmdir", "unlink", "remove", "rename", "replace", "link", "symlink", "truncate")
MAKES = os.O_CREAT | os.O_TRUNC | getattr(os, "O_TMPFILE", 0) & ~os.O_DIRECTORY
REAL = {name: getattr(os, name) for name in (*BY_HANDLE, *BY_PATH) if hasattr(os, name)}


@dataclass(frozen=True)
class Call:
    """One call about to be made on `path`; `target` is the second path of a rename."""

    name: str
    path: str
    arguments: tuple[Any, ...]
    perform: Callable[[], Any]
    target: str | None = None

    @property
    def writes(self) -> bool:
        return self.name in WRITES

    def tear(self) -> int:
        """Half of a write, and how many bytes that is; nothing of any other call."""
        if not self.writes:
            return 0
        given = list(self.arguments)
        if self.name == "write" or self.name == "pwrite":
            given[1] = memoryview(given[1]).cast("B")[: memoryview(given[1]).nbytes // 2]
        else:
            place = 3 if self.name == "sendfile" else 2
            given[place] = min(given[place], os.fstat(given[1 if self.name == "sendfile" else 0]).st_size) // 2
        written: int = REAL[self.name](*given)
        return written


@dataclass(frozen=True)
class Fault:
    """What happens at call `number` (from 1): death before, half through or after it, or an error.

    `sticky`: calls that follow fail alike, as on a disk that stays full.
    """

    number: int = 0
    moment: str = "before"  # half, after, error
    code: int = 0
    sticky: bool = False


class Disk(Protocol):
    """What the calls do to a disk that may lose power."""

    def before(self, call: Call) -> None: ...

    def after(self, call: Call) -> None: ...

    def cut(self) -> None: ...


@dataclass
class Layer:
    """Sees every call on something below `root`, one at a time; `names` are those made so far.

    `report` is a file that will say which call met the fault.
    """

    root: Path
    fault: Fault
    report: Path
    disk: Disk | None = None
    names: list[str] = field(default_factory=list)
    inside: int = 0  # the thread whose call it is: what that does to the disk besides is none of the program's
    lock: threading.Lock = field(default_factory=threading.Lock)

    def made(self, call: Call) -> Any:
        """Make the call, unless its turn has come."""
        with self.lock:
            self.inside = threading.get_ident()
            try:
                return self._made(call)
            finally:
                self.inside = 0

    def _made(self, call: Call) -> Any:
        self.names.append(call.name)
        due = len(self.names) == self.fault.number
        if self.fault.moment == "error":
            if due:
                self._tell(call)
            if due and self.fault.sticky and (written := call.tear()):
                return written  # what there was room for
            if due or self._fails_still(call):
                raise OSError(self.fault.code, os.strerror(self.fault.code), call.path)
        elif due:
            self._die(call)
        return self._perform(call)

    def _perform(self, call: Call) -> Any:
        if self.disk is None:
            return call.perform()
        self.disk.before(call)
        result = call.perform()
        self.disk.after(call)
        return result

    def _fails_still(self, call: Call) -> bool:
        """A full disk takes nothing more, but lets go of what it has."""
        later = self.fault.sticky and 0 < self.fault.number < len(self.names)
        return later and not (self.fault.code in FULL and call.name in FREES)

    def _die(self, call: Call) -> None:
        self._tell(call)
        if self.fault.moment == "after":
            self._perform(call)
        elif self.fault.moment == "half":
            if self.disk is not None:
                self.disk.before(call)
            call.tear()
        if self.disk is not None:
            self.disk.cut()
        os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)

    def _tell(self, call: Call) -> None:
        self.report.write_bytes(f"{call.name} {call.path} {call.target or ''}".encode(errors="replace"))


FULL = (errno.ENOSPC, errno.EDQUOT)
FREES = ("unlink", "remove", "rmdir", "rename", "replace", "fsync", "fdatasync", "ftruncate", "truncate")

_active: list[Layer] = []


def arm(layer: Layer) -> None:
    """From here on the calls of this process go through `layer`."""
    _active.append(layer)


def disarm() -> Layer:
    """The calls of this process are its own again."""
    return _active.pop()


def install() -> None:
    """Put the layer under `os` and `open`. Once, before anything keeps functions of theirs."""
    for name in REAL:
        setattr(os, name, _wrapped(name))
    real_open = builtins.open
    slow = importlib.import_module("_pyio")  # which types know nothing of

    def either(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        return (slow.open if _seen() and set(mode) & set("wax+") else real_open)(file, mode, *args, **kwargs)

    for module in (builtins, io):
        setattr(module, "open", either)  # noqa: B010 - typed otherwise


def watch_fallocate() -> None:
    """cpimerge calls the system's own by ctypes; to be called when cpimerge has been imported."""
    try:
        from cpimerge import disk
    except ImportError:
        return
    real = disk._fallocate()
    if real is None:
        return

    def fallocate(handle: int, *given: Any) -> int:
        path = _path_of(handle)
        if not _seen() or not _below(path):
            return real(handle, *given)
        try:
            call = Call("fallocate", path, (handle, *given), lambda: real(handle, *given))
            return int(_active[-1].made(call))
        except OSError as error:
            ctypes.set_errno(error.errno or 0)
            return -1

    setattr(disk, "_fallocate", lambda: fallocate)  # noqa: B010


def _wrapped(name: str) -> Callable[..., Any]:
    real = REAL[name]

    def call(*args: Any, **kwargs: Any) -> Any:
        if not _seen():
            return real(*args, **kwargs)
        made = _call(name, args, kwargs)
        return real(*args, **kwargs) if made is None else _active[-1].made(made)

    return call


def _call(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call | None:
    """What is about to happen; None where it changes nothing below the root."""
    perform = lambda: REAL[name](*args, **kwargs)  # noqa: E731
    if name in BY_HANDLE:
        path = _path_of(args[0])
        return Call(name, path, args, perform) if _below(path) else None
    if name == "open" and not (args[1] if len(args) > 1 else kwargs["flags"]) & MAKES:
        return None
    if name in ("rename", "replace", "link", "symlink"):
        first = os.path.abspath(os.fspath(args[0]))
        second = os.path.abspath(os.fspath(args[1]))
        return Call(name, first, args, perform, second) if _below(second) else None
    path = os.path.join(_path_of(kwargs.get("dir_fd")), os.fspath(args[0]))
    return Call(name, os.path.abspath(path), args, perform) if _below(os.path.abspath(path)) else None


def _path_of(handle: int | None) -> str:
    """Where an open file or directory is; what is no file, or has lost its name, is said to be deleted."""
    if handle is None:
        return os.getcwd()
    try:
        return os.readlink(f"/proc/self/fd/{handle}")
    except OSError:
        return ""


def _seen() -> bool:
    """Whether the calls of this thread go through a layer now."""
    return bool(_active) and _active[-1].inside != threading.get_ident()


def _below(path: str) -> bool:
    return f"{path}/".startswith(f"{_active[-1].root}/")
