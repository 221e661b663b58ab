"""Many small tensors in one go: all that `plan` wants of a tensor whose only chunk is in memory.

Each tensor is treated as a large one is (see selection.py): a sample brackets every core, one look settles what is
certain, and the threshold is found among what is open. Between two tensors there is no interpreter.

B tensors; S elements of a sample.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from . import bitsets, scanning
from .arrays import WORD, Bits, Counts, Doubles, Floats, Stored, Words, compiled
from .floats import item_bytes
from .scanning import INFINITE, Found, Look, Scratch

SETTLED, IDENTICAL, OPEN = 0, 1, 2  # what became of a tensor; open: left to those who can do more or say what is wrong

LEAST, LARGEST = np.uint32(1), np.uint32(0x7F7FFFFF)  # magnitudes that may be in a core
RUN = 64  # neighbouring elements of a sample
WHOLE = 1 << 12  # so few elements are sampled entirely
SHARE = 16  # else one element in so many
MOST = 1 << 12  # but no more of a task
DEVIATIONS = 3.5  # half the width of a bracket
GOLDEN = 0.6180339887498949  # its multiples spread over [0, 1) and fall in with no row length
DIGIT = 8  # bits of a magnitude that are counted at a time


class Batch(NamedTuple):
    """Tensors that lie one after the other in the rows of `raw`, which has one for each checkpoint."""

    begins: Counts  # [B]: bytes before each in every row
    kinds: Counts  # [B, C]
    elements: Counts  # [B]
    rows: Counts  # [B]: elements of a row
    sizes: Counts  # [B, T]: of the cores
    grams: Counts  # [B + 1]: where each one's Gram matrices begin in `Results.gram`
    cores: Counts  # [B + 1]: where its cores begin in `Results.cores`


class Blend(NamedTuple):
    """What all tensors of a merge have in common; see `Look`."""

    tasks: int
    member: int
    delta: bool
    near: np.uint32
    least: Bits  # by the base's kind
    half: Floats  # by the base's kind


class Work(NamedTuple):
    """Room for one tensor; contents do not matter."""

    bits: Words  # [T · words of a chunk]
    inward: Words  # [T · words of a chunk]
    places: Bits  # [elements of a chunk]
    values: Floats  # [elements of a chunk, C]
    sample: Bits  # [T, MOST]
    candidates: Bits  # [elements of a chunk]
    spare: Bits  # [elements of a chunk]
    bins: Counts  # [2^DIGIT]


def work(checkpoints: int, elements: int, places: Bits, values: Floats) -> Work:
    """Room for tensors of so many checkpoints and elements; `places` and `values` may serve others too."""
    candidates, spare = (np.empty(elements, np.uint32) for _ in range(2))
    bits, inward = (np.empty(checkpoints * -(-elements // WORD), np.uint64) for _ in range(2))
    sample = np.empty((checkpoints, MOST), np.uint32)
    return Work(bits, inward, places, values, sample, candidates, spare, np.empty(1 << DIGIT, np.int64))


class Results(NamedTuple):
    """What was found of each tensor; all of it 0 at first. As in `Found` and `bitsets.overlaps`."""

    states: npt.NDArray[np.int8]  # [B]
    counts: Counts  # [B, T, 5]
    peaks: Bits  # [B, C − 1]
    sums: Doubles  # [B, T, 2]
    gram: Doubles  # [rows of all, P]
    pairs: Counts  # [B, T, T]
    aligned: Counts  # [B, T, T]
    inwards: Counts  # [B, T, T]
    claimed: Counts  # [B]: elements in any core
    lengths: Counts  # [B, T]: bytes of each core
    cores: Stored  # Roaring bitmaps, those of a tensor one after the other


@compiled
def settle_all(raw: Stored, batch: Batch, blend: Blend, room: Scratch, work: Work, out: Results) -> None:
    """Settle every tensor of a batch, or say that it is identical everywhere, or leave it open.

    `raw` uint8 [C, n] holds the tensors' bytes. Left open are tensors with an update that is not finite, and those
    whose bracket was a wrong guess.
    """
    tasks = blend.tasks
    for b in range(batch.elements.size):
        size, base = batch.elements[b], batch.kinds[b, 0]
        words = -(-size // WORD)
        least, half = blend.least[base], blend.half[base]
        row = min(batch.rows[b], size)
        look = Look(size, row, tasks, blend.member, blend.delta, blend.near, least, half, batch.begins[b])
        work.bits[: tasks * words] = 0
        work.inward[: tasks * words] = 0
        found = Found(
            work.bits[: tasks * words].reshape((tasks, words)),
            work.inward[: tasks * words].reshape((tasks, words)),
            out.counts[b],
            out.peaks[b],
            out.sums[b],
            out.gram[batch.grams[b] : batch.grams[b + 1]],
            work.places,
            work.values,
        )
        out.states[b] = _settle(raw, batch.kinds[b], batch.sizes[b], look, found, room, work)
        if out.states[b] == SETTLED:
            its = out.pairs[b], out.aligned[b], out.inwards[b]
            out.claimed[b] = bitsets.overlaps(found.bits, found.inward, *its)
            end = batch.cores[b]
            for t in range(tasks):
                out.lengths[b, t] = bitsets.serialize(found.bits[t], out.cores[end:])
                end += out.lengths[b, t]


@compiled
def _settle(raw: Stored, kinds: Counts, sizes: Counts, look: Look, found: Found, room: Scratch, work: Work) -> Any:
    low, high = np.empty(look.tasks, np.uint32), np.empty(look.tasks, np.uint32)
    sampled = _sample(raw, kinds, look, room, work.sample) if sizes.any() else 0
    for t in range(look.tasks):
        low[t], high[t] = _bracket(work.sample[t, :sampled], sizes[t], look.size, work)
    opened = scanning.scan(raw, kinds, look, low, high, found, room)
    if (found.peaks >= INFINITE).any():
        return OPEN
    if _are_identical(raw, kinds, look, found):
        return IDENTICAL
    limits, ties = np.empty(look.tasks, np.uint32), np.zeros(look.tasks, np.int64)
    for t in range(look.tasks):
        above, between = found.counts[t, 3], found.counts[t, 4]
        wanted = min(sizes[t], found.counts[t, 0])
        if not above <= wanted <= above + between:
            return OPEN
        values = found.values[:opened]
        limits[t], ties[t] = _threshold(values, t, low[t], high[t], wanted - above, between, work)
    left = Found(
        found.bits,
        found.inward,
        found.counts,
        found.peaks,
        found.sums,
        found.gram,
        found.places[:opened],
        found.values[:opened],
    )
    scanning.resolve(look, low, high, limits, ties, left, room)
    return SETTLED


@compiled
def _sample(raw: Stored, kinds: Counts, look: Look, room: Scratch, out: Bits) -> int:
    """Magnitudes of every task into `out` [T, ≥ S]: of all elements, or of runs in all parts; returns S."""
    run, runs = (look.size, 1) if look.size <= WHOLE else (RUN, min(look.size // SHARE, MOST) // RUN)
    part = look.size / runs
    starts = np.empty(runs, np.int64)
    for number in range(runs):
        starts[number] = int(number * part + (number * GOLDEN % 1.0) * (part - run))
    scanning.magnitudes(raw, kinds, starts, run, out[: look.tasks], room, look.begin)
    return runs * run


@compiled
def _bracket(sample: Bits, size: int, elements: int, work: Work) -> tuple[np.uint32, np.uint32]:
    """As `selection.around`, for one task."""
    if size == 0:
        return np.uint32(LARGEST + np.uint32(1)), np.uint32(LARGEST + np.uint32(1))
    if sample.size == elements:
        exact = _ranked(sample, size, work)
        return exact, exact
    rank = size * sample.size / elements
    middle = _ranked(sample, int(rank + 0.5), work)
    runs = sample.size // RUN
    hits = squares = 0
    for number in range(runs):
        inside = (sample[number * RUN : (number + 1) * RUN] >= middle).sum()
        hits += inside
        squares += inside * inside
    spread = math.sqrt((runs * squares - hits * hits) / runs)
    slack = DEVIATIONS * max(spread, math.sqrt(rank * (1 - rank / sample.size))) + 2
    return _ranked(sample, math.ceil(rank + slack), work), _ranked(sample, math.floor(rank - slack), work)


@compiled
def _ranked(sample: Bits, rank: int, work: Work) -> Any:
    """The rank-th largest that may be in a core; ranks beyond the sample give the bounds."""
    if rank < 1:
        return LARGEST
    if rank > sample.size:
        return LEAST
    return max(LEAST, kth_largest(sample, rank, work.spare, work.bins))


@compiled
def kth_largest(values: Bits, k: int, spare: Bits, bins: Counts) -> Any:
    """The k-th largest of `values` uint32 [n], 1 ≤ k ≤ n: digit by digit, among those that share the digits before.

    `spare` uint32 [≥ n] and `bins` int64 [2^DIGIT] are room.
    """
    count = values.size
    spare[:count] = values
    prefix = np.uint32(0)
    for shift in (24, 16, 8, 0):
        bins[:] = 0
        for i in range(count):
            bins[(spare[i] >> np.uint32(shift)) & np.uint32((1 << DIGIT) - 1)] += 1
        digit, k = scanning.kth_bin(bins, k)
        prefix |= np.uint32(digit) << np.uint32(shift)
        kept = 0
        for i in range(count):
            value = spare[i]
            spare[kept] = value  # overwritten by the next, unless it belongs
            kept += value >> np.uint32(shift) == prefix >> np.uint32(shift)
        count = kept
    return prefix


@compiled
def _are_identical(raw: Stored, kinds: Counts, look: Look, found: Found) -> bool:
    """The same bytes and dtype in every checkpoint."""
    if found.counts[:, 0].any() or (kinds != kinds[0]).any():
        return False
    end = look.begin + item_bytes(kinds[0]) * look.size
    different = np.uint8(0)
    for c in range(1, kinds.size):
        different |= _difference(raw[0, look.begin : end], raw[c, look.begin : end])
    return bool(different == 0)


@compiled
def _difference(a: Stored, b: Stored) -> Any:
    """The bits in which some byte differs."""
    different = np.uint8(0)
    for i in range(a.size):
        different |= a[i] ^ b[i]
    return different


@compiled
def _threshold(
    values: Floats, task: int, low: np.uint32, high: np.uint32, missing: int, between: int, work: Work
) -> tuple[np.uint32, int]:
    """The task's core ends with the `missing`-th largest of the `between` that are open: the limit, and its ties.

    As `Bracket.known` and `pick` in selection.py.
    """
    if missing == 0:
        return high, 0
    if missing == between:
        return np.uint32(low - np.uint32(1)), 0
    if low == high:
        return low, missing
    count = 0
    for u in range(values.shape[0]):
        m = scanning.moved(values[u, 1 + task], values[u, 0])
        work.candidates[count] = m
        count += (low <= m) & (m <= high)
    candidates = work.candidates[:count]
    bits = kth_largest(candidates, missing, work.spare, work.bins)
    ties = missing - (candidates > bits).sum()
    if ties == (candidates == bits).sum():
        return np.uint32(bits - np.uint32(1)), 0
    return bits, ties
