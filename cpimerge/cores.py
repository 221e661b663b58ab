"""A task's core: exactly which elements moved most, and how that is kept on disk.

METHOD §1 says what a core is; selection.py finds its threshold.
"""

from __future__ import annotations

import os
from array import array
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import xxhash
from pyroaring import BitMap

from .errors import PlanError

__all__ = ["CoreReader", "CoreWriter", "Threshold", "budget"]

Counts = npt.NDArray[np.int64]
Positions = npt.NDArray[np.uint32]


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
    """Appends one task's core to `file`, a serialised Roaring bitmap a chunk, and their offsets to `file`.npy."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._stream: BinaryIO = open(file, "xb")  # noqa: SIM115 - closed by `close`, which `finish` calls
        self._offsets = array("Q", [0])
        self._hash = xxhash.xxh3_128()

    @property
    def chunks(self) -> int:
        """Chunks written so far."""
        return len(self._offsets) - 1

    def append(self, data: bytes) -> None:
        """The next chunk's core, a serialised Roaring bitmap."""
        self._stream.write(data)
        self._hash.update(data)
        self._offsets.append(self._offsets[-1] + len(data))

    def close(self) -> None:
        self._stream.close()

    def finish(self) -> str:
        """Complete both files; returns the xxh3-128 of the bitmaps and then the offsets."""
        self.close()
        offsets = np.array(self._offsets, np.uint64)
        np.save(offsets_file(self._file), offsets)
        self._hash.update(offsets.tobytes())
        return self._hash.hexdigest()


class CoreReader:
    """Reads the core of one task, chunk by chunk, on any thread; to be closed."""

    def __init__(self, file: Path, expected_xxh3: str) -> None:
        """Raises PlanError where the two files are not those that the plan was saved with."""
        self._file = file
        try:
            self._offsets = np.load(offsets_file(file), allow_pickle=False)
            actual = _hash_of(file, self._offsets)
        except (OSError, ValueError) as error:
            raise PlanError(f"{file}: cannot be read: {error}. Run `cpimerge plan` again") from error
        if actual != expected_xxh3:
            raise PlanError(f"{file}: is not the core that the plan was saved with. Run `cpimerge plan` again")
        self._handle = os.open(file, os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        os.close(self._handle)

    def positions(self, chunk: int, elements: int) -> Positions:
        """Ascending positions uint32 [k] within chunk number `chunk`, which has so many elements.

        Raises PlanError where there is no such chunk, or its positions do not fit: the plan was edited amiss.
        """
        if not 0 <= chunk < len(self._offsets) - 1:
            raise PlanError(f"{self._file}: has no chunk {chunk}, which plan.json refers to. Run `cpimerge plan` again")
        begin, end = int(self._offsets[chunk]), int(self._offsets[chunk + 1])
        data = os.pread(self._handle, end - begin, begin)
        found = np.frombuffer(BitMap.deserialize(data).to_array(), np.uint32)
        if found.size and found.max() >= elements:
            raise PlanError(f"{self._file}: chunk {chunk} does not fit its tensor. Run `cpimerge plan` again")
        return found


def offsets_file(file: Path) -> Path:
    """Where the offsets of a core file lie: uint64 [chunks + 1], bytes."""
    return file.with_suffix(".npy")


def _hash_of(file: Path, offsets: npt.NDArray[np.uint64]) -> str:
    digest = xxhash.xxh3_128()
    with open(file, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    digest.update(offsets.tobytes())
    return digest.hexdigest()
