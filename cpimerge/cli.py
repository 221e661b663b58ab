"""The command line: parses, calls the library, shows the result."""

from __future__ import annotations

import errno
import gc
import io
import json
import os
import shlex
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial, wraps
from pathlib import Path
from typing import Any, TextIO

import click

from . import __version__, api
from .budget import format_size, parse_size
from .errors import CpimergeError, OutputError, ResourceError

MAX_SHOWN_PROBLEMS = 100
GARBAGE_THRESHOLD = 100_000  # a run makes many objects and few cycles: looking for these took a fifth of it
INTERRUPTED = 130  # 128 + SIGINT, as shells report it
NORMAL_COLUMNS, NORMAL_ROWS = 80, 24

Command = Callable[..., None]
Progress = Callable[[str, int, int], None]


class Screen:
    """What the user sees: results on stdout, all else on stderr. `as_json`: one JSON document on stdout, no more."""

    def __init__(self, quiet: bool, as_json: bool, debug: bool) -> None:
        self.quiet = quiet
        self.as_json = as_json
        self.debug = debug

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
            click.echo(line, err=True)

    @contextmanager
    def progress(self) -> Iterator[Progress]:
        """A callback for the library: a bar a phase on a terminal, plain lines otherwise, nothing when quiet."""
        if self.quiet:
            yield lambda phase, done, total: None
        elif sys.stderr.isatty():
            with _bars() as update:
                yield update
        else:
            yield _lines()

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Whatever is raised becomes lines on stderr and an exit code; --debug adds where it came from."""
        try:
            yield
        except (click.ClickException, click.exceptions.Exit):
            raise
        except CpimergeError as error:
            self._fail(error.problems)
        except KeyboardInterrupt:
            self._fail(["interrupted"], INTERRUPTED)
        except Exception as error:
            what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            self._fail([f"unexpected {what}. Please report this, with what --debug shows"])

    def _fail(self, problems: Sequence[str], code: int = 1) -> None:
        from .report import printable

        if self.debug:
            traceback.print_exc()
        for problem in problems[:MAX_SHOWN_PROBLEMS]:
            click.echo(f"error: {printable(problem)}", err=True)
        if len(problems) > MAX_SHOWN_PROBLEMS:
            click.echo(f"error: and {len(problems) - MAX_SHOWN_PROBLEMS} more like these", err=True)
        with suppress(OutputError):  # it may be the very problem
            self.data({"errors": list(problems)})
        sys.exit(code)


def _write(text: str) -> None:
    """To stdout. Nobody reading it any more is no reason to stop the work: the rest goes nowhere."""
    try:
        click.echo(text, nl=False)
    except OSError as error:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())  # also what Python still has to flush
        os.close(nowhere)
        if error.errno != errno.EPIPE:
            raise OutputError(f"stdout: cannot be written: {error.strerror}") from error


def _columns(terminal: TextIO) -> int:
    """Its width; the usual one where it does not say, as some that were made by a program do not."""
    try:
        return os.get_terminal_size(terminal.fileno()).columns or NORMAL_COLUMNS
    except OSError:
        return NORMAL_COLUMNS


@contextmanager
def _bars() -> Iterator[Progress]:
    """A bar for the phase at hand, with rate and time left; it goes when the phase ends."""
    from tqdm import tqdm

    new_bar = partial(tqdm, unit="B", unit_scale=True, leave=False, ncols=_columns(sys.stderr), nrows=NORMAL_ROWS)
    bars: dict[str, Any] = {}

    def update(phase: str, done: int, total: int) -> None:
        if phase not in bars:
            bars[phase] = new_bar(total=total, desc=phase)
        bars[phase].update(done - bars[phase].n)
        if done >= total:
            bars[phase].close()

    try:
        yield update
    finally:
        for bar in bars.values():
            bar.close()


def _lines() -> Progress:
    """A line for every tenth of a phase."""
    shown: dict[str, int] = {}

    def update(phase: str, done: int, total: int) -> None:
        tenths = 10 * done // total if total else 10
        if tenths > shown.get(phase, 0):
            shown[phase] = tenths
            click.echo(f"{phase}: {10 * tenths}% of {format_size(total)}", err=True)

    return update


def _size(context: click.Context, option: click.Parameter, text: str | None) -> int | None:
    try:
        return None if text is None else parse_size(text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


THREADS = click.option("--threads", type=click.IntRange(min=1), help="Worker threads. Default: all processors.")
MEMORY = click.option("--memory", metavar="SIZE", callback=_size, help="Budget for the whole process, such as 512MB.")


class WorkCommand(click.Command):
    """A command whose --download may stand alone: what follows is its value only if it can be one."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        given = args[: args.index("--")] if "--" in args else args
        for place, word in enumerate(given):
            if word == "--download" and given[place + 1 : place + 2] not in ([way] for way in DOWNLOADS):
                args[place] = "--download=cache"
        return super().parse_args(ctx, args)


DOWNLOADS = ("cache", "stream")
DOWNLOAD = click.option(
    "--download",
    type=click.Choice(DOWNLOADS),
    help="Fetch models from the Hugging Face Hub into its cache (also without a value: --download); or stream "
    "them: fetch pieces as they are read and delete them again, with about two layers of each model on the disk at a "
    "time. Default: touch no network.",
)
WORK_OPTIONS = (
    THREADS,
    MEMORY,
    click.option("--force", is_flag=True, help="Replace the output directory if it is not empty."),
    DOWNLOAD,
)
SHARD_SIZE = click.option(
    "--shard-size", metavar="SIZE", callback=_size, help="Most tensor data in one file. Default: 5GB."
)
SCREEN_OPTIONS = (
    click.option("--quiet", "-q", is_flag=True, help="Print errors only."),
    click.option("--json", "as_json", is_flag=True, help="Print the result, or the errors, as JSON on stdout."),
    click.option("--debug", is_flag=True, help="Show the traceback of an error."),
)


def work_options(function: Command) -> Command:
    """Give a command the options of those that merge: they go to the library as they are."""
    for option in reversed(WORK_OPTIONS):
        function = option(function)
    return function


def command(function: Command) -> Command:
    """Give a command the options that all have, and its Screen; take care of what it raises."""

    @wraps(function)
    def run(quiet: bool, as_json: bool, debug: bool, **arguments: Any) -> None:
        screen = Screen(quiet, as_json, debug)
        with screen.errors():
            function(screen, **arguments)

    for option in reversed(SCREEN_OPTIONS):
        run = option(run)
    return run


def _directory(help: str, required: bool = True) -> Callable[[Command], Command]:
    path = click.Path(path_type=Path)
    return click.option("--output", "-o", metavar="DIR", required=required, type=path, help=help)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="cpimerge")
def main() -> None:
    """Fuse fine-tunes of one base model: exact, streaming, offline.

    Write a recipe, look at the plan, fuse, and load the result with transformers.
    """
    gc.set_threshold(GARBAGE_THRESHOLD)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a table is worth more than an accent that the locale lacks


@main.command("plan", cls=WorkCommand)
@click.argument("recipe", type=click.Path(path_type=Path))
@_directory("Directory for the plan.", required=False)
@click.option("--estimate", is_flag=True, help="Only say what plan and fuse would need: memory, disk, and time.")
@work_options
@command
def plan_command(screen: Screen, recipe: Path, output: Path | None, estimate: bool, **options: Any) -> None:
    """Check every input of RECIPE, read them once, and settle what `fuse` will do.

    Lists everything that is wrong before it reads any weights. Prints each task's core, how the cores overlap, the
    stages, and how the rest will be blended.
    """
    if estimate:
        del options["force"]
        _show_estimate(screen, recipe, output or Path(), **options)
        return
    if output is None:
        raise click.UsageError("Missing option '--output' / '-o'.")
    announced: list[Any] = []

    def announce(needs: Any) -> None:
        from .report import needs_report

        announced.append(needs)
        screen.show(needs_report(needs), "")

    with screen.progress() as progress:
        plan = api.plan(recipe, output, progress=progress, announce=announce, **options)
    from .report import plan_report, plan_summary

    screen.show(*plan_report(plan), f"\nplan: {_quoted(output)}   next: cpimerge fuse {_quoted(output)} -o OUT_DIR")
    screen.data(plan_summary(plan, *announced))


def _show_estimate(screen: Screen, recipe: Path, output: Path, **options: Any) -> None:
    with screen.progress() as progress:
        needs = api.estimate(recipe, output, progress=progress, **options)
    from .report import needs_report

    screen.show(needs_report(needs))
    screen.data(needs.as_dict())


@main.command("fuse", cls=WorkCommand)
@click.argument("plan_dir", type=click.Path(path_type=Path))
@_directory("Directory for the model.")
@SHARD_SIZE
@work_options
@command
def fuse_command(screen: Screen, plan_dir: Path, output: Path, **options: Any) -> None:
    """Write the fused checkpoint that PLAN_DIR describes.

    Refuses inputs that changed since they were planned. The output directory appears when all of it is on disk.
    """
    with screen.progress() as progress:
        manifest = api.fuse(plan_dir, output, progress=progress, **options)
    _show_model(screen, manifest, output)


@main.command("merge", cls=WorkCommand)
@click.argument("recipe", type=click.Path(path_type=Path))
@_directory("Directory for the model.")
@SHARD_SIZE
@work_options
@command
def merge_command(screen: Screen, recipe: Path, output: Path, **options: Any) -> None:
    """Plan and fuse RECIPE in one go, without keeping the plan."""

    def announce(needs: Any) -> None:
        from .report import needs_report

        screen.show(needs_report(needs), "")

    def planned(plan: Any) -> None:
        from .report import plan_report

        screen.show(*plan_report(plan), "")

    with screen.progress() as progress:
        manifest = api.merge(recipe, output, progress=progress, announce=announce, planned=planned, **options)
    _show_model(screen, manifest, output)


@main.command("push")
@click.argument("directory", type=click.Path(path_type=Path))
@click.argument("name", metavar="ORG/NAME")
@click.option("--private", is_flag=True, help="Make the repository private, where it is not there yet.")
@click.option("--revision", metavar="BRANCH", help="Branch to upload to, made if need be. Default: main.")
@click.option("--message", metavar="TEXT", help="Message of the commit.")
@click.option("--force", is_flag=True, help="Delete what the repository has and DIRECTORY lacks.")
@command
def push_command(screen: Screen, directory: Path, name: str, **options: Any) -> None:
    """Upload what `fuse` wrote to DIRECTORY to the Hugging Face Hub.

    Every file is compared with the manifest before, which takes one read. Uses the token of `hf auth login`.
    """

    def announce(upload: Any) -> None:
        screen.show(f"upload: {len(upload.files)} files, {format_size(upload.nbytes)}, to {name}")
        if upload.edited:
            screen.show(f"edited since the merge: {', '.join(upload.edited)}")

    bars = not screen.quiet and sys.stderr.isatty()
    with screen.progress() as progress:
        pushed = api.push(directory, name, progress=progress, announce=announce, bars=bars, **options)
    screen.show(f"pushed: {pushed.url}")
    screen.data({"url": pushed.url, "commit": pushed.commit, "files": list(pushed.files)})


@main.command("inspect", cls=WorkCommand)
@click.argument("path")
@click.argument("other", metavar="[PATH2]", required=False)
@THREADS
@MEMORY
@DOWNLOAD
@command
def inspect_command(screen: Screen, path: str, other: str | None, **options: Any) -> None:
    """Say what is in the checkpoint PATH, or how PATH2 differs from it.

    One checkpoint: its files, dtypes, layers, vocabulary and every kind of tensor, by its headers. Two: how much has
    changed, by kind of tensor and by layer, in one read of both. --json says it for every tensor.
    """
    from .report_inspect import inspect_report

    with screen.progress() as progress:
        found = api.inspect(path, other, progress=progress, **options)
    screen.show(*inspect_report(found))
    screen.data(found.as_dict())


@main.command("demo")
@_directory(
    "Directory for the checkpoints, new or empty. Default: a temporary one, deleted at the end.", required=False
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Another seed, another run.")
@command
def demo_command(screen: Screen, output: Path | None, seed: int) -> None:
    """Train a small model and its fine-tunes, fuse them, and score everything.

    Takes under two minutes on two processors, and no network. With --output, the checkpoints and recipes stay.
    """
    with _demo_directory(output) as directory:
        try:
            from .demo import run_demo
        except ModuleNotFoundError as error:
            if error.name != "torch":
                raise
            raise ResourceError("the demo trains models with PyTorch: pip install 'cpimerge[demo]'") from error
        result = run_demo(directory, seed=seed, log=screen.tell)
    from .report import demo_report, demo_summary

    screen.show(*demo_report(result), f"\n{_demo_footer(output)}")
    screen.data(demo_summary(result, output))


@contextmanager
def _demo_directory(output: Path | None) -> Iterator[Path]:
    """`output`, made if missing, or a temporary directory that goes at the end. Raises OutputError."""
    if output is None:
        with tempfile.TemporaryDirectory(prefix="cpimerge-demo-") as temporary:
            yield Path(temporary)
        return
    from .writer import check_target

    directory = output.expanduser()
    check_target(directory, True, ())  # forced: what it says of a full one names --force, which the demo lacks
    try:
        directory.mkdir(parents=True, exist_ok=True)
        full = any(directory.iterdir())
    except OSError as error:
        raise OutputError(f"{output}: cannot be written: {error.strerror}") from error
    if full:
        raise OutputError(f"{output}: not empty. Give another output directory")
    yield directory


def _demo_footer(output: Path | None) -> str:
    if output is None:
        return "next: cpimerge demo -o DIR keeps the checkpoints"
    return f"checkpoints: {_quoted(output)}   next: cpimerge plan {_quoted(output / 'fused.yml')} -o PLAN_DIR"


def _show_model(screen: Screen, manifest: dict[str, Any], output: Path) -> None:
    from .report import fuse_report

    screen.show(fuse_report(manifest, _quoted(output)))
    screen.data(manifest)


def _quoted(path: Path) -> str:
    """A path as it can be pasted into a shell."""
    return shlex.quote(os.fspath(path))
