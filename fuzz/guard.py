"""Watches Python while it reads a stranger's input: nothing is executed, unpickled, sent, or written elsewhere.

Python tells of these things by audit events. What is seen is written down, since an exception raised there might be
taken for the parser's own; `watched` raises it at the end.
"""

from __future__ import annotations

import os
import sys
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .target import Run, Target

__all__ = ["Finding", "checked", "run_checked", "warmed", "watched"]

# Events that no parser has a reason for, by what they begin with.
FORBIDDEN = (
    *("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "pty.", "subprocess.", "socket.", "pickle."),
    *("ctypes.dlopen", "code.", "webbrowser.", "ftplib.", "smtplib.", "urllib.", "http.client", "sys.set"),
    *("os.putenv", "os.unsetenv", "os.kill", "signal."),
)
BUILDERS = ("/dataclasses.py", "/collections/__init__.py", "/typing.py", "/attr/_make.py")
# Events that change the file system -> which of their arguments are the paths that change.
ONE, BOTH, SECOND = slice(0, 1), slice(0, 2), slice(1, 2)
CHANGES = {
    **dict.fromkeys(("os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.chmod", "os.chown", "os.utime"), ONE),
    **dict.fromkeys(("os.mkfifo", "os.mknod", "os.setxattr", "shutil.rmtree"), ONE),
    **dict.fromkeys(("os.rename", "shutil.move"), BOTH),
    **dict.fromkeys(("os.link", "os.symlink", "shutil.copyfile", "shutil.copytree"), SECOND),
}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Finding(Exception):
    """Something that must not happen did."""


class _Watch:
    """What the process does at the moment: the directory that may be written, and what was seen."""

    def __init__(self) -> None:
        self.directory: str | None = None  # None: nobody watches
        self.seen: list[str] = []
        self.hooked = False

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.directory is None:
            return
        if event.startswith(FORBIDDEN) or (event == "exec" and _is_strange(arguments[0])):
            self.seen.append(f"{event} {str(arguments)[:200]}")
        elif event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING:
            self._check(event, arguments[0])
        elif event in CHANGES:
            for path in arguments[CHANGES[event]]:
                self._check(event, path, arguments[-1])

    def _check(self, event: str, path: Any, folder: Any = None) -> None:
        """That a path which is changed lies below the directory; `folder`: a handle of what it is relative to."""
        if isinstance(path, int):  # a file that is open already
            return
        name = os.fsdecode(path)
        if type(folder) is int and folder >= 0:
            name = os.path.join(os.path.realpath(f"/dev/fd/{folder}"), name)
        place = os.path.realpath(os.path.dirname(os.path.abspath(name)))
        if not f"{place}/".startswith(f"{self.directory}/") and name != os.devnull:
            self.seen.append(f"{event} {name[:200]!r}")


def _is_strange(code: Any) -> bool:
    """Whether code that is about to run comes from no file, nor from what builds classes when a module is imported."""
    caller = sys._getframe(2).f_code.co_filename
    generated = code.co_filename.startswith("<") and not code.co_filename.startswith("<frozen")
    return generated and not caller.endswith(BUILDERS)


_WATCH = _Watch()


@contextmanager
def watched(directory: Path) -> Iterator[None]:
    """Raise Finding at the end of the block if it did what no parser may. It may write below `directory`."""
    if not _WATCH.hooked:
        sys.addaudithook(_WATCH.hook)
        _WATCH.hooked = True
    _WATCH.seen.clear()
    _WATCH.directory = os.path.realpath(directory)
    try:
        yield
    finally:
        _WATCH.directory = None
    if _WATCH.seen:
        raise Finding("did what no parser may: " + "; ".join(_WATCH.seen[:5]))


def warmed(target: Target, scratch: Path) -> Run:
    """What runs an input, after it ran the seeds: whatever is imported or compiled when needed is there by then."""
    run = target.prepare(scratch)
    for seed in target.seeds().values():
        with suppress(Exception):  # they are inputs like others, and run again
            run(seed)
    return run


def checked(target: Target, run: Run, data: bytes, scratch: Path) -> bool:
    """Run one input; returns whether it was accepted. Raises Finding, or whatever else the parser must not raise."""
    with watched(scratch):
        try:
            run(data)
        except target.refusal:
            return False
        return True


def run_checked(target: Target, run: Run, data: bytes, scratch: Path) -> bool:
    """Run one input twice, and the second time look at the memory that Python takes for it as well."""
    accepted = checked(target, run, data, scratch)
    tracemalloc.start()
    try:
        checked(target, run, data, scratch)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    limit = target.memory + target.memory_per_byte * len(data)
    if peak > limit:
        raise Finding(f"takes {peak} bytes of memory for {len(data)}, more than {limit}")
    return accepted
