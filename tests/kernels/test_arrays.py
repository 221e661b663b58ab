"""Kernels run where compiled code cannot be kept; arrays that begin with a cache line, or are not counted."""

from __future__ import annotations

import errno
import os
import sys
from typing import Any, NamedTuple

import numba
import numpy as np
import pytest
from llvmlite import ir
from numba.core import caching

from cpimerge.kernels import arrays
from cpimerge.kernels.arrays import LINE, aligned, compiled, intrinsic

kernels: Any = arrays


def double(values: Any) -> Any:
    return values * 2


def test_without_a_place_to_keep_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """numba finds none that it may write to: an installation of somebody else, and no home directory."""
    monkeypatch.setattr(caching.CompileResultCacheImpl, "_locator_classes", [])
    assert compiled(double)(np.arange(3)).tolist() == [0, 2, 4]


def test_a_full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def full(*what: object) -> None:
        tried.append(what)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(caching.IndexDataCacheFile, "save", full)
    assert compiled(double)(np.arange(3)).tolist() == [0, 2, 4]
    assert len(tried) == 1


@pytest.mark.parametrize("shape", [1, 5, 4096, (3, 100), (2, 1, 7)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint32, np.float64])
def test_aligned(shape: int | tuple[int, ...], dtype: Any) -> None:
    array = aligned(shape, dtype)
    assert array.ctypes.data % LINE == 0
    assert array.dtype == dtype
    assert array.shape == np.empty(shape).shape
    assert array.flags.c_contiguous
    assert array.flags.writeable


class Room(NamedTuple):
    rows: np.ndarray
    size: int
    left: tuple[np.ndarray, float]


def borrowing(array: np.ndarray, room: Room) -> Any:
    array, room = kernels.borrowed((array, room))
    array[1:][0] = 5
    room.rows[1, 2:] = array[0]
    return room.rows[:, 1:].sum() + room.size + room.left[0][0] + room.left[1], array.shape, room.rows.strides


@intrinsic
def is_counted(typing, array):  # type: ignore[no-untyped-def]
    """Whether somebody counts the references of an array."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        owner = context.make_array(array)(context, builder, args[0]).meminfo
        return builder.icmp_unsigned("!=", owner, ir.Constant(owner.type, None))

    return numba.types.boolean(array), generate


def counting(array: np.ndarray, room: Room) -> Any:
    lent, in_room = kernels.borrowed((array, room))
    before = is_counted(array), is_counted(room.rows), is_counted(room.left[0])
    return before, (is_counted(lent), is_counted(lent[1:]), is_counted(in_room.rows), is_counted(in_room.left[0]))


borrow: Any = numba.njit(borrowing)
counted: Any = numba.njit(counting)


def test_borrowed_arrays_are_not_counted() -> None:
    room = Room(np.zeros((2, 3)), 7, (np.array([0.25]), 0.125))
    assert counted(np.zeros(2), room) == ((True, True, True), (False, False, False, False))


def test_borrowed_arrays_are_the_same() -> None:
    room = Room(np.zeros((4, 6))[::2, ::2], 7, (np.array([0.25]), 0.125))
    array = np.array([3.0, 4.0])
    assert borrow(array, room) == (3 + 7 + 0.25 + 0.125, array.shape, room.rows.strides)
    assert array.tolist() == [3, 5]
    assert room.rows.tolist() == [[0, 0, 0], [0, 0, 3]]


def test_borrowing_takes_no_reference_and_gives_none_back() -> None:
    room, array = Room(np.zeros((2, 3)), 7, (np.array([0.25]), 0.125)), np.array([3.0, 4.0])
    every = [array, room.rows, room.left[0]]
    before = [sys.getrefcount(one) for one in every]
    for _ in range(10):
        borrow(array, room)
    assert [sys.getrefcount(one) for one in every] == before
