"""`verify`: proves an output from first principles, in one streamed read of it and of what it was made of.

Nothing that planned or fused takes part: the files are read by their formats' rules, the elements computed by METHOD
in plain numpy, and cores judged without being made again. Shared with the merge are opening and reading the inputs
(adapters and vocabularies included), the recipe's parser and plan.json's schema.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from itertools import groupby
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from .budget import Budget
from .checkpoint import Checkpoint
from .errors import OutputError, PlanError
from .levelling import one_thread
from .models import Locate
from .ordinary import open_ordinary
from .plan_file import PLAN_FILE, Plan, TensorPlan
from .stream import PENDING, Workers, workers
from .verify_cores import CoreFile, numbers_of, pools_of
from .verify_elements import Look, Piece, Rules, Seen, folded
from .verify_files import (
    Manifest,
    OutputFile,
    OutputTensor,
    check_files,
    check_index,
    has_size,
    is_inside,
    read_manifest,
    sha256,
    weights,
)
from .verify_levels import Levelled, levelled, matrix_bytes, most_of, result_bytes, sampled
from .verify_numbers import values_of
from .verify_plan import check_chunks, check_manifest, find_plan, open_cores, read_coefficients
from .verify_results import Counts, Findings, Verification
from .verify_sources import CHUNK, PHASE, Job, Progress, chunks_of, jobs_of, open_inputs
from .verify_tallies import Tallies

__all__ = ["Output", "matrix_bytes", "open_output", "verify_output", "worker_bytes"]


@dataclass(frozen=True)
class Output:
    """What is verified: the directory, its manifest as parsed and as bytes, and the plan in its directory."""

    directory: Path
    manifest: Manifest
    raw: bytes
    plan: Plan
    plan_dir: Path


def open_output(out: Path, plan_dir: Path | None) -> Output:
    """The manifest, and its plan, in `plan_dir` or beside `out`. Raises OutputError or PlanError where it lacks one."""
    manifest, raw = read_manifest(out)
    found = find_plan(out, manifest, plan_dir)
    return Output(out, manifest, raw, Plan.load(found), found)


def worker_bytes(plan: Plan) -> int:
    """What a thread needs at least: what it reads, as floats, as the blend's doubles, masks and temporaries.

    Results wait beside it. What a levelled tensor takes is `matrix_bytes`.
    """
    inputs, tasks, members = len(plan.inputs), len(plan.tasks), len(plan.fold)
    each = inputs * (8 + 4) + members * (8 + 4) + tasks * (8 + 4 + 4 + 2) + 64
    return CHUNK * each + PENDING * result_bytes(plan) + sum(entry.scratch_bytes for entry in plan.inputs)


def verify_output(
    output: Output, find: Locate, budget: Budget, sample: Fraction | None, progress: Progress
) -> Verification:
    """Compare everything; of a `sample`, about that share of each tensor's chunks, and no hash of weights.

    Of tensors whose singular values are levelled, a sample has about that share of all, each whole or not at all:
    every element of one follows from all of it. So no element is counted as compared that is not.

    Raises CheckpointError or OutputError where a file cannot be read to its end.
    """
    findings = Findings()
    out, plan, manifest = output.directory, output.plan, output.manifest
    agree = check_files(out, manifest, findings)
    check_manifest(out, manifest, output.raw, plan, findings)
    files = weights(out, manifest, plan, findings)
    check_index(out, manifest, files, findings)
    counts, cores, tensors = Counts(), 0, 0
    hashes: dict[str, str] = {}
    with ExitStack() as stack:
        parts = _parts(output, find, findings, stack)
        if parts is None:  # nor is it asked where the recipe was, from paths that lead nowhere
            findings.notes.append("the elements were not compared, for want of what is told as wrong")
        else:
            tallies = _tallies(output, files, findings)
            pool = stack.enter_context(workers(budget.threads, len(plan.inputs), budget.matrices))
            stack.enter_context(one_thread())
            run = _Pass(output, parts, tallies, pool, sample)
            hashes = run.run(files, progress)
            counts, cores = run.counts, tallies.cores
            tensors = sum(len(file.tensors) for file in files) - len(run.skipped)
            if run.skipped:
                findings.notes.append(_left_out(len(run.skipped), plan))
            tallies.conclude(output.plan_dir, parts.inputs, sample is None and _has_all(plan, files), findings)
    if sample is None:
        agree += _compare_hashes(out, manifest, hashes, findings)
    return Verification(
        out=str(out),
        plan=str(output.plan_dir),
        sample=None if sample is None else float(sample),
        files=agree,
        tensors=tensors,
        cores=cores,
        **asdict(counts),
        failures=tuple(findings.failures),
        notes=tuple(findings.notes),
    )


def _left_out(count: int, plan: Plan) -> str:
    every = sum(tensor.is_levelled for tensor in plan.tensors)
    return (
        f"{count:,} of {every:,} tensors whose singular values are levelled were not looked at: a sample reads one of "
        "these whole or not at all, because each of its elements follows from all of it"
    )


def _tallies(output: Output, files: Sequence[OutputFile], findings: Findings) -> Tallies:
    """Nothing seen yet, and what must be seen by the recipe."""
    plan, told = output.plan, output.plan_dir / PLAN_FILE
    numbers = numbers_of(plan, findings, told)
    pools = pools_of(plan, numbers, findings, told)
    return Tallies(plan, numbers, pools, {one.planned.name: file.file for file in files for one in file.tensors})


def _has_all(plan: Plan, files: Sequence[OutputFile]) -> bool:
    return sum(len(file.tensors) for file in files) == len(plan.tensors)


def _compare_hashes(out: Path, manifest: Manifest, hashes: Mapping[str, str], findings: Findings) -> int:
    """Those of the weights, which were taken as they were read, where they could be."""
    agree = 0
    for name, described in manifest.shards.items():
        file = out / name
        if not is_inside(name) or not has_size(file, described.size):
            continue  # told already
        try:
            found = hashes[name] if name in hashes else sha256(file)
        except OSError as error:
            findings.fail(file, f"cannot be read: {error.strerror}")
            continue
        agree += found == described.sha256
        if found != described.sha256:
            findings.fail(file, "its sha256 is not the manifest's")
    return agree


@dataclass(frozen=True)
class _Parts:
    """What an output was made of: its inputs by name, cores by task, rows of coefficients where they lie in a file."""

    inputs: Mapping[str, Checkpoint]
    cores: Mapping[str, CoreFile]
    rows: npt.NDArray[np.float32] | None


def _parts(output: Output, find: Locate, findings: Findings, stack: ExitStack) -> _Parts | None:
    """All of it; None where something is missing or does not fit, which is told."""
    plan = output.plan
    first = ["base", *(task.name for task in plan.tasks)]
    if [entry.name for entry in plan.inputs[: len(first)]] != first:  # which all numbers of tasks here go by
        findings.fail(output.plan_dir / PLAN_FILE, "its inputs are not the base and then its tasks, in their order")
        return None
    opened = open_inputs(plan, find, findings)
    if len(opened) < len(plan.inputs):
        return None  # nor need the shapes be true
    sizes = {}
    for tensor in plan.tensors:
        every = chunks_of(tensor.shape, plan.settings.granularity)
        sizes[tensor.name] = len(every), every[-1].stop // every[-1].row if every else 0
    blended = [sizes[tensor.name] for tensor in plan.tensors if tensor.blend]
    chunks, count = (sum(size[which] for size in blended) for which in (0, 1))
    cores = open_cores(plan, output.plan_dir, chunks, findings)
    for core in cores.values():
        stack.enter_context(closing(core))
    rows = read_coefficients(plan, output.plan_dir, count, findings)
    whole = check_chunks(plan, output.plan_dir / PLAN_FILE, sizes, findings)
    has_rows = (rows is None) == (plan.coefficients_xxh3 is None)
    return _Parts(opened, cores, rows) if whole and has_rows and len(cores) == len(plan.tasks) else None


@dataclass(frozen=True)
class _Result:
    """A job's output bytes, the hashes of what was read for it, and what was seen; else, why nothing was."""

    job: Job
    data: npt.NDArray[np.uint8]
    digests: list[int]
    seen: Seen | None
    problem: str = ""


class _Pass:
    """The read."""

    def __init__(self, output: Output, parts: _Parts, tallies: Tallies, pool: Workers, sample: Fraction | None) -> None:
        self.plan = output.plan
        self.parts = parts
        self.tallies = tallies
        self.pool = pool
        self.sample = sample
        self.counts = Counts()
        self.skipped: set[str] = set()  # levelled tensors that are not of the sample
        names = [entry.name for entry in self.plan.inputs]
        tasks = [task.name for task in self.plan.tasks]
        self.sources = {
            tensor.name: [parts.inputs[name].tensors[tensor.name] for name in names] for tensor in self.plan.tensors
        }
        self.rules = Rules(
            tasks=len(tasks),
            order=tuple(tasks.index(task) for task in self.plan.order),
            fold=tuple(names.index(member) for member in self.plan.fold),
            delta=self.plan.settings.space == "delta",
            conflict=self.plan.settings.conflict,
        )

    def run(self, files: Sequence[OutputFile], progress: Progress) -> dict[str, str]:
        """Read all files; returns the sha256 of each, unless this is a sample."""
        if self.sample is not None:
            there = {one.planned.name for file in files for one in file.tensors}
            every = [tensor for tensor in self.plan.tensors if tensor.is_levelled and tensor.name in there]
            self.skipped = {tensor.name for tensor in every} - sampled(every, self.sample)
        total = sum(self._bytes(tensor, job) for file in files for tensor, job in self._jobs(file))
        hashes = {}
        for file in files:
            digest = hashlib.sha256(file.header)
            for result in self._results(file):
                digest.update(result.data)
                self._add(result)
                progress(PHASE, self.counts.input_bytes + self.counts.output_bytes, total)
            hashes[file.name] = digest.hexdigest()
        progress(PHASE, total, total)
        return hashes if self.sample is None else {}

    def _jobs(self, file: OutputFile) -> Iterator[tuple[OutputTensor, Job]]:
        for rank, tensor in enumerate(file.tensors):
            if tensor.planned.name in self.skipped:
                continue
            every = chunks_of(tensor.planned.shape, self.plan.settings.granularity)
            for number in _chosen(len(every), None if tensor.planned.is_levelled else self.sample, rank):
                yield tensor, Job(tensor.planned.name, number, every[number])

    def _groups(self, file: OutputFile) -> Iterator[list[Job]]:
        """What one worker takes at a time: a levelled tensor, or as `jobs_of`."""
        for alone, some in groupby(self._jobs(file), lambda each: each[0].planned.is_levelled and each[1].name):
            jobs = (job for _, job in some)
            yield from [list(jobs)] if alone else jobs_of(jobs)

    def _results(self, file: OutputFile) -> Iterator[_Result]:
        """Of the file's chunks in order, looked at by the workers."""
        offsets = {tensor.planned.name: tensor for tensor in file.tensors}
        try:
            handle = open_ordinary(file.file)
        except OSError as error:
            raise OutputError(f"{file.file}: cannot be read: {error.strerror}") from error
        try:

            def look(jobs: list[Job]) -> list[_Result]:
                planned = offsets[jobs[0].name].planned
                if not planned.is_levelled:
                    return [self._look(offsets[job.name], job, handle, file, None) for job in jobs]
                with self.pool.whole:
                    update = self._levelled(planned, jobs)
                    return [self._look(offsets[job.name], job, handle, file, update) for job in jobs]

            for results in self.pool.map(look, self._groups(file)):
                yield from results
        finally:
            os.close(handle)

    def _levelled(self, planned: TensorPlan, jobs: Sequence[Job]) -> Levelled:
        """What the tensor's fold becomes, from all of its chunks; they are read for it alone, and not counted."""
        sources = self.sources[planned.name]
        fold, square = np.empty(planned.output.elements, np.float32), 0.0
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is told as such
            for job in jobs:
                stored = self.pool.read(sources, job.chunk)
                values = [values_of(raw, info.dtype) for raw, info in zip(stored, sources, strict=True)]
                square += float(np.square(values[0], dtype=np.float64).sum())
                members = [values[number] - values[0] for number in self.rules.fold]
                coefficients = self.tallies.coefficients(planned, job.chunk, self.parts.rows)
                fold[job.chunk.start : job.chunk.stop] = folded(members, coefficients)
            share = planned.blend.levelled if planned.blend else 0.0
            return levelled(fold.reshape(planned.shape), most_of(square, self.plan.settings.rest), share)

    def _look(self, tensor: OutputTensor, job: Job, handle: int, file: OutputFile, update: Levelled | None) -> _Result:
        """`update`: of a levelled tensor what its fold became."""
        planned, sources = tensor.planned, self.sources[job.name]
        item = planned.output.nbytes // max(1, planned.output.elements)
        try:
            raw = os.pread(handle, job.chunk.size * item, tensor.offset + job.chunk.start * item)
        except OSError as error:
            raise OutputError(f"{file.file}: tensor {job.name!r}: cannot be read: {error.strerror}") from error
        data = np.frombuffer(raw, np.uint8)
        if data.size != job.chunk.size * item:
            raise OutputError(f"{file.file}: tensor {job.name!r}: the file ended early. It changed while it was read")
        stored = self.pool.read(sources, job.chunk)
        digests = [] if self.sample else [xxhash.xxh3_64_intdigest(raw) for raw in stored]
        piece = Piece(job.chunk.start, stored, [info.dtype for info in sources], data, planned.dtype)
        if planned.blend is None:
            return _Result(job, data, digests, Look(piece, self.rules).copied())
        try:
            places = [
                self.parts.cores[task.name].positions(planned.first_chunk + job.number, job.chunk.size)
                for task in self.plan.tasks
            ]
        except PlanError as error:
            return _Result(job, data, digests, None, error.problems[0])
        coefficients = self.tallies.coefficients(planned, job.chunk, self.parts.rows)
        blended = replace(piece, places=places, coefficients=coefficients)
        if update is not None:
            part = update.values[job.chunk.start : job.chunk.stop]
            blended = replace(blended, update=part, tolerance=update.tolerance)
        return _Result(job, data, digests, Look(blended, self.rules).blended())

    def _bytes(self, tensor: OutputTensor, job: Job) -> int:
        items = sum(info.item_bytes for info in self.sources[job.name])
        return job.chunk.size * (items + tensor.planned.output.nbytes // max(1, tensor.planned.output.elements))

    def _add(self, result: _Result) -> None:
        job, seen = result.job, result.seen
        self.counts.input_bytes += job.chunk.size * sum(info.item_bytes for info in self.sources[job.name])
        self.counts.output_bytes += result.data.size
        tally = self.tallies.of(job.name)
        tally.add_digests(result.digests)
        if seen is None:
            tally.problem = tally.problem or result.problem
            return
        self.counts.elements += job.chunk.size
        self.counts.core += seen.claimed
        if tally.planned.blend is None:
            self.counts.copied += job.chunk.size
        else:
            self.counts.blended += job.chunk.size - seen.claimed
        self.tallies.add(job.name, job.chunk, seen, self.parts.rows)


def _chosen(count: int, sample: Fraction | None, rank: int) -> Sequence[int]:
    """Which of a tensor's chunks to read: all, or so large a share, spread evenly, and for each tensor elsewhere."""
    if sample is None or not count:
        return range(count)
    wanted = -(-sample.numerator * count // sample.denominator)
    return sorted({(number * count + rank * 7919 % count) // wanted % count for number in range(wanted)})
