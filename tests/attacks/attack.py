"""How every attack is made: through a command, with everything watched that a hostile file must not bring about.

A place has sound models and a recipe in `home`, and `outside` what is none of theirs. An attack spoils something in it
and runs a command. What must hold whatever the file says:

- the command ends with exit code 1 and lines of error, none of them unexpected, none with a control character;
- nothing changes in the place, and nothing is left there;
- nothing is written elsewhere, nothing planted is imported, no process is started, no network is asked.
"""

from __future__ import annotations

import os
import stat
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash
from click.testing import CliRunner, Result

from cpimerge.cli import main

__all__ = [
    "Spoil",
    "both",
    "check",
    "done",
    "fifo",
    "folder",
    "link",
    "refused",
    "removed",
    "run",
    "sparse",
    "text",
    "watched",
]

Spoil = Callable[[Path], object]

SECONDS = 20  # of the processor, for files of a few kilobytes; a first kernel is compiled in less
HASHED = 1 << 20
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
NEVER = (
    *("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "pty.spawn"),
    *("socket.connect", "socket.bind", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "urllib.Request"),
    *("os.symlink", "os.link", "os.chown"),
)
# No kernel that numba has compiled and kept, which is a pickle of this machine's own, names these.
NEVER_UNPICKLED = {"os", "posix", "subprocess", "runpy", "importlib", "socket", "shutil", "pty", "planted"}
RUNNING = {"eval", "exec", "compile", "open", "getattr", "__import__", "apply"}
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.utime", "shutil.rmtree")


@dataclass
class _Watch:
    """What is going on meanwhile: `seen` are things that must not be."""

    allowed: tuple[str, ...]
    seen: list[str]

    def note(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in NEVER:
            self.seen.append(f"{event} {arguments!r}")
        elif event == "import" and str(arguments[0]).startswith("planted"):
            self.seen.append(f"import {arguments[0]}")
        elif event == "pickle.find_class" and (arguments[0] in NEVER_UNPICKLED or arguments[1] in RUNNING):
            self.seen.append(f"{event} {arguments!r}")
        elif event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITES:
            self.note_write(event, arguments[0])
        elif event in CHANGES:
            self.note_write(event, arguments[0], arguments[-1])

    def note_write(self, event: str, place: Any, directory: Any = -1) -> None:
        """`directory` is the handle of that which `place` is in, where it is 0 or more."""
        if isinstance(place, int):
            return  # a file that was opened before, which was looked at then
        above = os.readlink(f"/proc/self/fd/{directory}") if isinstance(directory, int) and directory >= 0 else ""
        path = os.path.abspath(os.path.join(above, os.fsdecode(place)))
        if event == "os.mkdir" and os.path.isdir(path):
            return  # it is made only where it is missing
        if not path.startswith(self.allowed) and "__pycache__" not in path and path != os.devnull:
            self.seen.append(f"{event} {path}")


_watch: _Watch | None = None


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _watch is not None:
        _watch.note(event, arguments)


sys.addaudithook(_hook)  # for good: there is no taking it away


@contextmanager
def watched(home: Path) -> Iterator[None]:
    """Asserts that the block writes nothing but outputs, imports nothing planted, starts nothing, asks no network."""
    global _watch
    names = ("out", "plan", ".out", ".plan", "..out")
    _watch = watch = _Watch(tuple(f"{home}/{name}" for name in names), [])
    try:
        yield
    finally:
        _watch = None
    assert not watch.seen, "\n".join(watch.seen)


def snapshot(directory: Path) -> dict[str, tuple[object, ...]]:
    """Everything below a directory, links not followed: kind and content; of large files size and time."""
    return {str(path.relative_to(directory)): _state(path) for path in sorted(directory.rglob("*"))}


def _state(path: Path) -> tuple[object, ...]:
    found = path.lstat()
    if stat.S_ISLNK(found.st_mode):
        return "link", os.readlink(path)
    if not stat.S_ISREG(found.st_mode):
        return (stat.S_IFMT(found.st_mode),)
    content = xxhash.xxh3_128_hexdigest(path.read_bytes()) if found.st_size <= HASHED else found.st_mtime_ns
    return "file", found.st_size, content


def run(home: Path, *arguments: str) -> Result:
    """Run a command in `home` under watch."""
    begin = time.process_time()
    with watched(home):
        result = CliRunner().invoke(main, [argument.format(home=home) for argument in arguments])
    assert time.process_time() - begin < SECONDS
    assert all(line.isprintable() for line in (result.stdout + result.stderr).split("\n"))
    return result


COMMANDS = {
    "plan": ("plan", "{home}/recipe.yml", "-o", "{home}/plan", "--threads", "1"),
    "fuse": ("fuse", "{home}/plan", "-o", "{home}/out", "--threads", "1"),
    "merge": ("merge", "{home}/recipe.yml", "-o", "{home}/out", "--threads", "1"),
    "inspect": ("inspect", "{home}/math"),
}


def refused(home: Path, command: str = "plan", *options: str) -> list[str]:
    """The lines with which a command refuses what it is given, without the path of `home`."""
    before = snapshot(home.parent)
    result = run(home, *COMMANDS[command], *options)
    assert result.exit_code == 1, (result.output, result.exception)
    assert isinstance(result.exception, SystemExit)
    lines = result.stderr.splitlines()
    problems = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    assert not any(problem.startswith("unexpected") for problem in problems), problems
    assert ("Traceback" in result.stderr) == ("--debug" in options)
    assert snapshot(home.parent) == before
    return [problem.replace(f"{home}/", "").replace(f"{home}", "HOME") for problem in problems]


def check(home: Path, spoil: Spoil, problems: list[str], command: str = "plan") -> None:
    """Asserts that the command refuses what `spoil` makes of the place, in these words; "..." stands for many more."""
    spoil(home)
    found = refused(home, command)
    if problems[-1] == "...":
        problems = problems[:-1]
        assert len(found) > len(problems)
        found = found[: len(problems)]
    assert found == problems


def done(home: Path, command: str = "merge", *options: str) -> Result:
    """The result of a command that does what it should, whatever was planted; all that there was is as it was."""
    before = snapshot(home.parent)
    result = run(home, *COMMANDS[command], *options)
    assert result.exit_code == 0, result.stderr
    after = snapshot(home.parent)
    assert {path: after.get(path) for path in before} == before
    inside = (f"{home.name}/out", f"{home.name}/plan")
    assert all(path.startswith(inside) for path in after.keys() - before.keys())
    return result


# --- what attackers put in the place of a file ------------------------------------------------------


def text(name: str, content: str | bytes) -> Spoil:
    """The file `name` of the place with this content; half a surrogate pair is written as it is."""
    raw = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    return lambda home: (home / name).write_bytes(raw)


def fifo(name: str) -> Spoil:
    """A pipe, which nobody writes to."""

    def spoil(home: Path) -> None:
        (home / name).unlink(missing_ok=True)
        os.mkfifo(home / name)

    return spoil


def link(name: str, target: str) -> Spoil:
    """A link; in `target`, OUTSIDE is the directory beside the place."""

    def spoil(home: Path) -> None:
        (home / name).unlink(missing_ok=True)
        (home / name).symlink_to(target.replace("OUTSIDE", str(home.parent / "outside")))

    return spoil


def sparse(name: str, size: int = 1 << 40) -> Spoil:
    """The file lengthened by a hole, which takes no disk."""

    def spoil(home: Path) -> None:
        (home / name).touch()
        os.truncate(home / name, size)

    return spoil


def both(*spoils: Spoil) -> Spoil:
    """One after the other."""
    return lambda home: [spoil(home) for spoil in spoils]


def folder(name: str) -> Spoil:
    """A folder, perhaps in the place of a file."""

    def spoil(home: Path) -> None:
        (home / name).unlink(missing_ok=True)
        (home / name).mkdir()

    return spoil


def removed(name: str) -> Spoil:
    """Without the file `name`."""
    return lambda home: (home / name).unlink()
