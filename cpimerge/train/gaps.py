"""A set of elements of a parameter's memory, in one byte or two for each of them.

Codes add up: each element's code is how far it lies behind the one before it, the first one's is its position. The
largest code is no element; it only skips that far. Bytes serve where one element in 255 or more is in the set, and two
bytes otherwise: c codes for k elements of n, c ≤ k + n/255 or c ≤ k + n/65,535.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from ..kernels import gaps as kernels
from .stage_cores import Positions

__all__ = ["Gaps"]

PIECE = 1 << 20  # codes that PyTorch decodes at a time, into 8 MB of positions
COMPILED = {"cpu"}  # devices of which cpimerge's kernels reach the memory


class Gaps:
    """A set of `count` elements. Memory is given as integers [n], as `placement.bits` has it, on any device."""

    def __init__(self, positions: Positions) -> None:
        """`positions` int64 [count] in memory, ascending, none twice."""
        narrow = kernels.size(positions, 0xFF) <= 2 * positions.size
        self._skip = 0xFF if narrow else 0xFFFF
        codes = np.empty(kernels.size(positions, self._skip), np.uint8 if narrow else np.uint16)
        kernels.encode(positions, self._skip, codes)
        self._codes = torch.from_numpy(codes)
        self.count = positions.size

    @property
    def nbytes(self) -> int:
        """Bytes that the set takes."""
        return self._codes.nbytes

    def take(self, memory: torch.Tensor) -> torch.Tensor:
        """Its elements' values [count]."""
        values = memory.new_empty(self.count)
        if memory.device.type in COMPILED:
            kernels.take(self._on(memory.device).numpy(), self._skip, memory.numpy(), values.numpy())
        else:
            for piece, positions in self._pieces(memory.device):
                torch.index_select(memory, 0, positions, out=values[piece])
        return values

    def put(self, values: torch.Tensor, memory: torch.Tensor) -> None:
        """Write the values [count] to its elements."""
        if memory.device.type in COMPILED:
            kernels.put(self._on(memory.device).numpy(), self._skip, values.numpy(), memory.numpy())
        else:
            for piece, positions in self._pieces(memory.device):
                memory.index_copy_(0, positions, values[piece])

    def clear(self, memory: torch.Tensor) -> None:
        """Set its elements to zero."""
        if memory.device.type in COMPILED:
            kernels.clear(self._on(memory.device).numpy(), self._skip, memory.numpy())
        else:
            for _, positions in self._pieces(memory.device):
                memory.index_fill_(0, positions, 0)

    def _on(self, device: torch.device) -> torch.Tensor:
        """The codes, which lie where the parameter does from its first step there on."""
        if self._codes.device != device:
            self._codes = self._codes.to(device)
        return self._codes

    def _pieces(self, device: torch.device) -> Iterator[tuple[slice, torch.Tensor]]:
        """Positions int64, piece by piece, with where each piece stands among the elements."""
        codes = self._on(device)
        before, end = torch.zeros((), dtype=torch.int64, device=device), 0
        for start in range(0, len(codes), PIECE):
            steps = codes[start : start + PIECE].to(torch.int64)
            positions = steps.cumsum(0).add_(before)
            before = positions[-1]
            if len(codes) > self.count:  # else it need not wait for the device to count them
                positions = positions[steps != self._skip]
            begin, end = end, end + len(positions)
            yield slice(begin, end), positions
