"""Arrays of a plan are those that numpy saved, of the shape that is expected, or an error."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cpimerge.errors import PlanError
from cpimerge.plan_arrays import open_array


@pytest.mark.parametrize("shape", [(0,), (1,), (1000,), (3, 2), (0, 5), (12345, 7)])
@pytest.mark.parametrize("dtype", ["<u8", "<f4"])
def test_what_numpy_saves(tmp_path: Path, shape: tuple[int, ...], dtype: str) -> None:
    wanted = np.arange(np.prod(shape)).astype(dtype).reshape(shape)
    np.save(tmp_path / "a.npy", wanted)
    found = open_array(tmp_path / "a.npy", dtype, shape)
    assert found.dtype == wanted.dtype
    assert np.array_equal(found, wanted)
    assert not found.flags.writeable or not found.size


@given(st.integers(0, 127), st.integers(0, 255))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_other_header_is_followed(tmp_path: Path, place: int, byte: int) -> None:
    np.save(tmp_path / "a.npy", np.arange(9, dtype=np.uint64))
    raw = bytearray((tmp_path / "a.npy").read_bytes())
    unchanged = raw[place] == byte
    raw[place] = byte
    (tmp_path / "a.npy").write_bytes(raw)
    if unchanged:
        assert open_array(tmp_path / "a.npy", "<u8", (9,)).tolist() == list(range(9))
        return
    with pytest.raises(PlanError, match=r"a\.npy: is not uint64 \[9\], as plan\.json wants"):
        open_array(tmp_path / "a.npy", "<u8", (9,))


@pytest.mark.parametrize("size", [0, 8, 127, 128, 199, 201])
def test_a_file_of_another_size(tmp_path: Path, size: int) -> None:
    np.save(tmp_path / "a.npy", np.arange(9, dtype=np.uint64))
    raw = (tmp_path / "a.npy").read_bytes()
    (tmp_path / "a.npy").write_bytes((raw + bytes(9))[:size])
    with pytest.raises(PlanError, match="is not uint64"):
        open_array(tmp_path / "a.npy", "<u8", (9,))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"a\.npy: cannot be read: No such file or directory"):
        open_array(tmp_path / "a.npy", "<u8", (9,))
