"""Cores as bits, with pyroaring as the oracle."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyroaring import BitMap

from cpimerge.kernels.arrays import WORD
from cpimerge.kernels.bitsets import CONTAINER, is_serialized, most_bytes, overlaps, serialize

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
    assert is_serialized(out[:size], members.size)


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
    rng = np.random.default_rng(elements)
    members = rng.random((tasks, elements)) < density
    less = members & (rng.random((tasks, elements)) < 0.4)
    bits, inward = (np.array([words_of(row) for row in rows]) for rows in (members, less))
    pairs, aligned, inwards = (np.full((tasks, tasks), -1, np.int64) for _ in range(3))
    assert overlaps(bits, inward, pairs, aligned, inwards) == members.any(axis=0).sum()
    assert pairs.tolist() == [[int((a & b).sum()) for b in members] for a in members]
    assert inwards.tolist() == [[int((a & b).sum()) for b in members] for a in less]
    signs = members.astype(int) - 2 * less  # 1 outward, -1 inward, 0 in no core
    assert aligned.tolist() == [[int((a * b == 1).sum()) for b in signs] for a in signs]


# --- what a stranger may have written ---------------------------------------------------------------


def bitmap(cookie: int, containers: list[tuple[int, int, bytes]], after: bytes = b"") -> bytes:
    """A bitmap of containers (key, how many elements it claims, its bytes), right or wrong."""
    head = struct.pack("<II", cookie, len(containers))
    keys = b"".join(struct.pack("<HH", key, count - 1) for key, count, _ in containers)
    end, offsets = len(head) + 8 * len(containers), b""
    for _, _, content in containers:
        offsets, end = offsets + struct.pack("<I", end), end + len(content)
    return head + keys + offsets + b"".join(content for _, _, content in containers) + after


def listed(*lows: int) -> tuple[int, bytes]:
    return len(lows), struct.pack(f"<{len(lows)}H", *lows)


FULL = (CONTAINER, b"\xff" * 8192)
COOKIE = 12346
RUNS = struct.pack("<I", 12347) + b"\1" + struct.pack("<HHHHH", 0, 0xFFFF, 1, 0, 0xFFFF)  # all of it

FORGED: dict[str, tuple[bytes, bool]] = {
    "sound": (bitmap(COOKIE, [(0, *listed(1, 5)), (3, *FULL)]), True),
    "nothing": (bitmap(COOKIE, []), True),
    "no bytes": (b"", False),
    "odd bytes": (bitmap(COOKIE, [(0, *listed(1))], b"\0"), False),
    "bytes left over": (bitmap(COOKIE, [(0, *listed(1))], b"\0\0"), False),
    "cut": (bitmap(COOKIE, [(0, *listed(1, 2))])[:-2], False),
    "cut in the head": (bitmap(COOKIE, [(0, *listed(1, 2))])[:10], False),
    "another cookie": (bitmap(12345, [(0, *listed(1))]), False),
    "runs": (RUNS, False),
    "falling": (bitmap(COOKIE, [(0, *listed(2, 1))]), False),
    "twice": (bitmap(COOKIE, [(0, *listed(1, 1))]), False),
    "falling keys": (bitmap(COOKIE, [(1, *listed(1)), (0, *listed(1))]), False),
    "a key twice": (bitmap(COOKIE, [(0, *listed(1)), (0, *listed(2))]), False),
    "a key beyond": (bitmap(COOKIE, [(4, *listed(1))]), False),
    "too many containers": (bitmap(COOKIE, [(key, *listed(1)) for key in range(5)]), False),
    "containers without end": (struct.pack("<II", COOKIE, 0xFFFFFFFF) + bytes(64), False),
    "fewer bits than it says": (bitmap(COOKIE, [(0, 60_000, b"\xff" + bytes(8191))]), False),
    "more bits than it says": (bitmap(COOKIE, [(0, 4097, b"\xff" * 8192)]), False),
    "a list that should be bits": (bitmap(COOKIE, [(0, *listed(*range(4097)))]), False),
    "bits that should be a list": (bitmap(COOKIE, [(0, 8, b"\xff" + bytes(8191))]), False),
    "an offset elsewhere": (bitmap(COOKIE, [(0, *listed(1))])[:12] + b"\0\1\0\0\1\0", False),
}


@pytest.mark.parametrize("case", FORGED)
def test_only_what_serialize_writes_is_taken(case: str) -> None:
    data, sound = FORGED[case]
    assert is_serialized(np.frombuffer(data, np.uint8), 4 * CONTAINER) is sound
    if sound:
        assert BitMap.deserialize(data).serialize() == data


@given(st.sets(st.integers(0, 3 * CONTAINER - 1), max_size=50), st.data())
def test_no_change_passes_unless_it_is_another_set(places: set[int], data: st.DataObject) -> None:
    raw = bytearray(BitMap(places, optimize=False).serialize())
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    if is_serialized(np.frombuffer(bytes(raw), np.uint8), 3 * CONTAINER):
        found = BitMap.deserialize(bytes(raw))
        assert BitMap(list(found), optimize=False).serialize() == bytes(raw)
