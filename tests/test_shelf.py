"""Arrays come back from the shelf as they were put there."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cpimerge.shelf import Shelf

KINDS = st.sampled_from([np.uint8, np.uint16, np.uint32, np.uint64, np.int64, np.float32, np.float64])
arrays = KINDS.flatmap(lambda kind: hnp.arrays(kind, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=9)))


@pytest.fixture
def shelf(tmp_path: Path) -> Iterator[Shelf]:
    result = Shelf(tmp_path / "shelf")
    yield result
    result.close()


def same(found: list[np.ndarray], wanted: list[np.ndarray]) -> bool:
    return [(a.dtype, a.shape, a.tobytes()) for a in found] == [(a.dtype, a.shape, a.tobytes()) for a in wanted]


@given(st.lists(st.lists(arrays, max_size=4), max_size=5))
def test_arrays_come_back_in_any_order(groups: list[list[np.ndarray]]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        shelf = Shelf(Path(directory, "shelf"))
        shelved = [shelf.put(group) for group in groups]
        for place in reversed(range(len(groups))):
            assert same(shelf.get(shelved[place]), groups[place])
            assert same(shelf.get(shelved[place]), groups[place])  # they stay there
            one_by_one = [shelf.get_one(shelved[place], which) for which in range(len(groups[place]))]
            assert same(one_by_one, groups[place])
        shelf.close()


def test_what_comes_back_is_a_copy(shelf: Shelf) -> None:
    wanted = np.arange(3)
    shelved = shelf.put([wanted])
    wanted += 5
    (found,) = shelf.get(shelved)
    assert found.tolist() == [0, 1, 2]
    found += 1
    assert shelf.get(shelved)[0].tolist() == [0, 1, 2]


def test_arrays_need_not_be_contiguous(shelf: Shelf) -> None:
    wanted = np.arange(60, dtype=np.float32).reshape(10, 6)[::3, 1:4]
    assert same(shelf.get(shelf.put([wanted])), [wanted])


def test_they_come_back_aligned(shelf: Shelf) -> None:
    shelved = shelf.put([np.ones(3, np.uint8), np.ones(5), np.ones(1, np.uint16), np.ones(2)])
    for found in (*shelf.get(shelved), *(shelf.get_one(shelved, which) for which in range(4))):
        assert found.flags.aligned


class Pair(NamedTuple):
    a: np.ndarray
    b: np.ndarray


def test_a_named_tuple_of_arrays(shelf: Shelf) -> None:
    pair = Pair(np.zeros((0, 4)), np.array([7], np.uint64))
    assert same(list(Pair(*shelf.get(shelf.put(pair)))), list(pair))


def test_what_an_earlier_run_put_there_is_still_there(tmp_path: Path, shelf: Shelf) -> None:
    first, second = shelf.put([np.arange(5)]), shelf.put([np.ones(3, np.uint8), np.arange(4.0)])
    shelf.close()
    again = Shelf(tmp_path / "shelf")
    assert again.holds(first)
    assert again.holds(second)
    again.go_on(first.end)
    third = again.put([np.arange(7, 10)])
    assert third.offset == first.end
    assert again.holds(first)
    assert same(again.get(first), [np.arange(5)])
    assert not again.holds(second)
    os.truncate(tmp_path / "shelf", third.end - 1)
    assert not again.holds(third)
    again.close()


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "link").symlink_to("precious")
    with pytest.raises(OSError, match="symbolic links"):
        Shelf(tmp_path / "link")
    assert (tmp_path / "precious").read_text() == "precious"


def test_the_room_that_clear_makes_is_used_again(tmp_path: Path, shelf: Shelf) -> None:
    first = shelf.put([np.ones(1000)])
    shelf.put([np.ones(1000)])
    shelf.clear()
    again = shelf.put([np.full(2, 3.0)])
    assert again.offset == first.offset
    assert same(shelf.get(again), [np.full(2, 3.0)])
    assert (tmp_path / "shelf").stat().st_size == 16_000


def test_the_system_may_take_and_give_a_little_at_a_time(shelf: Shelf) -> None:
    write, read = os.pwrite, os.preadv
    group: list[np.ndarray] = [np.arange(100), np.arange(7, dtype=np.uint8)]
    with (
        mock.patch.object(os, "pwrite", lambda file, data, place: write(file, data[:13], place)),
        mock.patch.object(os, "preadv", lambda file, into, place: read(file, [into[0][:11]], place)),
    ):
        assert same(shelf.get(shelf.put(group)), group)


def test_a_full_disk_is_an_oserror(shelf: Shelf) -> None:
    with (
        mock.patch.object(os, "pwrite", side_effect=OSError(28, "No space left on device")),
        pytest.raises(OSError, match="No space left"),
    ):
        shelf.put([np.ones(1)])


def test_two_threads(shelf: Shelf) -> None:
    def work(number: int) -> bool:
        group = [np.full(number * 37 % 500, number), np.full((3, number % 5), number, np.float32)]
        shelved = shelf.put(group)
        return same(shelf.get(shelved), group)

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(work, range(400)))
