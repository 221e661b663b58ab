"""Tensors of a model with an adapter on it, which are computed as they are read."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

from .checkpoint import Handles, Tensor

__all__ = ["AdaptedTensor", "CastTensor", "Kept", "LowRank", "ShiftedTensor"]

BLOCK = 1 << 16  # elements that are decoded at a time; a row's partial sums divide it
KEPT = 16  # tensors whose columns' lengths are kept
LEFT = 1 << 18  # numbers of the left factor that are held at a time, unless one row has more


class Kept:
    """What readers of one adapter keep between reads: a thread's last right factor, and lengths of columns."""

    def __init__(self) -> None:
        self.local = threading.local()
        self.lock = threading.Lock()
        self.factors: dict[str, Any] = {}


@dataclass(frozen=True, slots=True)
class LowRank:
    """ΔW = scale · left · right of a weight seen as [rows, columns].

    As stored, `left` is [rows, rank] and `right` [rank, columns]; if `transposed`, [rank, rows] and [columns, rank].
    `magnitude` (DoRA) has the length of each output's vector: a row of W + ΔW, or a column if `transposed`.
    """

    left: Tensor
    right: Tensor
    rank: int
    columns: int
    transposed: bool
    scale: float
    magnitude: Tensor | None


@dataclass(frozen=True, slots=True)
class AdaptedTensor(Tensor):
    """A weight with its low-rank update, rounded once to the weight's dtype."""

    base: Tensor
    update: LowRank
    kept: Kept = field(compare=False)

    @property
    def scratch_bytes(self) -> int:
        padded = self.update.rank + 3
        left = 12 * max(LEFT, padded)  # as stored, decoded, padded
        right = 12 * padded * self.update.columns
        lengths = 0
        if self.update.magnitude is not None:
            rows = 1 if self.update.transposed else min(self.elements, BLOCK) // max(1, self.update.columns) + 2
            lengths = left + BLOCK * (self.item_bytes + 4) + 8 * 64 * rows + (32 + 4 * KEPT) * self.update.columns
        return self.base.scratch_bytes + left + right + 8 * BLOCK + lengths

    def read_into(self, buffer: memoryview, start: int, handles: Handles) -> None:
        """As for every `Tensor`. Raises CheckpointError where a factor is not finite."""
        from .lowrank import read_adapted  # with numba, which headers need not wait for

        read_adapted(self, buffer, start, handles)


@dataclass(frozen=True, slots=True)
class ShiftedTensor(Tensor):
    """A bias with `scale` times the adapter's bias added, rounded once to the bias's dtype."""

    base: Tensor
    shift: Tensor
    scale: float

    @property
    def scratch_bytes(self) -> int:
        return self.base.scratch_bytes + 20 * BLOCK

    def read_into(self, buffer: memoryview, start: int, handles: Handles) -> None:
        """As for every `Tensor`. Raises CheckpointError where the shift is not finite."""
        from .lowrank import read_shifted

        read_shifted(self, buffer, start, handles)


@dataclass(frozen=True, slots=True)
class CastTensor(Tensor):
    """A tensor that an adapter has in another float dtype than the model, rounded to the model's."""

    source: Tensor

    @property
    def scratch_bytes(self) -> int:
        return self.source.scratch_bytes + 12 * BLOCK

    def read_into(self, buffer: memoryview, start: int, handles: Handles) -> None:
        """As for every `Tensor`. Raises CheckpointError where a value is not finite."""
        from .lowrank import read_cast

        read_cast(self, buffer, start, handles)
