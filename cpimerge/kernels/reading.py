"""Reads many small pieces of files in one go, without the interpreter between them."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from numba import types

from .arrays import Counts, Stored, compiled

# POSIX: ssize_t pread(int, void *, size_t, off_t)
_pread: Any = types.ExternalFunction("pread", types.intp(types.int32, types.uintp, types.uintp, types.int64))
WILL_NEED = 3  # Linux's POSIX_FADV_WILLNEED

if sys.platform == "linux":
    # int posix_fadvise(int, off_t, off_t, int)
    _advise: Any = types.ExternalFunction(
        "posix_fadvise", types.int32(types.int32, types.int64, types.int64, types.int32)
    )

    @compiled
    def _announce(file: int, size: int, offset: int) -> None:
        """Tell the system that bytes [offset, offset + size) will be read."""
        _advise(np.int32(file), np.int64(offset), np.int64(size), np.int32(WILL_NEED))

else:

    @compiled
    def _announce(file: int, size: int, offset: int) -> None:
        """Nothing that all other systems have."""


@compiled
def _read(file: int, place: int, size: int, offset: int) -> bool:
    """Bytes [offset, offset + size) of an open file to the address `place`. False where they could not be read."""
    done = np.int64(0)
    while done < size:
        count = _pread(np.int32(file), np.uintp(place + done), np.uintp(size - done), np.int64(offset + done))
        if count <= 0:
            return False
        done += count
    return True


@compiled
def read_tensors(files: Counts, offsets: Counts, sizes: Counts, begins: Counts, out: Stored) -> bool:
    """`sizes` bytes of B tensors from every file, from `offsets` on; all of these int64 [B, C].

    They go to `begins` [B] in the rows of `out` uint8 [C, n]. False where something could not be read.
    """
    for b in range(begins.size):
        for c in range(files.shape[1]):
            if not _read(files[b, c], out[c].ctypes.data + begins[b], sizes[b, c], offsets[b, c]):
                return False
    return True


@compiled
def read_runs(files: Counts, offsets: Counts, items: Counts, starts: Counts, run: int, out: Stored) -> bool:
    """Elements [start, start + run) of a tensor from every file, one run after the other, into the rows of `out`.

    `files` [C] are open file descriptors, `offsets` [C] where the tensor begins in each, `items` [C] the bytes of an
    element; `starts` [runs] count elements; `out` uint8 [C, ≥ runs · run · item]. False where something could not be
    read: what, a slower reader will find out.
    """
    if starts.size > 1:  # a disk that has to fetch them does so many at a time, and not each when it is waited for
        for c in range(files.size):
            for start in starts:
                _announce(files[c], run * items[c], offsets[c] + start * items[c])
    for c in range(files.size):
        size = run * items[c]
        place = out[c].ctypes.data
        for start in starts:
            if not _read(files[c], place, size, offsets[c] + start * items[c]):
                return False
            place += size
    return True
