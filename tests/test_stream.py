"""Chunks cover a tensor exactly; decoding and encoding are torch's; workers keep the order."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pyroaring import BitMap
from safetensors.numpy import save_file
from trees import is_open

from cpimerge import CheckpointError, stream
from cpimerge.checkpoint import ITEM_BYTES, StoredTensor, read_header
from cpimerge.kernels.reading import read_runs
from cpimerge.stream import OPEN_FILES, chunk_count, chunks, decode, encode, row_count, row_length, workers

shapes = st.lists(st.integers(0, 9), max_size=3).map(tuple)


@given(shapes, st.sampled_from(["tensor", "row"]), st.integers(1, 40), st.integers(1, 5))
def test_chunks_cover_the_tensor_in_order(shape: tuple[int, ...], granularity: str, chunk: int, rows: int) -> None:
    with mock.patch.multiple(stream, CHUNK=chunk, CHUNK_ROWS=rows):
        found = chunks(shape, granularity)
        assert chunk_count(shape, granularity) == len(found)
    places = [place for c in found for place in range(c.start, c.stop)]
    assert places == list(range(math.prod(shape)))
    assert all(0 < c.size <= chunk for c in found)
    assert sum(c.rows for c in found if c.opens_row) == row_count(shape, granularity)
    for c in found:
        whole_rows = c.start % c.row == 0 and c.size % c.row == 0 and c.size // c.row <= rows
        piece = c.start // c.row == (c.stop - 1) // c.row
        assert whole_rows or piece


@pytest.mark.parametrize(
    ("shape", "tensor", "row"),
    [((), 1, 1), ((5,), 5, 5), ((2, 3), 6, 3), ((2, 3, 4), 24, 4), ((3, 0), 0, 0), ((0, 3), 0, 3)],
)
def test_row_length(shape: tuple[int, ...], tensor: int, row: int) -> None:
    assert (row_length(shape, "tensor"), row_length(shape, "row")) == (tensor, row)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_16_bit_value_decodes_and_encodes_exactly(dtype: torch.dtype) -> None:
    name = {torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]
    bits = np.arange(1 << 16, dtype=np.uint16)
    bits = bits[(bits & stream.EXPONENT[name]) != stream.EXPONENT[name]]
    out = decode(bits.view(np.uint8), name)
    assert out.tobytes() == torch.from_numpy(bits.view(np.int16)).view(dtype).float().numpy().tobytes()
    assert encode(out, name).tobytes() == bits.tobytes()


@pytest.mark.parametrize(
    ("value", "dtype", "wanted"),
    [
        (1 + 2**-8, "BF16", 1.0),  # halfway: to even
        (1 + 3 * 2**-8, "BF16", 1 + 2**-6),
        (1 + 2**-8 + 2**-20, "BF16", 1 + 2**-7),
        (2**-25, "F16", 0.0),
        (2**-25 + 2**-40, "F16", 2**-24),
        (65519.0, "F16", 65504.0),
        (65520.0, "F16", math.inf),
    ],
)
def test_encode_rounds_once_to_nearest_even(value: float, dtype: str, wanted: float) -> None:
    values = np.array([value], np.float32)
    assert decode(encode(values, dtype).view(np.uint8), dtype).tolist() == [wanted]


def test_what_is_encoded_or_decoded_is_a_copy() -> None:
    values = np.ones(3, np.float32)
    encoded = encode(values, "F32")
    values[:] = 2
    assert encoded.view(np.float32).tolist() == [1, 1, 1]
    decoded = decode(encoded.view(np.uint8), "F32")
    encoded[:] = 0
    assert decoded.tolist() == [1, 1, 1]


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_map_keeps_order_and_bounds_what_waits(threads: int) -> None:
    started = 0
    lock = threading.Lock()

    def work(item: int) -> int:
        nonlocal started
        with lock:
            started += 1
        time.sleep(0.001 * (item % 3))
        return item

    with workers(threads, 1) as pool:
        for number, item in enumerate(pool.map(work, range(50))):
            assert item == number
            assert started <= number + 1 + stream.PENDING * threads + 1


def test_map_ends_when_nothing_runs_any_more() -> None:
    """Also of an interrupt while it waits for the last: what a worker uses may be closed then."""
    ended: list[int] = []

    def work(number: int) -> None:
        time.sleep(0.3)
        ended.append(number)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with workers(2, 1) as pool:
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            with pytest.raises(KeyboardInterrupt):
                list(pool.map(work, [0]))
            assert ended == [0]
    finally:
        signal.signal(signal.SIGALRM, before)


def test_map_raises_what_a_worker_raised() -> None:
    with workers(2, 1) as pool, pytest.raises(ZeroDivisionError):
        list(pool.map(lambda item: 1 // (3 - item), range(100)))


def test_a_matrix_is_not_begun_after_an_earlier_job_failed() -> None:
    """Those that wait for their turn meanwhile leave without it, and what failed is told."""
    inside = threading.Event()
    begun: list[int] = []
    waiting = threading.Barrier(4, timeout=60)

    def work(number: int) -> None:
        if 0 < number < 4:
            assert inside.wait(timeout=60)  # the first has it
            waiting.wait()
        with pool.whole:
            begun.append(number)
            inside.set()
            waiting.wait()
            raise ZeroDivisionError(number)

    with workers(4, 1) as pool:
        with pytest.raises(ZeroDivisionError, match="0"):
            list(pool.map(work, range(9)))
        assert begun == [0]
        assert list(pool.map(partial(hold, pool), range(9))) == list(range(9))  # as if nothing had been


def hold(pool: stream.Workers, number: int) -> int:
    with pool.whole:
        return number


def test_a_matrix_before_the_one_that_failed_is_done() -> None:
    """Its result comes first, whoever has had the matrix first."""
    inside = threading.Event()
    begun: list[int] = []

    def work(number: int) -> int:
        if number == 0:
            assert inside.wait(timeout=60)
        with pool.whole:
            begun.append(number)
            if number == 1:
                inside.set()
                raise ZeroDivisionError
            return number

    with workers(2, 1) as pool:
        results = pool.map(work, range(2))
        assert next(results) == 0
        with pytest.raises(ZeroDivisionError):
            next(results)
    assert begun == [1, 0]


@pytest.mark.parametrize("matrices", [1, 2])
def test_no_matrix_is_begun_when_nobody_waits_for_results(matrices: int) -> None:
    """As after Ctrl-C, while the main thread waits for what is running."""
    begun: list[int] = []
    held = threading.Barrier(matrices + 1, timeout=60)
    release = threading.Event()

    def work(number: int) -> None:
        if number == 0:
            return
        with pool.whole:
            begun.append(number)
            held.wait()
            assert release.wait(timeout=60)

    def stopping(futures: list[Future[None]]) -> None:
        release.set()
        wait(futures)

    with workers(4, 1, matrices) as pool, mock.patch.object(stream, "wait", stopping):
        results = pool.map(work, range(9))
        next(results)
        held.wait()
        results.close()
    assert len(begun) == matrices


def test_no_more_matrices_at_a_time_than_there_may_be() -> None:
    with workers(1, 1, 2) as pool, pool.whole, pool.whole:
        assert not pool.whole.acquire(blocking=False)


# --- reading ----------------------------------------------------------------------------------------

WHOLE = stream.Chunk(0, 10, 10)


def tensor(file: Path, values: np.ndarray) -> StoredTensor:
    """A tensor that does not begin where the file's data begins."""
    save_file({"w": values, "a": np.zeros(3, values.dtype)}, file)
    return next(info for info in read_header(file).tensors if info.name == "w")


def number(directory: Path, count: int) -> list[StoredTensor]:
    """So many files; the tensor of each says its number."""
    return [tensor(directory / str(i), np.full(4, i, np.float32)) for i in range(count)]


def numbers(found: list[stream.Bytes]) -> list[list[float]]:
    return [raw.view(np.float32).tolist() for raw in found]


@pytest.fixture
def data() -> list[np.ndarray]:
    return [np.arange(10, dtype=np.float32), np.arange(10, 20).astype(np.float16), np.arange(10, dtype=np.int64)]


@pytest.fixture
def infos(tmp_path: Path, data: list[np.ndarray]) -> list[StoredTensor]:
    return [tensor(tmp_path / f"{i}.safetensors", values) for i, values in enumerate(data)]


def test_read_brings_each_sources_bytes(data: list[np.ndarray], infos: list[StoredTensor]) -> None:
    with workers(1, 4) as pool:  # room for more than there are
        for start, stop in ((3, 7), (0, 10), (9, 10), (3, 7)):
            found = pool.read(infos, stream.Chunk(start, stop, 10))
            assert [raw.tobytes() for raw in found] == [values[start:stop].tobytes() for values in data]
        found = pool.read(infos[1:], stream.Chunk(3, 7, 10))
        assert [raw.tobytes() for raw in found] == [values[3:7].tobytes() for values in data[1:]]


@pytest.mark.parametrize("fast", [True, False])
def test_read_runs_lays_them_end_to_end(data: list[np.ndarray], infos: list[StoredTensor], fast: bool) -> None:
    """Also where the kernel gives up."""
    starts, run = [7, 0, 0, 4], 3
    reading = mock.patch.object(stream, "read_runs", read_runs if fast else lambda *_: False)
    with reading, workers(1, 3) as pool:
        pool.read_runs(infos, starts, run)
        for raw, values in zip(pool.buffers.raw, data, strict=True):
            wanted = np.concatenate([values[start : start + run] for start in starts]).tobytes()
            assert raw[: len(wanted)].tobytes() == wanted


def test_a_chunk_that_is_asked_for_again_is_read_once(infos: list[StoredTensor]) -> None:
    with workers(1, 3) as pool, mock.patch.object(stream, "read_runs", side_effect=read_runs) as reading:

        def reads(sources: list[StoredTensor], chunk: stream.Chunk) -> int:
            before = reading.call_count
            assert len(pool.read(sources, chunk)) == len(sources)
            return reading.call_count - before

        assert reads(infos, WHOLE) == 1
        assert reads(list(infos), stream.Chunk(0, 10, 10)) == 0  # equal, if not the same
        assert reads(infos, stream.Chunk(0, 9, 10)) == 1
        assert reads(infos[:2], stream.Chunk(0, 9, 10)) == 1
        assert reads(infos, WHOLE) == 1
        pool.read_runs(infos, [5], 2)  # overwrites it
        assert reads(infos, WHOLE) == 1
        assert pool.read(infos, WHOLE)[0].view(np.float32)[0] == 0


def test_each_thread_reads_for_itself(tmp_path: Path) -> None:
    sources = number(tmp_path, 2)
    meet = threading.Barrier(2, timeout=60)

    def work(info: StoredTensor) -> list[list[float]]:
        found = pool.read([info], stream.Chunk(0, 4, 4))
        meet.wait()  # both have read
        return numbers(found)

    with workers(2, 1) as pool:
        assert list(pool.map(work, sources)) == [[[0.0] * 4], [[1.0] * 4]]


@pytest.mark.parametrize(
    ("spoil", "fault"),
    [
        (lambda file: os.truncate(file, file.stat().st_size - 3), "the file ended 3 bytes early. It changed during"),
        (lambda file: file.unlink(), "cannot be read: No such file or directory"),
    ],
)
@pytest.mark.parametrize("which", [0, 2])
def test_a_file_that_changes_during_the_run(
    infos: list[StoredTensor], spoil: Callable[[Path], None], fault: str, which: int
) -> None:
    file = infos[which].file
    spoil(file)
    with workers(1, 3) as pool:
        with pytest.raises(CheckpointError) as error:
            pool.read(infos, WHOLE)
        assert str(error.value).startswith(f"{file}: tensor 'w': {fault}")
        with pytest.raises(CheckpointError):  # what could not be read is not remembered
            pool.read(infos, WHOLE)
        with pytest.raises(CheckpointError):
            pool.read_runs(infos, [0, 7], 3)


def test_a_file_cut_short_after_it_was_opened(infos: list[StoredTensor]) -> None:
    with workers(1, 3) as pool:
        pool.read(infos, WHOLE)
        os.truncate(infos[1].file, infos[1].file.stat().st_size - 3)
        pool.read(infos, stream.Chunk(0, 8, 10))  # which is there still
        with pytest.raises(CheckpointError, match="the file ended 3 bytes early"):
            pool.read(infos, WHOLE)


def test_files_stay_open_until_the_workers_end(infos: list[StoredTensor]) -> None:
    def work(info: StoredTensor) -> int:
        pool.read([info], WHOLE)
        with mock.patch.object(os, "open", side_effect=AssertionError):
            return pool.buffers.handles.of(info.file)

    with workers(1, 1) as pool:
        handles = [*pool.map(work, infos), work(infos[0])]  # a worker's, and this thread's
        assert len(set(handles)) == 4
        assert all(map(is_open, handles))
    assert not any(map(is_open, handles))


def test_files_are_closed_where_a_worker_failed(infos: list[StoredTensor]) -> None:
    handles = []

    def work(pool: stream.Workers, info: StoredTensor) -> None:
        handles.append(pool.buffers.handles.of(info.file))
        assert is_open(handles[0])
        raise ZeroDivisionError

    def run() -> None:
        with workers(1, 1) as pool:
            list(pool.map(lambda info: work(pool, info), infos[:1]))

    with pytest.raises(ZeroDivisionError):
        run()
    assert not is_open(handles[0])


def test_more_files_than_may_be_open(tmp_path: Path) -> None:
    """One source stays the same while the others change: its file must not be closed while it is read."""
    first, *others = number(tmp_path, OPEN_FILES + 6)
    with workers(1, 2) as pool:
        for i, other in enumerate(others, 1):
            assert numbers(pool.read([first, other], stream.Chunk(0, 4, 4))) == [[0.0] * 4, [float(i)] * 4]


def test_more_sources_than_files_may_be_open(tmp_path: Path) -> None:
    sources = number(tmp_path, OPEN_FILES + 6)
    with workers(1, len(sources)) as pool:
        for some in (sources, sources[::-1]):
            wanted = [[float(info.file.name)] * 4 for info in some]
            assert numbers(pool.read(some, stream.Chunk(0, 4, 4))) == wanted


def test_a_buffer_holds_the_largest_chunk() -> None:
    """What the kernels are given room for: CHUNK elements of any dtype."""
    buffers = stream.Buffers(2, open_files=1)
    assert buffers.raw.shape == (2, max(ITEM_BYTES.values()) * stream.CHUNK)
    assert buffers.places.size == len(buffers.values) == stream.CHUNK
    assert buffers.serialized.size >= len(BitMap(range(0, stream.CHUNK, 2)).serialize())


def test_all_threads_together_open_less_than_they_may(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "getrlimit", lambda _: (64, 64))
    sources = number(tmp_path, 6)
    with workers(4, 1) as pool:  # four files each
        handles = [pool.buffers.handles.of(info.file) for info in sources]
        assert sum(map(is_open, set(handles))) == 4
