"""`fuse`: obeys a plan in one streamed pass: every tensor is a blend of a few vectors, with cores written over it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from .budget import Budget
from .chat_template import check_replaceable
from .checkpoint import FLOAT_NAMES, ITEM_BYTES, Checkpoint, Tensor, collect
from .companions import companion_bytes, read_manifest, unreadable, write_companions
from .cores import CoreReader
from .disk import flush, open_to_write, reserve
from .errors import CheckpointError, IncompatibleError, PlanError
from .findings import content_hash
from .kernels.floats import KINDS, first_nonfinite
from .kernels.mixing import Mix, blend
from .levelling import level, one_thread, reach
from .models import Locate, locate
from .needs import check_disk
from .places import keep_only
from .plan_arrays import chunks_of, open_coefficients
from .plan_file import COEFFICIENTS_FILE, Plan, TensorPlan, plan_hash
from .planned_inputs import PLAN_AGAIN, open_inputs
from .staging import Staging, Target, Watch, Work, staged_bytes, staged_directory
from .stream import (
    CHUNK,
    EXPONENT,
    Bytes,
    Chunk,
    Floats,
    Workers,
    bits_of,
    chunks,
    decode,
    encode,
    kinds_of,
    workers,
)
from .transplant import Bits, Claim, Stored, transplant
from .writer import BegunShard, FinishedShard, ShardLayout, ShardRecord, ShardWriter, shard_layouts, shard_records

__all__ = ["fuse_plan"]

TOGETHER = 256  # small tensors that a worker takes at most at a time
TOO_LARGE = "The inputs are too large to merge"


def fuse_plan(
    plan: Plan, plan_dir: Path, target: Target, budget: Budget, watch: Watch, find: Locate = locate
) -> dict[str, Any]:
    """Write the fused checkpoint to `target`; returns its manifest.

    Goes on where an earlier run of the same plan was cut off, and tells `watch`. Raises PlanError where the plan is
    damaged or an input changed since, CheckpointError where the base's other files cannot be copied, ResourceError
    where the disk is too small, IncompatibleError where a result does not fit the output dtype, OutputError where the
    target cannot be written. Whatever is raised, nothing appears there.
    """
    checkpoints = open_inputs(plan, find)
    base = checkpoints["base"].path
    _check_companions(plan, base, target)
    layouts = shard_layouts((tensor.output for tensor in plan.tensors), target.shard_bytes)
    forbidden = [plan_dir, *(path for checkpoint in checkpoints.values() for path in checkpoint.directories)]
    work = target.work or Work("fuse", f"{plan_hash(plan_dir)} {target.shard_bytes}")
    threads = workers(budget.threads, len(checkpoints), budget.matrices)
    with staged_directory(target, forbidden, work) as staging, threads as pool:
        if staging.is_published:
            return read_manifest(target.directory)
        with one_thread(), closing(_Fusion(plan, plan_dir, checkpoints, pool, watch)) as fusion:
            sha256 = fusion.write_shards(layouts, staging)
        return write_companions(plan, plan_dir, base, staging.files, layouts, sha256)


def _check_companions(plan: Plan, base: Path, target: Target) -> None:
    """Raise where the other files of the output cannot be written, before hours of work on its tensors."""
    problems: list[str] = []
    needed = plan.output_bytes
    with collect(base, problems):
        problems.extend(unreadable(base))
        needed += companion_bytes(base, len(plan.tensors), len(plan.fold))
    if plan.chat_template is not None:
        check_replaceable(base, problems)
    if problems:
        raise CheckpointError(problems)
    check_disk(needed - staged_bytes(target.directory), target.directory)


@dataclass(frozen=True)
class _Job:
    """One chunk of one tensor; `number` counts the tensor's chunks, `offset` the bytes before it in its shard.

    `place` is the tensor's number in its shard.
    """

    tensor: TensorPlan
    place: int
    chunk: Chunk
    number: int
    last: bool
    offset: int


@dataclass(frozen=True)
class _Fused:
    """The bytes of some jobs, one after the other; and of each job the xxh3-64 of what was read for it."""

    jobs: Sequence[_Job]
    data: Sequence[memoryview]
    digests: Sequence[Mapping[str, int]]  # by checkpoint


class _Fusion:
    """Fuses chunks on the workers and writes them in order."""

    def __init__(
        self, plan: Plan, plan_dir: Path, checkpoints: Mapping[str, Checkpoint], pool: Workers, watch: Watch
    ) -> None:
        self.plan = plan
        self.checkpoints = checkpoints
        self.pool = pool
        self.watch = watch
        count = chunks_of(plan)
        with ExitStack() as opened:
            self.cores = {
                task.name: opened.enter_context(closing(CoreReader(plan_dir / task.core_file, task.core_xxh3, count)))
                for task in plan.tasks
            }
            self._opened = opened.pop_all()
        self.rows = open_coefficients(plan, plan_dir)
        self.sources = plan.fold if "base" in plan.fold else [*plan.fold, "base"]
        self.base = self.sources.index("base")
        self.total = plan.output_bytes
        self.done = 0

    def close(self) -> None:
        self._opened.close()

    def write_shards(self, layouts: Sequence[ShardLayout], staging: Staging) -> dict[str, str]:
        """Fuse and write every shard, but for what an earlier run has done; returns their sha256 by filename."""
        known = shard_records(staging.done)
        sha256 = {
            name: record.sha256
            for name, record in known.items()
            if isinstance(record, FinishedShard) and record.holds(staging.files / name)
        }
        left = [layout for layout in layouts if layout.filename not in sha256]
        _prepare(left, staging.files, sha256)
        self.done = self.total - sum(tensor.nbytes for layout in left for tensor in layout.tensors)
        for layout in left:
            file = staging.files / layout.filename
            with closing(ShardWriter(file, layout.header(), staging.journal.append)) as writer:
                tensors = _taken_over(writer, layout, known.get(layout.filename))
                self.done += sum(tensor.nbytes for tensor in layout.tensors[:tensors])
                if layout is left[0]:
                    self._tell_resumed()
                sha256[layout.filename] = self._write_shard(layout, writer, tensors)
        if not left:
            self._tell_resumed()
        return {layout.filename: sha256[layout.filename] for layout in layouts}

    def _tell_resumed(self) -> None:
        if self.done:
            self.watch.resumed(self.done, self.total)

    def _write_shard(self, layout: ShardLayout, writer: ShardWriter, tensors: int) -> str:
        """Fuse and write one shard, whose first `tensors` are there; returns its sha256."""
        seen: dict[str, list[int]] = {}
        with closing(self.pool.map(partial(self._fuse_all, writer), self._jobs(layout, tensors))) as results:
            for fused in results:
                for data in fused.data:
                    writer.hash(data)
                    self.done += data.nbytes
                    if data is fused.data[-1]:  # before it is told that they are done
                        self._check_and_mark(writer, fused, seen)
                    self.watch.progress("fuse", self.done, self.total)
            return writer.finish()

    def _check_and_mark(self, writer: ShardWriter, fused: _Fused, seen: dict[str, list[int]]) -> None:
        """Whole tensors were read as they were planned; `seen` are the digests of the chunks of one before its end."""
        for job, digests in zip(fused.jobs, fused.digests, strict=True):
            for name, digest in digests.items():
                seen.setdefault(name, []).append(digest)
            if job.last:
                self._check_unchanged(job.tensor, seen)
                seen.clear()
        if fused.jobs[-1].last:
            writer.mark(fused.jobs[-1].place + 1)

    def _jobs(self, layout: ShardLayout, first: int) -> Iterator[list[_Job]]:
        """The chunks of a shard's tensors from number `first` on: one at a time, but small tensors together.

        A levelled tensor's are together, too, and by themselves. What comes together lies one after the other.
        """
        tensors = {tensor.name: tensor for tensor in self.plan.tensors}
        begin = held = 0
        small: list[_Job] = []  # of `held` elements together
        for place, output in enumerate(layout.tensors):
            every = chunks(output.shape, self.plan.settings.granularity) if place >= first else []
            tensor, item = tensors[output.name], ITEM_BYTES[output.dtype]
            jobs = [
                _Job(tensor, place, chunk, number, number == len(every) - 1, begin + chunk.start * item)
                for number, chunk in enumerate(every)
            ]
            begin += output.nbytes
            is_small = len(jobs) == 1 and not tensor.is_levelled
            if small and jobs and (not is_small or len(small) == TOGETHER or held + output.elements > CHUNK):
                yield small
                small, held = [], 0
            if is_small:
                small += jobs
                held += output.elements
            elif jobs:
                yield from [jobs] if tensor.is_levelled else ([job] for job in jobs)
        if small:
            yield small

    def _check_unchanged(self, tensor: TensorPlan, seen: Mapping[str, Sequence[int]]) -> None:
        changed = [name for name, digests in seen.items() if content_hash(digests) != tensor.xxh3[name]]
        if changed:
            where = (
                f"{self.checkpoints[name].where}: tensor {tensor.name!r}: changed since planned" for name in changed
            )
            raise PlanError([*where, PLAN_AGAIN])

    def _fuse_all(self, writer: ShardWriter, jobs: Sequence[_Job]) -> _Fused:
        if not jobs[0].tensor.is_levelled:
            return self._write(writer, jobs, None)
        with self.pool.whole:  # until nothing of the matrix is held, and the disk has taken it
            return self._write(writer, jobs, self._levelled(jobs))

    def _write(self, writer: ShardWriter, jobs: Sequence[_Job], update: Floats | None) -> _Fused:
        """Fuse chunks that lie one after the other, and write them."""
        parts = [self._fuse(job, update) for job in jobs]
        data = [part for part, _ in parts]
        if update is None and len(jobs) > 1:  # for many small tensors calls take longer than a copy
            data = [memoryview(b"".join(data))]
        place = writer.data_begin + jobs[0].offset
        for part in data:
            writer.write(part, place)
            place += part.nbytes
        return _Fused(jobs, data, [digests for _, digests in parts])

    def _fuse(self, job: _Job, update: Floats | None) -> tuple[memoryview, Mapping[str, int]]:
        """A chunk's bytes, and the xxh3-64 of what was read for it, by checkpoint."""
        infos = [self.checkpoints[name].tensors[job.tensor.name] for name in self.sources]
        stored = self.pool.read(infos, job.chunk)  # all of them: also what has no effect must be what was planned
        digests = {name: xxhash.xxh3_64_intdigest(raw) for name, raw in zip(self.sources, stored, strict=True)}
        with np.errstate(over="ignore", invalid="ignore"):  # `_finite` finds what overflows
            blends = job.tensor.action == "blend"
            data = (
                self._blend(job, infos, stored, update)
                if blends
                else self._copy(job, infos[self.base], stored[self.base])
            )
        return memoryview(data.view(np.uint8)), digests

    def _copy(self, job: _Job, info: Tensor, raw: Bytes) -> Bits:
        if info.dtype == job.tensor.dtype:
            return raw.copy()
        return self._finite(job, encode(decode(raw, info.dtype), job.tensor.dtype))

    def _levelled(self, jobs: Sequence[_Job]) -> Floats:
        """The levelled update of a whole tensor, float32 [elements]: from its chunks, which are read for it alone."""
        tensor = jobs[0].tensor
        share = tensor.blend.levelled if tensor.blend else 0.0
        infos = [self.checkpoints[name].tensors[tensor.name] for name in self.sources]
        update = np.empty(tensor.output.elements, np.float32)
        seen: dict[str, list[int]] = {name: [] for name in self.sources}
        squares = 0.0  # of the base, in the order of the chunks
        for job in jobs:
            stored = self.pool.read(infos, job.chunk)
            for name, raw in zip(self.sources, stored, strict=True):
                seen[name].append(xxhash.xxh3_64_intdigest(raw))
            squares += float(np.sum(np.square(decode(stored[self.base], tensor.base_dtype), dtype=np.float64)))
            part = update[job.chunk.start : job.chunk.stop]
            self._mix(job, infos, part.view(np.uint8), "F32", based=False)
        self._check_unchanged(tensor, seen)
        _check_fits(tensor, 0, update.view(np.uint32), "F32")
        try:
            with np.errstate(over="ignore", invalid="ignore"):  # what overflows is found below
                level(update.reshape(tensor.shape), reach(squares, self.plan.settings.rest), share)
        except np.linalg.LinAlgError as error:
            where = f"tensor {tensor.name!r}: its singular values cannot be computed ({error})"
            raise IncompatibleError(f"{where}. Set singular_values: keep in the recipe") from error
        _check_fits(tensor, 0, update.view(np.uint32), "F32")
        return update

    def _mix(self, job: _Job, infos: Sequence[Tensor], out: Bytes, dtype: str, *, based: bool) -> None:
        """The blend of the chunk that was read last, as `dtype`, with or without the base of its differences."""
        delta, size = self.plan.settings.space == "delta", job.chunk.size
        mix = Mix(size, min(job.chunk.row, size), self.base, delta, delta and based, KINDS[dtype])
        buffers = self.pool.buffers
        blend(buffers.raw[: len(infos)], kinds_of(infos), mix, self._coefficients(job), out, buffers.scratch)

    def _blend(self, job: _Job, infos: Sequence[Tensor], stored: Sequence[Bytes], update: Floats | None) -> Bits:
        """The chunk's blend, or what `update` makes of the base, with the cores over it: bits of the output dtype."""
        dtype = job.tensor.dtype
        base = Stored(bits_of(stored[self.base], infos[self.base]), infos[self.base].dtype)
        if update is None:
            out = np.empty(job.chunk.size * ITEM_BYTES[dtype], np.uint8)
            self._mix(job, infos, out, dtype, based=True)
            bits: Bits = out.view(f"u{ITEM_BYTES[dtype]}")
        else:
            bits = encode(decode(stored[self.base], base.dtype) + update[job.chunk.start : job.chunk.stop], dtype)
        claims = [self._claim(task, job, infos, stored) for task in self.plan.order]
        transplant(bits, claims, self.plan.settings.conflict, base, dtype)
        return self._finite(job, bits)

    def _coefficients(self, job: _Job) -> Floats:
        """float32 [R, V] for the rows that the chunk touches."""
        blend = job.tensor.blend
        if blend is not None and blend.coefficients is not None:
            return np.array([blend.coefficients], np.float32)
        first = job.tensor.first_row + job.chunk.start // job.chunk.row
        rows = np.ascontiguousarray(self.rows[first : first + job.chunk.rows])
        if first < 0 or len(rows) != job.chunk.rows:
            raise PlanError(f"{COEFFICIENTS_FILE}: has no row {first + job.chunk.rows - 1}. Run `cpimerge plan` again")
        return rows

    def _claim(self, task: str, job: _Job, infos: Sequence[Tensor], stored: Sequence[Bytes]) -> Claim:
        """The task's core in this chunk, and what the task has stored."""
        place = self.sources.index(task)
        values = Stored(bits_of(stored[place], infos[place]), infos[place].dtype)
        if not job.tensor.tasks[task].core:
            return Claim(NO_POSITIONS, values)
        return Claim(self.cores[task].positions(job.tensor.first_chunk + job.number, job.chunk.size), values)

    def _finite(self, job: _Job, bits: Bits) -> Bits:
        _check_fits(job.tensor, job.chunk.start, bits, job.tensor.dtype)
        return bits


def _check_fits(tensor: TensorPlan, start: int, bits: Bits, dtype: str) -> None:
    """Raise IncompatibleError where bits of `dtype`, the tensor's elements from `start` on, are not all finite."""
    place = first_nonfinite(bits, EXPONENT[dtype])
    if place >= 0:
        name = FLOAT_NAMES[dtype]
        way_out = "Set dtype: bfloat16 or float32 in the recipe" if name == "float16" else TOO_LARGE
        where = f"tensor {tensor.name!r}: flat index {start + place}"
        raise IncompatibleError(f"{where}: the result does not fit {name}. {way_out}")


def _taken_over(writer: ShardWriter, layout: ShardLayout, record: ShardRecord | None) -> int:
    """How many tensors of a shard an earlier run has written and the writer goes on from."""
    if isinstance(record, BegunShard) and record.fits(layout) and writer.go_on(record):
        return record.tensors
    return 0


def _prepare(layouts: Sequence[ShardLayout], directory: Path, finished: Iterable[str]) -> None:
    """Set the disk's space aside for every shard to be written. What else lies there will be made anew."""
    shards = {layout.filename: layout for layout in layouts}
    keep_only(directory, {*shards, *finished})
    for name, layout in shards.items():
        handle = open_to_write(directory / name)
        try:
            reserve(handle, len(layout.header()) + sum(tensor.nbytes for tensor in layout.tensors))
        finally:
            os.close(handle)
    flush(directory)


NO_POSITIONS = np.empty(0, np.uint32)
