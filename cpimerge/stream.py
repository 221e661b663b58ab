"""Bounded-memory streaming: chunks of tensors, decoded to float32, on a few worker threads.

A chunk is the unit of reading, of partial sums and of core bitmaps. Its bounds follow from the tensor's shape and
the granularity alone, so they are the same for every thread count and memory budget.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from .checkpoint import TensorInfo

CHUNK = 1 << 18  # elements; a constant, because it enters sums
CHUNK_ROWS = 1 << 11  # rows of a chunk at most, so that their Gram matrices stay small
BLOCK_CHUNKS = 16  # chunks that a worker takes at a time
PENDING = 2  # results a thread may have waiting

TORCH_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
# The exponent field of each float dtype: all of its bits are set in NaN and Inf, and in nothing else.
EXPONENT: dict[str, np.unsignedinteger[Any]] = {
    "F16": np.uint16(0x7C00),
    "BF16": np.uint16(0x7F80),
    "F32": np.uint32(0x7F800000),
}
_STORED = {2: torch.int16, 4: torch.int32}  # what torch takes the raw bytes as, by item size

Progress = Callable[[str, int, int], None]  # phase, bytes done, bytes in all
Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Chunk:
    """Elements [start, stop) of a tensor in row-major order; whole rows of `row` elements, or a piece of one."""

    start: int
    stop: int
    row: int

    @property
    def size(self) -> int:
        return self.stop - self.start

    @property
    def rows(self) -> int:
        """Rows that the chunk touches."""
        return max(1, self.size // self.row)

    @property
    def opens_row(self) -> bool:
        """False where the chunk goes on with the row of the chunk before it."""
        return self.start % self.row == 0


def row_length(shape: tuple[int, ...], granularity: str) -> int:
    """Elements of one vector: the last dimension for `row`, else the whole tensor."""
    return shape[-1] if granularity == "row" and len(shape) > 1 else math.prod(shape)


def row_count(shape: tuple[int, ...], granularity: str) -> int:
    """Vectors in a tensor; none in an empty one."""
    elements = math.prod(shape)
    return elements // row_length(shape, granularity) if elements else 0


def chunks(shape: tuple[int, ...], granularity: str) -> list[Chunk]:
    """The chunks of a tensor, in order; none for an empty tensor."""
    elements = math.prod(shape)
    if not elements:
        return []
    row = row_length(shape, granularity)
    if row <= CHUNK:
        step = min(CHUNK // row, CHUNK_ROWS) * row
        return [Chunk(start, min(start + step, elements), row) for start in range(0, elements, step)]
    return [
        Chunk(start, min(start + CHUNK, begin + row), row)
        for begin in range(0, elements, row)
        for start in range(begin, begin + row, CHUNK)
    ]


def decode(raw: Bytes, dtype: str, out: Floats) -> None:
    """Stored bytes of a float dtype as float32 [n] into `out`; exact for F16, BF16 and F32."""
    torch.from_numpy(out).copy_(torch.from_numpy(raw).view(TORCH_DTYPES[dtype]))


def encode(values: Floats, dtype: str) -> npt.NDArray[np.generic]:
    """float32 [n] rounded once, to nearest even, to `dtype`: unsigned integers of its item size holding its bits."""
    stored = torch.from_numpy(values).to(TORCH_DTYPES[dtype], copy=True)
    bits = stored.view(_STORED[stored.element_size()]).numpy()
    return bits.view(f"u{bits.itemsize}")


def bits_of(raw: Bytes, info: TensorInfo) -> npt.NDArray[np.generic]:
    """Raw bytes as unsigned integers of the tensor's item size."""
    return raw.view(f"u{info.item_bytes}")


class Buffers:
    """One worker's reusable memory, for chunks of up to `count` checkpoints and `cache_bytes` of whole tensors."""

    def __init__(self, count: int, cache_bytes: int) -> None:
        self.cache = np.empty(cache_bytes // 2, np.uint8)  # the other half is for results
        self.raw = np.empty((count, 8 * CHUNK), np.uint8)  # 8-byte integers are the largest; untouched is not taken
        self._values = np.empty(count * CHUNK, np.float32)
        self.spare = np.empty(CHUNK, np.float32)
        self.positions = np.empty(CHUNK, np.uint32)

    def values(self, rows: int, elements: int) -> Floats:
        """Room for float32 [rows, elements], contiguous, as the kernels need it to use vector registers."""
        return self._values[: rows * elements].reshape(rows, elements)


class Workers:
    """A pool of threads with a `Buffers` each. Results come in the order of the items, whatever the thread count."""

    def __init__(self, threads: int, checkpoints: int, cache_bytes: int) -> None:
        self.threads = threads
        self._local = threading.local()
        self._sizes = (checkpoints, cache_bytes)
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="cpimerge")

    @property
    def buffers(self) -> Buffers:
        """The calling thread's own buffers."""
        if not hasattr(self._local, "buffers"):
            self._local.buffers = Buffers(*self._sizes)
        buffers: Buffers = self._local.buffers
        return buffers

    def read(self, sources: Sequence[TensorInfo], chunk: Chunk) -> list[Bytes]:
        """The chunk's bytes from each of `sources`, in the calling thread's buffers."""
        result = []
        for info, buffer in zip(sources, self.buffers.raw, strict=False):
            raw = buffer[: chunk.size * info.item_bytes]
            info.read_into(memoryview(raw), chunk.start * info.item_bytes)
            result.append(raw)
        return result

    def decode(self, sources: Sequence[TensorInfo], stored: Sequence[Bytes], chunk: Chunk) -> Floats:
        """What `read` brought as float32 [sources, n], in the calling thread's buffers."""
        values = self.buffers.values(len(stored), chunk.size)
        for info, raw, row in zip(sources, stored, values, strict=True):
            decode(raw, info.dtype, row)
        return values

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Like `map`, in parallel; at most a few results wait, and the first exception ends the rest."""
        pending: deque[Future[Result]] = deque()
        try:
            for item in items:
                pending.append(self._executor.submit(function, item))
                if len(pending) > PENDING * self.threads:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()

    def close(self) -> None:
        self._executor.shutdown(wait=True, cancel_futures=True)


@contextmanager
def workers(threads: int, checkpoints: int, cache_bytes: int = 0) -> Iterator[Workers]:
    """Worker threads for one run. Torch's own threads rest meanwhile: ours are the parallelism."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    pool = Workers(threads, checkpoints, cache_bytes)
    try:
        yield pool
    finally:
        pool.close()
        torch.set_num_threads(before)
