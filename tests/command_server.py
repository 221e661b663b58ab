"""Real processes that run `cpimerge`, a tenth of a second each: forks of one that has everything imported and compiled.

They can be paused in the middle of their work, so that something can happen to them there.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

PATIENCE = 60  # seconds for anything to happen


@dataclass(frozen=True)
class Ended:
    """Exit code, or minus the signal that ended it; and what was said on stdout and stderr."""

    code: int
    stdout: str
    stderr: str

    @property
    def errors(self) -> list[str]:
        """The lines that are errors, without the word."""
        return [line.removeprefix("error: ") for line in self.stderr.splitlines() if line.startswith("error: ")]


class Running:
    """A process at work; `said` is where it and its end are recorded."""

    def __init__(self, process: int, said: Path) -> None:
        self.process = process
        self._said = said

    @property
    def has_ended(self) -> bool:
        return (self._said / "code").exists()

    def send(self, number: signal.Signals) -> None:
        os.kill(self.process, number)

    def wait(self, seconds: float = PATIENCE) -> Ended:
        """Raises TimeoutError where it is still at work then."""
        code = self._said / "code"
        wait_for(code.exists, seconds)
        output = ((self._said / name).read_text(errors="replace") for name in ("stdout", "stderr"))
        return Ended(int(code.read_text()), *output)


class Server:
    """Starts processes; `directory` has what they say.

    It runs the commands `first` itself: what these import and compile, all processes have.
    """

    def __init__(self, directory: Path, first: Sequence[Sequence[str | Path]]) -> None:
        self._directory = directory
        commands = json.dumps([[*map(str, arguments)] for arguments in first])
        self._server = subprocess.Popen(
            [sys.executable, __file__, commands],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self._count = 0

    def start(self, *arguments: str | Path, before: str = "", cwd: Path | None = None) -> Running:
        """`cpimerge ARGUMENTS`; `before` is Python that its process runs first."""
        self._count += 1
        said = self._directory / str(self._count)
        said.mkdir(parents=True)
        asked = {"arguments": [*map(str, arguments)], "before": before, "cwd": str(cwd or "/"), "said": str(said)}
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(asked).encode() + b"\n")
        self._server.stdin.flush()
        return Running(int(self._server.stdout.readline()), said)

    def run(self, *arguments: str | Path, before: str = "", cwd: Path | None = None) -> Ended:
        return self.start(*arguments, before=before, cwd=cwd).wait()

    @contextmanager
    def paused(self, *arguments: str | Path, phase: str, share: float = 0.5, before: str = "") -> Iterator[Running]:
        """A process that waits, as soon as this share of the phase is done, until the block ends."""
        marker = self._directory / f"pause{self._count}"
        running = self.start(*arguments, before=f"{before}\npause({phase!r}, {share}, {str(marker)!r})")
        try:
            wait_for(lambda: marker.exists() or running.has_ended)
            assert marker.exists(), running.wait()
            yield running
        finally:
            marker.unlink(missing_ok=True)

    def close(self) -> None:
        self._server.communicate(timeout=PATIENCE)


def wait_for(condition: Callable[[], bool], seconds: float = PATIENCE) -> None:
    due = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > due:
            raise TimeoutError
        time.sleep(0.005)


# --- the server -------------------------------------------------------------------------------------


def serve() -> None:
    """A process for each line that is asked for; answers with its number."""
    answers = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    for arguments in json.loads(sys.argv[1]):
        run_here(arguments)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for line in sys.stdin:
        if os.fork() == 0:
            watch(json.loads(line), answers)


def run_here(arguments: list[str]) -> int:
    from cpimerge import cli

    try:
        cli.main(arguments, prog_name="cpimerge")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    return 0


def watch(asked: dict[str, Any], answers: int) -> NoReturn:
    """Start the process, tell its number, and note how it ends."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    process = os.fork()
    if process == 0:
        be_command(asked)
    os.write(answers, b"%d\n" % process)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    said = Path(asked["said"])
    (said / "ended").write_text(str(code))
    (said / "ended").rename(said / "code")
    os._exit(0)


def be_command(asked: dict[str, Any]) -> NoReturn:
    """The process."""
    code = 70
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a test runner in the background ignores it
    try:
        said = Path(asked["said"])
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for place, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(said / name, os.O_WRONLY | os.O_CREAT, 0o666), place)
        os.chdir(asked["cwd"])
        exec(asked["before"], {"pause": pause})
        code = run_here(asked["arguments"])
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):
                stream.flush()
        os._exit(code)


def pause(phase: str, share: float, marker: str) -> None:
    """Wait as soon as this share of `phase` is done, while there is a file `marker`."""
    from cpimerge import screen

    lines = screen._lines

    def pausing() -> Callable[[str, int, int], None]:
        tell = lines()

        def update(now: str, done: int, total: int) -> None:
            tell(now, done, total)
            if now == phase and max(1, share * total) <= done < total and not paused:
                paused.append(True)
                Path(marker).touch()
                while os.path.exists(marker):
                    time.sleep(0.005)

        return update

    paused: list[bool] = []
    screen._lines = pausing


if __name__ == "__main__":
    serve()
