"""Bounded-memory streaming: chunks of tensors, decoded to float32, on a few worker threads.

A chunk is the unit of reading, of partial sums and of core bitmaps. Its bounds follow from the tensor's shape and
the granularity alone, so they are the same for every thread count and memory budget.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from resource import RLIMIT_NOFILE, getrlimit
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from .checkpoint import ITEM_BYTES, Handles, StoredTensor, Tensor
from .kernels import bitsets, floats, singles
from .kernels.reading import read_runs
from .kernels.scanning import Scratch, scratch

CHUNK = 1 << 18  # elements; a constant, because it enters sums
CHUNK_ROWS = 1 << 11  # rows of a chunk at most, so that their Gram matrices stay small
BLOCK_CHUNKS = 4  # chunks that a worker takes at a time
OPEN_FILES = 64  # of one thread, unless so many may not be open
PENDING = 2  # results a thread may have waiting

# The exponent field of each float dtype: all of its bits are set in NaN and Inf, and in nothing else.
EXPONENT: dict[str, np.unsignedinteger[Any]] = {
    "F16": np.uint16(0x7C00),
    "BF16": np.uint16(0x7F80),
    "F32": np.uint32(0x7F800000),
}

Map = Callable[..., Iterator[Any]]  # Python's own, or that of `Workers`
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


def chunk_count(shape: tuple[int, ...], granularity: str) -> int:
    """How many chunks a tensor has."""
    elements, row = math.prod(shape), row_length(shape, granularity)
    if not elements:
        return 0
    if row > CHUNK:
        return elements // row * -(-row // CHUNK)
    return -(-elements // (min(CHUNK // row, CHUNK_ROWS) * row))


def decode(raw: Bytes, dtype: str) -> Floats:
    """Stored bytes of a float dtype as float32 [n]; exact for F16, BF16 and F32."""
    values = np.empty(raw.size // ITEM_BYTES[dtype], np.uint32)
    floats.decode(raw, floats.KINDS[dtype], values)
    return values.view(np.float32)


def encode(values: Floats, dtype: str) -> npt.NDArray[np.generic]:
    """float32 [n], none NaN, rounded once, to nearest even, to `dtype`: unsigned integers that hold its bits."""
    item = ITEM_BYTES[dtype]
    stored = np.empty(item * values.size, np.uint8)
    floats.encode(values.view(np.uint32), floats.KINDS[dtype], stored)
    return stored.view(f"u{item}")


def values_of(tensor: Tensor, first: int, last: int, handles: Handles) -> Floats:
    """Elements [first, last) of a float tensor as float32."""
    raw = np.empty((last - first) * tensor.item_bytes, np.uint8)
    tensor.read_into(memoryview(raw), first * tensor.item_bytes, handles)
    return decode(raw, tensor.dtype)


def store(values: Floats, dtype: str, out: Bytes) -> None:
    """float32 [n] rounded to `dtype`, into its bytes. What is not finite stays so, and is found by whoever reads."""
    bits = values.view(np.uint32)
    floats.quiet(bits)
    floats.encode(bits, floats.KINDS[dtype], out)


def bits_of(raw: Bytes, info: Tensor) -> npt.NDArray[np.generic]:
    """Raw bytes as unsigned integers of the tensor's item size."""
    return raw.view(f"u{info.item_bytes}")


def kinds_of(sources: Sequence[Tensor]) -> npt.NDArray[np.int64]:
    """What the kernels call the float dtypes of `sources`: int64 [C]."""
    return np.array([floats.KINDS[info.dtype] for info in sources], np.int64)


class Buffers:
    """One worker's reusable memory, for chunks of up to `count` checkpoints, and the files it has open."""

    def __init__(self, count: int, open_files: int) -> None:
        self.raw = np.empty((count, 8 * CHUNK), np.uint8)  # 8-byte integers are the largest; untouched is not taken
        self.places = np.empty(CHUNK, np.uint32)
        self.values = np.empty((CHUNK, count), np.float32)
        self.serialized = np.empty(bitsets.most_bytes(CHUNK), np.uint8)
        self.scratch: Scratch = scratch(count)
        self.singles = singles.work(count, CHUNK, self.places, self.values)
        self.handles = Handles(open_files)
        self.holds: object = None  # what `raw` was read for


class Whole(threading.BoundedSemaphore):
    """Held by whoever holds a matrix whole. Once a job failed or nobody waits for results, no later one gets it.

    A job is known by its number in the run of `Workers.map`. Entering raises CancelledError where it came too late.
    """

    def __init__(self, matrices: int) -> None:
        super().__init__(matrices)
        self.end: float = math.inf  # jobs from this number on are not wanted
        self._local = threading.local()

    def begin(self, number: int) -> None:
        """The calling thread goes on with the job of this number."""
        self._local.number = number

    def __enter__(self, blocking: bool = True, timeout: float | None = None) -> bool:
        acquired = super().__enter__(blocking, timeout)
        if self._number >= self.end:
            self.release()
            raise CancelledError
        return acquired

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:  # before another gets it
            self.end = min(self.end, self._number)
        super().__exit__(kind, value, trace)

    @property
    def _number(self) -> int:
        """-1 on a thread that is no worker."""
        return getattr(self._local, "number", -1)


class Workers:
    """A pool of threads with a `Buffers` each. Results come in the order of the items, whatever the thread count."""

    def __init__(self, threads: int, checkpoints: int, matrices: int = 1) -> None:
        self.threads = threads
        self.whole = Whole(matrices)
        self._local = threading.local()
        self._sizes = (checkpoints, min(OPEN_FILES, getrlimit(RLIMIT_NOFILE)[0] // (4 * threads)))
        self._buffers: list[Buffers] = []
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="cpimerge")

    @property
    def buffers(self) -> Buffers:
        """The calling thread's own buffers."""
        if not hasattr(self._local, "buffers"):
            self._local.buffers = Buffers(*self._sizes)
            self._buffers.append(self._local.buffers)
        buffers: Buffers = self._local.buffers
        return buffers

    def read(self, sources: Sequence[Tensor], chunk: Chunk) -> list[Bytes]:
        """The chunk's bytes from each of `sources`, in the calling thread's buffers; once, if asked for again."""
        if self.buffers.holds != (chunk, sources):
            self.read_runs(sources, [chunk.start], chunk.size)
            self.buffers.holds = (chunk, sources)
        return [raw[: chunk.size * info.item_bytes] for info, raw in zip(sources, self.buffers.raw, strict=False)]

    def read_runs(self, sources: Sequence[Tensor], starts: Sequence[int], run: int) -> None:
        """Elements [start, start + run) of each of `sources`, one run after the other, into the thread's `raw`.

        Raises CheckpointError as `Tensor.read_into` does.
        """
        buffers = self.buffers
        buffers.holds = None
        stored = [info for info in sources if isinstance(info, StoredTensor)]
        if len(stored) < len(sources) or not _read_fast(stored, starts, run, buffers):
            _read_slowly(sources, starts, run, buffers)

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Generator[Result]:
        """Like `map`, in parallel; at most a few results wait, and the first exception ends the rest."""
        pending: deque[Future[Result]] = deque()
        self.whole.end = math.inf

        def run(number: int, item: Item) -> Result:
            self.whole.begin(number)
            return function(item)

        try:
            for number, item in enumerate(items):
                pending.append(self._executor.submit(run, number, item))
                if len(pending) > PENDING * self.threads:
                    yield _next(pending)
            while pending:
                yield _next(pending)
        finally:
            if pending:
                self.whole.end = 0  # who waits for it need not begin
            running = [future for future in pending if not future.cancel()]
            wait(running)  # nothing that they use may be closed under them

    def close(self) -> None:
        self._executor.shutdown(wait=True, cancel_futures=True)
        for buffers in self._buffers:
            buffers.handles.close()


def _next(pending: deque[Future[Result]]) -> Result:
    """The result of the first, which stays among them as long as it is waited for."""
    result = pending[0].result()
    pending.popleft()
    return result


def _read_fast(sources: Sequence[StoredTensor], starts: Sequence[int], run: int, buffers: Buffers) -> bool:
    """Without the interpreter between the runs. False where something could not be read."""
    try:
        files = np.array(buffers.handles.all([info.file for info in sources]), np.int64)
    except OSError:
        return False
    offsets, items = (np.array([getattr(info, key) for info in sources], np.int64) for key in ("offset", "item_bytes"))
    return bool(read_runs(files, offsets, items, np.array(starts, np.int64), run, buffers.raw))


def _read_slowly(sources: Sequence[Tensor], starts: Sequence[int], run: int, buffers: Buffers) -> None:
    """Of tensors of any kind; says what is wrong."""
    for info, buffer in zip(sources, buffers.raw, strict=False):
        view, size = memoryview(buffer), run * info.item_bytes
        for number, start in enumerate(starts):
            place = view[number * size : (number + 1) * size]
            info.read_into(place, start * info.item_bytes, buffers.handles)


@contextmanager
def workers(threads: int, checkpoints: int, matrices: int = 1) -> Iterator[Workers]:
    """Worker threads for one run, which hold so many matrices whole at a time."""
    pool = Workers(threads, checkpoints, matrices)
    try:
        yield pool
    finally:
        pool.close()
