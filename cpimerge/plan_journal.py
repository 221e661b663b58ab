"""What `plan` has found out so far: its files, its findings, and how far these are on the disk.

From time to time, and when a run stops, a record says what a later run need not do again (plan_records.py): all pools
that are settled, and of a large pool the first look at its first blocks, whose arrays lie on the shelf. A record is
written when the disk has what it speaks of; and the next run reads that again before it believes it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import numpy as np

from .examination import Begun, Pool, blocks_of, is_small
from .findings import Findings, pack, unpack
from .passes import Scanned, Settled
from .plan_files import Mark, PlanFiles, Room
from .plan_records import CoreRecord, PoolsRecord, ScanRecord, begun_of, blob, parse_records, raw, scan_record
from .preflight import Inputs, TensorSpec, pools
from .shelf import Shelf, Shelved
from .staging import VERDICTS, Staging

__all__ = ["CHECKPOINT_SECONDS", "PlanJournal"]

CHECKPOINT_SECONDS = 5.0  # between two records: a run that is killed loses no more than that, and one record's making


@dataclass
class _Scan:
    """The first look at a large pool. `recorded` of its chunks are in the journal.

    `news` are its chunks from a number on. They are replaced together with that: a run may be interrupted anywhere.
    """

    pool: int
    begun: Begun
    recorded: int
    news: tuple[int, list[Scanned]]


class PlanJournal:
    """Takes what is found, in order; `findings` and `problems` have all of it, an earlier run's included.

    To be used in a `with`: what is left when it ends with an exception is recorded for the next run.
    """

    def __init__(self, inputs: Inputs, staging: Staging, room: Room) -> None:
        """Goes on where the records in `staging` end, as far as what they speak of is there. Raises OSError."""
        self.findings = {spec.name: Findings.empty(spec, len(inputs.recipe.tasks)) for spec in inputs.tensors}
        self.problems: dict[tuple[str, int], str] = {}  # by tensor and checkpoint
        self.files = PlanFiles(staging, room)
        self._inputs = inputs
        self._staging = staging
        self._pools = list(pools(inputs.tensors, inputs.recipe.scope).values())
        self._done = self._recorded = (0, Mark())  # pools, and how far the files are after these
        self._scan: _Scan | None = None
        self._named = False  # the disk knows that the files are there
        self._flusher = ThreadPoolExecutor(1, thread_name_prefix="cpimerge-flush")
        self._flushing: Future[None] | None = None
        self._due = time.monotonic() + CHECKPOINT_SECONDS
        try:
            self._take_over()
        except OSError:
            self.files.close()
            raise

    @property
    def left(self) -> Sequence[Pool]:
        """The pools that are not settled, in order."""
        return self._pools[self._done[0] :]

    @property
    def bytes_done(self) -> int:
        """Bytes of the inputs that need not be read again, but for those in `begun`."""
        return sum(spec.source_bytes for pool in self._pools[: self._done[0]] for spec in pool)

    @property
    def begun(self) -> Begun | None:
        """What is done of the first of the pools that are left, if it is a large one."""
        return self._scan.begun if self._scan else None

    @property
    def shelf(self) -> Shelf:
        return self.files.shelf

    # --- what the run tells --------------------------------------------------------------------------

    def begin(self, begun: Begun) -> None:
        """The first look at the next pool begins; its arrays go on the shelf."""
        count = len(begun.scanned)
        self._scan = _Scan(self._done[0], begun, count, (count, []))

    def scanned(self, one: Scanned) -> None:
        """The next chunk of a first look; only those of a large pool are recorded."""
        if self._scan is not None:
            self._scan.news[1].append(one)
            self._tick()

    def keep(self, settled: Settled) -> None:
        """The next settled chunk."""
        found = self.findings[settled.spec.name]
        if found.first_chunk < 0:
            mark = self.files.mark
            found.first_chunk, found.first_row = mark.chunks, mark.rows
        self.files.add(settled)

    def settled(self, count: int) -> None:
        """So many pools more are done."""
        self._done = self._done[0] + count, self.files.mark
        self._scan = None
        self._tick()

    # --- records --------------------------------------------------------------------------------------

    def _tick(self) -> None:
        if time.monotonic() >= self._due and (self._flushing is None or self._flushing.done()):
            self._check_flushed()
            self._flushing = self._flusher.submit(self._append, self._records())
            self._due = time.monotonic() + CHECKPOINT_SECONDS

    def _check_flushed(self) -> None:
        if self._flushing is not None:
            self._flushing.result()  # an error of the disk is reported once

    def _append(self, records: Sequence[PoolsRecord | ScanRecord]) -> None:
        if not records:
            return
        if not self._named:
            self.files.sync_names()
            self._named = True
        self.files.sync()
        for record in records:
            self._staging.journal.append(record.model_dump())
            if isinstance(record, PoolsRecord):
                self._recorded = record.last, Mark(record.chunks, record.rows)
            elif (scan := self._scan) is not None and scan.pool == record.pool:
                scan.recorded = record.last

    def _records(self) -> list[PoolsRecord | ScanRecord]:
        """Of everything since the last ones, which are written by now."""
        records: list[PoolsRecord | ScanRecord] = []
        done, scan = self._done, self._scan
        if done != self._recorded:
            self.files.flush()
            records.append(self._pools_record(self._recorded, done))
        if scan is not None and scan.pool == done[0]:
            first, news = scan.news
            scan.news = scan.recorded, news[scan.recorded - first :]
            if scan.news[1]:
                records.append(scan_record(scan.pool, scan.recorded, scan.begun.bracket, list(scan.news[1])))
        return records

    def _pools_record(self, begin: tuple[int, Mark], end: tuple[int, Mark]) -> PoolsRecord:
        (first, before), (last, now) = begin, end
        specs = self._specs(first, last)
        numbers = {spec.name: number for number, spec in enumerate(specs)}
        table, digests = pack([self.findings[spec.name] for spec in specs], len(self.files.cores))
        return PoolsRecord(
            first=first,
            last=last,
            chunks=now.chunks,
            rows=now.rows,
            cores=[
                CoreRecord(
                    ends=blob(np.array(writer.ends(before.chunks, now.chunks), "<u8").tobytes()),
                    xxh3=writer.bitmaps.digest(writer.size_of(now.chunks)).hexdigest(),
                )
                for writer in self.files.cores
            ],
            grams_xxh3=self.files.grams.file.digest(self.files.grams.bytes_of(now.rows)).hexdigest(),
            table=blob(table),
            digests=blob(digests),
            problems=[(numbers[name], at, text) for (name, at), text in self.problems.items() if name in numbers],
        )

    def _specs(self, first: int, last: int) -> list[TensorSpec]:
        """The tensors of pools [first, last), in order."""
        return [spec for pool in self._pools[first:last] for spec in pool]

    # --- what an earlier run has done -----------------------------------------------------------------

    def _take_over(self) -> None:
        settled, scans = parse_records(self._staging.done)
        ends: list[list[int]] = [[] for _ in self.files.cores]
        for record in settled:
            if not self._take(record, ends):
                break
        for writer, some in zip(self.files.cores, ends, strict=True):
            writer.go_on(some)
        self.files.grams.go_on(self._done[1].rows)
        self._recorded = self._done
        self._take_scan([record for record in scans if record.pool == self._done[0]])

    def _take(self, record: PoolsRecord, ends: list[list[int]]) -> bool:
        """Take over some pools, and add to the `ends` of the chunks. False, and nothing is, where that cannot be."""
        done = self._done[0]
        if not done == record.first < record.last <= len(self._pools) or len(record.cores) != len(ends):
            return False
        specs = self._specs(record.first, record.last)
        try:
            news = [np.frombuffer(raw(core.ends), "<u8").tolist() for core in record.cores]
            found = unpack(raw(record.table), raw(record.digests), specs, self._inputs.recipe.granularity)
            problems = {(specs[number].name, at): text for number, at, text in record.problems}
        except (ValueError, IndexError):
            return False
        if not self._is_there(record, [(*old[-1:], *new) for old, new in zip(ends, news, strict=True)]):
            return False
        for old, new in zip(ends, news, strict=True):
            old.extend(new)
        self.findings.update(zip((spec.name for spec in specs), found, strict=True))
        self.problems.update(problems)
        self._done = record.last, Mark(record.chunks, record.rows)
        return True

    def _is_there(self, record: PoolsRecord, ends: Sequence[Sequence[int]]) -> bool:
        """Whether the files hold what the record says. It is read again: a disk may lose what it said it had.

        `ends` are where the chunks of each core file end, from the last before the record's on.
        """
        grams, before = self.files.grams, self._done[1].chunks
        return grams.file.holds(grams.bytes_of(record.rows), record.grams_xxh3) and all(
            len(some) == record.chunks - before + min(before, 1)
            and list(some) == sorted(some)
            and writer.bitmaps.holds(some[-1] if some else 0, core.xxh3)
            for writer, some, core in zip(self.files.cores, ends, record.cores, strict=True)
        )

    def _take_scan(self, records: Sequence[ScanRecord]) -> None:
        """Take over the first look at a large pool, as far as its arrays still are on the shelf."""
        granularity = self._inputs.recipe.granularity
        if not self.left or not self.left[0][0].is_float or is_small(self.left[0], granularity):
            return
        blocks = blocks_of(self.left[0], granularity)
        begun = begun_of(records, blocks, self._inputs.first_member)
        if begun is None:
            return
        count = 0
        for block in blocks:
            some = begun.scanned[count : count + len(block.chunks)]
            if not some or not all(isinstance(one.kept, Shelved) and self.shelf.holds(one.kept) for one in some):
                break
            count += len(some)
        scanned = begun.scanned[:count]
        if scanned:
            self.begin(Begun(begun.bracket, scanned))
            self.shelf.go_on(max(one.kept.end for one in scanned if isinstance(one.kept, Shelved)))

    # --- the end --------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._flusher.shutdown(wait=True)
        try:
            if error is None:
                self._check_flushed()
            elif not isinstance(error, VERDICTS):
                with suppress(OSError):  # what cannot be kept is done again
                    self._append(self._records())
        finally:
            self.files.close()
