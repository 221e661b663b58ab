"""Where a tensor's elements lie in a parameter's memory."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cpimerge.train.placement import Placement, bits


@st.composite
def boxes(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, Placement]:
    """A tensor that numbers its elements, a box of it in some memory layout, and what `Placement` is to say of that."""
    whole = tuple(draw(st.lists(st.integers(1, 5), max_size=4)))
    start = tuple(draw(st.integers(0, size)) for size in whole)
    shape = tuple(draw(st.integers(0, size - first)) for size, first in zip(whole, start, strict=True))
    numbered = torch.arange(math.prod(whole)).reshape(whole)
    order = draw(st.permutations(range(len(whole))))
    piece = numbered[tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))]
    back = [order.index(i) for i in range(len(whole))]
    local = piece.permute(order).contiguous().permute(back)
    return numbered, local, Placement(whole, start, shape, local.stride())


@given(box=boxes(), data=st.data())
def test_offsets_are_those_of_the_elements_in_the_box(box: Any, data: st.DataObject) -> None:
    numbered, local, place = box
    chosen = data.draw(st.sets(st.integers(0, numbered.numel() - 1)))
    offsets = place.offsets(np.array(sorted(chosen), np.int64))
    assert (np.diff(offsets) > 0).all()
    memory = bits(local)
    assert {int(memory[i]) for i in offsets} == chosen & set(local.flatten().tolist())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_bits_are_the_tensors_own_memory(dtype: torch.dtype) -> None:
    tensor = torch.zeros(3, 4, dtype=dtype, requires_grad=dtype != torch.float8_e4m3fn)
    memory = bits(tensor)
    assert (memory.shape, memory.itemsize, memory.requires_grad) == ((12,), tensor.itemsize, False)
    memory[5] = -1
    assert [i for i, x in enumerate(tensor.detach().float().flatten().tolist()) if x != 0] == [5]


def test_bits_of_a_part_of_a_memory() -> None:
    whole = torch.arange(20.0).reshape(4, 5)
    assert bits(whole[1:3]).view(torch.float32).tolist() == [float(i) for i in range(5, 15)]
    assert bits(whole[:0]).tolist() == []
    assert bits(torch.tensor(2.0)).view(torch.float32).tolist() == [2.0]


def test_another_layout_does_not_fit() -> None:
    tensor = torch.zeros(3, 4)
    place = Placement.of("x", tensor)
    assert place == Placement((3, 4), (0, 0), (3, 4), (4, 1))
    assert place.fits(torch.ones(3, 4, dtype=torch.float16))
    assert not place.fits(torch.zeros(4, 3))
    assert not place.fits(torch.zeros(4, 3).t())
