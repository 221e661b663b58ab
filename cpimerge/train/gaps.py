"""A set of elements of a tensor, in one byte or two for each of them.

Codes add up: each element's code is how far it lies behind the one before it, the first one's is its position. The
largest code is no element; it only skips that far. Bytes serve where an element in 255 or more is in the set, and two
bytes otherwise: c codes for k elements of n, c ≤ k + n/255 or c ≤ k + n/65,535.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from ..kernels.gaps import decode
from .stage_cores import Positions

__all__ = ["Gaps"]

PIECE = 1 << 18  # codes that are decoded at a time: 2 MB of positions


class Gaps:
    """Ascending positions of `count` elements; `codes` uint8 or uint16 lie where the tensor does, once it was used."""

    def __init__(self, positions: Positions) -> None:
        """`positions` int64 [count], ascending, none twice."""
        steps = np.diff(positions, prepend=0)
        byte = not steps.size or int((steps // 0xFF).sum()) <= steps.size
        self._skip = 0xFF if byte else 0xFFFF
        skips = steps // self._skip
        codes = np.full(steps.size + int(skips.sum()), self._skip, np.uint8 if byte else np.uint16)
        codes[np.cumsum(skips) + np.arange(steps.size)] = steps % self._skip
        self.codes = torch.from_numpy(codes)
        self.count = steps.size

    @property
    def nbytes(self) -> int:
        """What it holds, in bytes."""
        return self.codes.nbytes

    def pieces(self, device: torch.device) -> Iterator[tuple[slice, torch.Tensor]]:
        """The positions int64 on `device`, piece by piece, with where each piece stands among all of them."""
        if self.codes.device != device:
            self.codes = self.codes.to(device)
        begin = 0
        for positions in self._decoded_by_kernel() if device.type == "cpu" else self._decoded_by_torch():
            end = begin + len(positions)
            yield slice(begin, end), positions
            begin = end

    def _decoded_by_kernel(self) -> Iterator[torch.Tensor]:
        codes = self.codes.numpy()
        out = np.empty(min(codes.size, PIECE), np.int64)
        place = torch.from_numpy(out)
        position = 0
        for start in range(0, codes.size, PIECE):
            count, position = decode(codes[start : start + PIECE], self._skip, position, out)
            yield place[:count]

    def _decoded_by_torch(self) -> Iterator[torch.Tensor]:
        skips = len(self.codes) > self.count
        position: torch.Tensor | int = 0
        for start in range(0, len(self.codes), PIECE):
            steps = self.codes[start : start + PIECE].to(torch.int64)
            places = steps.cumsum(0) + position
            position = places[-1]
            yield places[steps != self._skip] if skips else places
