"""Exact selection from histograms, and cores on disk."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpimerge.cores import CoreReader, CoreWriter, bitmap, budget, offsets_file, pair_counts
from cpimerge.errors import PlanError


@pytest.mark.parametrize(
    ("density", "elements", "k"),
    [("0.29", 100, 29), ("0.1", 10, 1), ("0.01", 99, 0), ("1", 7, 7), ("0", 7, 0), ("0.3", 10**18, 3 * 10**17)],
)
def test_budget_is_exact(density: str, elements: int, k: int) -> None:
    assert budget(Fraction(Decimal(density)), elements) == k


positions = st.sets(st.integers(0, 99)).map(lambda places: np.array(sorted(places), np.uint32))


@given(st.lists(positions, min_size=1, max_size=4))
def test_pair_counts(cores: list[np.ndarray]) -> None:
    counts = pair_counts([bitmap(core) for core in cores])
    sets = [set(core.tolist()) for core in cores]
    assert counts.tolist() == [[len(a & b) for b in sets] for a in sets]


def write(file: Path, cores: list[list[int]]) -> str:
    writer = CoreWriter(file)
    for core in cores:
        writer.append(bitmap(np.array(core, np.uint32)))
    assert writer.chunks == len(cores)
    return writer.finish()


def test_cores_come_back(tmp_path: Path) -> None:
    cores = [[0, 5, 2**18 - 1], [], [7], list(range(0, 2**18, 2))]
    digest = write(tmp_path / "00.roaring", cores)
    reader = CoreReader(tmp_path / "00.roaring", digest)
    assert [reader.positions(chunk, 2**18).tolist() for chunk in (3, 1, 0, 2)] == [
        cores[chunk] for chunk in (3, 1, 0, 2)
    ]


@pytest.mark.parametrize("which", ["bitmaps", "offsets"])
def test_changed_cores_are_refused(tmp_path: Path, which: str) -> None:
    file = tmp_path / "00.roaring"
    digest = write(file, [[1, 2], [3]])
    if which == "bitmaps":
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    else:
        np.save(offsets_file(file), np.load(offsets_file(file))[:-1])
    with pytest.raises(PlanError, match=r"00\.roaring: is not the core that the plan was saved with"):
        CoreReader(file, digest)


def test_chunks_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "00.roaring"
    reader = CoreReader(file, write(file, [[1, 7]]))
    assert reader.positions(0, 8).tolist() == [1, 7]
    with pytest.raises(PlanError, match="chunk 0 does not fit its tensor"):
        reader.positions(0, 7)
    for chunk in (-1, 1):
        with pytest.raises(PlanError, match=f"has no chunk {chunk}, which"):
            reader.positions(chunk, 8)
