"""`plan`: preflight, one streamed read of everything, and every number that `fuse` will obey."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations
from pathlib import Path
from typing import Literal

import numpy as np

from . import __version__
from .agreement import Shares, agreements, by_chance
from .analysis import Analysis
from .budget import Budget
from .checkpoint import Checkpoint
from .findings import Findings
from .folding import Folder
from .identity import Files, plan_work
from .needs import plan_room
from .overlap import Counts, chance, jaccard, stages, tau_notes
from .plan_checks import core_file
from .plan_file import Blend, Input, Pair, Plan, Settings, ShardIdentity, Task, TaskTensor, TensorPlan
from .plan_files import PlanFiles, remove_scratch
from .plan_journal import PlanJournal
from .preflight import Inputs, TensorSpec
from .prospects import prospects
from .references import Reference, planned_path
from .staging import Target, Watch, staged_directory
from .stream import workers

__all__ = ["make_plan"]


def make_plan(inputs: Inputs, target: Target, budget: Budget, watch: Watch) -> Plan:
    """Read all inputs once and write the plan directory `target`.

    Goes on where an earlier run of the same plan was cut off, and tells `watch`. Raises IncompatibleError for what only
    the data show (NaN, Inf, unequal non-float tensors), CheckpointError for files that change or cannot be read,
    OutputError where the target cannot be written.
    """
    inputs_now = Files.of(inputs)
    with staged_directory(target, inputs.directories, plan_work(inputs, inputs_now)) as staging:
        if staging.is_published:
            return Plan.load(target.directory)
        with (
            inputs_now.unchanged(),
            PlanJournal(inputs, staging, plan_room(inputs)) as journal,
            workers(budget.threads, len(inputs.checkpoints)) as pool,  # stops before what it writes to is closed
        ):
            findings = Analysis(inputs, pool, journal, watch).run()
            plan = _conclude(inputs, findings, journal.files, staging.files)
            plan = plan.model_copy(update={"notes": [*plan.notes, *prospects(plan, inputs)]}).sealed()
            plan.save(staging.files)
    if target.keep_journal:
        remove_scratch(staging.root)
    return plan


def _conclude(inputs: Inputs, findings: dict[str, Findings], files: PlanFiles, directory: Path) -> Plan:
    """Everything that follows from the read."""
    recipe = inputs.recipe
    hashes = [writer.finish() for writer in files.cores]
    overlaps = _overlaps(inputs, findings)
    pairs = list(_pairs(inputs, findings, overlaps))
    order = stages(recipe, overlaps.pairs, agreements(overlaps.compared, overlaps.aligned, overlaps.expected))
    backbone = order[-1][-1] if recipe.backbone == "last" else recipe.backbone
    backbone = "backbone" if isinstance(backbone, Reference) else backbone
    members = [backbone, *(task for stage in order for task in stage if task != backbone)]
    first_row = {name: found.first_row for name, found in findings.items() if found.first_row >= 0}
    folder = Folder(inputs, files.grams, first_row, members)
    blended = [spec for spec in inputs.tensors if _action(spec, findings[spec.name]) == "blend"]
    blends, coefficients_xxh3 = folder.fold_all(blended, directory)
    return Plan(
        cpimerge=__version__,
        recipe=recipe.text,
        settings=_settings(inputs),
        inputs=[_input(name, c) for name, c in zip(inputs.names, inputs.checkpoints, strict=True)],
        tasks=[_task(inputs, findings, number, digest) for number, digest in enumerate(hashes)],
        pairs=pairs,
        stages=order,
        backbone=backbone,
        fold=members,
        layers=_layers(spec.layer for spec in inputs.tensors),
        notes=[*inputs.notes, *tau_notes(recipe, pairs, np.diag(overlaps.pairs).tolist(), len(order))],
        vocabulary=inputs.vocabulary,
        chat_template=inputs.chat_template,
        coefficients_xxh3=coefficients_xxh3,
        tensors=[_tensor(inputs, spec, findings[spec.name], blends.get(spec.name)) for spec in inputs.tensors],
    )


def _layers(layers: Iterable[str]) -> dict[str, int]:
    """How many layers differ only in their number; the pattern of their names has a star for it."""
    return dict(Counter(".".join((*layer.split(".")[:-2], "*")) for layer in dict.fromkeys(layers) if layer))


def _settings(inputs: Inputs) -> Settings:
    recipe = inputs.recipe
    return Settings(
        space=recipe.space,
        conflict=recipe.conflict,
        granularity=recipe.granularity,
        scope=recipe.scope,
        tau="auto" if recipe.tau == "auto" else float(recipe.tau),
        rest=float(recipe.rest),
    )


def _input(name: str, checkpoint: Checkpoint) -> Input:
    shards = [
        ShardIdentity(file=shard.file.name, size=shard.size, header_xxh3=shard.header_xxh3, sha256=shard.sha256)
        for shard in checkpoint.shards
    ]
    return Input(
        name=name,
        path=planned_path(checkpoint.path),
        adapter=planned_path(checkpoint.adapter) if checkpoint.adapter else None,
        scratch_bytes=checkpoint.scratch_bytes,
        shards=shards,
    )


def _task(inputs: Inputs, findings: dict[str, Findings], number: int, core_xxh3: str) -> Task:
    floats = [spec for spec in inputs.tensors if spec.is_float]
    elements = sum(spec.elements for spec in floats)
    changed, near, rounding = (int(sum(findings[s.name].updates[number, i] for s in floats)) for i in range(3))
    core = int(sum(findings[spec.name].pairs[number, number] for spec in floats))
    sum_in, sum_out = (float(sum(findings[spec.name].sums[number, i] for spec in floats)) for i in range(2))
    return Task(
        name=inputs.recipe.tasks[number].name,
        core_file=core_file(number),
        core_xxh3=core_xxh3,
        elements=elements,
        changed=changed,
        near=near,
        rounding=rounding,
        core=core,
        mean_in=sum_in / core if core else 0.0,
        mean_out=sum_out / (elements - core) if elements > core else 0.0,
    )


@dataclass(frozen=True)
class _Overlaps:
    """Over the model, [T, T] each; see `Pair`."""

    pairs: Counts  # |Ca ∩ Cb|
    compared: Counts
    aligned: Counts
    expected: Shares


def _overlaps(inputs: Inputs, findings: dict[str, Findings]) -> _Overlaps:
    floats = [spec for spec in inputs.tensors if spec.is_float]
    in_layers = [spec for spec in floats if spec.layer] or floats
    shape = (len(inputs.recipe.tasks),) * 2
    pairs, compared, aligned = (np.zeros(shape, np.int64) for _ in range(3))
    expected = np.zeros(shape)
    for spec in floats:
        pairs += findings[spec.name].pairs
    for spec in in_layers:
        compared += findings[spec.name].pairs
        aligned += findings[spec.name].aligned
        expected += by_chance(findings[spec.name].pairs, findings[spec.name].inwards)  # always in this order
    return _Overlaps(pairs, compared, aligned, expected)


def _pairs(inputs: Inputs, findings: dict[str, Findings], overlaps: _Overlaps) -> Iterator[Pair]:
    """Every pair of tasks, with its overlap in the model and in each layer."""
    eligible = [spec for spec in inputs.tensors if spec.eligible]
    sizes: Counter[tuple[Fraction, ...]] = Counter()  # elements by the tasks' densities, which are mostly the same
    for spec in eligible:
        sizes[spec.density] += spec.elements
    layers: dict[str, Counts] = {}
    for spec in eligible:
        layers[spec.layer] = layers.get(spec.layer, 0) + findings[spec.name].pairs
    names = [task.name for task in inputs.recipe.tasks]
    for a, b in combinations(range(len(names)), 2):
        independent = chance([*sizes.values()], [density[a] for density in sizes], [density[b] for density in sizes])
        index = jaccard(overlaps.pairs, a, b)
        shared = int(overlaps.pairs[a, b])
        yield Pair(
            a=names[a],
            b=names[b],
            shared=shared,
            union=int(overlaps.pairs[a, a] + overlaps.pairs[b, b]) - shared,
            jaccard=float(index),
            chance=float(independent),
            lift=float(index / independent) if independent else None,
            compared=int(overlaps.compared[a, b]),
            aligned=int(overlaps.aligned[a, b]),
            expected=float(overlaps.expected[a, b]),
            layers={layer: float(jaccard(counts, a, b)) for layer, counts in layers.items()},
        )


def _tensor(inputs: Inputs, spec: TensorSpec, found: Findings, blend: Blend | None) -> TensorPlan:
    names = [task.name for task in inputs.recipe.tasks]
    return TensorPlan(
        name=spec.name,
        shape=list(spec.shape),
        dtype=spec.dtype,
        base_dtype=spec.sources[0].dtype,
        action=_action(spec, found),
        first_chunk=max(found.first_chunk, 0),
        first_row=max(found.first_row, 0),
        xxh3=dict(zip(inputs.names, found.hashes, strict=True)),
        claimed=found.claimed,
        tasks={name: _task_tensor(spec, found, number) for number, name in enumerate(names)} if spec.is_float else {},
        blend=blend,
    )


def _action(spec: TensorSpec, found: Findings) -> Literal["copy", "identical", "blend"]:
    if not spec.is_float:
        return "copy"
    return "identical" if found.identical else "blend"


def _task_tensor(spec: TensorSpec, found: Findings, number: int) -> TaskTensor:
    changed, near, rounding = found.updates[number].tolist()
    sum_in, sum_out = found.sums[number].tolist()
    return TaskTensor(
        dtype=spec.sources[1 + number].dtype,
        changed=changed,
        near=near,
        rounding=rounding,
        core=int(found.pairs[number, number]),
        sum_in=sum_in,
        sum_out=sum_out,
    )
