"""What a run will need in memory and on disk, from headers alone. Sizes in bytes."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from .analysis import SMALL, is_small
from .budget import Budget, format_size
from .checkpoint import ITEM_BYTES
from .cores import budget
from .errors import ResourceError
from .passes import CROWDED
from .plan_file import Plan
from .preflight import Inputs, TensorSpec, pools
from .selection import BIN_BITS
from .stream import CHUNK, CHUNK_ROWS, PENDING, row_count, row_length

__all__ = ["Needs", "check_disk", "fuse_worker_bytes", "plan_needs", "worker_bytes"]

BITMAP_BYTES = CHUNK // 8  # a Roaring bitmap of a chunk at its largest
HISTOGRAM_BYTES = 8 << BIN_BITS
OPEN = 1 / 24  # share of elements that a sample leaves open; with many equal updates it may be more
JSON_BYTES = 600  # of plan.json for a tensor and a task


@dataclass(frozen=True)
class Needs:
    """What a run needs: `plan_bytes` at most, and about `scratch_bytes` beside the plan until it is complete.

    The seconds are known after a probe, and are without start-up.
    """

    threads: int
    memory_bytes: int
    input_bytes: int
    plan_bytes: int
    scratch_bytes: int
    output_bytes: int
    plan_seconds: float | None = None
    fuse_seconds: float | None = None

    def as_dict(self) -> dict[str, float | None]:
        return asdict(self)


def plan_needs(inputs: Inputs, allowed: Budget) -> Needs:
    """What `plan` and then `fuse` will need, from headers alone."""
    return Needs(
        threads=allowed.threads,
        memory_bytes=allowed.peak_bytes,
        input_bytes=inputs.nbytes,
        plan_bytes=_plan_bytes(inputs),
        scratch_bytes=_scratch_bytes(inputs),
        output_bytes=sum(spec.elements * ITEM_BYTES[spec.dtype] for spec in inputs.tensors),
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
    """Buffers, a small pool whose every element is open, and results that wait to be written."""
    checkpoints, tasks = len(inputs.checkpoints), len(inputs.recipe.tasks)
    item = max((info.item_bytes for spec in inputs.tensors for info in spec.sources), default=1)
    buffers = CHUNK * (checkpoints * (item + 4) + 8)
    open_bytes = int(CHUNK * CROWDED) * 4 * (1 + checkpoints)
    pool = SMALL * (open_bytes + tasks * BITMAP_BYTES + _gram_bytes(inputs))
    return buffers + pool + PENDING * (SMALL * (tasks * BITMAP_BYTES + _gram_bytes(inputs)) + tasks * HISTOGRAM_BYTES)


def _fuse_worker_bytes(sources: int, tasks: int) -> int:
    buffers = CHUNK * (sources * (8 + 4) + 8)  # raw bytes, of 8-byte integers at the largest, and values
    claims = CHUNK * (tasks * (4 + 4 + 4 + 4) + 40)  # positions, bits, updates and masks where cores take everything
    return buffers + claims + PENDING * CHUNK * 8


def _gram_bytes(inputs: Inputs) -> int:
    """The largest Gram matrices of one chunk."""
    members = len(inputs.checkpoints)
    rows = max((_chunk_rows(spec, inputs.recipe.granularity) for spec in inputs.tensors if spec.elements), default=1)
    return 8 * rows * members * (members + 1) // 2


def _chunk_rows(spec: TensorSpec, granularity: str) -> int:
    return min(row_count(spec.shape, granularity), CHUNK_ROWS, max(1, CHUNK // row_length(spec.shape, granularity)))


def _scratch_bytes(inputs: Inputs) -> int:
    """What waits on the shelf for the largest pool: a bit for each element and task, and some elements of it whole."""
    every = pools(inputs.tensors, inputs.recipe.scope).values()
    largest = max((sum(spec.elements for spec in pool) for pool in every if not is_small(pool)), default=0)
    return largest * len(inputs.recipe.tasks) // 8 + int(largest * OPEN) * 4 * (1 + len(inputs.checkpoints))


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
