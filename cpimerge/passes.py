"""What one worker does with one block of chunks, in each of the four passes over a pool (see analysis.py).

Shapes: T tasks, C checkpoints (base, tasks, perhaps a backbone), V members of the blend, n elements of a chunk,
R rows of a chunk, P = V·(V+1)/2 pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import xxhash
from pyroaring import BitMap

from . import kernels
from .cores import Positions, Threshold, bitmap, pair_counts
from .preflight import TensorSpec
from .stream import EXPONENT, Bytes, Chunk, Floats, Workers, bits_of

__all__ = ["Block", "Load", "Passes", "Settled", "Surveyed"]

NEAR = np.float32(1e-5).view(np.uint32)  # the largest float32 that is ≤ 1e-5 (METHOD §6)

Load = Callable[[TensorSpec, Chunk], list[Bytes]]  # the chunk from every checkpoint
Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Block:
    """Neighbouring chunks of one tensor: what a worker takes at a time."""

    spec: TensorSpec
    chunks: Sequence[Chunk]


@dataclass
class Surveyed:
    """The survey of one block."""

    spec: TensorSpec
    digests: list[list[int]]  # a list for each checkpoint: xxh3-64 of each chunk's bytes
    identical: bool  # the same bytes and dtype in every checkpoint
    updates: Counts  # [T, 3]: elements changed, with m ≤ 1e-5, within half a unit in the last place
    histogram: Counts | None  # [T, HIGH_BINS] of the magnitudes' high halves, if the tensor may have cores
    faults: dict[int, int]  # checkpoint -> first flat index that is not finite, or that differs from the base's
    overflows: dict[int, int]  # checkpoint -> first flat index whose update does not fit float32


@dataclass(frozen=True)
class Settled:
    """One chunk, settled."""

    spec: TensorSpec
    chunk: Chunk
    cores: list[BitMap]  # a core for each task, positions within the chunk
    pairs: Counts  # [T, T] |Ca ∩ Cb|
    claimed: int  # elements in any core
    sums: npt.NDArray[np.float64]  # [T, 2]: Σ m in the core and outside it
    gram: npt.NDArray[np.float64]  # [R, P] of the elements in no core


@dataclass(frozen=True)
class Passes:
    """The passes over the chunks that `load` brings. `members` are the checkpoints that enter the blend."""

    load: Load
    workers: Workers
    tasks: int
    members: slice
    delta: bool  # blend the differences from the base, not the weights

    def survey(self, block: Block) -> Surveyed:
        """First look at the bytes: what they are, whether they may be merged, how much moved."""
        spec = block.spec
        surveyed = Surveyed(spec, [[] for _ in spec.sources], True, np.zeros((self.tasks, 3), np.int64), None, {}, {})
        if spec.eligible:
            surveyed.histogram = np.zeros((self.tasks, kernels.HIGH_BINS), np.int64)
        same_dtype = len({info.dtype for info in spec.sources}) == 1
        for chunk in block.chunks:
            stored = self.load(spec, chunk)
            for digests, raw in zip(surveyed.digests, stored, strict=True):
                digests.append(xxhash.xxh3_64_intdigest(raw))
            if surveyed.identical:
                surveyed.identical = same_dtype and all(np.array_equal(stored[0], raw) for raw in stored[1:])
            if spec.is_float:
                self._survey_values(surveyed, chunk, self.workers.decode(spec.sources, stored, chunk))
            elif not surveyed.identical:
                _note_differences(surveyed.faults, spec, chunk, stored)
        return surveyed

    def refine(self, block: Block, bins: Sequence[int]) -> Counts:
        """[T, LOW_BINS] of the low halves of the magnitudes whose high half is the task's bin; -1 is no bin."""
        counts = np.zeros((self.tasks, kernels.LOW_BINS), np.int64)
        for _, values in self._values(block):
            for task, magnitude in self._magnitudes(values):
                if bins[task] >= 0:
                    kernels.histogram_low(magnitude, np.uint32(bins[task]), counts[task])
        return counts

    def count_ties(self, block: Block, thresholds: Sequence[Threshold]) -> Counts:
        """[chunks, T]: elements whose magnitude is exactly the threshold."""
        return np.array(
            [
                [kernels.count_equal(m, np.uint32(thresholds[task].bits)) for task, m in self._magnitudes(values)]
                for _, values in self._values(block)
            ],
            np.int64,
        )

    def settle(self, work: tuple[Block, list[list[Threshold]]]) -> list[Settled]:
        """Cores and Gram matrices; for each chunk of the block a threshold for each task."""
        block, thresholds = work
        return [
            self._settle_chunk(block.spec, chunk, values, limits)
            for (chunk, values), limits in zip(self._values(block), thresholds, strict=True)
        ]

    def _settle_chunk(self, spec: TensorSpec, chunk: Chunk, values: Floats, limits: Sequence[Threshold]) -> Settled:
        cores: list[Positions] = []
        sums = np.zeros((self.tasks, 2))
        for task, magnitude in self._magnitudes(values):
            positions = self._select(magnitude, limits[task])
            moved = magnitude.view(np.float32)
            sums[task, 0] = kernels.total(moved[positions])
            kernels.clear_at(moved[np.newaxis], positions)
            sums[task, 1] = kernels.total(moved)
            cores.append(positions)
        members = self._rest(values, cores)
        gram = np.empty((chunk.rows, len(members) * (len(members) + 1) // 2))
        kernels.gram(members, min(chunk.row, chunk.size), gram)
        bitmaps = [bitmap(positions) for positions in cores]
        return Settled(spec, chunk, bitmaps, pair_counts(bitmaps), len(BitMap.union(*bitmaps)), sums, gram)

    def _rest(self, values: Floats, cores: Sequence[Positions]) -> Floats:
        """The blend's vectors float32 [V, n], in place, with 0 wherever any task has its core."""
        if self.delta:
            np.subtract(values[1:], values[0], out=values[1:])
            values[0] = 0.0  # the base as a delta
        members = values[self.members]
        for positions in cores:
            kernels.clear_at(members, positions)
        return members

    def _select(self, magnitude: npt.NDArray[np.uint32], limit: Threshold) -> Positions:
        room: Positions = self.workers.buffers.positions
        count = int(kernels.select(magnitude, np.uint32(limit.bits), limit.ties, room))
        return room[:count].copy()

    def _survey_values(self, surveyed: Surveyed, chunk: Chunk, values: Floats) -> None:
        for checkpoint, row in enumerate(values):
            place = kernels.first_nonfinite(row.view(np.uint32), EXPONENT["F32"])
            if place >= 0:
                surveyed.faults.setdefault(checkpoint, chunk.start + place)
        half_ulp = HALF_ULP[surveyed.spec.sources[0].dtype]
        for task, magnitude in self._magnitudes(values, len(values) - 1):
            place = kernels.first_nonfinite(magnitude, EXPONENT["F32"])
            if place >= 0 and not surveyed.faults:
                surveyed.overflows.setdefault(1 + task, chunk.start + place)
            if task == self.tasks:  # a backbone that is no task
                break
            surveyed.updates[task] += kernels.tally(magnitude, values[0].view(np.uint32), half_ulp, NEAR)
            if surveyed.histogram is not None:
                kernels.histogram_high(magnitude, surveyed.histogram[task])

    def _values(self, block: Block) -> Iterator[tuple[Chunk, Floats]]:
        for chunk in block.chunks:
            yield chunk, self.workers.decode(block.spec.sources, self.load(block.spec, chunk), chunk)

    def _magnitudes(self, values: Floats, count: int | None = None) -> Iterator[tuple[int, npt.NDArray[np.uint32]]]:
        """(task, bit patterns uint32 [n] of |Δ|) of `count` tasks; the array is reused for the next task."""
        out = self.workers.buffers.spare[: values.shape[1]]
        for task in range(self.tasks if count is None else count):
            kernels.magnitude(values[0], values[1 + task], out)
            yield task, out.view(np.uint32)


def _note_differences(faults: dict[int, int], spec: TensorSpec, chunk: Chunk, stored: Sequence[Bytes]) -> None:
    base = bits_of(stored[0], spec.sources[0])
    for checkpoint, raw in enumerate(stored):
        differing = np.flatnonzero(base != bits_of(raw, spec.sources[0]))
        if differing.size:
            faults.setdefault(checkpoint, chunk.start + int(differing[0]))


def _half_ulps(fraction_bits: int, least_exponent: int) -> npt.NDArray[np.uint32]:
    """Bit patterns of half a unit in the last place of a dtype, by the float32 exponent field of the value [256].

    A unit in the last place is the step from |θ⁰| to the next larger magnitude. The table is float32's, so half of
    float32's smallest step is rounded down to 0, which no magnitude but 0 is within.
    """
    exponents = np.maximum(np.arange(256), least_exponent) - 127 - fraction_bits - 1
    steps: npt.NDArray[np.float64] = np.ldexp(1.0, exponents)
    return steps.astype(np.float32).view(np.uint32)


HALF_ULP = {"F32": _half_ulps(23, 1), "BF16": _half_ulps(7, 1), "F16": _half_ulps(10, 127 - 14)}
