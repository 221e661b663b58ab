"""`sft`: the staged fine-tune of a plan's groups, each stage leaving the cores of others as they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import xxhash

from ..card import model_name
from ..checkpoint import Checkpoint, Handles, read_json_object
from ..companions import MANIFEST
from ..errors import CheckpointError, IncompatibleError, PlanError
from ..plan_file import Plan, plan_hash
from ..references import Reference
from ..staging import Target, check_target
from .examples import read_data
from .job import Cores, Job, Observer, check_extra, content_hash, open_start
from .sampling import draw
from .settings import Settings

__all__ = ["Begin", "train_stages"]

OPEN_FILES = 8
Begin = Reference | None  # the model to train; None: the plan's base


def train_stages(
    cores: Cores, begin: Begin, data: Path, target: Target, settings: Settings, observer: Observer
) -> dict[str, Any]:
    """Train the groups of a plan in stage order on examples of their tasks in `data`; write the model to `target`.

    Returns its record. Everything that is wrong with the plan, the data, headers and the target is raised before
    PyTorch is imported.
    """
    plan_dir = cores.plan_dir
    plan = Plan.load(plan_dir)
    inputs = [plan_dir, data]
    check_target(target, inputs)
    found = read_data(data, plan.order)
    samples = draw(found.examples, settings)
    start = _start(plan, plan_dir, begin)
    check_target(target, [*inputs, start.path])
    check_extra(settings)
    _check_cores(plan, plan_dir)
    if begin is None:
        _check_values(plan, start)
    content, planned = content_hash(start), plan_hash(plan_dir)
    origin = {"model": model_name(str(start.path)), "is_base": begin is None, "content_xxh3": content}
    job = Job(
        kind="sft",
        start=start,
        stages=plan.stages,
        samples=samples,
        settings=settings,
        cores=cores,
        parts={
            "the plan": planned,
            "the model": content,
            "the data": found.xxh3,
            "--freeze": cores.freeze,
            **settings.parts(),
        },
        facts={"plan_xxh3": planned, "start": origin, "data_xxh3": found.xxh3},
        inputs=[*inputs, start.path],
        notes=tuple(_notes(start, plan_dir, planned)),
    )
    from .runs import run  # with PyTorch, which a mistake in the data need not wait for

    return run(job, target, observer)


def _start(plan: Plan, plan_dir: Path, begin: Begin) -> Checkpoint:
    """The model to train, which has the plan's tensors. Raises CheckpointError, PlanError or IncompatibleError."""
    base = next(entry for entry in plan.inputs if entry.name == "base")
    if begin is None and base.adapter is not None:
        raise PlanError(f"{plan_dir}: its base is an adapter on a model, which cannot be trained. Give another --model")
    if begin is None and plan.vocabulary is not None and plan.vocabulary.joined:
        raise PlanError(
            f"{plan_dir}: `vocabulary: union` joined tokens that its base does not have. Give the model that was fused "
            "from it as --model"
        )
    start = open_start(base.reference if begin is None else begin)
    problems = list(_differences(plan, start))
    if begin is None:
        changed = {shard.file: shard.header_xxh3 for shard in base.shards}
        if {shard.file.name: shard.header_xxh3 for shard in start.shards} != changed:
            raise PlanError(f"{start.path}: the base is not what was planned. Run `cpimerge plan` again")
    if problems:
        raise IncompatibleError(problems)
    return start


def _differences(plan: Plan, start: Checkpoint) -> Iterator[str]:
    """How the model's tensors differ from those of the plan, by name and shape."""
    planned = {tensor.name: list(tensor.shape) for tensor in plan.tensors}
    for name, shape in planned.items():
        if name not in start.tensors:
            yield f"{start.path}: tensor {name!r}: missing, and the plan has it. Give the model that was fused from it"
        elif (there := list(start.tensors[name].shape)) != shape:
            yield f"{start.path}: tensor {name!r}: expected {shape} (as planned), got {there}"
    for name in start.tensors:
        if name not in planned:
            yield f"{start.path}: tensor {name!r}: the plan has no such tensor. Give the model that was fused from it"


def _check_cores(plan: Plan, plan_dir: Path) -> None:
    """Raise PlanError where a core is not what was planned, before the first stage trains, not the last."""
    from ..cores import CoreReader  # with numba, which a mistake in the data need not wait for
    from ..plan_arrays import chunks_of

    count = chunks_of(plan)
    for task in plan.tasks:
        CoreReader(plan_dir / task.core_file, task.core_xxh3, count).close()


def _check_values(plan: Plan, base: Checkpoint) -> None:
    """Raise PlanError where the base is not what was planned, as `fuse` does: at the first tensor that is not."""
    from ..findings import content_hash  # with numba, which a mistake in the data need not wait for
    from ..stream import chunks

    with closing(Handles(OPEN_FILES)) as handles:
        for planned in plan.tensors:
            tensor, digests = base.tensors[planned.name], []
            for chunk in chunks(tensor.shape, plan.settings.granularity):
                raw = bytearray(chunk.size * tensor.item_bytes)
                tensor.read_into(memoryview(raw), chunk.start * tensor.item_bytes, handles)
                digests.append(xxhash.xxh3_64_intdigest(raw))
            if content_hash(digests) != planned.xxh3["base"]:
                raise PlanError(
                    [
                        f"{base.where}: tensor {planned.name!r}: changed since planned",
                        "The inputs are not those that were planned: run `cpimerge plan` again",
                    ]
                )


def _notes(start: Checkpoint, plan_dir: Path, planned: str) -> Iterator[str]:
    """What is odd about the start, and no error."""
    try:
        manifest = read_json_object(start.path / MANIFEST)
    except (OSError, CheckpointError):
        return
    if manifest.get("plan_xxh3") != planned:
        yield f"{start.path}: was fused from another plan than {plan_dir}, whose cores are frozen"
