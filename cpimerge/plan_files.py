"""What grows while `plan` reads: a core file for each task, the Gram matrices, and the shelf of a large pool."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

from .cores import CoreWriter
from .disk import flush
from .folding import GramSpool
from .passes import Settled
from .places import keep_only, remove
from .plan_checks import core_file
from .shelf import Shelf
from .staging import Staging

__all__ = ["Mark", "PlanFiles", "Room", "remove_scratch"]


GRAMS, SHELF = "grams", "shelf"  # in the staging directory


@dataclass(frozen=True)
class Room:
    """What is set aside of the disk: bytes for each task's core, rows of `pairs` products, bytes for the shelf."""

    cores: Sequence[int]
    rows: int
    pairs: int
    shelf: int


@dataclass(frozen=True)
class Mark:
    """How far the files are: chunks in each core file, and rows of Gram matrices."""

    chunks: int = 0
    rows: int = 0


class PlanFiles:
    """The files, new or as an earlier run left them; what else lies there is removed. Raises OSError."""

    def __init__(self, staging: Staging, room: Room) -> None:
        cores = [Path(core_file(task)) for task in range(len(room.cores))]
        keep_only(staging.root, {"journal", "files", GRAMS, SHELF}, {"files"})
        keep_only(staging.files, {"cores"}, {"cores"})
        (staging.files / "cores").mkdir(exist_ok=True)
        keep_only(staging.files / "cores", {core.name for core in cores})
        self._directories = (staging.files / "cores", staging.files, staging.root)
        with ExitStack() as opened:
            self.grams = opened.enter_context(closing(GramSpool(staging.root / GRAMS, room.pairs, room.rows)))
            self.shelf = opened.enter_context(closing(Shelf(staging.root / SHELF, room.shelf)))
            self.cores = [
                opened.enter_context(closing(CoreWriter(staging.files / core, nbytes)))
                for core, nbytes in zip(cores, room.cores, strict=True)
            ]
            self._opened = opened.pop_all()

    @property
    def mark(self) -> Mark:
        """How far they are; at the end of a tensor."""
        return Mark(self.cores[0].chunks, self.grams.rows)

    def add(self, settled: Settled) -> None:
        """Keep one chunk; chunks of a tensor come in order and together."""
        for writer, core in zip(self.cores, settled.cores, strict=True):
            writer.append(core)
        self.grams.add(settled.gram, settled.chunk.opens_row)

    def flush(self) -> None:
        """Hand everything to the system; the next chunk must be the first of a tensor."""
        self.grams.flush()
        for writer in self.cores:
            writer.bitmaps.flush()

    def sync(self) -> None:
        """Have the disk take what was flushed; on any thread."""
        self.shelf.sync()
        self.grams.file.sync()
        for writer in self.cores:
            writer.bitmaps.sync()

    def sync_names(self) -> None:
        """Have the disk take that the files are there."""
        for directory in self._directories:
            flush(directory)

    def close(self) -> None:
        """Once is enough."""
        self._opened.close()


def remove_scratch(root: Path) -> None:
    """Delete what a plan that is complete does not need, where its staging directory stays."""
    for name in (GRAMS, SHELF):
        remove(root / name)
