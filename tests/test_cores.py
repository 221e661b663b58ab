"""How large a core is, and cores on disk."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import xxhash
from pyroaring import BitMap

from cpimerge.cores import CoreReader, CoreWriter, budget, offsets_file
from cpimerge.errors import PlanError


@pytest.mark.parametrize(
    ("density", "elements", "k"),
    [("0.29", 100, 29), ("0.1", 10, 1), ("0.01", 99, 0), ("1", 7, 7), ("0", 7, 0), ("0.3", 10**18, 3 * 10**17)],
)
def test_budget_is_exact(density: str, elements: int, k: int) -> None:
    assert budget(Fraction(Decimal(density)), elements) == k


def write(file: Path, cores: list[list[int]]) -> str:
    writer = CoreWriter(file)
    for core in cores:
        writer.append(BitMap(core).serialize())
    assert writer.chunks == len(cores)
    digest = writer.finish()
    writer.close()
    return digest


def test_cores_come_back(tmp_path: Path) -> None:
    cores = [[0, 5, 2**18 - 1], [], [7], list(range(0, 2**18, 2))]
    digest = write(tmp_path / "00.roaring", cores)
    reader = CoreReader(tmp_path / "00.roaring", digest, 4)
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
        np.save(offsets_file(file), np.load(offsets_file(file)) // 2)
    with pytest.raises(PlanError, match=r"00\.roaring: is not the core that the plan was saved with"):
        CoreReader(file, digest, 2)


def test_chunks_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "00.roaring"
    reader = CoreReader(file, write(file, [[1, 7]]), 1)
    assert reader.positions(0, 8).tolist() == [1, 7]
    with pytest.raises(PlanError, match="chunk 0 does not fit its tensor"):
        reader.positions(0, 7)
    for chunk in (-1, 1):
        with pytest.raises(PlanError, match=f"has no chunk {chunk}, which"):
            reader.positions(chunk, 8)


def test_the_digest_is_that_of_the_bitmaps_and_the_offsets(tmp_path: Path) -> None:
    cores = [[1, 2], [], [3]]
    digest = write(tmp_path / "00.roaring", cores)
    bitmaps = [BitMap(core).serialize() for core in cores]
    assert (tmp_path / "00.roaring").read_bytes() == b"".join(bitmaps)
    offsets = np.cumsum([0, *map(len, bitmaps)]).astype(np.uint64)
    assert np.load(offsets_file(tmp_path / "00.roaring")).tolist() == offsets.tolist()
    assert digest == xxhash.xxh3_128_hexdigest(b"".join(bitmaps) + offsets.tobytes())


def test_a_core_is_gone_on_with(tmp_path: Path) -> None:
    cores = [[1, 2], [], [3], list(range(0, 2**18, 2))]
    whole = write(tmp_path / "whole.roaring", cores)
    file = tmp_path / "00.roaring"
    write(file, cores[:3])
    writer = CoreWriter(file)
    ends = np.load(offsets_file(file))[1:3].tolist()
    assert writer.bitmaps.holds(ends[-1], xxhash.xxh3_128_hexdigest(file.read_bytes()[: ends[-1]]))
    writer.go_on(ends)
    assert writer.chunks == 2
    for core in cores[2:]:
        writer.append(BitMap(core).serialize())
    assert writer.finish() == whole
    writer.close()
    for one, other in ((file, "whole.roaring"), (offsets_file(file), "whole.npy")):
        assert one.read_bytes() == (tmp_path / other).read_bytes()


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "00.roaring").symlink_to("precious")
    with pytest.raises(OSError, match="symbolic links"):
        CoreWriter(tmp_path / "00.roaring")
    assert (tmp_path / "precious").read_text() == "precious"


@pytest.mark.parametrize("name", ["00.roaring", "00.npy"])
def test_missing_cores_are_refused(tmp_path: Path, name: str) -> None:
    digest = write(tmp_path / "00.roaring", [[1]])
    (tmp_path / name).unlink()
    with pytest.raises(PlanError, match=rf"{name}: cannot be read: No such file"):
        CoreReader(tmp_path / "00.roaring", digest, 1)
