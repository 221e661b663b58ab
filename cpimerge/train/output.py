"""What a training run leaves: the checkpoint, the start's other files, the log, a card, and a record of it all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from .. import __version__
from ..card import hub_place, model_name
from ..companions import CARD, companion_files
from ..plain_text import code, plain_name
from .job import Job, library_versions
from .training_log import LOG, TrainingLog, first_and_last
from .weights import stored_values, write_weights

__all__ = ["RECORD", "read_record", "write_output"]

RECORD = "cpimerge_training.json"
TITLES = {"sft": "trained in stages", "probe": "an expert"}


def write_output(
    job: Job, model: PreTrainedModel, out: Path, log: TrainingLog, frozen: Sequence[int], shard_bytes: int
) -> dict[str, Any]:
    """Write all of it to the empty directory `out`; returns the record. `frozen`: elements that each stage froze."""
    shards = write_weights(job.start, stored_values(model, job.start), out, shard_bytes)
    for source in companion_files(job.start.path):
        target = out / source.relative_to(job.start.path)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    log.copy_to(out / LOG)
    record = _record(job, log.lines(), frozen, shards)
    (out / CARD).write_text(_card(job, record), encoding="utf-8")
    (out / RECORD).write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return record


def read_record(out: Path) -> dict[str, Any]:
    """The record of an output that this cpimerge wrote. Raises OSError or ValueError."""
    record: dict[str, Any] = json.loads((out / RECORD).read_bytes())
    return record


def _record(
    job: Job, lines: Sequence[Mapping[str, Any]], frozen: Sequence[int], shards: Mapping[str, Any]
) -> dict[str, Any]:
    """Everything that decides the result, and what came of it; nothing about this machine's directories."""
    held_out = {line["stage"]: line["held_out"] for line in lines if "held_out" in line}
    stages = []
    for number, tasks in enumerate(job.stages, 1):
        losses = first_and_last(lines, number)
        steps = max(line["step"] for line in lines if line["stage"] == number and "step" in line)
        stages.append(
            {
                "tasks": list(tasks),
                "steps": steps,
                "frozen": frozen[number - 1],
                "loss": {task: losses[task] for task in tasks if task in losses},
                "held_out": held_out.get(number),
            }
        )
    return {
        "format": "cpimerge training",
        "version": 1,
        "cpimerge": __version__,
        "kind": job.kind,
        **job.facts,
        "freeze": job.cores and job.cores.freeze,
        "settings": asdict(job.settings),
        "samples": {task: len(job.samples[task].train) for task in job.tasks},
        "held_out_before": held_out.get(0),
        "stages": stages,
        "versions": library_versions(),
        "shards": dict(shards),
    }


def _card(job: Job, record: Mapping[str, Any]) -> str:
    """README.md: metadata that the Hub understands, then how the model came about."""
    from huggingface_hub import ModelCardData

    place = hub_place(str(job.start.path))
    data = ModelCardData(
        base_model=[place.name] if place else None,
        base_model_relation="finetune" if place else None,
        library_name="transformers",
        tags=["cpimerge"],
    )
    name = model_name(str(job.start.path))
    stages = "\n".join(
        f"{number}. {', '.join(map(plain_name, stage['tasks']))}: {stage['steps']:,} steps, "
        f"{stage['frozen']:,} elements frozen"
        for number, stage in enumerate(record["stages"], 1)
    )
    return f"""---
{data.to_yaml()}
---

# {plain_name(name)}, {TITLES[job.kind]}

Trained from {code(name)} with cpimerge {__version__}. What with, and what came of it, is in `{RECORD}` and `{LOG}`.

## Stages

{stages}
"""
