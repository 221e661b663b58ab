"""Exactly which magnitude is the k-th largest, found without sorting and without keeping what is read.

A sample brackets the k-th largest magnitude: above the bracket an element is certainly in the core, below it certainly
not. One look at everything counts both, and keeps the few elements between; among them the k-th is then found exactly.
The bracket is only a guess that saves work: whether it holds follows from the counts, and where it does not, the
magnitude is found by counting bins. All of it depends on the data alone.

Magnitudes are bit patterns (uint32) of float32. T tasks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .cores import NOTHING, Threshold
from .errors import CheckpointError
from .kernels.arrays import Bits, Counts
from .kernels.scanning import kth_bin
from .stream import Map

__all__ = ["Bracket", "around", "everything", "narrow", "pick", "sample_size"]

LEAST, LARGEST = 1, 0x7F7FFFFF  # magnitudes that may be in a core: those of finite numbers other than 0
RUN = 512  # neighbouring elements of a sample that are read together
WHOLE = 1 << 15  # so few elements are sampled entirely
SHARE = 128  # else one element in so many
MOST = 1 << 21  # but no more of all tasks together
DEVIATIONS = 3.5  # half the width of a bracket; a wrong guess costs time, not exactness
BIN_BITS = 16


@dataclass(frozen=True)
class Bracket:
    """For each task the magnitudes between which its threshold lies, both included: uint32 [T]."""

    low: Bits
    high: Bits

    @classmethod
    def at(cls, bounds: Sequence[tuple[int, int]]) -> Bracket:
        low, high = np.array(bounds, np.uint32).reshape(-1, 2).T
        return cls(np.ascontiguousarray(low), np.ascontiguousarray(high))

    @property
    def is_exact(self) -> bool:
        """Whether every bracket holds one magnitude at most."""
        return bool((self.low >= self.high).all())

    def holds(self, above: Counts, between: Counts, wanted: Counts) -> bool:
        """Whether the core of `wanted` [T] elements ends in the bracket that so many lie above, and in."""
        return bool(((above <= wanted) & (wanted <= above + between)).all())

    def known(self, missing: Counts, between: Counts) -> list[Threshold | None]:
        """The thresholds that counts settle, when `missing` [T] of `between` [T] elements in it are in the cores."""
        columns = (self.low.tolist(), self.high.tolist(), missing.tolist(), between.tolist())
        return [_known(*row) for row in zip(*columns, strict=True)]


NO_CORE = (LARGEST + 1, LARGEST + 1)


def _known(low: int, high: int, missing: int, between: int) -> Threshold | None:
    if missing == 0:
        return Threshold(high, 0)
    if missing == between:  # all are in, hence no ties to count
        return Threshold(low - 1, 0)
    return Threshold(low, missing) if low == high else None


def everything(tasks: int) -> Bracket:
    """The bracket that knows nothing."""
    return Bracket.at([(LEAST, LARGEST)] * tasks)


def sample_size(elements: int, tasks: int) -> int:
    """How many of a pool's elements to sample: all, or a whole number of runs."""
    if elements <= WHOLE:
        return elements
    return min(max(elements // SHARE, WHOLE // 2), MOST // tasks) // RUN * RUN


def around(sample: Bits, sizes: Sequence[int], elements: int, run: Map = map) -> Bracket:
    """A bracket for each task of its `sizes` [T]-th largest among so many elements, of which `sample` uint32 [T, S].

    A sample of fewer than all elements consists of runs of RUN. Tasks are worked on by `run`.
    """
    return Bracket.at(list(run(lambda one: _bounds(one[0], one[1], elements), zip(sample, sizes, strict=True))))


def _bounds(sample: Bits, size: int, elements: int) -> tuple[int, int]:
    if size == 0:
        return NO_CORE
    if sample.size == elements:
        exact = _ranked(sample, size)
        return exact, exact
    if sample.size == 0:
        return LEAST, LARGEST
    rank = size * sample.size / elements
    hits = (sample.reshape(-1, RUN) >= _ranked(sample, round(rank))).sum(axis=1, dtype=np.int64)
    # Neighbours are alike, so how much the hits of the runs differ says more than that of independent elements.
    spread = math.sqrt(len(hits) * int((hits * hits).sum()) - int(hits.sum()) ** 2) / math.sqrt(len(hits))
    slack = DEVIATIONS * max(spread, math.sqrt(rank * (1 - rank / sample.size))) + 2
    return _ranked(sample, math.ceil(rank + slack)), _ranked(sample, math.floor(rank - slack))


def _ranked(sample: Bits, rank: int) -> int:
    """The rank-th largest of `sample` uint32 [S], but one that may be in a core; ranks beyond it give the bounds."""
    if rank < 1:
        return LARGEST
    if rank > sample.size:
        return LEAST
    place = sample.size - rank
    return max(LEAST, int(np.partition(sample, place)[place]))


Count = Callable[[Bracket, npt.NDArray[np.int64], int], Counts]  # bracket, shifts [T], bins → counts [T, bins]


def narrow(bracket: Bracket, wanted: Counts, candidates: Counts, count: Count, enough: int) -> tuple[Bracket, Counts]:
    """Narrow each task's bracket around its `wanted` [T]-th largest, until no more than `enough` candidates are left.

    Or until it holds that magnitude only. Where 0 is wanted, the bracket holds nothing then. `count` counts, for each
    task, the magnitudes m in the bracket by the bin (m − low) >> shift; about so many `candidates` [T] are there.
    Returns the narrower bracket, and which largest in it is wanted [T]. Raises CheckpointError where there are fewer
    than wanted, because an input changed.
    """
    low, high, left = (values.astype(np.int64) for values in (bracket.low, bracket.high, wanted))
    low = np.where(left > 0, low, high + 1)
    left_over = np.where(left > 0, candidates, 0)
    while (low < high).any() and left_over.max() > enough:
        shifts = np.array([max(0, int(width).bit_length() - BIN_BITS) for width in high - low], np.int64)
        bins = 1 + max(int(width) >> int(shift) for width, shift in zip(high - low, shifts, strict=True))
        counts = count(Bracket(low.astype(np.uint32), high.astype(np.uint32)), shifts, bins)
        for task in np.flatnonzero(left):
            if counts[task].sum() < left[task]:
                raise CheckpointError("an input changed during the run: start again when nothing writes to it")
            place, left[task] = kth_bin(counts[task], left[task])
            left_over[task] = counts[task, place]
            low[task] += place << shifts[task]
            high[task] = min(high[task], low[task] + (1 << shifts[task]) - 1)
    return Bracket(low.astype(np.uint32), high.astype(np.uint32)), left


def pick(candidates: Bits, wanted: int) -> Threshold:
    """The threshold that is the `wanted`-th largest of `candidates` uint32 [n], which is reordered; NOTHING for 0."""
    if wanted == 0:
        return NOTHING
    place = candidates.size - wanted
    candidates.partition(place)
    bits = int(candidates[place])
    ties = wanted - int((candidates[place:] > bits).sum())
    # Where all that are equal are in, the core is all above the next smaller pattern, and there are no ties to count.
    return Threshold(bits - 1, 0) if ties == int((candidates == bits).sum()) else Threshold(bits, ties)
