"""Arrays that wait in a file until they are needed again: what is too much to hold in memory."""

from __future__ import annotations

import errno
import math
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from .disk import flush_data, open_to_write, reserve, write_at

__all__ = ["Kinds", "Shelf", "Shelved"]

Arrays = Sequence[npt.NDArray[Any]]
Kinds = tuple[tuple[np.dtype[Any], tuple[int, ...]], ...]  # dtypes and shapes

ALIGNED = 8  # bytes that every array begins at a multiple of


@dataclass(frozen=True, slots=True)
class Shelved:
    """Where arrays lie, what they are, and the xxh3-64 of their bytes."""

    offset: int
    kinds: Kinds
    xxh3: int

    @property
    def nbytes(self) -> int:
        """Of all arrays, with what aligns them."""
        return sum(map(_room, self.sizes))

    @property
    def end(self) -> int:
        return self.offset + self.nbytes

    @property
    def sizes(self) -> list[int]:
        """Bytes of each array."""
        return [math.prod(shape) * dtype.itemsize for dtype, shape in self.kinds]


class Shelf:
    """Puts arrays away and gets them back, from any thread."""

    def __init__(self, file: Path, nbytes: int = 0) -> None:
        """With `nbytes` of the disk set aside. Raises OSError, also where `file` is a link or the disk lacks them."""
        self._handle = open_to_write(file)
        self._lock = threading.Lock()
        self._end = 0
        try:
            reserve(self._handle, nbytes)
        except OSError:
            self.close()
            raise

    def put(self, arrays: Arrays) -> Shelved:
        """Raises OSError where the disk is full."""
        nbytes = sum(_room(array.nbytes) for array in arrays)
        with self._lock:
            offset, self._end = self._end, self._end + nbytes
        place, digest = offset, xxhash.xxh3_64()
        for array in arrays:  # one by one, as to join them would take as long as to write them
            data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            for piece in (data, np.zeros(-data.size % ALIGNED, np.uint8)):
                digest.update(piece)
                write_at(self._handle, memoryview(piece), place)
                place += piece.size
        kinds = tuple((array.dtype, array.shape) for array in arrays)
        return Shelved(offset, kinds, digest.intdigest())

    def get(self, shelved: Shelved) -> list[npt.NDArray[Any]]:
        """Copies, which may be written to. Raises OSError where the file was cut short."""
        data = self._read(shelved.offset, shelved.nbytes)
        arrays, place = [], 0
        for size, (dtype, shape) in zip(shelved.sizes, shelved.kinds, strict=True):
            arrays.append(data[place : place + size].view(dtype).reshape(shape))
            place += _room(size)
        return arrays

    def get_one(self, shelved: Shelved, which: int) -> npt.NDArray[Any]:
        """As `get`, but one of the arrays, without a look at the others."""
        sizes, (dtype, shape) = shelved.sizes, shelved.kinds[which]
        return self._read(shelved.offset + sum(map(_room, sizes[:which])), sizes[which]).view(dtype).reshape(shape)

    def holds(self, shelved: Shelved) -> bool:
        """Whether it is still there, as an earlier run may have put it."""
        if shelved.end > os.fstat(self._handle).st_size:
            return False
        return xxhash.xxh3_64_intdigest(self._read(shelved.offset, shelved.nbytes)) == shelved.xxh3

    def go_on(self, end: int) -> None:
        """Put what comes behind the first `end` bytes, which are an earlier run's."""
        self._end = end

    def clear(self) -> None:
        """Forget everything, and keep the room."""
        self._end = 0

    def sync(self) -> None:
        """Have the disk take everything that was put there; on any thread. Raises OSError."""
        flush_data(self._handle)

    def close(self) -> None:
        """Once is enough."""
        handle, self._handle = self._handle, -1
        if handle >= 0:
            os.close(handle)

    def _read(self, offset: int, nbytes: int) -> npt.NDArray[np.uint8]:
        data = np.empty(nbytes, np.uint8)
        done = 0
        while done < data.size:
            count = os.preadv(self._handle, [memoryview(data)[done:]], offset + done)
            if not count:
                raise OSError(errno.EIO, "what was put away is gone")
            done += count
        return data


def _room(size: int) -> int:
    """Bytes that an array of `size` bytes takes, so that the next one is aligned."""
    return size + -size % ALIGNED
