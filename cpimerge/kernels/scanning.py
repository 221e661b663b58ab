"""The read of `plan`: everything that one look at a chunk can settle, and what was left open."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from .arrays import TILE, WORD, Bits, Counts, Doubles, Floats, Stored, Words, aligned, borrowed, compiled
from .floats import decode, item_bytes
from .sifting import clear_where, sift
from .vectors import above, at_least, gram, lowest, union

INFINITE = np.uint32(0x7F800000)  # from here on, a magnitude is no number; also the mask of the exponent

ALL = np.uint32(0xFFFFFFFF)  # bits


class Look(NamedTuple):
    """What to make of a chunk: of `size` elements, in rows of `row`, from `tasks` tasks and perhaps a backbone.

    The blend's members are the checkpoints from `member` on, as differences from the base if `delta`. `near` is a
    magnitude; half a unit in the last place of a base value b is `half` · max(2^⌊log2 |b|⌋, float32 of `least`).
    """

    size: int
    row: int
    tasks: int
    member: int
    delta: bool
    near: np.uint32
    least: np.uint32
    half: np.float32
    begin: int = 0  # bytes before the chunk in each row of `raw`


class Found(NamedTuple):
    """What `scan` fills in; see there."""

    bits: Words  # [T, W]: certainly in the core
    inward: Words  # [T, W]: and moved there against the sign of the base, that is towards zero or through it
    counts: Counts  # [T, 5]: changed, m ≤ near, within half a unit of the base; above the bracket, in it
    peaks: Bits  # [C − 1]: the largest magnitude
    sums: Doubles  # [T, 2]: Σ m above the bracket, below it
    gram: Doubles  # [R, P] of the elements below every bracket
    places: Bits  # [room]: where an element is in some task's bracket, ascending
    values: Floats  # [room, C]: what every checkpoint has there


class Scratch(NamedTuple):
    """Room for one tile; contents do not matter."""

    values: Bits  # [C, TILE]
    magnitude: Bits  # [TILE]
    half: Bits  # [TILE]
    keep: Bits  # [TILE]
    open: Words  # [TILE // WORD]
    reached: Words  # [TILE // WORD]


def scratch(checkpoints: int) -> Scratch:
    """Room for tiles of so many checkpoints."""
    magnitude, half, keep = (aligned(TILE, np.uint32) for _ in range(3))
    opened, reached = (aligned(TILE // WORD, np.uint64) for _ in range(2))
    return Scratch(aligned((checkpoints, TILE), np.uint32), magnitude, half, keep, opened, reached)


@compiled
def scan(raw: Stored, kinds: Counts, look: Look, low: Bits, high: Bits, found: Found, room: Scratch) -> int:
    """One look at a chunk, when of each core only a bracket of its smallest magnitude is known.

    `raw` uint8 [C, ≥ begin + 4n] holds the chunk's bytes from every checkpoint, of `kinds` [C]. A magnitude above
    `high` uint32 [T] is in the task's core, one below `low` (which is 1 or more) is not, and between them it is open;
    both are below 2³¹, as magnitudes are. Adds to `found`, but sets its bits and open elements, and raises its peaks.
    Returns how many elements are open for some task; those that do not fit into `found.places` are only counted.
    """
    raw, kinds, low, high, found, room = borrowed((raw, kinds, low, high, found, room))
    opened = 0
    for begin in range(0, look.size, TILE):
        count = min(TILE, look.size - begin)
        decode_tile(raw, kinds, look, begin, count, room)
        half_units(room.values[0], look, room.half)
        _sift_tasks(look, begin, low, high, found, room)
        if kinds.size > look.tasks + 1:  # a backbone that is no task
            _differ(room.values[look.tasks + 1], room.values[0], room.magnitude)
            found.peaks[look.tasks] = max(found.peaks[look.tasks], _peak(room.magnitude[:count]))
        opened = _note_open(room.open, begin, room.values, found, opened)
        clear_where(room.reached, room.keep)
        if look.delta:
            _subtract_base(room.values)
        _add_grams(room.values[look.member :], room.keep, begin, count, look.row, found.gram)
    return opened


@compiled
def decode_tile(raw: Stored, kinds: Counts, look: Look, begin: int, count: int, room: Scratch) -> None:
    """The values of elements [begin, begin + count) of a chunk, and 0 behind them."""
    for c in range(kinds.size):
        width = item_bytes(kinds[c])
        start = look.begin + width * begin
        decode(raw[c, start : start + width * count], kinds[c], room.values[c, :count])
        room.values[c, count:] = 0


@compiled
def _sift_tasks(look: Look, begin: int, low: Bits, high: Bits, found: Found, room: Scratch) -> None:
    """What every task did to the elements of a tile, which begins there in the chunk."""
    count = min(TILE, look.size - begin)
    padded = -(-count // WORD) * WORD
    base, half, word = room.values[0, :padded], room.half[:padded], begin // WORD
    room.open[:] = 0
    room.reached[:] = 0
    for t in range(look.tasks):
        limits, counts = (low[t], high[t], look.near), found.counts[t]
        words = (found.bits[t, word:], found.inward[t, word:], room.open, room.reached)
        sift(room.values[t + 1, :padded], base, half, limits, words, counts, found.sums[t], found.peaks[t:])
        counts[1] -= padded - count  # padding has not moved
        counts[2] -= padded - count


@compiled
def half_units(base: Bits, look: Look, out: Bits) -> None:
    """Half a unit in the last place of each of the base's values: bit patterns of float32, [n] both."""
    steps = out.view(np.float32)
    for i in range(base.size):
        out[i] = max(base[i] & INFINITE, look.least)
    for i in range(base.size):
        steps[i] *= look.half


@compiled
def _differ(a: Bits, b: Bits, out: Bits) -> None:
    """|a − b| of bit patterns of float32 [n]."""
    ours, theirs, sizes = a.view(np.float32), b.view(np.float32), out.view(np.float32)
    for i in range(a.size):
        sizes[i] = abs(ours[i] - theirs[i])


@compiled
def _peak(magnitude: Bits) -> Any:
    most = np.uint32(0)
    for i in range(magnitude.size):
        most = max(most, magnitude[i])
    return most


@compiled
def _note_open(words: Words, begin: int, values: Bits, found: Found, opened: int) -> int:
    for word in range(words.size):
        left = words[word]
        while left:
            place = word * WORD + lowest(left)
            left &= left - np.uint64(1)
            if opened < found.places.size:
                found.places[opened] = begin + place
                for c in range(values.shape[0]):
                    found.values[opened, c] = values[c, place : place + 1].view(np.float32)[0]
            opened += 1
    return opened


@compiled
def _subtract_base(values: Bits) -> None:
    """Make differences from the base of the values of a tile, in place; the base is 0 then."""
    base = values[0].view(np.float32)
    for c in range(1, values.shape[0]):
        _subtract(values[c].view(np.float32), base)
    values[0] = 0


@compiled
def _subtract(values: Floats, base: Floats) -> None:
    for i in range(values.size):
        values[i] -= base[i]


@compiled
def _add_grams(members: Bits, keep: Bits, begin: int, count: int, row: int, out: Doubles) -> None:
    """Add a tile's dot products to those of its rows: elements [begin, begin + count) of a chunk."""
    place = 0
    while place < count:
        r = (begin + place) // row
        end = min(count, (r + 1) * row - begin)
        gram(members, keep, place, end, out[r])
        place = end


@compiled
def magnitudes(raw: Stored, kinds: Counts, starts: Counts, run: int, out: Bits, room: Scratch, offset: int = 0) -> None:
    """|Δ| of every task in runs of at most TILE elements: `out` uint32 [T, ≥ runs · run], `starts` [runs] say where.

    `raw` and `kinds` as for `scan`; `offset` are the bytes before the elements in each row of `raw`.
    """
    base = room.values[0, :run]
    task = room.values[1, :run]
    for number in range(starts.size):
        begin = starts[number]
        for c in range(out.shape[0] + 1):
            width = item_bytes(kinds[c])
            place = offset + width * begin
            decode(raw[c, place : place + width * run], kinds[c], base if c == 0 else task)
            if c > 0:
                found = out[c - 1, number * run : (number + 1) * run]
                _differ(task, base, found)


@compiled
def moved(value: np.float32, base: np.float32) -> Any:
    """The bit pattern of |value − base|."""
    return np.float32(abs(value - base)).view(np.uint32)


@compiled
def count_bins(values: Floats, low: Bits, high: Bits, shifts: Counts, counts: Counts) -> None:
    """Count each task's magnitudes within [low, high] by (m − low) >> shift, in `counts` int64 [T, bins + 1].

    `values` float32 [U, C] as `scan` finds them; the others are [T]. The last bin takes all that are outside.
    """
    outside = counts.shape[1] - 1
    for u in range(values.shape[0]):
        for t in range(low.size):
            m = moved(values[u, 1 + t], values[u, 0])
            inside = (low[t] <= m) & (m <= high[t])
            counts[t, (np.int64(m) - np.int64(low[t])) >> shifts[t] if inside else outside] += 1


@compiled
def gather(values: Floats, low: Bits, high: Bits, out: Bits) -> Counts:
    """Each task's magnitudes within [low, high] into `out` uint32 [T, U + 1]; returns how many, int64 [T].

    `values` float32 [U, C] as `scan` finds them.
    """
    counts = np.zeros(low.size, np.int64)
    for u in range(values.shape[0]):
        for t in range(low.size):
            m = moved(values[u, 1 + t], values[u, 0])
            out[t, counts[t]] = m  # if it is outside, the next one overwrites it
            counts[t] += (low[t] <= m) & (m <= high[t])
    return counts


@compiled
def kth_bin(counts: Counts, k: int) -> tuple[int, int]:
    """The bin of `counts` int64 [bins] that holds the k-th largest entry, and how many of the k lie in that bin.

    1 ≤ k ≤ the sum of the counts.
    """
    place = counts.size - 1
    while counts[place] < k:
        k -= counts[place]
        place -= 1
    return place, k


@compiled
def count_equal(values: Floats, limits: Bits, counts: Counts) -> None:
    """Add to `counts` int64 [T] how many of `values` float32 [U, C] have a magnitude of exactly `limits` uint32 [T]."""
    for u in range(values.shape[0]):
        for t in range(limits.size):
            m = moved(values[u, 1 + t], values[u, 0])
            counts[t] += m == limits[t]


@compiled
def resolve(look: Look, low: Bits, high: Bits, limits: Bits, ties: Counts, found: Found, room: Scratch) -> None:
    """Decide the open elements of a chunk, `found.places` and `found.values` [U], once the thresholds are known.

    An open element is in a task's core if its magnitude is above `limits` uint32 [T], or equal to it and one of the
    first `ties` [T], which are counted down. Completes the bits, sums and Gram matrices of `found`.
    """
    low, high, limits, ties, found, room = borrowed((low, high, limits, ties, found, room))
    members, values = room.values[look.member :], room.values[look.member :].view(np.float32)
    sizes = room.magnitude.view(np.float32)
    room.keep[:] = ALL
    gathered: Any = 0
    row, row_end = 0, look.row
    for begin in range(0, found.places.size, WORD):
        end = min(begin + WORD, found.places.size)
        for t in range(limits.size):
            _move(found.values, t, begin, end, room.magnitude)
            opened = at_least(room.magnitude, 0, low[t]) & ~above(room.magnitude, 0, high[t])
            inside = opened & above(room.magnitude, 0, limits[t])
            equal = opened & at_least(room.magnitude, 0, limits[t]) & ~inside
            while equal and ties[t] > 0:
                inside |= equal & (~equal + np.uint64(1))  # the first of them
                equal &= equal - np.uint64(1)
                ties[t] -= 1
            _note_inside(inside, t, begin, found)
            found.sums[t, 0] = _add_up(inside, sizes, found.sums[t, 0])
            found.sums[t, 1] = _add_up(opened & ~inside, sizes, found.sums[t, 1])
        for u in range(begin, end):
            place = found.places[u]
            if gathered == TILE or place >= row_end:
                gram(members, room.keep, 0, gathered, found.gram[row])
                row, gathered = place // look.row, 0
                row_end = (row + 1) * look.row
            for v in range(members.shape[0]):
                stored = found.values[u, look.member + v]
                values[v, gathered] = stored - found.values[u, 0] if look.delta else stored
            # What some core has is overwritten by the next. (Not a branch, as it could not be foreseen.)
            claimed = union(found.bits, place // WORD) >> np.uint64(place % WORD) & np.uint64(1)
            gathered += np.int64(np.uint64(1) - claimed)
    gram(members, room.keep, 0, gathered, found.gram[row])


@compiled
def _move(values: Floats, task: int, begin: int, end: int, magnitude: Bits) -> None:
    """What a task moved elements [begin, end) of `values` [U, C] by, at most WORD of them, and then 0."""
    for i in range(end - begin):
        magnitude[i] = moved(values[begin + i, 1 + task], values[begin + i, 0])
    magnitude[end - begin : WORD] = 0


@compiled
def _note_inside(word: Any, task: int, begin: int, found: Found) -> None:
    """The open elements from number `begin` on whose bits the word has are in the task's core."""
    while word:
        u = begin + lowest(word)
        word &= word - np.uint64(1)
        place, base = found.places[u] // WORD, found.values[u, 0]
        bit = np.uint64(found.places[u] % WORD)
        down = found.values[u, 1 + task] < base
        found.bits[task, place] |= np.uint64(1) << bit
        found.inward[task, place] |= np.uint64(down != (base < 0)) << bit


@compiled
def _add_up(word: Any, sizes: Floats, total: np.float64) -> Any:
    """`total` and those of `sizes` whose bits the word has, one after the other."""
    while word:
        total += np.float64(sizes[lowest(word)])
        word &= word - np.uint64(1)
    return total
