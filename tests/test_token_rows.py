"""Tensors whose rows come from elsewhere: bytes, however they are read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import vocabularies
from checkpoints import save
from files import stored_bytes
from hypothesis import given, settings
from hypothesis import strategies as st

from cpimerge.checkpoint import Handles, Tensor
from cpimerge.models import Located, open_model
from cpimerge.token_rows import PIECE, MeanRows, MovedRows, Runs

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def stored(directory: Path, name: str, tensor: torch.Tensor) -> Tensor:
    return open_model(Located(save(directory / name, {"embed": tensor})), None).tensors["embed"]


@given(st.lists(st.integers(-1, 9), min_size=1, max_size=20), st.integers(1, 5), st.data())
@settings(max_examples=60)
def test_pieces_cover_what_is_asked_for(rows: list[int], row_bytes: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(rows) * row_bytes))
    stop = data.draw(st.integers(start, len(rows) * row_bytes))
    expected = [
        None if rows[at // row_bytes] < 0 else rows[at // row_bytes] * row_bytes + at % row_bytes
        for at in range(start, stop)
    ]
    found: list[int | None] = []
    end = start
    for begin, end_of, place in Runs(rows).pieces(start, stop, row_bytes):
        assert begin == end < end_of
        end = end_of
        found += [None if place is None else place + n for n in range(end_of - begin)]
    assert found == expected


@pytest.mark.parametrize(
    ("rows", "identity"), [([0, 1, 2], True), ([0], True), ([1, 2], False), ([0, 2], False), ([0, -1], False)]
)
def test_identity(rows: list[int], identity: bool) -> None:
    assert Runs(rows).is_identity is identity


def test_long_runs_are_read_at_once() -> None:
    """A vocabulary with a few changes costs a few reads."""
    rows = [*range(100), 200, *range(101, 50_000), -1, -1]
    assert len([*Runs(rows).pieces(0, len(rows) * 8, 8)]) == 4


@pytest.mark.parametrize("ours", FLOATS)
@pytest.mark.parametrize("theirs", FLOATS)
def test_rows_that_a_model_lacks_are_rounded_to_its_dtype(
    tmp_path: Path, ours: torch.dtype, theirs: torch.dtype
) -> None:
    torch.manual_seed(0)
    wide = PIECE + 7  # a row is converted in more than one piece
    source, fallback = torch.randn(3, wide).to(ours), torch.randn(4, wide).to(theirs)
    moved = MovedRows.of(stored(tmp_path, "a", source), Runs([2, -1, 0, -1]), stored(tmp_path, "b", fallback))
    expected = torch.stack([source[2], fallback[1].to(ours), source[0], fallback[3].to(ours)])
    assert (moved.name, moved.shape, moved.nbytes) == ("embed", (4, wide), 4 * wide * ours.itemsize)
    for cuts in ([], [1, wide - 1, wide, wide + 5, 3 * wide + PIECE], range(1, 4 * wide, 4099)):
        assert vocabularies.read(moved, list(cuts)) == stored_bytes(expected)


@pytest.mark.parametrize("dtype", FLOATS)
def test_means(tmp_path: Path, dtype: torch.dtype) -> None:
    """Added up in float32 in the order of the parts, rounded once."""
    torch.manual_seed(1)
    wide = PIECE + 3
    values = [torch.randn(2, wide).to(each) for each in FLOATS]
    parts = tuple((stored(tmp_path, str(n), value), {5: 1, 4 + 2 * (n % 2): 0}) for n, value in enumerate(values))
    base = stored(tmp_path, "base", torch.zeros(4, wide, dtype=dtype))
    mean = MeanRows.like(base, 7, parts)
    assert mean.shape == (7, wide)
    for row, having in ((4, [values[0][0], values[2][0]]), (5, [value[1] for value in values]), (6, [values[1][0]])):
        total = torch.zeros(wide)
        for value in having:
            total += value.float()
        expected = stored_bytes((total / len(having)).to(dtype))
        buffer = bytearray(wide * dtype.itemsize)
        mean.read_into(memoryview(buffer), row * len(buffer), Handles(4))
        assert bytes(buffer) == expected
        piece = memoryview(bytearray(len(buffer) - 3 * dtype.itemsize))
        mean.read_into(piece, row * len(buffer) + 2 * dtype.itemsize, Handles(4))
        assert bytes(piece) == expected[2 * dtype.itemsize : -dtype.itemsize]


def test_what_is_not_finite_stays_so(tmp_path: Path) -> None:
    """It is the inputs' error, found where they are looked at."""
    part = (stored(tmp_path, "a", torch.tensor([[float("nan"), float("inf"), 1.0], [0, 0, 0]])), {2: 0})
    mean = MeanRows.like(stored(tmp_path, "base", torch.zeros(2, 3, dtype=torch.bfloat16)), 3, [part])
    buffer = bytearray(6)
    mean.read_into(memoryview(buffer), 12, Handles(4))
    found = torch.frombuffer(buffer, dtype=torch.bfloat16)
    assert found.isfinite().tolist() == [False, False, True]


def test_scratch_is_what_reading_takes(tmp_path: Path) -> None:
    base = stored(tmp_path, "base", torch.zeros(4, 8))
    mean = MeanRows.like(base, 5, [(base, {4: 0})])
    moved = MovedRows.of(base, Runs([0, 1, 2, 3, -1]), mean)
    assert mean.scratch_bytes == 16 * PIECE
    assert moved.scratch_bytes >= mean.scratch_bytes
