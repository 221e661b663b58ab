"""Tensors that are a pool of their own and one chunk: many of them are examined in one go.

A model may have tens of thousands of these. What is found is what `examine` in analysis.py would find; the few that
need more than one look are left to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import cast

import numpy as np
import xxhash

from .checkpoint import StoredTensor
from .cores import budget
from .kernels import bitsets, singles
from .kernels.floats import KINDS
from .kernels.reading import read_tensors
from .kernels.singles import Batch, Blend, Results
from .passes import NEAR, PRECISION, Counts, Passes, Scanned, Settled
from .preflight import TensorSpec
from .stream import CHUNK, Bytes, Chunk, chunks

__all__ = ["is_single", "settle_singles"]

KIND_NAMES = sorted(KINDS, key=lambda dtype: KINDS[dtype])
LEAST, HALF = (np.array(column) for column in zip(*(PRECISION[dtype] for dtype in KIND_NAMES), strict=True))


def is_single(spec: TensorSpec, granularity: str) -> bool:
    """Whether `settle_singles` takes a tensor that is a pool of its own: float, stored as it is, and one chunk."""
    if not spec.is_float or spec.elements > CHUNK:
        return False
    stored = all(isinstance(info, StoredTensor) for info in spec.sources)
    return stored and len(chunks(spec.shape, granularity)) == 1


def settle_singles(specs: Sequence[TensorSpec], granularity: str, passes: Passes) -> Iterator[list[Scanned | Settled]]:
    """For each tensor what the first look found and, unless it is identical everywhere, its chunk settled.

    Nothing for a tensor that is left to `examine`. Together they have 2 · CHUNK elements at most.
    """
    every = [chunks(spec.shape, granularity)[0] for spec in specs]
    batch = _batch(specs, every, passes)
    buffers = passes.workers.buffers
    if not _read(specs, batch, passes):
        yield from ([] for _ in specs)
        return
    raw = buffers.raw[: batch.kinds.shape[1]]
    digests = _digests(specs, batch, raw)
    blend = Blend(passes.tasks, passes.member, passes.delta, NEAR, LEAST, HALF)
    results = _results(batch, passes)
    singles.settle_all(raw, batch, blend, buffers.scratch, buffers.singles, results)
    for number, (spec, chunk) in enumerate(zip(specs, every, strict=True)):
        yield _found(number, spec, chunk, digests[number], batch, results)


def _batch(specs: Sequence[TensorSpec], every: Sequence[Chunk], passes: Passes) -> Batch:
    sizes = [[budget(p, spec.elements) if spec.eligible else 0 for p in spec.density] for spec in specs]
    room = [sum(_most_bytes(k, chunk.size) for k in ks) for ks, chunk in zip(sizes, every, strict=True)]
    spans = [max(info.nbytes for info in spec.sources) for spec in specs]
    return Batch(
        begins=_offsets(spans)[:-1],
        kinds=np.array([[KINDS[info.dtype] for info in spec.sources] for spec in specs], np.int64),
        elements=np.array([chunk.size for chunk in every], np.int64),
        rows=np.array([chunk.row for chunk in every], np.int64),
        sizes=np.array(sizes, np.int64).reshape(len(specs), passes.tasks),
        grams=_offsets([chunk.rows for chunk in every]),
        cores=_offsets(room),
    )


def _offsets(lengths: Sequence[int]) -> Counts:
    """Where things of such lengths begin, end to end, and where the last one ends."""
    return np.array([0, *accumulate(lengths)], np.int64)


def _most_bytes(core: int, elements: int) -> int:
    """What the bitmap of so many of the elements takes at most: 2 bytes for each, or a bit for each place."""
    return min(bitsets.most_bytes(elements), 8 + 8 * -(-elements // bitsets.CONTAINER) + 2 * core)


def _read(specs: Sequence[TensorSpec], batch: Batch, passes: Passes) -> bool:
    """The tensors' bytes into the thread's `raw`. False where something could not be read."""
    buffers = passes.workers.buffers
    buffers.holds = None
    sources = [cast("tuple[StoredTensor, ...]", spec.sources) for spec in specs]
    files = list(dict.fromkeys(info.file for some in sources for info in some))
    try:
        handles = dict(zip(files, buffers.handles.all(files), strict=True))
    except OSError:
        return False
    opened, offsets, nbytes = (
        np.array([[value(info) for info in some] for some in sources], np.int64)
        for value in (lambda info: handles[info.file], lambda info: info.offset, lambda info: info.nbytes)
    )
    return bool(read_tensors(opened, offsets, nbytes, batch.begins, buffers.raw))


def _digests(specs: Sequence[TensorSpec], batch: Batch, raw: Bytes) -> list[list[int]]:
    """Of each tensor, for each checkpoint: xxh3-64 of its bytes."""
    rows = [memoryview(row) for row in raw]
    return [
        [
            xxhash.xxh3_64_intdigest(row[begin : begin + info.nbytes])
            for row, info in zip(rows, spec.sources, strict=True)
        ]
        for spec, begin in zip(specs, batch.begins.tolist(), strict=True)
    ]


def _results(batch: Batch, passes: Passes) -> Results:
    count, checkpoints = batch.kinds.shape
    tasks, members = passes.tasks, checkpoints - passes.member
    return Results(
        states=np.zeros(count, np.int8),
        counts=np.zeros((count, tasks, 5), np.int64),
        peaks=np.zeros((count, checkpoints - 1), np.uint32),
        sums=np.zeros((count, tasks, 2)),
        gram=np.zeros((int(batch.grams[-1]), members * (members + 1) // 2)),
        pairs=np.zeros((count, tasks, tasks), np.int64),
        aligned=np.zeros((count, tasks, tasks), np.int64),
        inwards=np.zeros((count, tasks, tasks), np.int64),
        claimed=np.zeros(count, np.int64),
        lengths=np.zeros((count, tasks), np.int64),
        cores=np.empty(int(batch.cores[-1]), np.uint8),
    )


def _found(
    number: int, spec: TensorSpec, chunk: Chunk, digests: list[int], batch: Batch, results: Results
) -> list[Scanned | Settled]:
    """What the results say of one tensor."""
    state = results.states[number]
    if state == singles.OPEN:
        return []
    scanned = Scanned(spec, chunk, digests, state == singles.IDENTICAL, results.counts[number])
    if scanned.identical:
        return [scanned]
    ends = batch.cores[number] + np.cumsum(results.lengths[number])
    cores = [
        results.cores[end - length : end].tobytes()
        for end, length in zip(ends.tolist(), results.lengths[number].tolist(), strict=True)
    ]
    settled = Settled(
        spec=spec,
        chunk=chunk,
        cores=cores,
        pairs=results.pairs[number],
        aligned=results.aligned[number],
        inwards=results.inwards[number],
        claimed=int(results.claimed[number]),
        sums=results.sums[number],
        gram=results.gram[batch.grams[number] : batch.grams[number + 1]],
    )
    return [scanned, settled]
