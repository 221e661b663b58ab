"""The command line: parses, calls the library, shows the result."""

from __future__ import annotations

import gc
import io
import os
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import click

from . import __version__, api
from .budget import format_size, parse_size
from .cli_training import FREEZE, run_training, training_options
from .errors import OutputError, ResourceError
from .screen import Screen

GARBAGE_THRESHOLD = 100_000  # a run makes many objects and few cycles: looking for these took a fifth of it

Command = Callable[..., None]


def _size(context: click.Context, option: click.Parameter, text: str | None) -> int | None:
    try:
        return None if text is None else parse_size(text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


def _share(context: click.Context, option: click.Parameter, text: str | None) -> str | None:
    from .verify_results import parse_share

    try:
        if text is not None:
            parse_share(text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error
    return text


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
    click.option("--restart", is_flag=True, help="Begin anew where an earlier run was cut off, not go on from there."),
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
        del options["force"], options["restart"]
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
        plan = api.plan(recipe, output, progress=progress, resumed=screen.resumed, announce=announce, **options)
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
        manifest = api.fuse(plan_dir, output, progress=progress, resumed=screen.resumed, **options)
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
        manifest = api.merge(
            recipe,
            output,
            progress=progress,
            resumed=screen.resumed,
            announce=announce,
            planned=planned,
            **options,
        )
    _show_model(screen, manifest, output)


@main.command("sft")
@click.argument("plan_dir", type=click.Path(path_type=Path))
@click.option("--model", metavar="DIR", help="The model to train: what `fuse` wrote.")
@click.option("--from-base", is_flag=True, help="Train the plan's base instead (DPI).")
@FREEZE
@SHARD_SIZE
@training_options
@command
def sft_command(screen: Screen, model: str | None, from_base: bool, **options: Any) -> None:
    """Fine-tune a model in the stages of PLAN_DIR, on a small balanced sample of each task.

    Each stage trains the tasks of one group and leaves the frozen cores as they are, bit for bit. Needs PyTorch.
    """
    if (model is None) != from_base:
        raise click.UsageError("Give --model DIR, or --from-base.")
    from .train import sft

    run_training(screen, sft, model=model, **options)


@main.command("probe")
@click.option("--task", metavar="NAME", required=True, help="The task whose examples are trained on.")
@click.option("--model", "base", metavar="BASE", required=True, help="The base: a directory, or as in a recipe.")
@SHARD_SIZE
@training_options
@command
def probe_command(screen: Screen, **options: Any) -> None:
    """Fine-tune a base on one task: an expert for a recipe.

    It has the base's tensor names, shapes and dtypes. Needs PyTorch.
    """
    from .train import probe

    run_training(screen, probe, **options)


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


@main.command("verify", cls=WorkCommand)
@click.argument("out_dir", required=False, type=click.Path(path_type=Path))
@click.option("--plan", metavar="PLAN_DIR", type=click.Path(path_type=Path), help="Its plan. Default: beside OUT_DIR.")
@click.option("--inputs", metavar="PLAN_DIR", type=click.Path(path_type=Path), help="Check a plan's inputs alone.")
@click.option("--sample", metavar="SHARE", callback=_share, help="Read only about so much of each tensor: 1%.")
@THREADS
@MEMORY
@DOWNLOAD
@command
def verify_command(screen: Screen, out_dir: Path | None, inputs: Path | None, **options: Any) -> None:
    """Prove that OUT_DIR is what its plan says, in one read of it and of the models it was made of.

    Every file by its hash, every element by arithmetic of its own, every core by its definition. Lists what is wrong,
    of each tensor the first element, and then exits with 1.
    """
    if (out_dir is None) == (inputs is None):
        raise click.UsageError("Give OUT_DIR, or --inputs PLAN_DIR.")
    plan, sample = options.pop("plan"), options.pop("sample")
    if inputs is not None and (plan is not None or sample is not None):
        raise click.UsageError("--inputs reads all inputs of its plan: it goes with neither --plan nor --sample.")
    from .report_verify import verify_report

    with screen.progress() as progress:
        if inputs is not None:
            found: Any = api.verify_inputs(inputs, progress=progress, **options)
        else:
            found = api.verify(str(out_dir), plan, sample=sample, progress=progress, **options)
    screen.show(*verify_report(found))
    screen.data(found.as_dict())
    if not found.ok:
        screen.list_problems([str(failure) for failure in found.failures])
        raise click.exceptions.Exit(1)


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
    from .staging import Target, check_target

    directory = output.expanduser()
    check_target(Target(directory, force=True), ())  # what it says of a full one names --force, which the demo lacks
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
