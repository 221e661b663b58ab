"""The options of `sft` and `probe`, and what their screens say while they train."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .train.settings import Settings

if TYPE_CHECKING:
    from .screen import Screen

__all__ = ["FREEZE", "run_training", "training_options"]

Command = Callable[..., None]
MANY = click.IntRange(min=1)
SHARE = click.FloatRange(min=0, max=1, max_open=True)
RATE = click.FloatRange(min=0, min_open=True)
SETTINGS = {field.name: field.default for field in fields(Settings)}


def _option(name: str, help: str, type: click.ParamType[Any] | None = None) -> Callable[[Command], Command]:
    """An option of the setting's name, with its default."""
    default: Any = SETTINGS[name.removeprefix("--").replace("-", "_")]
    if type is None:
        return click.option(name, is_flag=True, help=help)
    return click.option(name, type=type, default=default, show_default=default is not None, help=help)


FREEZE = click.option(
    "--freeze",
    type=click.Choice(["prior", "all"]),
    default="prior",
    show_default=True,
    help="In each stage, freeze the cores of the groups before it, or of all others.",
)
OPTIONS = (
    click.option(
        "--data",
        required=True,
        type=click.Path(path_type=Path),
        help="JSONL whose lines name their task, or a directory of one TASK.jsonl a task.",
    ),
    click.option(
        "--output",
        "-o",
        metavar="DIR",
        required=True,
        type=click.Path(path_type=Path),
        help="Directory for the model.",
    ),
    _option("--samples", "Examples of each task. Default: as many as every task has, at most 1000.", MANY),
    _option("--holdout", "Further examples of each task, for a look at its loss only.", click.IntRange(min=0)),
    _option("--epochs", "Passes over the examples of a stage.", MANY),
    _option("--steps", "Optimizer steps of a stage, instead of --epochs.", MANY),
    _option("--batch-size", "Examples of a batch.", MANY),
    _option("--gradient-accumulation", "Batches of an optimizer step.", MANY),
    _option("--learning-rate", "AdamW's, at its highest; it falls linearly to 0.", RATE),
    _option("--weight-decay", "AdamW's.", click.FloatRange(min=0)),
    _option("--warmup", "Share of a stage's steps in which the rate rises from 0.", SHARE),
    _option("--max-length", "Tokens of an example at most.", MANY),
    _option("--truncate", "Cut off the beginning of longer examples. Default: they are errors."),
    _option("--bf16", "Compute in bfloat16. The weights are trained in float32 all the same."),
    _option("--save-steps", "Steps between checkpoints, from which a run goes on where it is cut off.", MANY),
    _option("--seed", "Another seed, other examples in another order.", click.IntRange(0, (1 << 32) - 1)),
    click.option("--force", is_flag=True, help="Replace the output directory if it is not empty."),
    click.option("--restart", is_flag=True, help="Begin anew where an earlier run was cut off, not go on from there."),
)


def training_options(function: Command) -> Command:
    """Give a command the options of those that train."""
    for option in reversed(OPTIONS):
        function = option(function)
    return function


def run_training(screen: Screen, train: Callable[..., dict[str, Any]], output: Path, **options: Any) -> None:
    """Call `train` with the options, its settings among them, and show what it does and what came of it."""
    if options["steps"] is not None and _is_given("epochs"):
        raise click.UsageError("Give --epochs or --steps, not both.")
    settings = Settings(**{name: options.pop(name) for name in SETTINGS})

    def announce(outline: Any) -> None:
        from .report_training import outline_report

        screen.show(*outline_report(outline), "")

    with screen.progress(unit="step") as progress:
        record = train(
            out=output,
            settings=settings,
            progress=progress,
            resumed=screen.resumed_at,
            announce=announce,
            **options,
        )
    from .report_training import training_report

    screen.show(*training_report(record), f"\ntrained: {shlex.quote(str(output))}")
    screen.data(record)


def _is_given(option: str) -> bool:
    source = click.get_current_context().get_parameter_source(option)
    return source is click.core.ParameterSource.COMMANDLINE
