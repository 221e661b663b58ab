"""Elements of a weight with an adapter on it, computed as they are read.

The weight is seen as [rows, columns]: as it is stored, a convolution's kernel flattened. What an element becomes does
not depend on which others are read with it.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from .adapted import BLOCK, KEPT, LEFT, AdaptedTensor, CastTensor, ShiftedTensor
from .checkpoint import Handles, Tensor
from .errors import CheckpointError
from .kernels import floats, lowrank
from .stream import Bytes, Floats, decode, store, values_of

__all__ = ["read_adapted", "read_cast", "read_shifted"]


def read_adapted(tensor: AdaptedTensor, buffer: memoryview, start: int, handles: Handles) -> None:
    """Fill `buffer` with W + scale · left · right, for DoRA each output's vector at its length, rounded once."""
    tensor.base.read_into(buffer, start, handles)
    raw = np.frombuffer(buffer, np.uint8)
    item = tensor.item_bytes
    first = start // item
    work = _Work(tensor, handles)
    for begin, end in work.blocks(first, first + raw.size // item):
        piece = raw[(begin - first) * item : (end - first) * item]
        values = work.updated(piece, begin)
        if tensor.update.magnitude is not None:
            work.set_lengths(values, begin)
        store(values, tensor.dtype, piece)


def read_cast(tensor: CastTensor, buffer: memoryview, start: int, handles: Handles) -> None:
    """Fill `buffer` with the source's values, rounded to the tensor's dtype."""
    for first, piece in _pieces(tensor, buffer, start):
        values = _values(tensor.source, first, first + piece.size // tensor.item_bytes, handles)
        store(values, tensor.dtype, piece)


def read_shifted(tensor: ShiftedTensor, buffer: memoryview, start: int, handles: Handles) -> None:
    """Fill `buffer` with base + scale · shift, rounded once."""
    tensor.base.read_into(buffer, start, handles)
    for first, piece in _pieces(tensor, buffer, start):
        values = decode(piece, tensor.dtype)
        values += np.float32(tensor.scale) * _values(tensor.shift, first, first + values.size, handles)
        store(values, tensor.dtype, piece)


def _pieces(tensor: Tensor, buffer: memoryview, start: int) -> Iterator[tuple[int, Bytes]]:
    """Blocks of the buffer, and the number of the element that each begins with."""
    raw = np.frombuffer(buffer, np.uint8)
    step = BLOCK * tensor.item_bytes
    for done in range(0, raw.size, step):
        yield (start + done) // tensor.item_bytes, raw[done : done + step]


class _Work:
    """One call's view of the tensor, its factors, and room to compute in."""

    def __init__(self, tensor: AdaptedTensor, handles: Handles) -> None:
        self.tensor = tensor
        self.update = tensor.update
        self.handles = handles
        self.columns = tensor.update.columns
        self.rank = -(-tensor.update.rank // lowrank.UNROLL) * lowrank.UNROLL
        self.right = self._right()
        self.left = np.empty((0, self.rank), np.float32)
        self.left_begins = 0
        self.room = np.empty(lowrank.WIDTH, np.float32)

    def blocks(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """Elements [first, last) in blocks for `updated`: whole rows, or a piece of one."""
        rows = max(1, LEFT // self.rank)
        whole = BLOCK // self.columns * self.columns
        for row in range(first // self.columns, -(-last // self.columns), rows):
            begin, end = max(first, row * self.columns), min(last, (row + rows) * self.columns)
            self.left = np.empty((0, self.rank), np.float32)  # what it held is free before the next comes
            self.left, self.left_begins = self._left(row, -(-end // self.columns)), row
            place = begin
            while place < end:
                offset = place % self.columns
                count = whole - offset if whole else min(BLOCK - offset % BLOCK, self.columns - offset)
                yield place, min(place + count, end)
                place += count

    def updated(self, raw: Bytes, begin: int) -> Floats:
        """Elements from `begin` on, whose stored bytes are `raw`, with the update."""
        values = decode(raw, self.tensor.dtype)
        row, place = divmod(begin, self.columns)
        left = self.left[row - self.left_begins :]
        lowrank.add_low_rank(left, self.right, np.float32(self.update.scale), place, values, self.room)
        return values

    def set_lengths(self, values: Floats, begin: int) -> None:
        """DoRA: multiply elements from `begin` on, updated, by their output's magnitude over length."""
        row, place = divmod(begin, self.columns)
        if self.update.transposed:
            lowrank.multiply_columns(self._column_factors(), place, values)
            return
        count = -(-(place + values.size) // self.columns)
        lanes = np.zeros((count, lowrank.LANES))
        if values.size == count * self.columns:
            lowrank.add_row_squares(values, lanes)
        else:  # the lengths are of whole rows
            for first, part in _Work(self.tensor, self.handles).everything(row, row + count):
                above = first // self.columns - row
                lowrank.add_row_squares(part, lanes[above : above - (-part.size // self.columns)])
        norms = np.empty(count, np.float32)
        lowrank.norms(lanes, norms)
        lowrank.multiply_rows(self._over_magnitude(norms, row), self.columns, place, values)

    def _column_factors(self) -> Floats:
        """Magnitude over length of the columns, which takes a pass over the whole tensor, once."""
        kept = self.tensor.kept
        with kept.lock:
            if self.tensor.name not in kept.factors:
                sums = np.zeros(self.columns)
                work = _Work(self.tensor, self.handles)
                for begin, values in work.everything(0, self.tensor.elements // self.columns):
                    place = begin % self.columns
                    lowrank.add_column_squares(values, sums[place : place + values.size])
                while len(kept.factors) >= KEPT:
                    del kept.factors[next(iter(kept.factors))]
                kept.factors[self.tensor.name] = self._over_magnitude(np.sqrt(sums).astype(np.float32), 0)
            factors: Floats = kept.factors[self.tensor.name]
        return factors

    def everything(self, first: int, last: int) -> Iterator[tuple[int, Floats]]:
        """The elements of rows [first, last) with the update, block by block, and where each block begins."""
        item = self.tensor.item_bytes
        for begin, end in self.blocks(first * self.columns, last * self.columns):
            raw = np.empty((end - begin) * item, np.uint8)
            self.tensor.base.read_into(memoryview(raw), begin * item, self.handles)
            yield begin, self.updated(raw, begin)

    def _over_magnitude(self, norms: Floats, first: int) -> Floats:
        """Magnitudes [first, first + n) over `norms` float32 [n]. Where a norm is 0, so is what it scales: NaN."""
        assert self.update.magnitude is not None
        magnitudes = _values(self.update.magnitude, first, first + norms.size, self.handles)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            ratio: Floats = magnitudes / norms
        return ratio

    def _left(self, first: int, last: int) -> Floats:
        """Rows [first, last) of the left factor, float32 [rows, rank], padded with zeros."""
        left = np.zeros((last - first, self.rank), np.float32)
        factor, rank = self.update.left, self.update.rank
        if self.update.transposed:  # stored [rank, rows]
            rows = factor.elements // rank
            for k in range(rank):
                left[:, k] = _values(factor, k * rows + first, k * rows + last, self.handles)
        else:
            left[:, :rank] = _values(factor, first * rank, last * rank, self.handles).reshape(-1, rank)
        return left

    def _right(self) -> Floats:
        """The whole right factor, float32 [rank, columns], padded with zeros; the thread keeps the last one."""
        local = self.tensor.kept.local
        if getattr(local, "name", None) != self.tensor.name:
            local.name = local.right = None  # what it held is free before the next comes
            factor, rank = self.update.right, self.update.rank
            right = np.zeros((self.rank, self.columns), np.float32)
            values = _values(factor, 0, factor.elements, self.handles)
            right[:rank] = values.reshape(-1, rank).T if self.update.transposed else values.reshape(rank, -1)
            local.name, local.right = self.tensor.name, right
        found: Floats = local.right
        return found


def _values(tensor: Tensor, first: int, last: int, handles: Handles) -> Floats:
    """Elements [first, last) of an adapter's own tensor as float32. Raises CheckpointError where one is not finite."""
    values = values_of(tensor, first, last, handles)
    place = floats.first_nonfinite(values.view(np.uint32), np.uint32(0x7F800000))
    if place >= 0:
        file = getattr(tensor, "file", None)
        raise CheckpointError(
            f"{'' if file is None else f'{file}: '}tensor {tensor.name!r}: flat index {first + place} is NaN or Inf. "
            "Repair the adapter or take another"
        )
    return values
