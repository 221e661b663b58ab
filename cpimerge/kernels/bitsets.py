"""Cores as bits: their overlaps, and how they are stored."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from .arrays import WORD, Counts, Stored, Words, compiled
from .vectors import lowest, population, union

Halves = npt.NDArray[np.uint16]

COOKIE = 12346  # of bitmaps without run containers
CONTAINER = 1 << 16  # elements of a Roaring container
LAST_BIT = np.uint64(1 << 63)  # of a word: what `lowest` finds where no other is set
ARRAY = 4096  # so many of them are listed, more are a bit each


def most_bytes(elements: int) -> int:
    """What `serialize` writes at most for so many elements."""
    return 8 + -(-elements // CONTAINER) * (8 + CONTAINER // 8)


@compiled
def serialize(bits: Words, out: Stored) -> int:
    """Write the set `bits` uint64 [W] to `out` as a portable Roaring bitmap; returns its bytes.

    https://github.com/RoaringBitmap/RoaringFormatSpec: cookie, number of containers, each one's key and size, each
    one's offset, then the containers, the sorted low halves of their elements or a bit for each. Little-endian.
    """
    halves = out[: out.size // 2 * 2].view(np.uint16)  # everything begins at an even byte
    words = CONTAINER // WORD
    containers = -(-bits.size // words)
    sizes = np.zeros(containers, np.int64)
    for word in range(bits.size):
        sizes[word // words] += population(bits[word])
    filled = int(np.count_nonzero(sizes))
    _put(halves, 0, COOKIE)
    _put(halves, 2, filled)
    place, end = 4, 4 + 4 * filled
    for key in range(containers):
        if sizes[key]:
            halves[place] = key
            halves[place + 1] = sizes[key] - 1
            _put(halves, place + 2 * filled, 2 * end)
            place += 2
            end = _container(bits[key * words : (key + 1) * words], sizes[key], halves, end)
    return 2 * end


@compiled
def _container(bits: Words, size: int, halves: Halves, place: int) -> int:
    if size > ARRAY:
        end = place + CONTAINER // 16
        halves[place:end] = 0
        for word in range(bits.size):
            for quarter in range(4):
                halves[place + 4 * word + quarter] = bits[word] >> np.uint64(16 * quarter)
        return end
    end = place + size
    for word in range(bits.size):
        if place + 2 <= end:
            place = _list(bits[word], word * WORD, halves, place)
        elif bits[word]:
            halves[place] = word * WORD + lowest(bits[word])
            place += 1
    return end


@compiled
def _list(word: Any, first: int, halves: Halves, place: int) -> Any:
    """Write `first` + the number of each bit set in a word from `place` on; returns where these end.

    Two are written in any case, as how many there are cannot be foreseen; the next word's go over what is too much.
    """
    left = word
    for slot in range(2):
        halves[place + slot] = first + lowest(left | LAST_BIT)
        left &= left - np.uint64(1)
    more = place + 2
    while left:
        halves[more] = first + lowest(left)
        left &= left - np.uint64(1)
        more += 1
    return place + population(word)


@compiled
def _put(halves: Halves, place: int, value: int) -> None:
    halves[place] = value & 0xFFFF
    halves[place + 1] = value >> 16


@compiled
def is_serialized(data: Stored, elements: int) -> bool:
    """Whether `data` is in the form that `serialize` writes: a set within the containers that so many elements need.

    What a stranger wrote may lie about its sizes and offsets, and hold runs of any length. Nothing outside of `data` is
    read here, nor by who reads on after this. Only whether the last of the set is among the elements is left to see.
    """
    if data.size % 2 or data.size < 8:
        return False
    halves = data.view(np.uint16)
    filled = _get(halves, 2)
    containers = -(-elements // CONTAINER)
    end = 4 + 4 * filled
    if _get(halves, 0) != COOKIE or filled > containers or end > halves.size:
        return False
    before = -1
    for place in range(4, 4 + 2 * filled, 2):
        key, size = int(halves[place]), int(halves[place + 1]) + 1
        begin, end = end, end + (size if size <= ARRAY else CONTAINER // 16)
        if not before < key < containers or _get(halves, place + 2 * filled) != 2 * begin or end > halves.size:
            return False
        if not _is_container(halves[begin:end], size):
            return False
        before = key
    return bool(end == halves.size)


@compiled
def _is_container(halves: Halves, size: int) -> bool:
    """Whether so many elements are listed in ascending order; or, where each is a bit, there are so many."""
    if size > ARRAY:
        count = 0
        for place in range(halves.size):
            count += population(np.uint64(halves[place]))
        return count == size
    ascending = True
    for place in range(1, halves.size):  # to the end whatever comes, in vectors
        ascending &= halves[place - 1] < halves[place]
    return ascending


@compiled
def _get(halves: Halves, place: int) -> int:
    return int(halves[place]) | int(halves[place + 1]) << 16


@compiled
def overlaps(bits: Words, inward: Words, pairs: Counts, aligned: Counts, inwards: Counts) -> int:
    """|Ca ∩ Cb| of every two rows of `bits` uint64 [T, W] into `pairs` int64 [T, T]; returns |∪ C|.

    `inward` [T, W] has those elements of each core that moved inward. Into `aligned` [T, T]: how many of both cores did
    so in both, or in neither. Into `inwards` [T, T]: how many of both cores did so in the first of the two.
    """
    claimed = 0
    for word in range(bits.shape[1]):
        claimed += population(union(bits, word))
    for a in range(bits.shape[0]):
        for b in range(a, bits.shape[0]):
            pairs[a, b] = pairs[b, a] = _shared(bits[a], bits[b])
            inwards[a, b] = _shared(inward[a], bits[b])
            inwards[b, a] = _shared(bits[a], inward[b])
            opposed = inwards[a, b] + inwards[b, a] - 2 * _shared(inward[a], inward[b])
            aligned[a, b] = aligned[b, a] = pairs[a, b] - opposed
    return claimed


@compiled
def _shared(a: Words, b: Words) -> int:
    count = 0
    for word in range(a.size):
        count += population(a[word] & b[word])
    return count
