"""What a run will need, from headers and a fraction of a second of calibration. Sizes in bytes, times in seconds."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from . import kernels
from .analysis import PASSES, fits_cache
from .budget import Budget, format_size
from .checkpoint import ITEM_BYTES, TensorInfo
from .cores import Threshold, budget
from .errors import ResourceError
from .passes import Block, Passes
from .plan_file import Plan
from .preflight import Inputs, TensorSpec, pools
from .stream import (
    BLOCK_CHUNKS,
    CHUNK,
    CHUNK_ROWS,
    PENDING,
    Bytes,
    Chunk,
    Workers,
    encode,
    row_count,
    row_length,
    workers,
)

__all__ = ["Needs", "check_disk", "fuse_worker_bytes", "plan_needs", "worker_bytes"]

BITMAP_BYTES = CHUNK // 8  # a Roaring bitmap of a chunk at its largest
HISTOGRAM_BYTES = 8 * kernels.LOW_BINS
JSON_BYTES = 600  # of plan.json for a tensor and a task


@dataclass(frozen=True)
class Needs:
    """`read_bytes` of `plan`, repeated reads included; `plan_bytes` at most; seconds are computing, not waiting."""

    threads: int
    memory_bytes: int
    input_bytes: int
    read_bytes: int
    plan_bytes: int
    output_bytes: int
    plan_seconds: float
    fuse_seconds: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def plan_needs(inputs: Inputs, allowed: Budget) -> Needs:
    """What `plan` and then `fuse` will need."""
    elements = sum(spec.elements for spec in inputs.tensors if spec.is_float)
    plan_rate, fuse_rate = _calibrate(inputs)
    return Needs(
        threads=allowed.threads,
        memory_bytes=allowed.peak_bytes,
        input_bytes=inputs.nbytes,
        read_bytes=_read_bytes(inputs, allowed.cache_bytes),
        plan_bytes=_plan_bytes(inputs),
        output_bytes=sum(spec.elements * ITEM_BYTES[spec.dtype] for spec in inputs.tensors),
        plan_seconds=elements * plan_rate / allowed.threads,
        fuse_seconds=elements * fuse_rate / allowed.threads,
    )


def check_disk(needed: int, directory: Path) -> None:
    """Raise ResourceError where the disk that will hold `directory` has less than `needed` bytes free."""
    place = directory.expanduser().absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise ResourceError(
            f"{directory}: needs {format_size(needed)}, the disk has {format_size(free)} free. "
            "Free some space or write to another disk"
        )


def worker_bytes(inputs: Inputs) -> int:
    """What one worker thread needs at least for `plan` and then `fuse`."""
    return max(_plan_worker_bytes(inputs), _fuse_worker_bytes(len(inputs.checkpoints), len(inputs.recipe.tasks)))


def fuse_worker_bytes(plan: Plan) -> int:
    """What one worker thread needs at least for `fuse`."""
    return _fuse_worker_bytes(len(plan.inputs), len(plan.tasks))


def _plan_worker_bytes(inputs: Inputs) -> int:
    """Buffers, and results that wait to be written."""
    checkpoints, tasks = len(inputs.checkpoints), len(inputs.recipe.tasks)
    item = max((info.item_bytes for spec in inputs.tensors for info in spec.sources), default=1)
    buffers = CHUNK * (checkpoints * (item + 4) + 16)
    cores = tasks * (4 * CHUNK + BITMAP_BYTES * BLOCK_CHUNKS * PENDING)
    return buffers + cores + PENDING * max(tasks * HISTOGRAM_BYTES, BLOCK_CHUNKS * _gram_bytes(inputs))


def _fuse_worker_bytes(sources: int, tasks: int) -> int:
    buffers = CHUNK * (sources * (8 + 4) + 16)  # raw bytes, of 8-byte integers at the largest, and values
    claims = CHUNK * (tasks * (4 + 4 + 4 + 2) + 40)  # positions, bits, updates and masks where cores take everything
    return buffers + claims + PENDING * CHUNK * 8


def _gram_bytes(inputs: Inputs) -> int:
    """The largest Gram matrices of one chunk."""
    members = len(inputs.checkpoints)
    rows = max((_chunk_rows(spec, inputs.recipe.granularity) for spec in inputs.tensors if spec.elements), default=1)
    return 8 * rows * members * (members + 1) // 2


def _chunk_rows(spec: TensorSpec, granularity: str) -> int:
    return min(row_count(spec.shape, granularity), CHUNK_ROWS, max(1, CHUNK // row_length(spec.shape, granularity)))


def _read_bytes(inputs: Inputs, cache_bytes: int) -> int:
    total = 0
    for pool in pools(inputs.tensors, inputs.recipe.scope).values():
        nbytes = sum(spec.source_bytes for spec in pool)
        once = not pool[0].is_float or fits_cache(pool, inputs.recipe.granularity, cache_bytes)
        total += nbytes * (1 if once else PASSES)
    return total


def _plan_bytes(inputs: Inputs) -> int:
    """Cores at their largest (2 bytes an element, or a bit for each place), Gram matrices, and plan.json."""
    total = 0
    members = len(inputs.checkpoints)
    for spec in inputs.tensors:
        total += JSON_BYTES * (1 + len(spec.density))
        if spec.is_float:
            total += 8 * row_count(spec.shape, inputs.recipe.granularity) * members * (members + 3) // 2
        if spec.eligible:
            total += sum(min(2 * budget(p, spec.elements), spec.elements // 8) + 16 for p in spec.density)
    return total


def _calibrate(inputs: Inputs) -> tuple[float, float]:
    """Seconds that `plan` and `fuse` compute for each element of the model, on one thread, on this machine now."""
    count, tasks = len(inputs.checkpoints), len(inputs.recipe.tasks)
    rng = np.random.default_rng(0)
    base = rng.normal(size=CHUNK).astype(np.float32)
    moved = (base + 1e-3 * rng.normal(size=CHUNK).astype(np.float32) for _ in range(count - 1))
    raw = [encode(values, "BF16").view(np.uint8) for values in (base, *moved)]
    infos = tuple(TensorInfo("", "BF16", (CHUNK,), Path(), 0, 2 * CHUNK) for _ in raw)
    spec = TensorSpec("", (CHUNK,), infos, "BF16", True, (), (), ())
    block = Block(spec, [Chunk(0, CHUNK, CHUNK)])
    with workers(1, count) as pool:
        passes = Passes(lambda spec, chunk: raw, pool, tasks, slice(1, count), inputs.recipe.space == "delta")
        return _time(lambda: _plan_chunk(passes, block)) / CHUNK, _time(lambda: _fuse_chunk(pool, raw)) / CHUNK


def _plan_chunk(passes: Passes, block: Block) -> None:
    """Every pass of `plan` over one chunk; where the threshold lies does not change the work."""
    limits = [Threshold(0x3B000000, 1)] * passes.tasks
    passes.survey(block)
    passes.refine(block, [0x3B00] * passes.tasks)
    passes.count_ties(block, limits)
    passes.settle((block, [limits]))


def _fuse_chunk(pool: Workers, raw: list[Bytes]) -> None:
    """Blend, encode and hash one chunk: what `fuse` does to every element."""
    values = pool.buffers.values(len(raw), CHUNK)
    share = np.full((1, len(values)), 1 / len(values), np.float32)
    kernels.blend(values, share, CHUNK, pool.buffers.spare)
    hashlib.sha256(encode(pool.buffers.spare, "BF16").view(np.uint8))


def _time(work: Callable[[], None]) -> float:
    """The faster of two runs after one that loads the kernels."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times[1:])
