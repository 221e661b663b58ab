"""Sets of elements in a byte or two each."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cpimerge.train import gaps
from cpimerge.train.gaps import Gaps
from cpimerge.train.stage_cores import Positions

DTYPES = (torch.uint8, torch.int16, torch.int32, torch.int64)


@pytest.fixture(params=["kernels", "torch"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to reach the elements: that of the processor's memory, and that of other devices'."""
    if request.param == "torch":
        monkeypatch.setattr(gaps, "COMPILED", set())
        monkeypatch.setattr(gaps, "PIECE", 7)


def sets() -> st.SearchStrategy[list[int]]:
    """Ascending positions: dense, sparse, and with gaps at the limits of a code."""
    step = st.one_of(
        st.integers(1, 4), st.sampled_from([254, 255, 256, 509, 510, 511, 65_534, 65_535, 65_536, 131_070])
    )
    return st.tuples(st.sampled_from([0, 0, 1, 254, 255, 65_535, 65_536]), st.lists(step, max_size=40)).map(
        lambda drawn: list(np.cumsum([drawn[0], *drawn[1]]))
    )


@given(positions=sets(), dtype=st.sampled_from(DTYPES))
def test_exactly_its_elements_are_reached(positions: list[int], dtype: torch.dtype) -> None:
    memory = torch.arange(positions[-1] + 3).remainder(251).add(1).to(dtype)
    before = memory.clone()
    held = Gaps(np.array(positions, np.int64))
    assert held.count == len(positions)
    values = held.take(memory)
    assert values.tolist() == [before[i] for i in positions]
    held.clear(memory)
    assert [i for i, x in enumerate((memory == 0).tolist()) if x] == positions
    memory.copy_(before)
    held.put(values + 1, memory)
    assert torch.equal(memory[positions], values + 1)
    held.put(values, memory)
    assert torch.equal(memory, before)


def test_no_elements() -> None:
    held = Gaps(np.empty(0, np.int64))
    memory = torch.tensor([5], dtype=torch.int32)
    held.clear(memory)
    held.put(held.take(memory), memory)
    assert (held.count, held.nbytes, memory.tolist()) == (0, 0, [5])


def drawn(density: float, elements: int) -> Positions:
    return np.flatnonzero(np.random.default_rng(0).random(elements) < density)


@pytest.mark.parametrize("density", [5e-4, 0.001, 0.003, 0.01, 0.05, 0.1, 0.4, 1.0])
@pytest.mark.parametrize("elements", [576, 576 * 576, 4_000_000])
def test_two_bytes_an_element_are_enough(density: float, elements: int) -> None:
    positions = drawn(density, elements)
    assert Gaps(positions).nbytes <= 2 * positions.size


@pytest.mark.parametrize(("density", "most"), [(0.01, 1.1), (0.05, 1.0001), (0.4, 1.0)])
def test_mostly_one_is(density: float, most: float) -> None:
    positions = drawn(density, 4_000_000)
    assert Gaps(positions).nbytes <= most * positions.size


def test_the_bound_holds_where_elements_are_far_apart() -> None:
    positions = np.array([3, 10_000_000, 10_000_001], np.int64)
    assert Gaps(positions).nbytes <= 2 * (3 + 10_000_001 // 65_535)
