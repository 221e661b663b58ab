"""What `sft` and `probe` show: what they are going to do, and the losses that came of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType

from .plain_text import printable
from .report import titled

if TYPE_CHECKING:
    from .train.job import Outline

__all__ = ["outline_report", "training_report"]


def outline_report(outline: Outline) -> Iterator[RenderableType]:
    """A line a stage, and what is to be known of the examples."""
    held_out = f", {outline.holdout:,} more held out" if outline.holdout else ""
    yield f"{outline.samples:,} examples of each task{held_out}"
    for number, stage in enumerate(outline.stages, 1):
        yield f" {number}  {printable(', '.join(stage.tasks))}: {stage.examples:,} examples, {stage.steps:,} steps"
    for task, count in outline.cut.items():
        yield f"note: {printable(task)}: {count:,} examples are longer than --max-length and lose their beginning"
    yield from (f"note: {printable(note)}" for note in outline.notes)


def training_report(record: Mapping[str, Any]) -> Iterator[RenderableType]:
    """Loss by task and stage: while training on it, and on what was held out of it."""
    stages = record["stages"]
    rows = [
        (str(number), printable(task), f"{loss['first']:.4f}", f"{loss['last']:.4f}", f"{stage['frozen']:,}")
        for number, stage in enumerate(stages, 1)
        for task, loss in stage["loss"].items()
    ]
    yield from titled(
        "Training: mean loss of a token, in the first and the last tenth of the steps",
        ("stage", "task", "first", "last", "frozen elements"),
        rows,
    )
    if record["held_out_before"] is not None:
        yield ""
        headings = ("task", "before", *(f"stage {number}" for number in range(1, len(stages) + 1)))
        yield from titled(
            "Held out: mean loss of a token; * in the stage that trains the task",
            headings,
            [_held_out(task, record) for task in record["samples"]],
            0,
        )


def _held_out(task: str, record: Mapping[str, Any]) -> tuple[str, ...]:
    """A task's losses before the training and after every stage."""
    after = (f"{stage['held_out'][task]:.4f}{'*' if task in stage['tasks'] else ' '}" for stage in record["stages"])
    return (printable(task), f"{record['held_out_before'][task]:.4f}", *after)
