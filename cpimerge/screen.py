"""What a command shows on the terminal: results, progress, and errors as lines."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, TextIO

import click

from .budget import format_size
from .errors import CpimergeError, OutputError

__all__ = ["Screen"]

MAX_SHOWN_PROBLEMS = 100
NORMAL_COLUMNS, NORMAL_ROWS = 80, 24
ASK_AGAIN_SECONDS = 0.05

Progress = Callable[[str, int, int], None]


class Screen:
    """What the user sees: results on stdout, all else on stderr. `as_json`: one JSON document on stdout, no more."""

    def __init__(self, quiet: bool, as_json: bool, debug: bool) -> None:
        self.quiet = quiet
        self.as_json = as_json
        self.debug = debug
        self._done_before = 0  # bytes, or steps, of the phase to come

    def show(self, *renderables: Any) -> None:
        """Print results for people."""
        if self.quiet or self.as_json:
            return
        from .report import render

        terminal = sys.stdout.isatty()
        _write(render(renderables, _columns(sys.stdout) if terminal else None, terminal))

    def data(self, result: Any) -> None:
        """Print the result for machines."""
        if self.as_json:
            _write(json.dumps(result, indent=1, allow_nan=False) + "\n")

    def tell(self, line: str) -> None:
        """Print a line of progress."""
        if not self.quiet:
            _say(line)

    def resumed(self, done: int, total: int) -> None:
        """Say that a run goes on where an earlier one was cut off."""
        self._done_before = done
        self.tell(f"going on where an earlier run was cut off: {format_size(done)} of {format_size(total)} were done")

    def resumed_at(self, stage: int, step: int) -> None:
        """Say that a training goes on where an earlier one was cut off."""
        self._done_before = step
        self.tell(f"going on where an earlier run was cut off: stage {stage}, after step {step:,}")

    @contextmanager
    def progress(self, unit: str = "B") -> Iterator[Progress]:
        """A callback for the library: a bar a phase on a terminal, plain lines otherwise, nothing when quiet.

        `unit` is what it counts: bytes, or "step".
        """
        if self.quiet:
            yield lambda phase, done, total: None
        elif sys.stderr.isatty():
            with self._bars(unit) as update:
                yield update
        else:
            yield _lines() if unit == "B" else _tenths(lambda count: f"{count:,} {unit}s")

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Whatever is raised becomes lines on stderr and an exit code; --debug adds where it came from."""
        try:
            with _signals():
                yield
        except (click.ClickException, click.exceptions.Exit):
            raise
        except CpimergeError as error:
            self._fail(error.problems, error)
        except KeyboardInterrupt as error:
            number = error.number if isinstance(error, Stopped) else signal.SIGINT
            self._fail(["interrupted"], error, 128 + number)  # as shells report it
        except Exception as error:
            what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            self._fail([f"unexpected {what}. Please report this, with what --debug shows"], error)

    def list_problems(self, problems: Sequence[str]) -> None:
        """Print each as an error, unless they are very many."""
        from .report import printable

        for problem in problems[:MAX_SHOWN_PROBLEMS]:
            _say(f"error: {printable(problem)}")
        if len(problems) > MAX_SHOWN_PROBLEMS:
            _say(f"error: and {len(problems) - MAX_SHOWN_PROBLEMS} more like these")

    def _fail(self, problems: Sequence[str], error: BaseException, code: int = 1) -> None:
        from .report import printable

        notes: list[str] = getattr(error, "__notes__", [])
        if self.debug:
            for line in traceback.format_exc().splitlines():
                click.echo(printable(line), err=True)
        self.list_problems(problems)
        for note in notes:
            _say(f"note: {printable(note)}")
        with suppress(OutputError):  # it may be the very problem
            self.data({"errors": list(problems)} | ({"notes": notes} if notes else {}))
        sys.exit(code)

    @contextmanager
    def _bars(self, unit: str) -> Iterator[Progress]:
        """A bar for the phase at hand, with rate and time left; it goes when the phase ends."""
        from tqdm import tqdm

        new_bar = partial(
            tqdm, unit=unit, unit_scale=unit == "B", leave=False, ncols=_columns(sys.stderr), nrows=NORMAL_ROWS
        )
        bars: dict[str, Any] = {}

        def update(phase: str, done: int, total: int) -> None:
            with _whoever_reads():
                if phase not in bars:
                    bars[phase] = new_bar(total=total, desc=phase, initial=self._done_before)
                    self._done_before = 0
                bars[phase].update(done - bars[phase].n)
                if done >= total:
                    bars[phase].close()

        try:
            yield update
        finally:
            with _whoever_reads():
                for bar in bars.values():
                    bar.close()


class Stopped(KeyboardInterrupt):
    """A signal that asks the process to end, and which one."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


@contextmanager
def _signals() -> Iterator[None]:
    """The first request to end is raised, so that the work stops cleanly; the second ends the process at once."""

    def first(number: int, frame: object) -> None:
        for which in before:
            signal.signal(which, second)
        raise Stopped(number)

    def second(number: int, frame: object) -> None:
        os._exit(128 + number)

    def arm() -> None:
        for which in before:
            signal.signal(which, first)

    before = {}
    if threading.current_thread() is threading.main_thread():  # no other may say what signals do
        before = {which: signal.getsignal(which) for which in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        before = {which: now for which, now in before.items() if now != signal.SIG_IGN}  # as nohup wants it
    try:
        arm()
        with _asked_again(arm):
            yield
    finally:
        for which, handler in before.items():
            signal.signal(which, handler)


@contextmanager
def _asked_again(arm: Callable[[], None]) -> Iterator[None]:
    """A request to end that comes while Python cleans up after an object is passed over: `arm`, and ask again soon."""
    hook, timers = sys.unraisablehook, list[threading.Timer]()

    def unraised(lost: sys.UnraisableHookArgs) -> None:
        if not isinstance(lost.exc_value, Stopped):
            hook(lost)
            return
        arm()
        timers.append(threading.Timer(ASK_AGAIN_SECONDS, os.kill, (os.getpid(), lost.exc_value.number)))
        timers[-1].start()

    sys.unraisablehook = unraised
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for timer in timers:
            timer.cancel()


def _write(text: str) -> None:
    """To stdout. Nobody reading it any more is no reason to stop the work: the rest goes nowhere."""
    try:
        click.echo(text, nl=False)
    except OSError as error:
        _send_nowhere(sys.stdout)
        if error.errno != errno.EPIPE:
            raise OutputError(f"stdout: cannot be written: {error.strerror}") from error


def _say(line: str) -> None:
    """To stderr."""
    with _whoever_reads():
        click.echo(line, err=True)


@contextmanager
def _whoever_reads() -> Iterator[None]:
    """Where stderr cannot be written, there is nobody to tell, and the work goes on."""
    try:
        yield
    except OSError:
        _send_nowhere(sys.stderr)


def _send_nowhere(stream: TextIO) -> None:
    """What is written from now on, and what Python still has to flush."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def _columns(terminal: TextIO) -> int:
    """Its width; the usual one where it does not say, as some that were made by a program do not."""
    try:
        return os.get_terminal_size(terminal.fileno()).columns or NORMAL_COLUMNS
    except OSError:
        return NORMAL_COLUMNS


def _lines() -> Progress:
    """A line for every tenth of a phase, of so many bytes."""
    return _tenths(format_size)


def _tenths(show: Callable[[int], str]) -> Progress:
    shown: dict[str, int] = {}

    def update(phase: str, done: int, total: int) -> None:
        tenths = 10 * done // total if total else 10
        if tenths > shown.get(phase, 0):
            shown[phase] = tenths
            _say(f"{phase}: {10 * tenths}% of {show(total)}")

    return update
