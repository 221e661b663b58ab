"""Cores as bits, with pyroaring as the oracle."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyroaring import BitMap

from cpimerge.kernels.arrays import WORD
from cpimerge.kernels.bitsets import CONTAINER, most_bytes, overlaps, serialize

SIZES = [1, 63, 64, 65, 4096, 4097, CONTAINER - 1, CONTAINER, CONTAINER + 1, 2 * CONTAINER + 70, 4 * CONTAINER]


def words_of(members: np.ndarray) -> np.ndarray:
    """bool [n] as uint64 [⌈n/64⌉]."""
    padded = np.zeros(-(-members.size // WORD) * WORD, bool)
    padded[: members.size] = members
    return np.packbits(padded, bitorder="little").view(np.uint64)


def check(members: np.ndarray) -> None:
    wanted = BitMap(np.flatnonzero(members).astype(np.uint32), optimize=False)  # optimised, it has run containers
    out = np.full(most_bytes(members.size) + 8, 0xAB, np.uint8)  # what was there before must not show
    size = serialize(words_of(members), out)
    assert size <= most_bytes(members.size)
    assert out[:size].tobytes() == wanted.serialize()
    assert (out[most_bytes(members.size) :] == 0xAB).all()
    assert BitMap.deserialize(out[:size].tobytes()) == wanted


@pytest.mark.parametrize("elements", SIZES)
@pytest.mark.parametrize("density", [0, 0.0001, 0.05, 0.0624, 0.0626, 0.5, 0.999, 1])
def test_serialize_is_pyroarings(elements: int, density: float) -> None:
    check(np.random.default_rng(elements).random(elements) < density)


@pytest.mark.parametrize("count", [4095, 4096, 4097, 8192])
@pytest.mark.parametrize("key", [0, 1, 3])
def test_the_two_kinds_of_containers_meet(count: int, key: int) -> None:
    """One container of exactly so many elements, alone or among others; those before and between it are empty."""
    for other in (None, 0, 2):
        members = np.zeros(4 * CONTAINER, bool)
        places = np.random.default_rng(count).permutation(CONTAINER)[:count]
        members[key * CONTAINER + places] = True
        if other is not None and other != key:
            members[other * CONTAINER + CONTAINER - 1] = True
        check(members)


@given(st.integers(1, 3 * CONTAINER), st.sets(st.integers(0, 3 * CONTAINER - 1)), st.booleans())
def test_serialize_any_set(elements: int, places: set[int], inverted: bool) -> None:
    members = np.zeros(elements, bool)
    members[[place for place in places if place < elements]] = True
    check(members ^ inverted)


def test_the_longest_bitmap_is_no_shorter_than_most_bytes() -> None:
    bitmap = BitMap(np.arange(0, 2 * CONTAINER, dtype=np.uint32), optimize=False)
    assert len(bitmap.serialize()) == most_bytes(2 * CONTAINER)


@pytest.mark.parametrize("tasks", [1, 2, 5])
@pytest.mark.parametrize("elements", [1, 64, 65, 1000])
@pytest.mark.parametrize("density", [0, 0.1, 0.9, 1])
def test_overlaps(tasks: int, elements: int, density: float) -> None:
    members = np.random.default_rng(elements).random((tasks, elements)) < density
    bits = np.array([words_of(row) for row in members])
    out = np.full((tasks, tasks), -1, np.int64)
    assert overlaps(bits, out) == members.any(axis=0).sum()
    assert out.tolist() == [[int((a & b).sum()) for b in members] for a in members]
