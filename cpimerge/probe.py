"""How long `plan` and `fuse` would take on this machine now: a second of the real work on a part of the real files."""

from __future__ import annotations

import hashlib
import math
import os
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import xxhash

from .budget import Budget
from .checkpoint import ITEM_BYTES
from .examination import examine
from .kernels.floats import KINDS
from .kernels.mixing import Mix, blend
from .levelling import level, level_work, one_thread
from .needs import levelled
from .passes import Passes
from .preflight import Inputs, TensorSpec
from .stream import CHUNK, Workers, chunks, kinds_of, row_length, workers

__all__ = ["seconds"]

PIECE = 16 * CHUNK  # elements of a tensor that are tried
TRY_MATRIX = (768, 2048)
TRY_SECONDS = 0.4  # for each of plan, fuse and the disk, about
DISK_PIECE = 32_000_000  # bytes
SHARE_PARALLEL = 0.8  # of the computing, measured; the interpreter runs on one thread at a time


@dataclass
class _Pace:
    """What some of the work took: seconds computing on one thread and seconds waiting, by elements done."""

    elements: int = 0
    computing: float = 0.0
    waiting: float = 0.0

    def add(self, elements: int, wall: float, cpu: float) -> None:
        self.elements += elements
        self.computing += cpu
        self.waiting += max(0.0, wall - cpu)

    def seconds(self, elements: int, threads: int) -> float:
        """Of all the work. Waiting and computing overlap."""
        scale = elements / max(1, self.elements)
        return scale * max(self.computing * (1 - SHARE_PARALLEL + SHARE_PARALLEL / threads), self.waiting)


def seconds(inputs: Inputs, allowed: Budget, target: Path) -> tuple[float, float | None]:
    """Seconds that `plan` and `fuse` will take, without start-up. `target`'s disk is written to, and left as it was.

    None for `fuse` where that disk cannot be written. Raises CheckpointError where an input cannot be read.
    """
    threads = allowed.threads
    elements = sum(spec.elements for spec in inputs.tensors if spec.is_float)
    output_bytes = sum(spec.elements * ITEM_BYTES[spec.dtype] for spec in inputs.tensors)
    planning, fusing = _Pace(), _Pace()
    with workers(1, len(inputs.checkpoints)) as pool:
        pieces = _pieces(inputs)
        for number, piece in enumerate(pieces[:1] + pieces):  # the first only loads the kernels
            started = time.perf_counter(), time.thread_time()
            _plan_piece(inputs, pool, piece)
            planned = time.perf_counter(), time.thread_time()
            _fuse_piece(pool, piece)
            fused = time.perf_counter(), time.thread_time()
            if number:
                planning.add(piece.elements, planned[0] - started[0], planned[1] - started[1])
                fusing.add(piece.elements, fused[0] - planned[0], fused[1] - planned[1])
            if planning.computing + planning.waiting > TRY_SECONDS:
                break
    rate = _disk_rate(target)
    computing = fusing.seconds(elements, threads) + _level_seconds(inputs) / _at_a_time(inputs, allowed.matrices)
    fuse_seconds = None if rate is None else max(computing, output_bytes / rate)
    return planning.seconds(elements, threads), fuse_seconds


def _pieces(inputs: Inputs) -> list[TensorSpec]:
    """The beginnings of tensors, so ordered that the first few stand for all."""
    floats = [spec for spec in inputs.tensors if spec.is_float and spec.elements]
    by_size = sorted(floats, key=lambda spec: spec.elements, reverse=True)
    step = max(1, math.isqrt(len(by_size)))
    return [_beginning(spec) for first in range(step) for spec in by_size[first::step]]


def _beginning(spec: TensorSpec) -> TensorSpec:
    """A tensor of no more than PIECE elements: whole rows, or a part of one."""
    row = row_length(spec.shape, "row")
    rows = min(spec.elements, PIECE) // row
    shape = (rows, row) if rows else (PIECE,)
    count = math.prod(shape)
    sources = tuple(replace(info, shape=shape, nbytes=count * info.item_bytes) for info in spec.sources)
    return replace(spec, shape=shape, sources=sources)


def _plan_piece(inputs: Inputs, pool: Workers, piece: TensorSpec) -> None:
    tasks = len(inputs.recipe.tasks)
    passes = Passes(pool, tasks, inputs.first_member, inputs.recipe.space == "delta")
    for _ in examine([piece], inputs.recipe.granularity, passes, map):
        pass


def _fuse_piece(pool: Workers, piece: TensorSpec) -> None:
    """Reads, hashes, blends; hashes the result, but does not write it."""
    sources = piece.sources[1:] + piece.sources[:1]
    share = np.full((1, len(sources) - 1), 1 / (len(sources) - 1), np.float32)
    digest = hashlib.sha256()
    for chunk in chunks(piece.shape, "tensor"):
        for raw in pool.read(sources, chunk):
            xxhash.xxh3_64_intdigest(raw)
        out = np.empty(chunk.size * ITEM_BYTES[piece.dtype], np.uint8)
        mix = Mix(chunk.size, chunk.size, len(sources) - 1, False, False, KINDS[piece.dtype])
        blend(pool.buffers.raw[: len(sources)], kinds_of(sources), mix, share, out, pool.buffers.scratch)
        digest.update(out)


def _level_seconds(inputs: Inputs) -> float:
    """What levelling all matrices takes one thread."""
    shapes = [spec.shape for spec in levelled(inputs)]
    if not shapes:
        return 0.0
    sample = np.random.default_rng(0).normal(size=TRY_MATRIX).astype(np.float32)
    with one_thread():
        level(sample[:64].copy())  # what is loaded by the first call
        started = time.perf_counter()
        level(sample)
        taken = time.perf_counter() - started
    return taken * sum(map(level_work, shapes)) / level_work(TRY_MATRIX)


def _at_a_time(inputs: Inputs, matrices: int) -> float:
    """How many matrices are levelled at a time on the average, of so many at most: the largest takes as long alone."""
    work = [level_work(spec.shape) for spec in levelled(inputs)]
    return min(matrices, sum(work) / max(work)) if work else 1


def _disk_rate(target: Path) -> float | None:
    """Bytes a second that reach the disk of `target`; None where it cannot be written."""
    place = target.expanduser().absolute()
    while not place.is_dir():
        place = place.parent
    data = os.urandom(1 << 20) * (DISK_PIECE >> 20)
    started, written = time.perf_counter(), 0
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            while written < 8 * DISK_PIECE and time.perf_counter() - started < TRY_SECONDS:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                written += len(data)
    except OSError:
        return None
    return written / (time.perf_counter() - started)
