"""Runs of elements from several files at once."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from cpimerge.kernels.reading import read_runs


@contextmanager
def opened(directory: Path, contents: Sequence[bytes]) -> Iterator[list[int]]:
    handles = []
    try:
        for number, content in enumerate(contents):
            (directory / str(number)).write_bytes(content)
            handles.append(os.open(directory / str(number), os.O_RDONLY))
        yield handles
    finally:
        for handle in handles:
            os.close(handle)


def counts(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


@pytest.mark.parametrize(("starts", "run"), [([], 5), ([0], 0), ([0], 1), ([0], 100), ([90, 0, 7, 7, 95], 5)])
def test_read_runs(tmp_path: Path, starts: list[int], run: int) -> None:
    rng = np.random.default_rng(0)
    offsets, items = [13, 0, 1000], [2, 4, 8]
    contents = [rng.bytes(offset + 100 * item) for offset, item in zip(offsets, items, strict=True)]
    out = np.full((3, 1000), 0xAB, np.uint8)
    with opened(tmp_path, contents) as handles:
        assert read_runs(counts(*handles), counts(*offsets), counts(*items), counts(*starts), run, out)
    for row, content, offset, item in zip(out, contents, offsets, items, strict=True):
        wanted = b"".join(content[offset + start * item : offset + (start + run) * item] for start in starts)
        assert row.tobytes() == wanted.ljust(1000, b"\xab")


def test_one_file_may_be_read_for_several_rows(tmp_path: Path) -> None:
    out = np.zeros((2, 3), np.uint8)
    with opened(tmp_path, [b"abcdef"]) as [handle]:
        assert read_runs(counts(handle, handle), counts(0, 3), counts(1, 1), counts(0), 3, out)
    assert out.tobytes() == b"abcdef"


@pytest.mark.parametrize("start", [5, 6, 100])
def test_a_file_that_is_too_short(tmp_path: Path, start: int) -> None:
    out = np.zeros((1, 8), np.uint8)
    with opened(tmp_path, [bytes(10)]) as [handle]:
        assert read_runs(counts(handle), counts(1), counts(1), counts(4), 5, out)  # up to its last byte
        assert not read_runs(counts(handle), counts(1), counts(1), counts(start), 5, out)


def test_a_file_that_is_not_open(tmp_path: Path) -> None:
    out = np.zeros((2, 8), np.uint8)
    with opened(tmp_path, [bytes(10)]) as [handle]:
        assert not read_runs(counts(handle, -1), counts(0, 0), counts(1, 1), counts(0), 5, out)
        assert read_runs(counts(handle), counts(0), counts(1), counts(0), 5, out)
