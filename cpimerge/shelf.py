"""Arrays that wait in a nameless file until they are needed again: what is too much to hold in memory."""

from __future__ import annotations

import errno
import os
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import numpy.typing as npt

__all__ = ["Shelf", "Shelved"]

Arrays = Sequence[npt.NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Shelved:
    """Where arrays lie, and what they are."""

    offset: int
    kinds: tuple[tuple[np.dtype[Any], tuple[int, ...]], ...]


class Shelf:
    """Puts arrays away and gets them back, from any thread."""

    def __init__(self, directory: Path) -> None:
        self._file = cast(BinaryIO, tempfile.TemporaryFile(dir=directory))  # noqa: SIM115 - lives as long as the shelf
        self._lock = threading.Lock()
        self._end = 0

    def put(self, arrays: Arrays) -> Shelved:
        """Raises OSError where the disk is full."""
        data = b"".join(array.tobytes() + bytes(-array.nbytes % ALIGNED) for array in arrays)
        with self._lock:
            offset, self._end = self._end, self._end + len(data)
        view = memoryview(data)
        while view:
            count = os.pwrite(self._file.fileno(), view, offset + len(data) - len(view))
            view = view[count:]
        return Shelved(offset, tuple((array.dtype, array.shape) for array in arrays))

    def get(self, shelved: Shelved) -> list[npt.NDArray[Any]]:
        """Copies, which may be written to. Raises OSError where the file was cut short."""
        sizes = [int(np.prod(shape)) * dtype.itemsize for dtype, shape in shelved.kinds]
        data = np.empty(sum(size + -size % ALIGNED for size in sizes), np.uint8)
        done = 0
        while done < data.size:
            count = os.preadv(self._file.fileno(), [memoryview(data)[done:]], shelved.offset + done)
            if not count:
                raise OSError(errno.EIO, "what was put away is gone")
            done += count
        arrays, place = [], 0
        for size, (dtype, shape) in zip(sizes, shelved.kinds, strict=True):
            arrays.append(data[place : place + size].view(dtype).reshape(shape))
            place += size + -size % ALIGNED
        return arrays

    def clear(self) -> None:
        """Forget everything."""
        os.ftruncate(self._file.fileno(), 0)
        self._end = 0

    def close(self) -> None:
        self._file.close()


ALIGNED = 8  # bytes that every array begins at a multiple of
