"""The streamed read of `plan`: every tensor's cores, overlaps, update statistics and Gram matrices.

Tensors that share a budget form a pool (METHOD §1), which examination.py examines. A small pool is examined by one
worker, in memory. The blocks of a large one are shared by all workers, and what they keep waits on a shelf. Both do the
same sums in the same order, and which it is depends on the sizes alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby, repeat

from .errors import IncompatibleError
from .examination import SMALL_ROWS, Begun, Examination, Pool, Result, elements_of, examine, is_small, pool_rows
from .findings import Findings
from .passes import Passes, Scanned
from .plan_journal import PlanJournal
from .preflight import Inputs, TensorSpec
from .singles import is_single, settle_singles
from .staging import Watch
from .stream import CHUNK, Workers
from .token_rows import MovedRows

__all__ = ["Analysis"]


class Analysis:
    """One read of all inputs, but for what `journal` has of an earlier run; it is told everything that is found."""

    def __init__(self, inputs: Inputs, workers: Workers, journal: PlanJournal, watch: Watch) -> None:
        self.inputs = inputs
        self.workers = workers
        self.journal = journal
        self.watch = watch
        self.bytes_done = journal.bytes_done

    def run(self) -> dict[str, Findings]:
        """Findings by tensor name. Raises IncompatibleError naming every NaN, Inf and unequal non-float tensor."""
        self._go_on()
        for small, batch in _batches(self.journal.left, self.inputs.recipe.granularity):
            found = self.workers.map(self._examine_all, batch) if small else map(self._share, batch)
            for some, results in zip(batch, found, strict=True):
                for result in results:
                    self._keep(result)
                if small:
                    self.journal.settled(len(some))
        self.watch.progress("plan", self.inputs.nbytes, self.inputs.nbytes)
        problems = self.journal.problems
        if problems:
            raise IncompatibleError(problems[key] for key in sorted(problems))
        return self.journal.findings

    def _go_on(self) -> None:
        """Tell what an earlier run has done."""
        for scanned in self.journal.begun.scanned if self.journal.begun else ():
            self._note(scanned)
        if self.bytes_done:
            self.watch.resumed(self.bytes_done, self.inputs.nbytes)

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
        granularity, shelf = self.inputs.recipe.granularity, self.journal.shelf
        for pool in some:
            examination = Examination(pool, granularity, self._passes(), self.workers.map, shelf)
            begun = self.journal.begun
            if begun is None and pool[0].is_float:
                begun = Begun(examination.sample())
                self.journal.begin(begun)
            yield from examination.results(begun)
            self.journal.settled(1)  # whoever took the last result has kept it
            shelf.clear()

    def _passes(self) -> Passes:
        recipe = self.inputs.recipe
        return Passes(self.workers, len(recipe.tasks), self.inputs.first_member, recipe.space == "delta")

    def _keep(self, result: Result) -> None:
        if isinstance(result, Scanned):
            self._note(result)
            self.journal.scanned(result)
            self.watch.progress("plan", self.bytes_done, self.inputs.nbytes)
            return
        findings = self.journal.findings[result.spec.name]
        findings.pairs += result.pairs
        findings.aligned += result.aligned
        findings.inwards += result.inwards
        findings.claimed += result.claimed
        findings.sums += result.sums
        self.journal.keep(result)

    def _note(self, scanned: Scanned) -> None:
        """What the first look at a chunk says of its tensor; chunks come in order."""
        spec, problems = scanned.spec, self.journal.problems
        findings = self.journal.findings[spec.name]
        findings.identical &= scanned.identical
        findings.updates += scanned.counts[:, :3]
        for known, new in zip(findings.digests, scanned.digests, strict=True):
            known.append(new)
        for checkpoint, place in (scanned.faults or {}).items():  # the first that is kept is the tensor's first
            problems.setdefault((spec.name, checkpoint), _fault(spec, self.inputs, checkpoint, place))
        for checkpoint, place in (scanned.overflows or {}).items():
            where = _where(spec, self.inputs, checkpoint, place)
            text = f"{where} is so far from the base's value that their difference does not fit float32"
            problems.setdefault((spec.name, checkpoint), f"{text}. Take another checkpoint")
        self.bytes_done += sum(scanned.chunk.size * info.item_bytes for info in spec.sources)


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
            elements += elements_of(pool)
            rows += pool_rows(pool, granularity)
        yield small, batches
