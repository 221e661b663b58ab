"""A task's core: exactly which elements moved most, and how that is kept on disk.

METHOD §1 says what a core is; selection.py finds its threshold.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from fractions import Fraction
from io import BytesIO
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash
from pyroaring import BitMap

from .errors import PlanError
from .growing import GrowingFile
from .kernels.bitsets import is_serialized, most_bytes
from .ordinary import open_ordinary
from .plan_arrays import PLAN_AGAIN, open_array
from .stream import CHUNK

__all__ = ["CoreReader", "CoreWriter", "Threshold", "budget", "npy_header"]

Counts = npt.NDArray[np.int64]
Positions = npt.NDArray[np.uint32]
Offsets = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Threshold:
    """A core is every element whose magnitude's bit pattern is above `bits`, and the first `ties` equal to it."""

    bits: int
    ties: int


NOTHING = Threshold(bits=0xFFFFFFFF, ties=0)


def budget(density: Fraction, elements: int) -> int:
    """k = ⌊p·n⌋ elements, exact: p is the decimal that the user wrote."""
    return density.numerator * elements // density.denominator


class CoreWriter:
    """Appends one task's core to `file`, a serialised Roaring bitmap a chunk, and their offsets to `file`.npy.

    `nbytes` of the disk are set aside for the bitmaps. What an earlier run left in the file counts as far as `go_on`
    says.
    """

    def __init__(self, file: Path, nbytes: int = 0) -> None:
        """Raises OSError, also where `file` is a link or the disk lacks the space."""
        self._file = file
        self._offsets = array("Q", [0])
        self.bitmaps = GrowingFile(file, nbytes)

    @property
    def chunks(self) -> int:
        """Chunks written so far."""
        return len(self._offsets) - 1

    def append(self, data: bytes) -> None:
        """The next chunk's core, a serialised Roaring bitmap."""
        self.bitmaps.append(data)
        self._offsets.append(self._offsets[-1] + len(data))

    def ends(self, first: int, stop: int) -> Sequence[int]:
        """Where the chunks [first, stop) end, in bytes."""
        return self._offsets[1 + first : 1 + stop]

    def size_of(self, chunks: int) -> int:
        """What the first so many chunks take of the file, in bytes."""
        return self._offsets[chunks]

    def go_on(self, ends: Sequence[int]) -> None:
        """Append behind the chunks of an earlier run, which end there, in bytes."""
        self._offsets = array("Q", [0, *ends])
        self.bitmaps.go_on(self._offsets[-1])

    def close(self) -> None:
        self.bitmaps.close()

    def finish(self) -> str:
        """Complete both files; returns the xxh3-128 of the bitmaps and then the offsets."""
        self.bitmaps.finish()
        offsets = np.array(self._offsets, np.uint64)
        with closing(GrowingFile(offsets_file(self._file))) as file:
            file.append(npy_header(offsets.shape, offsets.dtype) + offsets.tobytes())
            file.finish()
        digest = self.bitmaps.digest(self.bitmaps.size)
        digest.update(offsets.tobytes())
        return digest.hexdigest()


class CoreReader:
    """Reads the core of one task, chunk by chunk, on any thread; to be closed."""

    def __init__(self, file: Path, expected_xxh3: str, chunks: int) -> None:
        """`chunks`: how many the plan has. Raises PlanError where the two files are not those that it was saved with.

        Their hash is no proof against a stranger's plan, so neither are they taken for what they should be.
        """
        self._file = file
        offsets = open_array(offsets_file(file), "<u8", (chunks + 1,))
        try:
            self._handle = open_ordinary(file)
        except OSError as error:
            raise PlanError(f"{file}: cannot be read: {error.strerror}. {PLAN_AGAIN}") from error
        try:
            self._check(offsets, expected_xxh3)
        except PlanError:
            self.close()
            raise
        self._offsets = offsets

    def _check(self, offsets: Offsets, expected_xxh3: str) -> None:
        size = os.fstat(self._handle).st_size
        if size > most_bytes(CHUNK) * (offsets.size - 1):
            raise PlanError(f"{self._file}: has {size} bytes for {offsets.size - 1} chunks. {PLAN_AGAIN}")
        if _hash_of(self._file, offsets) != expected_xxh3:
            raise PlanError(f"{self._file}: is not the core that the plan was saved with. {PLAN_AGAIN}")
        if offsets[0] != 0 or offsets[-1] != size or (offsets[1:] < offsets[:-1]).any():
            raise PlanError(f"{offsets_file(self._file)}: does not divide {self._file.name}. {PLAN_AGAIN}")

    def close(self) -> None:
        os.close(self._handle)

    def positions(self, chunk: int, elements: int) -> Positions:
        """Ascending positions uint32 [k] within chunk number `chunk`, which has so many elements.

        Raises PlanError where there is no such chunk, or it is no core of so many elements: the plan was edited amiss.
        """
        if not 0 <= chunk < len(self._offsets) - 1:
            raise PlanError(f"{self._file}: has no chunk {chunk}, which plan.json refers to. {PLAN_AGAIN}")
        begin, end = int(self._offsets[chunk]), int(self._offsets[chunk + 1])
        data = os.pread(self._handle, min(end - begin, most_bytes(elements) + 1), begin)
        if is_serialized(np.frombuffer(data, np.uint8), elements):  # pyroaring takes more, and more than fits
            found: Positions = np.frombuffer(BitMap.deserialize(data).to_array(), np.uint32)
            if not found.size or found[-1] < elements:
                return found
        raise PlanError(f"{self._file}: chunk {chunk} does not fit its tensor. {PLAN_AGAIN}")


def offsets_file(file: Path) -> Path:
    """Where the offsets of a core file lie: uint64 [chunks + 1], bytes."""
    return file.with_suffix(".npy")


def npy_header(shape: tuple[int, ...], dtype: npt.DTypeLike) -> bytes:
    """How a .npy file of an array in row-major order begins."""
    opening = BytesIO()
    descr = np.lib.format.dtype_to_descr(np.dtype(dtype))
    np.lib.format.write_array_header_1_0(opening, {"descr": descr, "fortran_order": False, "shape": shape})
    return opening.getvalue()


def _hash_of(file: Path, offsets: Offsets) -> str:
    digest = xxhash.xxh3_128()
    with open(file, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    digest.update(offsets.tobytes())
    return digest.hexdigest()
