"""A pool of tensors that share a budget: from a sample of it to its settled chunks.

    sample    a few elements: between which magnitudes each core's smallest must lie      → a bracket for each task
    scan      one look at everything: hashes, statistics, and what is certain by the bracket; what is not is kept
    resolve   the exact thresholds, from what was kept; then the rest of the cores and of the Gram matrices

So everything is read once. Only where a bracket proves wrong, or holds too many elements to keep (many equal updates),
is the pool read again: to find the thresholds by counting, and to settle what could not be kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from itertools import accumulate, chain, islice
from operator import iadd

import numpy as np

from .cores import NOTHING, Threshold, budget
from .kernels import scanning
from .kernels.arrays import Bits, Floats
from .kernels.scanning import Found
from .passes import Block, Counts, Limits, Passes, Scanned, Settled
from .preflight import TensorSpec
from .selection import Bracket, around, everything, narrow, pick
from .shelf import Shelf, Shelved
from .stream import BLOCK_CHUNKS, CHUNK, Item, Map, chunks, row_count

__all__ = [
    "SMALL",
    "SMALL_ROWS",
    "Begun",
    "Examination",
    "Pool",
    "Result",
    "blocks_of",
    "elements_of",
    "examine",
    "is_small",
    "pool_rows",
]

# A pool of which all checkpoints together hold so many elements, and of so many rows whose Gram matrices are kept, is
# examined by one worker in memory: nothing of it goes through a file, and no worker waits for the others.
SMALL = 144 * CHUNK
SMALL_ROWS = 1 << 14
GATHERED = 1 << 18  # magnitudes of a task that are looked at together
VALUES = Found._fields.index("values")

Pool = list[TensorSpec]
Result = Scanned | Settled


@dataclass(frozen=True)
class Begun:
    """The first look at a pool, as far as it is done: its bracket, and the chunks of its first blocks."""

    bracket: Bracket
    scanned: Sequence[Scanned] = ()


def examine(pool: Pool, granularity: str, passes: Passes, run: Map) -> Iterator[Result]:
    """Every chunk of a pool as first scanned, without its arrays; then, if all are sound, those settled that differ."""
    examination = Examination(pool, granularity, passes, run)
    return examination.results(Begun(examination.sample()) if pool[0].is_float else None)


class Examination:
    """One pool, from its sample to its settled chunks. With a `shelf`, scanned chunks wait there, not in memory."""

    def __init__(self, pool: Pool, granularity: str, passes: Passes, run: Map, shelf: Shelf | None = None) -> None:
        self.pool = pool
        self.passes = passes
        self.run = run
        self.shelf = shelf
        self.blocks = blocks_of(pool, granularity)
        elements = elements_of(pool)
        self.sizes = [budget(p, elements) if pool[0].eligible else 0 for p in pool[0].density]

    def sample(self) -> Bracket:
        """The bracket of a pool of floating-point tensors."""
        parts = list(self.run(self.passes.sample, self.passes.sample_parts(self.blocks, self.sizes)))
        found = np.concatenate([np.empty((len(self.sizes), 0), np.uint32), *parts], axis=1)
        return around(found, self.sizes, elements_of(self.pool), self.run)

    def results(self, begun: Begun | None) -> Iterator[Result]:
        """As `examine`, but without the chunks that are scanned in `begun`; None for tensors that are not float."""
        if begun is None:
            for block in self.run(self.passes.compare, self.blocks):
                yield from block
            return
        scanned, sound, changed = [], True, np.zeros(len(self.sizes), np.int64)
        left = self.blocks[_whole_blocks(self.blocks, len(begun.scanned)) :]
        for number, one in enumerate(chain(begun.scanned, self._scan(begun.bracket, left))):
            if number >= len(begun.scanned):
                yield one if isinstance(one.kept, Shelved) else replace(one, kept=None)
            sound &= not one.faults and not one.overflows
            changed += one.counts[:, 0]
            scanned.append(replace(one, digests=()))
        if sound:
            self._drop_identical(scanned)
            yield from self._settle(begun.bracket, scanned, np.minimum(self.sizes, changed))

    def _scan(self, bracket: Bracket, blocks: Sequence[Block]) -> Iterator[Scanned]:
        for block in self.run(partial(self._scan_block, bracket=bracket), blocks):
            yield from block

    def _scan_block(self, block: Block, bracket: Bracket) -> list[Scanned]:
        scanned = self.passes.scan(block, bracket)
        return scanned if self.shelf is None else [replace(one, kept=_put(self.shelf, one.kept)) for one in scanned]

    def _drop_identical(self, scanned: list[Scanned]) -> None:
        """Tensors that are the same bytes everywhere are not settled."""
        differing = {one.spec.name for one in scanned if not one.identical}
        self.blocks = [block for block in self.blocks if block.spec.name in differing]
        scanned[:] = [one for one in scanned if one.spec.name in differing]

    def _settle(self, bracket: Bracket, scanned: list[Scanned], wanted: Counts) -> Iterator[Settled]:
        """The chunks of a sound pool, whose cores have `wanted` [T] elements."""
        above, between, crowded = _totals(scanned, len(wanted))
        if not bracket.holds(above, between, wanted) or (crowded and not bracket.is_exact):
            scanned.clear()
            if self.shelf is not None:
                self.shelf.clear()
            bracket, _ = narrow(everything(len(wanted)), wanted, wanted, self._count_again, enough=0)
            scanned = [replace(one, digests=()) for one in self._scan(bracket, self.blocks)]
            above, between, crowded = _totals(scanned, len(wanted))
        thresholds = self._thresholds(bracket, scanned, wanted - above, between)
        limits = self._limits(thresholds, scanned, crowded)
        if crowded:
            by_block = ((block, list(islice(limits, len(block.chunks)))) for block in self.blocks)
            settled = self.run(partial(self.passes.settle, bracket=bracket), by_block)
        else:
            settled = self.run(partial(self._resolve, bracket=bracket), _some(zip(scanned, limits, strict=True)))
        for some in settled:
            yield from some

    def _thresholds(
        self, bracket: Bracket, scanned: list[Scanned], missing: Counts, between: Counts
    ) -> list[Threshold]:
        """Exact, from counts where they say enough, else from the open elements that were kept."""
        known = bracket.known(missing, between)
        unknown = np.array([0 if threshold else m for threshold, m in zip(known, missing, strict=True)], np.int64)
        if not unknown.any():
            return [threshold or NOTHING for threshold in known]
        narrower, wanted = narrow(bracket, unknown, between, partial(self._count_kept, scanned), enough=GATHERED)
        known = [
            threshold or (Threshold(int(low), int(ties)) if low == high else None)
            for threshold, low, high, ties in zip(known, narrower.low, narrower.high, wanted, strict=True)
        ]
        asked = [task for task, threshold in enumerate(known) if threshold is None]
        parts = list(self.run(partial(self._gather, narrower, asked), _some(scanned))) if asked else []

        def exact(number: int) -> Threshold:
            return pick(np.concatenate([part[number] for part in parts]), int(wanted[asked[number]]))

        for task, threshold in zip(asked, self.run(exact, range(len(asked))), strict=True):
            known[task] = threshold
        return [threshold or NOTHING for threshold in known]

    def _gather(self, bracket: Bracket, tasks: Sequence[int], some: Sequence[Scanned]) -> list[Bits]:
        """The magnitudes in the bracket, of each of `tasks`."""
        parts: list[list[Bits]] = [[] for _ in tasks]
        for one in some:
            values = self._values(one)
            out = np.empty((len(bracket.low), len(values) + 1), np.uint32)
            counts = scanning.gather(values, bracket.low, bracket.high, out)
            for part, task in zip(parts, tasks, strict=True):
                part.append(out[task, : counts[task]].copy())
        return [np.concatenate(part) for part in parts]

    def _count_kept(self, scanned: list[Scanned], bracket: Bracket, shifts: Counts, bins: int) -> Counts:
        def count(some: Sequence[Scanned]) -> Counts:
            values = (self._values(one) for one in some)
            return reduce(iadd, (self.passes.count_bins(each, bracket, shifts, bins) for each in values))

        counts: Counts = reduce(iadd, self.run(count, _some(scanned)))
        return counts

    def _count_again(self, bracket: Bracket, shifts: Counts, bins: int) -> Counts:
        count = partial(self.passes.count_block, bracket=bracket, shifts=shifts, bins=bins)
        counts: Counts = reduce(iadd, self.run(count, self.blocks))
        return counts

    def _limits(self, thresholds: list[Threshold], scanned: list[Scanned], crowded: bool) -> Iterator[Limits]:
        """For each chunk every task's threshold, with the ties that fall into this chunk: the earlier get them."""
        if not any(threshold.ties for threshold in thresholds):
            yield from (thresholds for _ in scanned)
            return
        bits = np.array([threshold.bits for threshold in thresholds], np.uint32)
        left = np.array([threshold.ties for threshold in thresholds])
        # Where not all open elements were kept, all of them are ties.
        if crowded:
            equal: Iterator[Counts] = (one.counts[:, 4] for one in scanned)
        else:
            equal = chain.from_iterable(self.run(partial(self._count_equal, bits), _some(scanned)))
        for counts in equal:
            taken = np.minimum(counts, left)
            left -= taken
            yield [Threshold(limit.bits, ties) for limit, ties in zip(thresholds, taken.tolist(), strict=True)]

    def _count_equal(self, bits: Bits, some: Sequence[Scanned]) -> Counts:
        """Of each chunk the open elements whose magnitude is that of `bits` [T]: int64 [chunks, T]."""
        counts = np.zeros((len(some), len(bits)), np.int64)
        for one, row in zip(some, counts, strict=True):
            scanning.count_equal(self._values(one), bits, row)
        return counts

    def _resolve(self, some: Sequence[tuple[Scanned, Limits]], bracket: Bracket) -> list[Settled]:
        return [
            self.passes.resolve(scanned.spec, scanned.chunk, self._kept(scanned), limits, bracket)
            for scanned, limits in some
        ]

    def _values(self, scanned: Scanned) -> Floats:
        """What every checkpoint has where an element is open: float32 [U, C]."""
        if isinstance(scanned.kept, Shelved) and self.shelf is not None:
            return self.shelf.get_one(scanned.kept, VALUES)
        return self._kept(scanned).values

    def _kept(self, scanned: Scanned) -> Found:
        kept = scanned.kept
        if isinstance(kept, Shelved):
            assert self.shelf is not None
            return Found(*self.shelf.get(kept))
        assert kept is not None
        return kept


def _some(items: Iterable[Item]) -> Iterator[list[Item]]:
    """What a worker takes at a time."""
    left = iter(items)
    while some := list(islice(left, BLOCK_CHUNKS)):
        yield some


def _put(shelf: Shelf, kept: Found | Shelved | None) -> Shelved:
    assert isinstance(kept, Found)
    return shelf.put(kept)


def _totals(scanned: Iterable[Scanned], tasks: int) -> tuple[Counts, Counts, bool]:
    """How many elements lie above the brackets and in them, each [T]; and whether some of these were not kept."""
    counts = np.zeros((tasks, 5), np.int64)
    crowded = False
    for one in scanned:
        counts += one.counts
        crowded |= one.is_crowded
    return counts[:, 3], counts[:, 4], crowded


def blocks_of(pool: Pool, granularity: str) -> list[Block]:
    """What workers take at a time: neighbouring chunks of a tensor."""
    result = []
    for spec in pool:
        every = chunks(spec.shape, granularity)
        result += [Block(spec, every[i : i + BLOCK_CHUNKS]) for i in range(0, len(every), BLOCK_CHUNKS)]
    return result


def _whole_blocks(blocks: Sequence[Block], count: int) -> int:
    """How many blocks the first `count` chunks are."""
    ends = list(accumulate(len(block.chunks) for block in blocks))
    return ends.index(count) + 1 if count else 0


def is_small(pool: Pool, granularity: str) -> bool:
    """Whether one worker examines it, in memory."""
    stored = elements_of(pool) * len(pool[0].sources)
    return stored <= SMALL and pool_rows(pool, granularity) <= SMALL_ROWS


def pool_rows(pool: Pool, granularity: str) -> int:
    """Vectors of a pool, each of which has a Gram matrix."""
    return sum(row_count(spec.shape, granularity) for spec in pool)


def elements_of(pool: Pool) -> int:
    """Elements of all its tensors."""
    return sum(spec.elements for spec in pool)
