"""The streamed read of `plan`: every tensor's cores, overlaps, update statistics and Gram matrices.

Tensors that share a budget form a pool (METHOD §1). A pool takes four passes over its chunks:

    survey       hashes, finiteness, update statistics; high halves of the magnitudes → where the k-th largest lies
    refine       low halves of those that lie there                                  → the exact threshold
    count_ties   how many elements of each chunk equal it                            → which ties are in
    settle       the cores, their overlaps, and the Gram matrix of what is in no core

A pool that fits a worker's cache is read once, and all its passes run on that worker. A larger one is read for every
pass, its blocks shared among the workers. Both do the same sums in the same order.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from itertools import groupby
from operator import add
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from . import kernels
from .cores import NOTHING, Threshold, budget
from .errors import IncompatibleError
from .passes import Block, Counts, Load, Passes, Settled, Surveyed
from .preflight import Inputs, TensorSpec, pools
from .stream import BLOCK_CHUNKS, PENDING, Bytes, Chunk, Progress, Workers, chunks, row_count

__all__ = ["Analysis", "Findings", "content_hash", "fits_cache"]

PASSES = 4

Pool = list[TensorSpec]
Run = Callable[..., Iterator[Any]]  # `map`: here, or on all workers


@dataclass
class Findings:
    """What the read found out about one tensor; shapes and meanings as in `Surveyed` and `Settled`."""

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
    cache_bytes: int  # the largest pool that a worker keeps whole
    sink: Callable[[Settled], None]
    progress: Progress
    findings: dict[str, Findings] = field(init=False)
    problems: dict[tuple[str, int], str] = field(default_factory=dict)  # by tensor and checkpoint
    pools_done: int = 0  # bytes

    def __post_init__(self) -> None:
        tasks = len(self.inputs.recipe.tasks)
        self.findings = {spec.name: Findings.empty(spec, tasks) for spec in self.inputs.tensors}

    def run(self) -> dict[str, Findings]:
        """Findings by tensor name. Raises IncompatibleError naming every NaN, Inf and unequal non-float tensor."""
        every = pools(self.inputs.tensors, self.inputs.recipe.scope).values()
        granularity = self.inputs.recipe.granularity
        for small, group in groupby(every, key=lambda pool: fits_cache(pool, granularity, self.cache_bytes)):
            for pool, results in self.workers.map(self._cached, group) if small else map(self._streamed, group):
                for result in results:
                    self._keep(result)
                self.pools_done += _nbytes(pool)
                self.progress("plan", self.pools_done, self.inputs.nbytes)
        if self.problems:
            raise IncompatibleError(self.problems[key] for key in sorted(self.problems))
        return self.findings

    def _cached(self, pool: Pool) -> tuple[Pool, list[Settled]]:
        """A small pool: read once, then every pass on this worker."""
        stored = self._read_whole(pool)

        def load(spec: TensorSpec, chunk: Chunk) -> list[Bytes]:
            return [
                raw[chunk.start * info.item_bytes : chunk.stop * info.item_bytes]
                for raw, info in zip(stored[spec.name], spec.sources, strict=True)
            ]

        return pool, list(self._settle(pool, self._passes(load), map))

    def _read_whole(self, pool: Pool) -> dict[str, list[Bytes]]:
        """Each tensor's bytes from every checkpoint, in this worker's cache."""
        stored: dict[str, list[Bytes]] = {}
        free = self.workers.buffers.cache
        for spec in pool:
            stored[spec.name] = []
            for info in spec.sources:
                raw, free = free[: info.nbytes], free[_aligned(info.nbytes) :]
                info.read_into(memoryview(raw), 0)
                stored[spec.name].append(raw)
        return stored

    def _streamed(self, pool: Pool) -> tuple[Pool, Iterator[Settled]]:
        """A large pool: every pass reads its chunks again, and all workers share them."""
        passes = self._passes(lambda spec, chunk: self.workers.read(spec.sources, chunk))
        share = _nbytes(pool) / (PASSES * max(1, len(_blocks(pool, self.inputs.recipe.granularity))))
        results_seen = 0

        def run(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
            nonlocal results_seen
            for result in self.workers.map(function, items):
                results_seen += 1
                self.progress("plan", self.pools_done + int(results_seen * share), self.inputs.nbytes)
                yield result

        return pool, self._settle(pool, passes, run)

    def _passes(self, load: Load) -> Passes:
        recipe = self.inputs.recipe
        members = slice(self.inputs.first_member, len(self.inputs.checkpoints))
        return Passes(load, self.workers, len(recipe.tasks), members, recipe.space == "delta")

    def _settle(self, pool: Pool, passes: Passes, run: Run) -> Iterator[Settled]:
        """All passes over one pool; nothing comes of it where a tensor is unfit to merge."""
        blocks = _blocks(pool, self.inputs.recipe.granularity)
        histogram: Counts | None = None
        sound = True
        for surveyed in run(passes.survey, blocks):
            self._record(surveyed)
            sound &= not surveyed.faults and not surveyed.overflows
            if surveyed.histogram is not None:
                histogram = surveyed.histogram if histogram is None else histogram + surveyed.histogram
        if not sound or not pool[0].is_float:
            return
        blocks = [block for block in blocks if not self.findings[block.spec.name].identical]
        thresholds = self._thresholds(pool, histogram, partial(_refine, passes, run, blocks))
        limits = _limits(passes, run, blocks, thresholds)
        for results in run(passes.settle, zip(blocks, limits, strict=True)):
            yield from results

    def _record(self, surveyed: Surveyed) -> None:
        """Keep what the survey of a block says of its tensor."""
        spec = surveyed.spec
        findings = self.findings[spec.name]
        findings.identical &= surveyed.identical
        findings.updates += surveyed.updates
        for known, new in zip(findings.digests, surveyed.digests, strict=True):
            known.extend(new)
        for checkpoint, place in surveyed.faults.items():
            # Blocks come in order, so the first that is kept is the tensor's first.
            self.problems.setdefault((spec.name, checkpoint), _fault(spec, self.inputs, checkpoint, place))
        for checkpoint, place in surveyed.overflows.items():
            where = _where(spec, self.inputs, checkpoint, place)
            text = f"{where} is so far from the base's value that their difference does not fit float32"
            self.problems.setdefault((spec.name, checkpoint), f"{text}. Take another checkpoint")

    def _keep(self, settled: Settled) -> None:
        findings = self.findings[settled.spec.name]
        findings.pairs += settled.pairs
        findings.claimed += settled.claimed
        findings.sums += settled.sums
        self.sink(settled)

    def _thresholds(
        self, pool: Pool, histogram: Counts | None, refine: Callable[[list[int]], Counts]
    ) -> list[Threshold]:
        """The exact threshold of each task's core in the pool (METHOD §1)."""
        tasks = len(self.inputs.recipe.tasks)
        elements = sum(spec.elements for spec in pool)
        changed = np.sum([self.findings[spec.name].updates[:, 0] for spec in pool], axis=0)
        sizes = [min(budget(p, elements), int(c)) for p, c in zip(pool[0].density, changed, strict=True)]
        if histogram is None or not any(sizes):
            return [NOTHING] * tasks
        places = [kernels.kth_bin(counts, k) if k else None for counts, k in zip(histogram, sizes, strict=True)]
        low_halves = refine([-1 if place is None else place[0] for place in places])
        return [_threshold(place, counts) for place, counts in zip(places, low_halves, strict=True)]


def _threshold(place: tuple[int, int] | None, low_halves: Counts) -> Threshold:
    if place is None:
        return NOTHING
    high, wanted = place
    low, ties = kernels.kth_bin(low_halves, wanted)
    bits = high << 16 | low
    # Where all that are equal are in, the core is all above the next smaller pattern, and there are no ties to count.
    return Threshold(bits - 1, 0) if ties == low_halves[low] else Threshold(bits, ties)


def _refine(passes: Passes, run: Run, blocks: Sequence[Block], bins: list[int]) -> Counts:
    counts: Counts = reduce(add, run(partial(passes.refine, bins=bins), blocks))
    return counts


def _limits(
    passes: Passes, run: Run, blocks: Sequence[Block], thresholds: list[Threshold]
) -> Iterator[list[list[Threshold]]]:
    """For each block, for each of its chunks, each task's threshold with the ties that fall into this chunk.

    Ties go to the earlier chunk: blocks stand in natural order of the tensors, and in index order within one.
    """
    if not any(threshold.ties for threshold in thresholds):
        yield from ([thresholds] * len(block.chunks) for block in blocks)
        return
    left = np.array([threshold.ties for threshold in thresholds])
    for block_counts in run(partial(passes.count_ties, thresholds=thresholds), blocks):
        limits = []
        for counts in block_counts:
            taken = np.minimum(counts, left)
            left -= taken
            limits.append([replace(limit, ties=int(ties)) for limit, ties in zip(thresholds, taken, strict=True)])
        yield limits


def _fault(spec: TensorSpec, inputs: Inputs, checkpoint: int, place: int) -> str:
    where = _where(spec, inputs, checkpoint, place)
    if spec.is_float:
        return f"{where} is NaN or Inf. Repair the checkpoint or take another; nothing can be merged with it"
    return (
        f"{where} differs from the base's ({spec.sources[0].dtype}). Tensors that are not floating-point must be equal"
    )


def fits_cache(pool: Pool, granularity: str, cache_bytes: int) -> bool:
    """Half of a cache is for the pool's tensors, half for its results and those that wait beside them."""
    sources = sum(_aligned(info.nbytes) for spec in pool for info in spec.sources)
    results = (PENDING + 2) * sum(_result_bytes(spec, granularity) for spec in pool)
    return 2 * max(sources, results) <= cache_bytes


def _result_bytes(spec: TensorSpec, granularity: str) -> int:
    """What the settled chunks of a tensor take at most: a bit an element for each task, and the Gram matrices."""
    if not spec.is_float:
        return 0
    members = len(spec.sources)
    return len(spec.density) * spec.elements // 8 + 4 * row_count(spec.shape, granularity) * members * (members + 1)


def _where(spec: TensorSpec, inputs: Inputs, checkpoint: int, place: int) -> str:
    return f"{inputs.checkpoints[checkpoint].path}: tensor {spec.name!r}: flat index {place}"


def _blocks(pool: Pool, granularity: str) -> list[Block]:
    result = []
    for spec in pool:
        every = chunks(spec.shape, granularity)
        result += [Block(spec, every[i : i + BLOCK_CHUNKS]) for i in range(0, len(every), BLOCK_CHUNKS)]
    return result


def _nbytes(pool: Pool) -> int:
    return sum(spec.source_bytes for spec in pool)


def _aligned(nbytes: int) -> int:
    """Rounded up, so that whatever lies behind is aligned for every dtype."""
    return -(-nbytes // 64) * 64
