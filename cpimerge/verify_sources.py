"""Whether the inputs of a plan are those that were planned: files, headers, and every tensor's content."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import xxhash

from .budget import Budget
from .checkpoint import Checkpoint, Tensor
from .errors import CpimergeError
from .models import Locate, open_model
from .plan_file import PLAN_FILE, Input, Plan
from .stream import Chunk, Workers, workers
from .verify_results import Failure, Findings, InputsVerification
from .vocabulary import settle

__all__ = ["Job", "chunks_of", "content_hash", "jobs_of", "open_inputs", "verify_plan_inputs", "worker_bytes"]

CHUNK = 1 << 18  # elements; docs/plan.md says what a chunk is
CHUNK_ROWS = 1 << 11
TOGETHER = 256  # chunks that a worker takes at a time, where they are small
ROW = 128  # elements that a row counts for there: what is found of it takes as much memory, however short it is
PHASE = "verify"

Progress = Callable[[str, int, int], None]


def chunks_of(shape: Sequence[int], granularity: str) -> list[Chunk]:
    """A tensor's chunks as docs/plan.md defines them."""
    elements = int(np.prod(shape, dtype=object)) if shape else 1
    if not elements:
        return []
    row = int(shape[-1]) if granularity == "row" and len(shape) > 1 else elements
    if row > CHUNK:
        return [
            Chunk(start, min(start + CHUNK, first + row), row)
            for first in range(0, elements, row)
            for start in range(first, first + row, CHUNK)
        ]
    step = row * min(CHUNK // row, CHUNK_ROWS)
    return [Chunk(start, min(start + step, elements), row) for start in range(0, elements, step)]


def content_hash(digests: Sequence[int]) -> str:
    """xxh3-64 of the chunks' xxh3-64 digests, little-endian, in order."""
    return xxhash.xxh3_64_hexdigest(b"".join(digest.to_bytes(8, "little") for digest in digests))


@dataclass(frozen=True)
class Job:
    """Chunk number `number` of a tensor that is called `name`."""

    name: str
    number: int
    chunk: Chunk


def jobs_of(each: Iterator[Job]) -> Iterator[list[Job]]:
    """What one worker takes at a time: a large chunk, or some small ones."""
    some: list[Job] = []
    size = 0
    for job in each:
        some.append(job)
        size += max(job.chunk.size, ROW * job.chunk.rows)
        if size >= CHUNK or len(some) == TOGETHER:
            yield some
            some, size = [], 0
    if some:
        yield some


def worker_bytes(plan: Plan) -> int:
    """What a thread needs to read and hash."""
    return CHUNK * 8 * len(plan.inputs) + sum(entry.scratch_bytes for entry in plan.inputs)


# --- opening -------------------------------------------------------------------------------------


def open_inputs(plan: Plan, find: Locate, findings: Findings) -> dict[str, Checkpoint]:
    """The inputs that can be opened, by name, in the vocabulary that was planned; what is wrong with any is told."""
    opened: dict[str, Checkpoint] = {}
    for entry in plan.inputs:
        try:
            opened[entry.name] = open_model(find(entry.reference, entry.name == "base"), opened.get("base"))
        except CpimergeError as error:
            for problem in error.problems:
                findings.fail(f"input {entry.name!r}", problem)
            continue
        _compare_shards(entry, opened[entry.name], findings)
    if plan.vocabulary is not None and len(opened) == len(plan.inputs):
        opened = _in_one_vocabulary(plan, opened, findings)
    return {name: model for name, model in opened.items() if _fits(plan, name, model, findings)}


def _compare_shards(entry: Input, opened: Checkpoint, findings: Findings) -> None:
    """Sizes and header hashes of an input's files."""
    planned = {shard.file: shard for shard in entry.shards}
    present = {shard.file.name: shard for shard in opened.shards}
    for name in sorted(planned.keys() | present.keys()):
        then, now = planned.get(name), present.get(name)
        if now is None:
            findings.fail(opened.where / name, "gone since it was planned")
        elif then is None:
            findings.fail(now.file, "was not there when planned")
        elif now.size != then.size:
            findings.fail(now.file, f"{now.size} bytes, {then.size} when planned")
        elif now.header_xxh3 != then.header_xxh3:
            findings.fail(now.file, "its header changed since it was planned")


def _in_one_vocabulary(plan: Plan, opened: dict[str, Checkpoint], findings: Findings) -> dict[str, Checkpoint]:
    assert plan.vocabulary is not None
    settled = settle(opened, plan.vocabulary.mode)
    for problem in settled.damaged + settled.problems:
        findings.fail("vocabulary", problem)
    if settled.vocabulary == plan.vocabulary:
        return settled.checkpoints
    now = settled.vocabulary.tokens_xxh3 if settled.vocabulary else {}
    changed = [name for name, xxh3 in plan.vocabulary.tokens_xxh3.items() if now.get(name) != xxh3]
    for name in changed or ["base"]:
        findings.fail(opened[name].where, "its tokens changed since it was planned")
    return {}


def _fits(plan: Plan, name: str, model: Checkpoint, findings: Findings) -> bool:
    """Whether it has the plan's tensors, in their shapes."""
    wrong = [
        tensor.name
        for tensor in plan.tensors
        if tensor.name not in model.tensors or [*model.tensors[tensor.name].shape] != tensor.shape
    ]
    for tensor in wrong:
        findings.fail(model.where, "missing, or of another shape than planned", tensor)
    return not wrong and (name != "base" or _no_more(plan, model, findings))


def _no_more(plan: Plan, base: Checkpoint, findings: Findings) -> bool:
    more = sorted(base.tensors.keys() - {tensor.name for tensor in plan.tensors})
    for tensor in more:
        findings.fail(base.where, "is not in the plan", tensor)
    return not more


# --- `verify --inputs` ---------------------------------------------------------------------------


def verify_plan_inputs(
    plan: Plan, directory: Path, find: Locate, budget: Budget, progress: Progress
) -> InputsVerification:
    """Read every input of the plan in `directory` and compare its content. Raises CheckpointError for broken reads."""
    findings = Findings()
    opened = open_inputs(plan, find, findings)
    sources = {tensor.name: [model.tensors[tensor.name] for model in opened.values()] for tensor in plan.tensors}
    total = sum(info.nbytes for some in sources.values() for info in some)
    done = 0
    digests: dict[str, list[list[int]]] = {tensor.name: [] for tensor in plan.tensors}
    every = (
        Job(tensor.name, number, chunk)
        for tensor in plan.tensors
        for number, chunk in enumerate(chunks_of(tensor.shape, plan.settings.granularity))
    )
    with workers(budget.threads, max(1, len(opened))) as pool:
        for some in pool.map(partial(_digests, pool, sources), jobs_of(every if opened else iter(()))):
            for job, found in some:
                digests[job.name].append(found)
                done += sum(job.chunk.size * info.item_bytes for info in sources[job.name])
            progress(PHASE, done, total)
    progress(PHASE, total, total)
    for tensor in plan.tensors:
        columns = zip(*digests[tensor.name], strict=True) if digests[tensor.name] else ((),) * len(opened)
        hashes = dict(zip(opened, map(content_hash, columns), strict=True))
        findings.extend(changed_content(opened, tensor.name, tensor.xxh3, hashes))
    return InputsVerification(
        plan=str(directory / PLAN_FILE),
        inputs=tuple(opened),
        files=sum(len(model.shards) for model in opened.values()),
        tensors=len(plan.tensors) * len(opened),
        input_bytes=total,
        failures=tuple(findings.failures),
    )


def changed_content(
    opened: Mapping[str, Checkpoint], tensor: str, planned: Mapping[str, str], found: Mapping[str, str]
) -> list[Failure]:
    """A failure for each input whose tensor has another content than planned."""
    return [
        Failure(str(opened[name].where), "changed since it was planned", tensor)
        for name, xxh3 in found.items()
        if planned[name] != xxh3
    ]


def _digests(
    pool: Workers, sources: Mapping[str, Sequence[Tensor]], jobs: Sequence[Job]
) -> list[tuple[Job, list[int]]]:
    return [(job, [xxhash.xxh3_64_intdigest(raw) for raw in pool.read(sources[job.name], job.chunk)]) for job in jobs]
