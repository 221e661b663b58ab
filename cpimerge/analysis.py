"""The streamed read of `plan`: every tensor's cores, overlaps, update statistics and Gram matrices.

Tensors that share a budget form a pool (METHOD §1). A pool is examined in three steps:

    sample    a few elements: between which magnitudes each core's smallest must lie      → a bracket for each task
    scan      one look at everything: hashes, statistics, and what is certain by the bracket; what is not is kept
    resolve   the exact thresholds, from what was kept; then the rest of the cores and of the Gram matrices

So everything is read once. Only where a bracket proves wrong, or holds too many elements to keep (many equal updates),
is the pool read again: to find the thresholds by counting, and to settle what could not be kept.

A small pool is examined by one worker, in memory. The blocks of a large one are shared by all workers, and what they
keep waits on a shelf. Both do the same sums in the same order, and which it is depends on the sizes alone.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from itertools import groupby, islice, repeat
from operator import add
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from .cores import NOTHING, Threshold, budget
from .errors import IncompatibleError
from .kernels import scanning
from .kernels.arrays import Bits
from .kernels.scanning import Found
from .passes import Block, Counts, Limits, Passes, Scanned, Settled
from .preflight import Inputs, TensorSpec, pools
from .selection import Bracket, everything, narrow, pick
from .shelf import Shelf, Shelved
from .singles import is_single, settle_singles
from .stream import BLOCK_CHUNKS, CHUNK, Progress, Workers, chunks, row_count
from .token_rows import MovedRows

__all__ = ["SMALL", "SMALL_ROWS", "Analysis", "Findings", "content_hash", "examine", "is_small", "pool_rows"]

# A pool of so many elements, and of so many rows whose Gram matrices are kept, is examined by one worker in memory.
SMALL = 16 * CHUNK
SMALL_ROWS = 1 << 14
GATHERED = 1 << 18  # magnitudes of a task that are looked at together

Pool = list[TensorSpec]
Result = Scanned | Settled
Run = Callable[..., Iterator[Any]]  # `map`: here, or on all workers


@dataclass
class Findings:
    """What the read found out about one tensor; shapes and meanings as in `Found` and `Settled`."""

    identical: bool
    digests: list[array[int]]
    updates: Counts
    pairs: Counts
    claimed: int
    sums: npt.NDArray[np.float64]

    @classmethod
    def empty(cls, spec: TensorSpec, tasks: int) -> Findings:
        """Nothing found yet."""
        digests = [array("Q") for _ in spec.sources]
        pairs = np.zeros((tasks, tasks), np.int64)
        return cls(True, digests, np.zeros((tasks, 3), np.int64), pairs, 0, np.zeros((tasks, 2)))

    @property
    def hashes(self) -> list[str]:
        """For each checkpoint the xxh3-64 of its chunks' digests: identifies the tensor's content."""
        return [content_hash(digests) for digests in self.digests]


def content_hash(digests: Sequence[int]) -> str:
    """xxh3-64, in hex, of the xxh3-64 digests of a tensor's chunks, little-endian and in order."""
    return xxhash.xxh3_64_hexdigest(np.array(digests, "<u8").tobytes())


@dataclass
class Analysis:
    """One read of all inputs. `sink` gets every settled chunk, in the order of pools, tensors and chunks."""

    inputs: Inputs
    workers: Workers
    shelf: Shelf
    sink: Callable[[Settled], None]
    progress: Progress
    findings: dict[str, Findings] = field(init=False)
    problems: dict[tuple[str, int], str] = field(default_factory=dict)  # by tensor and checkpoint
    bytes_done: int = 0

    def __post_init__(self) -> None:
        tasks = len(self.inputs.recipe.tasks)
        self.findings = {spec.name: Findings.empty(spec, tasks) for spec in self.inputs.tensors}

    def run(self) -> dict[str, Findings]:
        """Findings by tensor name. Raises IncompatibleError naming every NaN, Inf and unequal non-float tensor."""
        every = pools(self.inputs.tensors, self.inputs.recipe.scope).values()
        for small, batch in _batches(every, self.inputs.recipe.granularity):
            for results in self.workers.map(self._examine_all, batch) if small else map(self._share, batch):
                for result in results:
                    self._keep(result)
        self.progress("plan", self.inputs.nbytes, self.inputs.nbytes)
        if self.problems:
            raise IncompatibleError(self.problems[key] for key in sorted(self.problems))
        return self.findings

    def _examine_all(self, some: list[Pool]) -> list[Result]:
        """Small pools, on this worker."""
        granularity, passes = self.inputs.recipe.granularity, self._passes()
        results: list[Result] = []
        for single, group in groupby(some, key=lambda pool: len(pool) == 1 and is_single(pool[0], granularity)):
            pools = list(group)
            together = settle_singles([pool[0] for pool in pools], granularity, passes) if single else repeat([])
            for pool, found in zip(pools, together, strict=False):
                results += found or examine(pool, granularity, passes, map)
        return results

    def _share(self, some: list[Pool]) -> Iterator[Result]:
        """Large pools, on all workers."""
        granularity = self.inputs.recipe.granularity
        for pool in some:
            yield from examine(pool, granularity, self._passes(), self.workers.map, self.shelf)
            self.shelf.clear()

    def _passes(self) -> Passes:
        recipe = self.inputs.recipe
        return Passes(self.workers, len(recipe.tasks), self.inputs.first_member, recipe.space == "delta")

    def _keep(self, result: Result) -> None:
        if isinstance(result, Scanned):
            self._keep_scanned(result)
            return
        findings = self.findings[result.spec.name]
        findings.pairs += result.pairs
        findings.claimed += result.claimed
        findings.sums += result.sums
        self.sink(result)

    def _keep_scanned(self, scanned: Scanned) -> None:
        """What the first look at a chunk says of its tensor; chunks come in order."""
        spec = scanned.spec
        findings = self.findings[spec.name]
        findings.identical &= scanned.identical
        findings.updates += scanned.counts[:, :3]
        for known, new in zip(findings.digests, scanned.digests, strict=True):
            known.append(new)
        for checkpoint, place in (scanned.faults or {}).items():  # the first that is kept is the tensor's first
            self.problems.setdefault((spec.name, checkpoint), _fault(spec, self.inputs, checkpoint, place))
        for checkpoint, place in (scanned.overflows or {}).items():
            where = _where(spec, self.inputs, checkpoint, place)
            text = f"{where} is so far from the base's value that their difference does not fit float32"
            self.problems.setdefault((spec.name, checkpoint), f"{text}. Take another checkpoint")
        self.bytes_done += sum(scanned.chunk.size * info.item_bytes for info in spec.sources)
        self.progress("plan", self.bytes_done, self.inputs.nbytes)


def examine(pool: Pool, granularity: str, passes: Passes, run: Run, shelf: Shelf | None = None) -> Iterator[Result]:
    """Every chunk of a pool as first scanned, without its arrays; then, if all are sound, those settled that differ.

    With a `shelf`, scanned chunks wait there, not in memory.
    """
    return _Examination(pool, granularity, passes, run, shelf).results()


class _Examination:
    """One pool, from its sample to its settled chunks."""

    def __init__(self, pool: Pool, granularity: str, passes: Passes, run: Run, shelf: Shelf | None) -> None:
        self.pool = pool
        self.passes = passes
        self.run = run
        self.shelf = shelf
        self.blocks = _blocks(pool, granularity)

    def results(self) -> Iterator[Result]:
        if not self.pool[0].is_float:
            for block in self.run(self.passes.compare, self.blocks):
                yield from block
            return
        elements = _elements(self.pool)
        sizes = [budget(p, elements) if self.pool[0].eligible else 0 for p in self.pool[0].density]
        (bracket,) = self.run(partial(self.passes.sample, self.blocks), [sizes])
        scanned, sound, changed = [], True, np.zeros(len(sizes), np.int64)
        for one in self._scan(bracket):
            yield replace(one, kept=None)
            sound &= not one.faults and not one.overflows
            changed += one.counts[:, 0]
            scanned.append(replace(one, digests=()))
        if sound:
            self._drop_identical(scanned)
            yield from self._settle(bracket, scanned, np.minimum(sizes, changed))

    def _scan(self, bracket: Bracket) -> Iterator[Scanned]:
        for block in self.run(partial(self._scan_block, bracket=bracket), self.blocks):
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
            scanned = [replace(one, digests=()) for one in self._scan(bracket)]
            above, between, crowded = _totals(scanned, len(wanted))
        thresholds = self._thresholds(bracket, scanned, wanted - above, between)
        limits = self._limits(thresholds, scanned, crowded)
        if not crowded:
            yield from self.run(partial(self._resolve, bracket=bracket), zip(scanned, limits, strict=True))
            return
        by_block = ((block, list(islice(limits, len(block.chunks)))) for block in self.blocks)
        for settled in self.run(partial(self.passes.settle, bracket=bracket), by_block):
            yield from settled

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
        parts = list(self.run(partial(self._gather, narrower, asked), scanned)) if asked else []
        for task, some in zip(asked, zip(*parts, strict=True), strict=True):
            known[task] = pick(np.concatenate(some), int(wanted[task]))
        return [threshold or NOTHING for threshold in known]

    def _gather(self, bracket: Bracket, tasks: Sequence[int], scanned: Scanned) -> list[Bits]:
        """The magnitudes in the bracket, of each of `tasks`."""
        values = self._kept(scanned).values
        out = np.empty((len(bracket.low), len(values) + 1), np.uint32)
        counts = scanning.gather(values, bracket.low, bracket.high, out)
        return [out[task, : counts[task]].copy() for task in tasks]

    def _count_kept(self, scanned: list[Scanned], bracket: Bracket, shifts: Counts, bins: int) -> Counts:
        def count(one: Scanned) -> Counts:
            return self.passes.count_bins(self._kept(one), bracket, shifts, bins)

        counts: Counts = reduce(add, self.run(count, scanned))
        return counts

    def _count_again(self, bracket: Bracket, shifts: Counts, bins: int) -> Counts:
        count = partial(self.passes.count_block, bracket=bracket, shifts=shifts, bins=bins)
        counts: Counts = reduce(add, self.run(count, self.blocks))
        return counts

    def _limits(self, thresholds: list[Threshold], scanned: list[Scanned], crowded: bool) -> Iterator[Limits]:
        """For each chunk every task's threshold, with the ties that fall into this chunk: the earlier get them."""
        if not any(threshold.ties for threshold in thresholds):
            yield from (thresholds for _ in scanned)
            return
        bits = np.array([threshold.bits for threshold in thresholds], np.uint32)
        left = np.array([threshold.ties for threshold in thresholds])
        # Where not all open elements were kept, all of them are ties.
        equal = (
            (one.counts[:, 4] for one in scanned) if crowded else self.run(partial(self._count_equal, bits), scanned)
        )
        for counts in equal:
            taken = np.minimum(counts, left)
            left -= taken
            yield [replace(limit, ties=int(ties)) for limit, ties in zip(thresholds, taken, strict=True)]

    def _count_equal(self, bits: Bits, scanned: Scanned) -> Counts:
        counts = np.zeros(len(bits), np.int64)
        scanning.count_equal(self._kept(scanned).values, bits, counts)
        return counts

    def _resolve(self, work: tuple[Scanned, Limits], bracket: Bracket) -> Settled:
        scanned, limits = work
        return self.passes.resolve(scanned.spec, scanned.chunk, self._kept(scanned), limits, bracket)

    def _kept(self, scanned: Scanned) -> Found:
        kept = scanned.kept
        if isinstance(kept, Shelved):
            assert self.shelf is not None
            return Found(*self.shelf.get(kept))
        assert kept is not None
        return kept


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


def _fault(spec: TensorSpec, inputs: Inputs, checkpoint: int, place: int) -> str:
    where, source = _where(spec, inputs, checkpoint, place), spec.sources[checkpoint]
    if isinstance(source, MovedRows):
        if (own := source.in_source(place)) is None:
            return f"{where} in the rows of the output is NaN or Inf, and it has that from other models. Repair these"
        where = _where(spec, inputs, checkpoint, own)
    if spec.is_float:
        return f"{where} is NaN or Inf. Repair the checkpoint or take another; nothing can be merged with it"
    return (
        f"{where} differs from the base's ({spec.sources[0].dtype}). Tensors that are not floating-point must be equal"
    )


def _where(spec: TensorSpec, inputs: Inputs, checkpoint: int, place: int) -> str:
    return f"{inputs.checkpoints[checkpoint].where}: tensor {spec.name!r}: flat index {place}"


def _batches(every: Iterable[Pool], granularity: str) -> Iterator[tuple[bool, list[list[Pool]]]]:
    """Runs of small pools, several tiny ones together, and of large ones; all in their order."""
    for small, group in groupby(every, key=lambda pool: is_small(pool, granularity)):
        batches: list[list[Pool]] = [[]]
        elements = rows = 0
        for pool in group:
            if elements >= CHUNK or rows >= SMALL_ROWS:
                batches.append([])
                elements = rows = 0
            batches[-1].append(pool)
            elements += _elements(pool)
            rows += pool_rows(pool, granularity)
        yield small, batches


def is_small(pool: Pool, granularity: str) -> bool:
    """Whether one worker examines it, in memory."""
    return _elements(pool) <= SMALL and pool_rows(pool, granularity) <= SMALL_ROWS


def pool_rows(pool: Pool, granularity: str) -> int:
    """Vectors of a pool, each of which has a Gram matrix."""
    return sum(row_count(spec.shape, granularity) for spec in pool)


def _elements(pool: Pool) -> int:
    return sum(spec.elements for spec in pool)


def _blocks(pool: Pool, granularity: str) -> list[Block]:
    result = []
    for spec in pool:
        every = chunks(spec.shape, granularity)
        result += [Block(spec, every[i : i + BLOCK_CHUNKS]) for i in range(0, len(every), BLOCK_CHUNKS)]
    return result
