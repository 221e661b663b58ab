"""What one worker does with one block of chunks, in each pass over a pool (see analysis.py).

Shapes: T tasks, C checkpoints (base, tasks, perhaps a backbone), V members of the blend, n elements of a chunk,
R rows of a chunk, P = V·(V+1)/2 pairs, U open elements.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import xxhash

from .cores import Threshold
from .kernels import bitsets, scanning
from .kernels.arrays import WORD, Bits, Floats
from .kernels.floats import first_nonfinite
from .kernels.scanning import Found, Look
from .preflight import TensorSpec
from .selection import RUN, Bracket, sample_size
from .shelf import Shelved
from .stream import CHUNK, EXPONENT, Bytes, Chunk, Workers, bits_of, decode, kinds_of

__all__ = ["Block", "Passes", "SamplePart", "Scanned", "Settled", "nothing_found"]

NEAR = np.float32(1e-5).view(np.uint32)  # the largest float32 that is ≤ 1e-5 (METHOD §6)
# `Look`'s `least` and `half` by the base's dtype, which has so many bits of a fraction.
PRECISION = {
    dtype: (np.uint32(least), np.float32(2.0 ** (-fraction - 1)))
    for dtype, fraction, least in (("F32", 23, 1 << 23), ("BF16", 7, 1 << 23), ("F16", 10, (127 - 14) << 23))
}
FEW = 1 << 12  # open elements that are kept in any case
CROWDED = 1 / 8  # the share of open elements from which a chunk is rather read again
SAMPLE_PARTS = 8  # a part is so small a share of what a worker could hold, so that all of them get some
GOLDEN = 0.6180339887498949  # its multiples spread over [0, 1) and fall in with no row length

Counts = npt.NDArray[np.int64]
Limits = Sequence[Threshold]


@dataclass(frozen=True)
class Block:
    """Neighbouring chunks of one tensor: what a worker takes at a time."""

    spec: TensorSpec
    chunks: Sequence[Chunk]


@dataclass(frozen=True, slots=True)
class SamplePart:
    """A part of a sample: runs of elements that start at `starts` of a tensor, or of `chunk`, which is read whole."""

    spec: TensorSpec
    starts: Sequence[int]
    run: int
    chunk: Chunk | None = None


@dataclass(frozen=True, slots=True)
class Scanned:
    """One chunk after the first look at it."""

    spec: TensorSpec
    chunk: Chunk
    digests: Sequence[int]  # of each checkpoint: xxh3-64 of the chunk's bytes
    identical: bool  # the same bytes and dtype in every checkpoint
    counts: Counts  # [T, 5]: as in `Found`
    kept: Found | Shelved | None = None  # what `resolve` needs, of a floating-point tensor
    is_crowded: bool = False  # the open elements were too many to keep
    faults: Mapping[int, int] | None = None  # checkpoint -> first index not finite, or unlike the base's
    overflows: Mapping[int, int] | None = None  # checkpoint -> first index whose update is not finite


@dataclass(frozen=True)
class Settled:
    """One chunk, settled."""

    spec: TensorSpec
    chunk: Chunk
    cores: list[bytes]  # for each task, positions within the chunk as a Roaring bitmap
    pairs: Counts  # [T, T] |Ca ∩ Cb|
    aligned: Counts  # [T, T]: of these, how many moved in the same direction
    inwards: Counts  # [T, T]: and how many the first of the two moved inward
    claimed: int  # elements in any core
    sums: npt.NDArray[np.float64]  # [T, 2]: Σ m in the core and outside it
    gram: npt.NDArray[np.float64]  # [R, P] of the elements in no core


@dataclass(frozen=True)
class Passes:
    """The passes over chunks. Checkpoints from `member` on enter the blend."""

    workers: Workers
    tasks: int
    member: int
    delta: bool  # blend the differences from the base, not the weights

    def sample_parts(self, blocks: Sequence[Block], sizes: Sequence[int]) -> Iterator[SamplePart]:
        """Where to look for the `sizes` [T]-th largest magnitudes of a pool."""
        specs = list({block.spec.name: block.spec for block in blocks}.values())
        elements = sum(spec.elements for spec in specs)
        wanted = sample_size(elements, self.tasks) if any(sizes) else 0
        if wanted == elements:
            for block in blocks:
                for chunk in block.chunks:
                    whole = chunk.size // RUN * RUN
                    yield SamplePart(block.spec, range(0, whole, RUN), RUN, chunk)
                    yield SamplePart(block.spec, range(whole, chunk.size, RUN), chunk.size - whole, chunk)
        elif wanted and len(blocks) == len(blocks[0].chunks) == 1:  # its only chunk is read in a moment anyhow
            yield SamplePart(specs[0], _spread(elements, wanted // RUN), RUN, blocks[0].chunks[0])
        elif wanted:
            yield from _runs(specs, _spread(elements, wanted // RUN))

    def sample(self, part: SamplePart) -> Bits:
        """The magnitudes there, of every task: uint32 [T, runs · run]."""
        starts = part.starts
        if part.chunk is None:
            self.workers.read_runs(part.spec.sources, starts, part.run)
            starts = range(0, len(starts) * part.run, part.run)  # one after the other
        else:
            self.workers.read(part.spec.sources, part.chunk)
        return self._magnitudes(part.spec, starts, part.run)

    def _magnitudes(self, spec: TensorSpec, starts: Sequence[int], run: int) -> Bits:
        """Of every task, in runs of the buffer: uint32 [T, runs · run]."""
        buffers = self.workers.buffers
        out = np.empty((self.tasks, len(starts) * run), np.uint32)
        raw, kinds = buffers.raw[: len(spec.sources)], kinds_of(spec.sources)
        scanning.magnitudes(raw, kinds, np.array(starts, np.int64), run, out, buffers.scratch)
        return out

    def compare(self, block: Block) -> list[Scanned]:
        """The first look at a tensor that is not floating-point, which must be equal everywhere."""
        result, counts = [], np.zeros((self.tasks, 5), np.int64)
        for chunk in block.chunks:
            stored = self.workers.read(block.spec.sources, chunk)
            faults = _differences(block.spec, chunk, stored)
            result.append(Scanned(block.spec, chunk, _digests(stored), not faults, counts, faults=faults))
        return result

    def scan(self, block: Block, bracket: Bracket) -> list[Scanned]:
        """The first look at a floating-point tensor."""
        return [self._scan_chunk(block.spec, chunk, bracket) for chunk in block.chunks]

    def _scan_chunk(self, spec: TensorSpec, chunk: Chunk, bracket: Bracket) -> Scanned:
        stored = self.workers.read(spec.sources, chunk)
        found, opened = self._look(spec, chunk, bracket)
        faults, overflows = self._faults(spec, chunk, stored, found)
        same = not found.counts[:, 0].any() and len({info.dtype for info in spec.sources}) == 1
        crowded = opened > max(FEW, CROWDED * chunk.size)
        return Scanned(
            spec=spec,
            chunk=chunk,
            digests=_digests(stored),
            identical=same and all(np.array_equal(stored[0], raw) for raw in stored[1:]),
            counts=found.counts,
            kept=_detached(found, 0 if crowded else opened),
            is_crowded=crowded,
            faults=faults,
            overflows=overflows,
        )

    def _look(self, spec: TensorSpec, chunk: Chunk, bracket: Bracket) -> tuple[Found, int]:
        """All that one look at the chunk finds, with the open elements in the thread's buffers; and their number."""
        buffers, checkpoints = self.workers.buffers, len(spec.sources)
        found = nothing_found(chunk, self.tasks, self.member, buffers.places, buffers.values[:, :checkpoints])
        raw, look = buffers.raw[:checkpoints], self._what(spec, chunk)
        opened = scanning.scan(raw, kinds_of(spec.sources), look, bracket.low, bracket.high, found, buffers.scratch)
        return found._replace(places=found.places[:opened], values=found.values[:opened]), int(opened)

    def _what(self, spec: TensorSpec, chunk: Chunk) -> Look:
        least, half = PRECISION[spec.sources[0].dtype]
        row = min(chunk.row, chunk.size)
        return Look(chunk.size, row, self.tasks, self.member, self.delta, NEAR, least, half)

    def _faults(
        self, spec: TensorSpec, chunk: Chunk, stored: Sequence[Bytes], found: Found
    ) -> tuple[dict[int, int] | None, dict[int, int] | None]:
        """Where a checkpoint, or else an update, is not finite. An update is not where its checkpoint is not."""
        if not (found.peaks >= scanning.INFINITE).any():
            return None, None
        faults: dict[int, int] = {}
        overflows: dict[int, int] = {}
        for checkpoint, (info, raw) in enumerate(zip(spec.sources, stored, strict=True)):
            place = first_nonfinite(bits_of(raw, info), EXPONENT[info.dtype])
            if place >= 0:
                faults[checkpoint] = chunk.start + place
        base = decode(stored[0], spec.sources[0].dtype)
        for checkpoint, (info, raw) in enumerate(zip(spec.sources, stored, strict=True)):
            with np.errstate(over="ignore", invalid="ignore"):
                update = decode(raw, info.dtype) - base
            place = first_nonfinite(update.view(np.uint32), EXPONENT["F32"])
            if place >= 0 and not faults:
                overflows[checkpoint] = chunk.start + place
        return faults, overflows

    def count_bins(self, values: Floats, bracket: Bracket, shifts: Counts, bins: int) -> Counts:
        """[T, bins]: see `selection.narrow`; `values` [U, C] as in `Found`."""
        counts = np.zeros((self.tasks, bins + 1), np.int64)
        scanning.count_bins(values, bracket.low, bracket.high, shifts, counts)
        return counts[:, :bins]

    def count_block(self, block: Block, bracket: Bracket, shifts: Counts, bins: int) -> Counts:
        """As `count_bins`, of a whole block, which is read for it."""
        counts = np.zeros((self.tasks, bins), np.int64)
        for chunk in block.chunks:
            self.workers.read(block.spec.sources, chunk)
            counts += self.count_bins(self._look(block.spec, chunk, bracket)[0].values, bracket, shifts, bins)
        return counts

    def settle(self, work: tuple[Block, Sequence[Limits]], bracket: Bracket) -> list[Settled]:
        """A second look at a block, with the thresholds of its chunks and a bracket that holds them."""
        block, limits = work
        result = []
        for chunk, thresholds in zip(block.chunks, limits, strict=True):
            self.workers.read(block.spec.sources, chunk)
            found, _ = self._look(block.spec, chunk, bracket)
            result.append(self.resolve(block.spec, chunk, found, thresholds, bracket))
        return result

    def resolve(self, spec: TensorSpec, chunk: Chunk, found: Found, thresholds: Limits, bracket: Bracket) -> Settled:
        """Decides the open elements of a scanned chunk, by a threshold for each task."""
        limits = np.array([threshold.bits for threshold in thresholds], np.uint32)
        ties = np.array([threshold.ties for threshold in thresholds], np.int64)
        scanning.resolve(
            self._what(spec, chunk), bracket.low, bracket.high, limits, ties, found, self.workers.buffers.scratch
        )
        pairs, aligned, inwards = (np.empty((self.tasks, self.tasks), np.int64) for _ in range(3))
        claimed = int(bitsets.overlaps(found.bits, found.inward, pairs, aligned, inwards))
        cores = [self._serialized(bits) for bits in found.bits]
        return Settled(spec, chunk, cores, pairs, aligned, inwards, claimed, found.sums, found.gram)

    def _serialized(self, bits: npt.NDArray[np.uint64]) -> bytes:
        room = self.workers.buffers.serialized
        return room[: bitsets.serialize(bits, room)].tobytes()


def nothing_found(
    chunk: Chunk, tasks: int, member: int, places: npt.NDArray[np.uint32], values: npt.NDArray[np.float32]
) -> Found:
    """What a look at a chunk starts from; `places` [U] and `values` [U, C] are for the open elements."""
    checkpoints = values.shape[1]
    members, words = checkpoints - member, -(-chunk.size // WORD)
    return Found(
        bits=np.zeros((tasks, words), np.uint64),
        inward=np.zeros((tasks, words), np.uint64),
        counts=np.zeros((tasks, 5), np.int64),
        peaks=np.zeros(checkpoints - 1, np.uint32),
        sums=np.zeros((tasks, 2)),
        gram=np.zeros((chunk.rows, members * (members + 1) // 2)),
        places=places,
        values=values,
    )


def _detached(found: Found, count: int) -> Found:
    """With the first `count` open elements, in memory of their own."""
    return found._replace(places=found.places[:count].copy(), values=found.values[:count].copy())


def _digests(stored: Sequence[Bytes]) -> list[int]:
    return [xxhash.xxh3_64_intdigest(raw) for raw in stored]


def _spread(elements: int, runs: int) -> list[int]:
    """Where so many runs start among `elements`: one in each equal part, anywhere in it."""
    part = elements / runs
    return [int(number * part + (number * GOLDEN % 1.0) * (part - RUN)) for number in range(runs)]


def _runs(specs: Sequence[TensorSpec], starts: Sequence[int]) -> Iterator[SamplePart]:
    """Runs that start at these elements of a pool, its tensors laid end to end; moved to lie in one tensor."""
    begin, most = 0, max(1, CHUNK // SAMPLE_PARTS // RUN)
    for spec in specs:
        end = begin + spec.elements
        inside = [start - begin for start in starts[bisect_left(starts, begin) : bisect_left(starts, end)]]
        begin = end
        last = spec.elements - RUN
        for first in range(0, len(inside) if last >= 0 else 0, most):
            yield SamplePart(spec, [min(start, last) for start in inside[first : first + most]], RUN)


def _differences(spec: TensorSpec, chunk: Chunk, stored: Sequence[Bytes]) -> dict[int, int]:
    """By checkpoint, the first flat index where it is not the base."""
    base = bits_of(stored[0], spec.sources[0])
    faults = {}
    for checkpoint, raw in enumerate(stored):
        differing = np.flatnonzero(base != bits_of(raw, spec.sources[0]))
        if differing.size:
            faults[checkpoint] = chunk.start + int(differing[0])
    return faults
