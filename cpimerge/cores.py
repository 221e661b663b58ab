"""A task's core: exactly which elements moved most, and how that is kept on disk.

The k-th largest magnitude is found exactly from two histograms of its bit pattern (high half, then low half), so
nothing is sorted and no tensor needs to fit in memory. METHOD §1 says what a core is.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import floor
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import xxhash
from pyroaring import BitMap

from .errors import PlanError

__all__ = ["CoreReader", "CoreWriter", "Threshold", "budget", "pair_counts"]

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
    return floor(density * elements)


def bitmap(positions: Positions) -> BitMap:
    """Ascending positions within a chunk as a Roaring bitmap."""
    return BitMap(array("I", positions.tobytes()))  # from a numpy array it is ten times slower


def pair_counts(bitmaps: Sequence[BitMap]) -> Counts:
    """|Ca ∩ Cb| for every pair of tasks: int64 [T, T], symmetric, the cores' own sizes on the diagonal."""
    counts = np.zeros((len(bitmaps), len(bitmaps)), np.int64)
    for a, first in enumerate(bitmaps):
        counts[a, a] = len(first)
        for b in range(a):
            counts[a, b] = counts[b, a] = first.intersection_cardinality(bitmaps[b])
    return counts


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

    def append(self, core: BitMap) -> None:
        data = core.serialize()
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
    """Reads the core of one task, chunk by chunk."""

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

    def positions(self, chunk: int, elements: int) -> Positions:
        """Ascending positions uint32 [k] within chunk number `chunk`, which has so many elements.

        Raises PlanError where there is no such chunk, or its positions do not fit: the plan was edited amiss.
        """
        if not 0 <= chunk < len(self._offsets) - 1:
            raise PlanError(f"{self._file}: has no chunk {chunk}, which plan.json refers to. Run `cpimerge plan` again")
        begin, end = int(self._offsets[chunk]), int(self._offsets[chunk + 1])
        with open(self._file, "rb", buffering=0) as stream:
            stream.seek(begin)
            data = stream.read(end - begin)
        found = np.frombuffer(BitMap.deserialize(data).to_array(), np.uint32)
        if found.size and found[-1] >= elements:
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
