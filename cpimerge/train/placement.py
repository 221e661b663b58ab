"""Where a tensor's elements lie in the memory of a parameter: whole or sharded, contiguous or permuted."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch.distributed.tensor import DTensor, Replicate, Shard

from ..errors import IncompatibleError
from .stage_cores import Positions

__all__ = ["Placement", "bits"]

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Placement:
    """The box of a tensor of shape `whole` that this process holds, from `start` on, and its strides in elements."""

    whole: tuple[int, ...]
    start: tuple[int, ...]
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @classmethod
    def of(cls, name: str, tensor: torch.Tensor) -> Placement:
        """Raises IncompatibleError where the tensor is sharded in another way than by `Shard` and `Replicate`."""
        local = _local(tensor)
        whole, shape = tuple(tensor.shape), tuple(local.shape)
        start, expected = _box(name, tensor) if isinstance(tensor, DTensor) else ((0,) * len(whole), whole)
        if shape != expected:
            raise IncompatibleError(
                f"parameter {name!r}: this process holds {list(shape)} of it, expected {list(expected)}"
            )
        return cls(whole, start, shape, tuple(local.stride()))

    def offsets(self, positions: Positions) -> Positions:
        """Ascending offsets in memory int64 of those `positions` (row-major in the whole) that lie in the box."""
        if self.shape == self.whole and self.strides == _row_major(self.shape):
            return positions
        places = np.unravel_index(positions, self.whole) if self.whole else ()
        inside = np.ones(positions.size, bool)
        offsets = np.zeros(positions.size, np.int64)
        for place, start, size, stride in zip(places, self.start, self.shape, self.strides, strict=True):
            inside &= (place >= start) & (place < start + size)
            offsets += (place - start) * stride
        return np.sort(offsets[inside])

    def fits(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor's elements lie in this way."""
        local = _local(tensor)
        return (tuple(tensor.shape), tuple(local.shape), local.stride()) == (self.whole, self.shape, self.strides)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of what this process holds of a tensor: integers [extent], to be written to."""
    local = _local(tensor).detach()
    extent = 1 + sum((size - 1) * stride for size, stride in zip(local.shape, local.stride(), strict=True))
    flat = local.as_strided((extent if local.numel() else 0,), (1,))
    return flat.view(INTEGERS[local.element_size()])


def _local(tensor: torch.Tensor) -> torch.Tensor:
    if not isinstance(tensor, DTensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()


def _box(name: str, tensor: DTensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Where the box of this process begins, and its shape: each `Shard` divides what the ones before it left."""
    shape, start = list(tensor.shape), [0] * tensor.dim()
    coordinate = tensor.device_mesh.get_coordinate() or ()
    for number, rank, placement in zip(range(tensor.device_mesh.ndim), coordinate, tensor.placements, strict=True):
        if type(placement) is Replicate:
            continue
        if type(placement) is not Shard:
            raise IncompatibleError(
                f"parameter {name!r}: is sharded as {placement}; only Shard and Replicate are known"
            )
        piece = -(-shape[placement.dim] // tensor.device_mesh.size(number))
        skipped = min(rank * piece, shape[placement.dim])
        start[placement.dim] += skipped
        shape[placement.dim] = min(piece, shape[placement.dim] - skipped)
    return tuple(start), tuple(shape)


def _row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
