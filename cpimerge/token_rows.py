"""Embeddings and heads in the rows of another vocabulary: computed as they are read, a run of rows at a time.

Rows are those of the vocabulary's dimension, which is the first that is not 1; the bytes of a row lie together.
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from .checkpoint import Handles, Tensor
from .token_relations import NOWHERE, split_rows

if TYPE_CHECKING:
    from .stream import Floats

__all__ = ["MeanRows", "MovedRows", "Runs"]

PIECE = 1 << 14  # elements that are converted at a time


class Runs:
    """Where each row comes from: runs of rows that follow each other in the source, or that are not in it."""

    def __init__(self, rows: Sequence[int]) -> None:
        """`rows` [R]: the row of the source, or NOWHERE."""
        self.rows = len(rows)
        self._starts, self._sources = array("q"), array("q")
        expected = None
        for row, source in enumerate(rows):
            if source != expected:
                self._starts.append(row)
                self._sources.append(source)
            expected = NOWHERE if source == NOWHERE else source + 1

    @property
    def is_identity(self) -> bool:
        return list(self._sources) == [0]  # of a source that may have more rows

    def pieces(self, start: int, stop: int, row_bytes: int) -> Iterator[tuple[int, int, int | None]]:
        """Bytes [begin, end) that lie together, and where in the source they begin; None: not in it.

        Elements, where `row_bytes` counts these.
        """
        number = bisect_right(self._starts, start // row_bytes) - 1
        while start < stop:
            following = self._starts[number + 1] if number + 1 < len(self._starts) else self.rows
            end = min(stop, following * row_bytes)
            shift = (self._sources[number] - self._starts[number]) * row_bytes
            yield start, end, None if self._sources[number] == NOWHERE else start + shift
            start, number = end, number + 1


@dataclass(frozen=True, slots=True)
class MovedRows(Tensor):
    """Rows of `source` as `runs` say; those that it lacks are `fallback`'s, which has the same shape."""

    source: Tensor
    runs: Runs
    fallback: Tensor

    @property
    def scratch_bytes(self) -> int:
        return 8 * PIECE + self.source.scratch_bytes + self.fallback.scratch_bytes

    @classmethod
    def of(cls, source: Tensor, runs: Runs, fallback: Tensor) -> MovedRows:
        return cls(*_outline(source, runs.rows), source, runs, fallback)

    def in_source(self, element: int) -> int | None:
        """The flat index in the source of an element; None: it is the fallback's."""
        row_size = self.elements // self.runs.rows
        return next(self.runs.pieces(element, element + 1, row_size))[2]

    def read_into(self, buffer: memoryview, start: int, handles: Handles) -> None:
        """As for every `Tensor`."""
        row_bytes = self.nbytes // self.runs.rows
        for begin, end, place in self.runs.pieces(start, start + len(buffer), row_bytes):
            piece = buffer[begin - start : end - start]
            if place is not None:
                self.source.read_into(piece, place, handles)
            elif self.fallback.dtype == self.dtype:
                self.fallback.read_into(piece, begin, handles)
            else:
                self._convert(piece, begin // self.item_bytes, handles)

    def _convert(self, buffer: memoryview, first: int, handles: Handles) -> None:
        """The fallback's elements from `first` on, rounded to this dtype."""
        from .stream import store, values_of  # with numba, which comparing vocabularies need not wait for

        for place in range(0, len(buffer) // self.item_bytes, PIECE):
            piece = buffer[place * self.item_bytes : (place + PIECE) * self.item_bytes]
            begin, size = first + place, len(piece) // self.item_bytes
            store(values_of(self.fallback, begin, begin + size, handles), self.dtype, np.frombuffer(piece, np.uint8))


@dataclass(frozen=True, slots=True)
class MeanRows(Tensor):
    """For each row the mean of those `sources` that have it: added up in float32 in their order, rounded once.

    `places`: for each source, row -> the source's row. Only rows that one of them has may be read.
    """

    rows: int
    sources: tuple[Tensor, ...]
    places: tuple[Mapping[int, int], ...] = field(compare=False)

    @property
    def scratch_bytes(self) -> int:
        return 16 * PIECE + sum(source.scratch_bytes for source in self.sources)  # adapters keep what they read

    @classmethod
    def like(cls, tensor: Tensor, rows: int, parts: Sequence[tuple[Tensor, Mapping[int, int]]]) -> MeanRows:
        """Of the tensor's dtype and row, with `rows` rows; `parts` are the sources with their places."""
        sources, places = zip(*parts, strict=True)
        return cls(*_outline(tensor, rows), rows, sources, places)

    def read_into(self, buffer: memoryview, start: int, handles: Handles) -> None:
        """As for every `Tensor`."""
        from .stream import store

        item = self.item_bytes
        row_size = self.elements // self.rows
        place, stop = start // item, (start + len(buffer)) // item
        while place < stop:
            row, column = divmod(place, row_size)
            size = min(stop - place, row_size - column, PIECE)
            begin = place * item - start
            piece = np.frombuffer(buffer[begin : begin + size * item], np.uint8)
            store(self._mean(row, column, size, handles), self.dtype, piece)
            place += size

    def _mean(self, row: int, column: int, size: int, handles: Handles) -> Floats:
        from .stream import values_of

        row_size = self.elements // self.rows
        parts = zip(self.sources, self.places, strict=True)
        having = [(source, places[row]) for source, places in parts if row in places]
        total = np.zeros(size, np.float32)
        with np.errstate(over="ignore", invalid="ignore"):  # not finite is found where the inputs are looked at
            for source, place in having:
                begin = place * row_size + column
                total += values_of(source, begin, begin + size, handles)
            return total / np.float32(len(having))


def _outline(tensor: Tensor, rows: int) -> tuple[str, str, tuple[int, ...], int]:
    """Name, dtype, shape and bytes of a tensor, with that many rows."""
    before, _, after = split_rows(tensor.shape)
    shape = (*before, rows, *after)
    return tensor.name, tensor.dtype, shape, math.prod(shape) * tensor.item_bytes
