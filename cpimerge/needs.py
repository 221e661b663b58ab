"""What a run will need in memory and on disk, from headers alone. Sizes in bytes."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from .budget import Budget, format_size
from .checkpoint import ITEM_BYTES, Tensor
from .companions import companion_bytes
from .cores import budget
from .errors import ResourceError
from .examination import SMALL, SMALL_ROWS, Pool, elements_of, is_small, pool_rows
from .kernels import bitsets
from .kernels.singles import MOST
from .levelling import can_level, level_bytes
from .passes import CROWDED
from .pieces import travel_bytes
from .plan_file import Plan, TensorPlan
from .plan_files import Room
from .preflight import Inputs, TensorSpec, pools
from .selection import BIN_BITS
from .stream import BLOCK_CHUNKS, CHUNK, PENDING, chunks
from .writer import OutputTensor, shard_layouts

__all__ = [
    "Needs",
    "check_disk",
    "fuse_matrix_bytes",
    "fuse_worker_bytes",
    "levelled",
    "matrix_bytes",
    "plan_needs",
    "plan_room",
    "worker_bytes",
]

HISTOGRAM_BYTES = 8 << BIN_BITS
OPEN = 1 / 24  # share of elements that a sample leaves open; with many equal updates it may be more
JSON_BYTES = 600  # of plan.json for a tensor and a task


@dataclass(frozen=True)
class Needs:
    """What a run needs: `plan_bytes` at most, and about `scratch_bytes` beside the plan until it is complete.

    `output_bytes` are those of the output's tensors; its other files take about `companion_bytes`.

    What is read from the Hub as it is needed: `plan_travel_bytes` and `fuse_travel_bytes`, more where many updates are
    equal. The seconds are known after a probe, and are without start-up.
    """

    threads: int
    memory_bytes: int
    input_bytes: int
    plan_bytes: int
    scratch_bytes: int
    output_bytes: int
    companion_bytes: int
    plan_travel_bytes: int = 0
    fuse_travel_bytes: int = 0
    plan_seconds: float | None = None
    fuse_seconds: float | None = None

    def as_dict(self) -> dict[str, float | None]:
        return asdict(self)


def plan_needs(inputs: Inputs, allowed: Budget) -> Needs:
    """What `plan` and then `fuse` will need, from headers alone."""
    room = plan_room(inputs)
    return Needs(
        threads=allowed.threads,
        memory_bytes=allowed.peak_bytes,
        input_bytes=inputs.nbytes,
        plan_bytes=_plan_bytes(inputs, room),
        scratch_bytes=room.shelf,
        output_bytes=sum(spec.elements * ITEM_BYTES[spec.dtype] for spec in inputs.tensors),
        companion_bytes=companion_bytes(
            inputs.checkpoints[0].path, len(inputs.tensors), len(inputs.checkpoints) - inputs.first_member
        ),
        plan_travel_bytes=travel_bytes(_as_planned(inputs)),
        fuse_travel_bytes=travel_bytes(_as_fused(inputs)),
    )


def _as_planned(inputs: Inputs) -> Iterator[Tensor]:
    """The tensors in the order in which `plan` reads them: each pool is sampled, then scanned."""
    for pool in pools(inputs.tensors, inputs.recipe.scope).values():
        for _ in range(2 if pool[0].eligible else 1):
            yield from (info for spec in pool for info in spec.sources)


def _as_fused(inputs: Inputs) -> Iterator[Tensor]:
    """The tensors in the order in which `fuse` reads them: as they lie in the output."""
    sources = {spec.name: spec.sources for spec in inputs.tensors}
    layouts = shard_layouts(OutputTensor(spec.name, spec.dtype, spec.shape) for spec in inputs.tensors)
    return (info for layout in layouts for output in layout.tensors for info in sources[output.name])


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


def worker_bytes(inputs: Inputs, *, levels: bool = True) -> int:
    """What one worker thread needs at least for `plan` and then `fuse`; for `fuse` without `levels`, but for that."""
    waiting = _largest(_result, levelled(inputs)) if levels else 0
    fuse = _fuse_worker_bytes(len(inputs.checkpoints), len(inputs.recipe.tasks)) + PENDING * waiting
    least = max(_plan_worker_bytes(inputs), fuse)
    return least + sum(checkpoint.scratch_bytes for checkpoint in inputs.checkpoints)


def fuse_worker_bytes(plan: Plan) -> int:
    """What one worker thread needs at least for `fuse`."""
    waiting = _largest(_result, _planned(plan))
    least = _fuse_worker_bytes(len(plan.inputs), len(plan.tasks)) + PENDING * waiting
    return least + sum(entry.scratch_bytes for entry in plan.inputs)


def matrix_bytes(inputs: Inputs) -> int:
    """What the largest matrix that may be levelled takes while `fuse` holds it whole; 0 where there is none."""
    return _largest(_matrix, levelled(inputs))


def fuse_matrix_bytes(plan: Plan) -> int:
    """What the largest levelled matrix takes while `fuse` holds it whole; 0 where there is none."""
    return _largest(_matrix, _planned(plan))


def levelled(inputs: Inputs) -> list[TensorSpec]:
    """The matrices that are levelled where several tasks moved them."""
    if not inputs.recipe.levels or len(inputs.checkpoints) < 3:  # one update is in nobody's way
        return []
    return [spec for spec in inputs.tensors if spec.is_float and can_level(spec.shape, spec.layer)]


def _planned(plan: Plan) -> list[TensorPlan]:
    return [tensor for tensor in plan.tensors if tensor.is_levelled]


def _largest(size: Callable[[Sequence[int], str], int], tensors: Sequence[TensorSpec | TensorPlan]) -> int:
    """The largest `size` of their shapes and dtypes; 0 where there are none."""
    return max((size(tensor.shape, tensor.dtype) for tensor in tensors), default=0)


def _matrix(shape: Sequence[int], dtype: str) -> int:
    return level_bytes(shape) + _result(shape, dtype)


def _result(shape: Sequence[int], dtype: str) -> int:
    """A levelled tensor as it is written: it waits whole to be hashed."""
    return math.prod(shape) * ITEM_BYTES[dtype]


def _plan_worker_bytes(inputs: Inputs) -> int:
    """Buffers, what is kept of a small pool, or of a block of a large one, and what came of it; results that wait.

    Of these one more than may wait is just being written.
    """
    checkpoints, tasks = len(inputs.checkpoints), len(inputs.recipe.tasks)
    item = max((info.item_bytes for spec in inputs.tensors for info in spec.sources), default=1)
    buffers = CHUNK * (checkpoints * (item + 4) + 16) + checkpoints * (2 * CHUNK // 8 + 4 * MOST)
    elements = max(SMALL // checkpoints, BLOCK_CHUNKS * CHUNK)
    settled = elements * tasks // 8 + _gram_bytes(inputs)
    pool = int(elements * CROWDED) * 4 * (1 + checkpoints) + 2 * elements * tasks // 8 + settled
    return buffers + pool + (1 + PENDING) * settled + PENDING * tasks * HISTOGRAM_BYTES


def _fuse_worker_bytes(sources: int, tasks: int) -> int:
    buffers = CHUNK * (sources * (8 + 4) + 8)  # raw bytes, of 8-byte integers at the largest, and values
    claims = CHUNK * (tasks * (4 + 4 + 4 + 4) + 40)  # positions, bits, updates and masks where cores take everything
    return buffers + claims + (1 + PENDING) * CHUNK * 8  # small tensors, before they are joined, and results that wait


def _gram_bytes(inputs: Inputs) -> int:
    """The Gram matrices of small pools that one worker examines together, or of a block of a large one."""
    rows = pool_rows([spec for spec in inputs.tensors if spec.is_float], inputs.recipe.granularity)
    return min(rows, 2 * SMALL_ROWS) * _matrix_bytes(inputs)


def _matrix_bytes(inputs: Inputs) -> int:
    members = len(inputs.checkpoints)
    return 8 * members * (members + 1) // 2


def _shelf_bytes(inputs: Inputs, every: Iterable[Pool]) -> int:
    """What waits on the shelf for the largest pool: bits of the cores and of signs, open elements, Gram matrices."""
    granularity, tasks = inputs.recipe.granularity, len(inputs.recipe.tasks)
    largest = 0
    for pool in every:
        if pool[0].is_float and not is_small(pool, granularity):
            elements = elements_of(pool)
            kept = 2 * elements * tasks // 8 + int(elements * OPEN) * 4 * (1 + len(inputs.checkpoints))
            largest = max(largest, kept + pool_rows(pool, granularity) * _matrix_bytes(inputs))
    return largest


def plan_room(inputs: Inputs) -> Room:
    """What `plan` sets aside of the disk before it reads: all that its files may take, and about what the shelf will.

    Bitmaps take 2 bytes for each element of a core, or a bit for each place, and begin with what is in them.
    """
    granularity, tasks = inputs.recipe.granularity, len(inputs.recipe.tasks)
    bounds = {shape: _bitmap_bytes(shape, granularity) for shape in {spec.shape for spec in inputs.tensors}}
    every = pools(inputs.tensors, inputs.recipe.scope).values()
    cores, rows = [0] * tasks, 0
    for pool in every:
        if not pool[0].is_float:
            continue
        opening, most = (sum(bounds[spec.shape][which] for spec in pool) for which in (0, 1))
        elements, rows = elements_of(pool), rows + pool_rows(pool, granularity)
        for task, p in enumerate(pool[0].density):
            cores[task] += min(most, opening + 2 * budget(p, elements)) if pool[0].eligible else opening
    members = len(inputs.checkpoints) - inputs.first_member
    return Room(cores, rows, members * (members + 1) // 2, _shelf_bytes(inputs, every))


def _bitmap_bytes(shape: tuple[int, ...], granularity: str) -> tuple[int, int]:
    """What a task's bitmaps of such a tensor take: with nothing in them, and at most."""
    sizes = [chunk.size for chunk in chunks(shape, granularity)]
    opening = sum(8 + 8 * -(-size // bitsets.CONTAINER) for size in sizes)
    return opening, sum(map(bitsets.most_bytes, sizes))


def _plan_bytes(inputs: Inputs, room: Room) -> int:
    """Cores at their largest with their offsets, Gram matrices, coefficients, and plan.json."""
    granularity, tasks = inputs.recipe.granularity, len(inputs.recipe.tasks)
    offsets = 8 * tasks * sum(len(chunks(spec.shape, granularity)) for spec in inputs.tensors)
    matrices = 8 * room.rows * (room.pairs + len(inputs.checkpoints))
    return sum(room.cores) + offsets + matrices + JSON_BYTES * len(inputs.tensors) * (1 + tasks)
