"""`probe`: a short fine-tune of the base on one task, whose result is an expert that `plan` takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..card import model_name
from ..references import Reference
from ..staging import Target, check_target
from .examples import read_task
from .job import Job, Observer, check_extra, content_hash, open_start
from .sampling import draw
from .settings import Settings

__all__ = ["train_probe"]


def train_probe(
    base: Reference, task: str, data: Path, target: Target, settings: Settings, observer: Observer
) -> dict[str, Any]:
    """Train `base` on the examples of `task` in `data`, and write the expert to `target`; returns its record.

    Everything that is wrong with the data, the base's headers and the target is raised before PyTorch is imported.
    """
    check_target(target, [data])
    found = read_task(data, task)
    samples = draw(found.examples, settings)
    start = open_start(base)
    check_target(target, [data, start.path])
    check_extra(settings)
    content = content_hash(start)
    job = Job(
        kind="probe",
        start=start,
        stages=[[task]],
        samples=samples,
        settings=settings,
        cores=None,
        parts={"the base": content, "the data": found.xxh3, "--task": task, **settings.parts()},
        facts={"start": {"model": model_name(str(start.path)), "content_xxh3": content}, "data_xxh3": found.xxh3},
        inputs=[data, start.path],
    )
    from .runs import run  # with PyTorch, which a mistake in the data need not wait for

    return run(job, target, observer)
