"""Chunks cover a tensor exactly; decoding and encoding are torch's; workers keep the order."""

from __future__ import annotations

import math
import threading
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cpimerge import stream
from cpimerge.checkpoint import read_header
from cpimerge.stream import chunks, decode, encode, row_count, row_length, workers

shapes = st.lists(st.integers(0, 9), max_size=3).map(tuple)


@given(shapes, st.sampled_from(["tensor", "row"]), st.integers(1, 40), st.integers(1, 5))
def test_chunks_cover_the_tensor_in_order(shape: tuple[int, ...], granularity: str, chunk: int, rows: int) -> None:
    with mock.patch.multiple(stream, CHUNK=chunk, CHUNK_ROWS=rows):
        found = chunks(shape, granularity)
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
    out = np.empty(bits.size, np.float32)
    decode(bits.view(np.uint8), name, out)
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
    out = np.empty(1, np.float32)
    decode(encode(values, dtype).view(np.uint8), dtype, out)
    assert out[0] == wanted
    assert encode(values, dtype) is not values


def test_encode_does_not_share_memory() -> None:
    values = np.ones(3, np.float32)
    encoded = encode(values, "F32")
    values[:] = 2
    assert encoded.view(np.float32).tolist() == [1, 1, 1]


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


def test_map_raises_what_a_worker_raised() -> None:
    with workers(2, 1) as pool, pytest.raises(ZeroDivisionError):
        list(pool.map(lambda item: 1 // (3 - item), range(100)))


def test_workers_give_torch_its_threads_back() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with workers(1, 1):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_read_brings_each_sources_bytes(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    data: list[np.ndarray] = [np.arange(10, dtype=np.float32), np.arange(10, 20).astype(np.float16)]
    for number, values in enumerate(data):
        save_file({"w": values, "a": np.zeros(3, np.float32)}, tmp_path / f"{number}.safetensors")
    infos = [
        info
        for number in range(2)
        for info in read_header(tmp_path / f"{number}.safetensors").tensors
        if info.name == "w"
    ]
    with workers(1, 2) as pool:
        found = pool.read(infos, stream.Chunk(3, 7, 10))
        assert [raw.tobytes() for raw in found] == [values[3:7].tobytes() for values in data]
