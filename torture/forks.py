"""Runs commands in forks of this process, which has imported and compiled everything: a run takes a blink."""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

POLL = 0.001  # seconds between two looks at what a run does

Watch = Callable[[], None]


@dataclass(frozen=True)
class Outcome:
    """How a run ended: its exit code, or minus the signal that ended it; what it said; how long it took in seconds.

    `moved` counts the bytes that it read and wrote; 0 where it was killed, or the system does not say.
    """

    code: int
    said: str
    seconds: float
    moved: int

    @property
    def killed(self) -> bool:
        return self.code == -signal.SIGKILL


class Forks:
    """Forks that run `cpimerge ARGUMENTS`. `directory` holds what they say."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._log = directory / "said"
        self._counts = directory / "io"

    def run(
        self,
        arguments: Sequence[str],
        *,
        kill_after: float | None = None,
        prepare: Watch | None = None,
        finish: Watch | None = None,
        started: Callable[[int], None] | None = None,
        watch: Watch | None = None,
    ) -> Outcome:
        """One run, to its end or killed after so many seconds.

        `prepare` is called in it before it starts and `finish` when it has ended; here, `started` with its number and
        `watch` meanwhile.
        """
        assert threading.active_count() == 1, "a process with threads must not fork"
        for file in (self._log, self._counts):
            file.write_bytes(b"")
        begin = time.monotonic()
        process = os.fork()
        if process == 0:
            self._be_cpimerge(arguments, prepare, finish)
        if started is not None:
            started(process)
        due = None if kill_after is None else begin + kill_after
        while True:
            ended, status = os.waitpid(process, os.WNOHANG if watch or due else 0)
            if ended:
                break
            if due is not None and time.monotonic() >= due:
                os.kill(process, signal.SIGKILL)
                due = None
            if watch is not None:
                watch()
            rest = POLL if due is None else due - time.monotonic()
            time.sleep(max(0, min(POLL, rest)))
        code = os.waitstatus_to_exitcode(status)
        moved = int(self._counts.read_text() or 0)
        return Outcome(code, self._log.read_text(errors="replace"), time.monotonic() - begin, moved)

    def _be_cpimerge(self, arguments: Sequence[str], prepare: Watch | None, finish: Watch | None) -> NoReturn:
        """The whole life of a fork."""
        code = 70
        try:
            said = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
            null = os.open(os.devnull, os.O_RDWR)
            counts = os.open(self._counts, os.O_WRONLY)
            for place, handle in enumerate((null, null, said)):
                os.dup2(handle, place)
            if prepare is not None:
                prepare()
            code = run_here(arguments)
            if finish is not None:
                finish()
            with suppress(OSError):  # it may be no run's day
                os.write(counts, str(_moved()).encode())
        except BaseException:  # what gets this far is a finding
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)


def _moved() -> int:
    """Bytes that this process has read and written. Raises OSError where the system does not say."""
    counts = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(counts["rchar"]) + int(counts["wchar"])


def run_here(arguments: Sequence[str]) -> int:
    """A command in this process; returns its exit code."""
    from cpimerge import cli

    try:
        cli.main(list(arguments), prog_name="cpimerge")
    except SystemExit as end:
        return int(end.code or 0) if not isinstance(end.code, str) else 1
    return 0


def settle() -> None:
    """Once everything is warm: what is here now is left alone by the garbage collectors of the forks."""
    gc.collect()
    gc.freeze()
