"""From the Gram matrices of the read to the coefficients of the plan.

The order of the fold is only known when all overlaps are, and under granularity row there are too many matrices to
hold. So they wait in a file.
"""

from __future__ import annotations

import errno
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import groupby
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from .blend import Fold, Share, fold, matrices, shares
from .cores import npy_header
from .growing import GrowingFile
from .levelling import apart, can_level
from .plan_file import COEFFICIENTS_FILE, Blend
from .preflight import Inputs, TensorSpec
from .stream import row_count

__all__ = ["Folder", "GramSpool"]

SLAB_ROWS = 1 << 12

Gram = npt.NDArray[np.float64]


class GramSpool:
    """Appends Gram matrices float64 [R, P] to `file`; then reads them back, a slab of rows at a time.

    `room` rows of the disk are set aside. What an earlier run left in the file counts as far as `go_on` says.
    """

    def __init__(self, file: Path, pairs: int, room: int = 0) -> None:
        """Raises OSError, also where `file` is a link or the disk lacks the space."""
        self.file = GrowingFile(file, room * pairs * 8)
        self._pairs = pairs
        self._open: Gram | None = None  # its last row may go on in the next chunk

    @property
    def rows(self) -> int:
        """Rows added so far."""
        return self.file.size // (8 * self._pairs) + (0 if self._open is None else len(self._open))

    def bytes_of(self, rows: int) -> int:
        """What so many rows take of the file."""
        return 8 * self._pairs * rows

    def add(self, gram: Gram, opens_row: bool) -> None:
        """Append rows; with `opens_row` false, the one row given is added to the last row instead."""
        if not opens_row and self._open is not None:
            self._open[-1] += gram[0]
            return
        self._close_row()
        self._open = gram

    def go_on(self, rows: int) -> None:
        """Append behind so many rows of an earlier run."""
        self.file.go_on(self.bytes_of(rows))

    def flush(self) -> None:
        """Hand all rows to the system; the next chunk must open one."""
        self._close_row()
        self.file.flush()

    def read(self, first: int, count: int) -> Iterator[Gram]:
        """Rows [first, first + count), in slabs float64 [≤ SLAB_ROWS, P]. Raises OSError where they are gone."""
        self.flush()
        for begin in range(first, first + count, SLAB_ROWS):
            rows = min(SLAB_ROWS, first + count - begin)
            data = self.file.read(self.bytes_of(begin), self.bytes_of(rows))
            if len(data) < self.bytes_of(rows):
                raise OSError(errno.EIO, "Gram matrices are gone")
            yield np.frombuffer(data).reshape(rows, self._pairs)

    def close(self) -> None:
        self.file.close()

    def _close_row(self) -> None:
        if self._open is not None:
            self.file.append(self._open.tobytes())
            self._open = None


@dataclass(frozen=True)
class Folder:
    """Folds each tensor's vectors in the order of `members`, the backbone first."""

    inputs: Inputs
    grams: GramSpool
    first_row: Mapping[str, int]
    members: Sequence[str]

    def fold_all(self, tensors: Iterable[TensorSpec], directory: Path) -> tuple[dict[str, Blend], str | None]:
        """The blend of each tensor by name; under granularity row also coefficients.npy, and its xxh3-128."""
        ordered = sorted(tensors, key=lambda spec: self.first_row.get(spec.name, 0))
        blends, digest = (
            (self._whole_tensors(ordered), None)
            if self.inputs.recipe.granularity == "tensor"
            else self._row_by_row(ordered, directory)
        )
        for spec in ordered:
            if self.inputs.recipe.levels and can_level(spec.shape, spec.layer):
                blends[spec.name] = blends[spec.name].model_copy(update={"levelled": self._apart(spec)})
        return blends, digest

    def _row_by_row(self, ordered: Sequence[TensorSpec], directory: Path) -> tuple[dict[str, Blend], str]:
        """Tensors whose rows are a vector each: coefficients.npy has their coefficients."""
        digest = xxhash.xxh3_128()
        blends = {}
        shape = (self.grams.rows, len(self.members))
        with closing(GrowingFile(directory / COEFFICIENTS_FILE, 4 * math.prod(shape))) as file:
            file.append(npy_header(shape, "<f4"))
            for spec in ordered:
                summary = _RowSummary()
                for part in self._folds(self._shares(spec), self.first_row.get(spec.name, 0), self._rows(spec)):
                    data = np.ascontiguousarray(part.coefficients, "<f4").tobytes()
                    file.append(data)
                    digest.update(data)
                    summary.add(part)
                blends[spec.name] = summary.blend()
            file.finish()
        return blends, digest.hexdigest()

    def _whole_tensors(self, ordered: Sequence[TensorSpec]) -> dict[str, Blend]:
        """Tensors of one vector each; those that follow one another and share their weights are folded together."""
        nothing = Blend(coefficients=[0.0] * len(self.members), angles=[], steps=0, slerped=0)
        blends = {spec.name: nothing for spec in ordered if not self._rows(spec)}
        for steps, group in groupby((spec for spec in ordered if self._rows(spec)), key=self._shares):
            specs = list(group)
            parts = self._folds(steps, self.first_row[specs[0].name], len(specs))
            for spec, blend in zip(specs, (blend for part in parts for blend in _blends(part)), strict=True):
                blends[spec.name] = blend
        return blends

    def _apart(self, spec: TensorSpec) -> float:
        """How far apart the members' updates of the whole tensor are, outside the cores, 0 to 1."""
        total = np.zeros((1, len(self.members) * (len(self.members) + 1) // 2))
        for part in self.grams.read(self.first_row.get(spec.name, 0), self._rows(spec)):
            total += part.sum(axis=0)
        return apart(matrices(total, range(len(self.members)))[0])

    def _rows(self, spec: TensorSpec) -> int:
        return row_count(spec.shape, self.inputs.recipe.granularity)

    @cached_property
    def _tasks(self) -> list[int | None]:
        """Each member's number among the tasks; None: a backbone that is no task."""
        numbers = {task.name: number for number, task in enumerate(self.inputs.recipe.tasks)}
        return [numbers.get(member) for member in self.members]

    @cached_property
    def _order(self) -> list[int]:
        """Where each member stands in the Gram matrices."""
        names = self.inputs.names[self.inputs.first_member :]
        return [names.index(member) for member in self.members]

    def _shares(self, spec: TensorSpec) -> tuple[Share, ...]:
        weights = tuple(Fraction(1) if task is None else spec.weight[task] for task in self._tasks)
        return shares(weights, tuple(None if task is None else spec.t[task] for task in self._tasks))

    def _folds(self, steps: Sequence[Share], first: int, rows: int) -> Iterator[Fold]:
        for gram in self.grams.read(first, rows):
            yield fold(gram, self._order, steps, float(self.inputs.recipe.rest))


def _blends(part: Fold) -> Iterator[Blend]:
    """Of tensors that are one vector each."""
    rows = np.degrees(part.angles).tolist()
    for coefficients, row, slerped in zip(
        part.coefficients.tolist(), rows, part.slerped.sum(axis=1).tolist(), strict=True
    ):
        angles = [None if math.isnan(angle) else angle for angle in row]
        yield Blend(coefficients=coefficients, angles=angles, steps=len(angles), slerped=slerped)


@dataclass
class _RowSummary:
    """The angles of many rows: the smallest, mean and largest, in degrees, and how many steps were slerp."""

    steps: int = 0
    slerped: int = 0
    known: int = 0
    total: float = 0.0
    least: float = 180.0
    most: float = 0.0

    def add(self, part: Fold) -> None:
        angles = np.degrees(part.angles)
        self.steps += angles.size
        self.slerped += int(part.slerped.sum())
        angles = angles[~np.isnan(angles)]
        if angles.size:
            self.known += angles.size
            self.total += float(angles.sum())
            self.least = min(self.least, float(angles.min()))
            self.most = max(self.most, float(angles.max()))

    def blend(self) -> Blend:
        angles: list[float | None] = [self.least, self.total / self.known, self.most] if self.known else []
        return Blend(coefficients=None, angles=angles, steps=self.steps, slerped=self.slerped)
