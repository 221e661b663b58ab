"""The read of `inspect`: every tensor that two checkpoints have, element by element, streamed once.

Counts are exact. Sums are in float64; those of the chunks are added in order, so nothing depends on the number of
threads.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import numpy.typing as npt

from .budget import Budget
from .checkpoint import Checkpoint, Tensor
from .comparison import Comparison, Difference, Fault, Place, TensorDifference, Unequal, Unlike
from .inspection import Model, contents
from .kernels.differences import Difference as Found
from .kernels.differences import compare
from .kernels.scanning import Look
from .layouts import compare_layouts
from .passes import NEAR, PRECISION
from .stream import BLOCK_CHUNKS, CHUNK, Bytes, Chunk, Progress, Workers, bits_of, chunks, decode, kinds_of, workers

__all__ = ["compare_checkpoints", "worker_bytes"]

FAULT_BYTES = 40 * CHUNK  # to look for what is not finite
TOGETHER = 256  # chunks at most that a worker takes at a time, where they are small


@dataclass(frozen=True, slots=True)
class _Pair:
    """A tensor of both checkpoints; of each, what comes first of `shape` is compared."""

    name: str
    shape: tuple[int, ...]
    sources: tuple[Tensor, Tensor]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * sum(info.item_bytes for info in self.sources)

    @property
    def is_whole(self) -> bool:
        return all(info.shape == self.shape for info in self.sources)


@dataclass
class _Tally:
    """What was found of one pair so far; chunks come in order."""

    pair: _Pair
    identical: bool
    counts: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(4, np.int64))
    sums: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(4))
    largest: tuple[float, int] = (0.0, -1)
    places: dict[str, tuple[int, int]] = field(default_factory=dict)  # see `_faults` -> count, first flat index

    def add(self, other: _Tally) -> None:
        """What the next chunk adds."""
        self.identical &= other.identical
        self.counts += other.counts
        self.sums += other.sums
        self.largest = max(self.largest, other.largest, key=lambda place: place[0])
        for where, (count, first) in other.places.items():
            known, before = self.places.get(where, (0, first))
            self.places[where] = known + count, before

    def difference(self) -> Difference:
        base, other = self.pair.sources
        changed, near, rounding, left_out = map(int, self.counts)
        base_square, product, other_square, change_square = map(float, self.sums)
        value, index = self.largest
        return Difference(
            tensors=1,
            identical=int(self.identical),
            elements=math.prod(self.pair.shape),
            left_out=left_out,
            changed=changed,
            near=near,
            rounding=rounding,
            base_square=base_square,
            product=product,
            other_square=other_square,
            change_square=change_square,
            largest=Place(value, self.pair.name, index) if index >= 0 else None,
            dtypes=((base.dtype, other.dtype),),
        )


def compare_checkpoints(base_model: Model, other_model: Model, budget: Budget, progress: Progress) -> Comparison:
    """Read both and compare what can be compared. Raises CheckpointError where a file cannot be read."""
    base, other = base_model.checkpoint, other_model.checkpoint
    pairs, unlike = _pairs(base, other)
    tallies: dict[str, _Tally] = {pair.name: _Tally(pair, pair.is_whole and _same_dtype(pair)) for pair in pairs}
    total, done = sum(pair.nbytes for pair in pairs), 0
    with workers(budget.threads, 2) as pool:
        for job in pool.map(partial(_look_at_all, pool), _jobs(pairs)):
            for chunk, found in job:
                tallies[found.pair.name].add(found)
                done += chunk.size * sum(info.item_bytes for info in found.pair.sources)
            progress("inspect", done, total)
    progress("inspect", total, total)
    only_base = tuple(name for name in base.tensors if name not in other.tensors)
    only_other = tuple(name for name in other.tensors if name not in base.tensors)
    every = tallies.values()
    floats = [tally for tally in every if _is_float(tally.pair)]
    return Comparison(
        base=contents(base_model),
        other=contents(other_model),
        tensors=tuple(TensorDifference(tally.pair.name, tally.pair.shape, tally.difference()) for tally in floats),
        unequal=tuple(_unequal(tally) for tally in every if not _is_float(tally.pair)),
        only_base=only_base,
        only_other=only_other,
        unlike=tuple(unlike),
        faults=tuple(_fault(tally, where) for tally in floats for where in tally.places),
        notes=tuple(compare_layouts(base, other, only_base, only_other).problems),
    )


def worker_bytes(*checkpoints: Checkpoint) -> int:
    """What one worker thread needs at least."""
    return CHUNK * 2 * (8 + 4) + FAULT_BYTES + sum(checkpoint.scratch_bytes for checkpoint in checkpoints)


def _pairs(base: Checkpoint, other: Checkpoint) -> tuple[list[_Pair], list[Unlike]]:
    """What can be compared, and what not or only in part."""
    pairs, unlike = [], []
    for name, ours in base.tensors.items():
        theirs = other.tensors.get(name)
        if theirs is None:
            continue
        shape = _common(ours, theirs)
        if shape is not None:
            pairs.append(_Pair(name, shape, (ours, theirs)))
        if shape is None or ours.shape != theirs.shape:
            rows = shape[0] if shape else 0
            unlike.append(Unlike(name, _described(ours), _described(theirs), rows))
    return pairs, unlike


def _common(ours: Tensor, theirs: Tensor) -> tuple[int, ...] | None:
    """The shape of what can be compared of two tensors: all, or the first rows; None where nothing can."""
    if not (ours.dtype == theirs.dtype or (ours.is_float and theirs.is_float)):
        return None
    if ours.shape == theirs.shape:
        return ours.shape
    if len(ours.shape) != len(theirs.shape) or ours.shape[1:] != theirs.shape[1:]:
        return None
    return (min(ours.shape[0], theirs.shape[0]), *ours.shape[1:])


def _described(info: Tensor) -> str:
    return f"{info.dtype} {list(info.shape)}"


def _same_dtype(pair: _Pair) -> bool:
    return pair.sources[0].dtype == pair.sources[1].dtype


def _is_float(pair: _Pair) -> bool:
    return pair.sources[0].is_float


def _jobs(pairs: Iterable[_Pair]) -> Iterator[list[tuple[_Pair, Chunk]]]:
    """Chunks that one worker takes: neighbours, as many as make a few large ones."""
    job: list[tuple[_Pair, Chunk]] = []
    size = 0
    for pair in pairs:
        for chunk in chunks(pair.shape, "tensor"):
            job.append((pair, chunk))
            size += chunk.size
            if size >= BLOCK_CHUNKS * CHUNK or len(job) >= TOGETHER:
                yield job
                job, size = [], 0
    if job:
        yield job


def _look_at_all(pool: Workers, job: Sequence[tuple[_Pair, Chunk]]) -> list[tuple[Chunk, _Tally]]:
    return [(chunk, _look_at(pool, pair, chunk)) for pair, chunk in job]


def _look_at(pool: Workers, pair: _Pair, chunk: Chunk) -> _Tally:
    """What is found in one chunk."""
    stored = pool.read(pair.sources, chunk)
    if not _is_float(pair):
        return _unequal_elements(pair, chunk, stored)
    found = Found(np.zeros(4, np.int64), np.zeros(1, np.uint32), np.full(1, -1), np.zeros(4))
    least, half = PRECISION[pair.sources[0].dtype]
    look = Look(chunk.size, chunk.size, 1, 0, False, NEAR, least, half)
    compare(pool.buffers.raw, kinds_of(pair.sources), look, found, pool.buffers.scratch)
    place = int(found.place[0])
    return _Tally(
        pair,
        identical=_same_dtype(pair) and not found.counts[0] and np.array_equal(stored[0], stored[1]),
        counts=found.counts,
        sums=found.sums,
        largest=(float(found.peak.view(np.float32)[0]), chunk.start + place if place >= 0 else -1),
        places=_faults(pair, chunk, stored) if found.counts[3] else {},
    )


def _unequal_elements(pair: _Pair, chunk: Chunk, stored: Sequence[Bytes]) -> _Tally:
    """Of a tensor that is not floating-point: how many differ, and which is the first."""
    ours, theirs = (bits_of(raw, info) for raw, info in zip(stored, pair.sources, strict=True))
    differing = np.flatnonzero(ours != theirs)
    tally = _Tally(pair, not differing.size)
    if differing.size:
        tally.places["difference"] = differing.size, chunk.start + int(differing[0])
    return tally


def _unequal(tally: _Tally) -> Unequal:
    count, first = tally.places.get("difference", (0, None))
    return Unequal(tally.pair.name, tally.pair.sources[0].dtype, math.prod(tally.pair.shape), count, first)


def _fault(tally: _Tally, where: str) -> Fault:
    count, first = tally.places[where]
    return Fault(where, tally.pair.name, count, first)


def _faults(pair: _Pair, chunk: Chunk, stored: Sequence[Bytes]) -> dict[str, tuple[int, int]]:
    """Elements that are not finite, by where: how many, and the first flat index."""
    base, other = (decode(raw, info.dtype) for raw, info in zip(stored, pair.sources, strict=True))
    with np.errstate(over="ignore", invalid="ignore"):
        change = other - base
    masks = {"base": ~np.isfinite(base), "other": ~np.isfinite(other)}
    masks["difference"] = ~np.isfinite(change) & ~masks["base"] & ~masks["other"]
    return {where: (int(mask.sum()), chunk.start + int(mask.argmax())) for where, mask in masks.items() if mask.any()}
