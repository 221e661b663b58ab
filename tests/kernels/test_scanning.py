"""One look at a chunk, and what it left open, against lines of numpy over the whole chunk."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from chunk_of_checkpoints import SHAPES, Stored, near_the_base, stored
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cpimerge.kernels import scanning
from cpimerge.kernels.arrays import TILE, WORD
from cpimerge.kernels.scanning import INFINITE, Found, Look, scratch

NEAR = np.float32(1e-5).view(np.uint32)
PRECISION = {0: (7, -126), 1: (10, -14), 2: (23, -126)}  # bits of a fraction, and the smallest exponent
LARGEST = 0x7F7FFFFF
BRACKETS = ["narrow", "wide", "all", "nothing", "gap", "one"]


def bits_of(values: np.ndarray) -> np.ndarray:
    bits: np.ndarray = np.abs(values).view(np.uint32)
    return bits


@dataclass
class Case:
    """A chunk, how to look at it, and each task's bracket."""

    chunk: Stored
    look: Look
    low: np.ndarray
    high: np.ndarray

    @property
    def n(self) -> int:
        return self.look.size

    @property
    def magnitude(self) -> np.ndarray:
        """uint32 [C − 1, n]."""
        return bits_of(self.chunk.values[1:] - self.chunk.values[0])

    @property
    def above(self) -> np.ndarray:
        above: np.ndarray = self.magnitude[: self.look.tasks] > self.high[:, np.newaxis]
        return above

    @property
    def inward(self) -> np.ndarray:
        """Of the tasks' values, which are below a base of 0 or more, or not below one under 0: bool [T, n]."""
        base, tasks = self.chunk.values[0], self.chunk.values[1 : 1 + self.look.tasks]
        inward: np.ndarray = np.where(base < 0, tasks >= base, tasks < base)
        return inward

    @property
    def below(self) -> np.ndarray:
        below: np.ndarray = self.magnitude[: self.look.tasks] < self.low[:, np.newaxis]
        return below

    @property
    def between(self) -> np.ndarray:
        between: np.ndarray = ~(self.above | self.below)
        return between

    def gram(self, keep: npt.ArrayLike) -> np.ndarray:
        """[R, P] of the members' elements in `keep` bool [n]."""
        values = self.chunk.values - self.chunk.values[0] if self.look.delta else self.chunk.values
        kept = np.where(keep, values[self.look.member :], np.float32(0)).astype(np.float64)
        by_row = kept.reshape(len(kept), -1, self.look.row)
        products: np.ndarray = np.einsum("irk,jrk->rij", by_row, by_row)
        return products[:, *np.triu_indices(len(kept))]

    def sums(self, *parts: np.ndarray) -> list[list[float]]:
        """[T, parts] of the magnitudes in each part, bool [T, n]."""
        sizes = self.magnitude.view(np.float32)
        return [[math.fsum(map(float, sizes[t][part[t]])) for part in parts] for t in range(self.look.tasks)]

    def nothing_found(self, room: int) -> Found:
        checkpoints = len(self.chunk.kinds)
        members = checkpoints - self.look.member
        return Found(
            bits=np.zeros((self.look.tasks, -(-self.n // WORD)), np.uint64),
            inward=np.zeros((self.look.tasks, -(-self.n // WORD)), np.uint64),
            counts=np.zeros((self.look.tasks, 5), np.int64),
            peaks=np.zeros(checkpoints - 1, np.uint32),
            sums=np.zeros((self.look.tasks, 2)),
            gram=np.zeros((self.n // self.look.row, members * (members + 1) // 2)),
            places=np.full(room, 0xFFFFFFFF, np.uint32),
            values=np.full((room, checkpoints), np.nan, np.float32),
        )

    def scan(self, found: Found) -> int:
        room = scratch(len(self.chunk.kinds))
        for rubbish in room:
            rubbish.fill(0x7FFFFFFF)
        opened = scanning.scan(self.chunk.raw, self.chunk.kinds, self.look, self.low, self.high, found, room)
        return int(opened)


def bracket(kind: str, magnitude: np.ndarray, rng: np.random.Generator) -> tuple[int, int]:
    some = sorted(int(m) for m in rng.choice(magnitude, 2))
    low, high = {
        "narrow": (some[0], some[1]),
        "wide": (1, some[1]),
        "all": (1, LARGEST),
        "nothing": (LARGEST + 1, LARGEST + 1),
        "gap": (some[1] + 1, some[1]),  # nothing is between
        "one": (some[1], some[1]),
    }[kind]
    return max(1, low), high


@st.composite
def settings_of(draw: Any) -> dict[str, Any]:
    tasks = draw(st.integers(1, 4))
    backbone = draw(st.booleans())
    member = draw(st.integers(0, 1))
    kind = st.integers(0, 2)
    return {
        "tasks": tasks,
        "kinds": draw(st.lists(kind, min_size=1 + tasks + backbone, max_size=1 + tasks + backbone)),
        "brackets": draw(st.lists(st.sampled_from(BRACKETS), min_size=tasks, max_size=tasks)),
        "member": member,
        "delta": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**32 - 1)),
    }


def look(n: int, row: int, options: dict[str, Any]) -> Look:
    fraction, exponent = PRECISION[options["kinds"][0]]
    least, half = np.float32(2.0**exponent).view(np.uint32), np.float32(2.0 ** (-fraction - 1))
    return Look(n, row, options["tasks"], options["member"], options["delta"], NEAR, least, half)


def case(n: int, row: int, options: dict[str, Any]) -> Case:
    rng = np.random.default_rng(options["seed"])
    chunk = stored(near_the_base(rng, len(options["kinds"]), n), options["kinds"])
    found = Case(chunk, look(n, row, options), np.empty(0, np.uint32), np.empty(0, np.uint32))
    bounds = [bracket(kind, m, rng) for kind, m in zip(options["brackets"], found.magnitude, strict=False)]
    found.low, found.high = np.array(bounds, np.uint32).T.copy()
    return found


def unpacked(words: np.ndarray, n: int) -> np.ndarray:
    """uint64 [T, W] as bool [T, n]; what is beyond n must be 0."""
    members = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little").astype(bool)
    assert not members[:, n:].any()
    return members[:, :n]


def half_units(base: np.ndarray, kind: int) -> np.ndarray:
    """float64 [n]: half a unit in the last place of each base value, in its own dtype."""
    fraction, least = PRECISION[kind]
    _, exponents = np.frexp(base.astype(np.float64))
    exponents = np.where(base == 0, least, np.maximum(exponents - 1, least))
    units: np.ndarray = np.ldexp(1.0, exponents - fraction - 1)
    return units


def check_close(found: np.ndarray, wanted: Any, scale: Any) -> None:
    assert found.shape == np.shape(wanted)
    assert (np.abs(found - wanted) <= 1e-13 * np.asarray(scale)).all()


@pytest.mark.parametrize(("n", "row"), SHAPES)
@given(settings_of())
@settings(max_examples=30)
def test_scan(n: int, row: int, options: dict[str, Any]) -> None:
    one = case(n, row, options)
    found = one.nothing_found(n)
    opened = one.scan(found)
    tasks, magnitude = options["tasks"], one.magnitude
    assert (unpacked(found.bits, n) == one.above).all()
    assert (unpacked(found.inward, n) == one.above & one.inward).all()
    sizes = magnitude[:tasks].view(np.float32).astype(np.float64)
    wanted = [
        (magnitude[:tasks] > 0),
        (sizes <= float(np.float32(1e-5))),
        (sizes <= half_units(one.chunk.values[0], options["kinds"][0])),
        one.above,
        one.between,
    ]
    assert found.counts.T.tolist() == [part.sum(axis=1).tolist() for part in wanted]
    assert found.peaks.tolist() == magnitude.max(axis=1).tolist()
    check_close(found.sums, one.sums(one.above, one.below), 1e-300 + sizes.sum(axis=1, keepdims=True))
    check_close(found.gram, one.gram(one.below.all(axis=0)), 1e-300 + np.abs(one.gram(np.ones(n, bool))).max())
    places = np.flatnonzero(one.between.any(axis=0))
    assert opened == places.size
    assert found.places[:opened].tolist() == places.tolist()
    assert found.values[:opened].tobytes() == np.ascontiguousarray(one.chunk.values.T[places]).tobytes()
    assert (found.places[opened:] == 0xFFFFFFFF).all()


@pytest.mark.parametrize("room", [0, 1, 100, 2500, 2600])
def test_open_elements_that_do_not_fit_are_counted(room: int) -> None:
    options = {"tasks": 2, "kinds": [0, 1, 2], "brackets": ["all", "nothing"], "member": 1, "delta": True, "seed": 3}
    one = case(5000, 1000, options)
    everything, found = one.nothing_found(5000), one.nothing_found(room)
    opened = one.scan(everything)
    assert one.scan(found) == opened > 2600
    assert found.places.tolist() == everything.places[:room].tolist()
    assert found.values.tobytes() == everything.values[:room].tobytes()
    for part in ("bits", "inward", "counts", "peaks", "sums", "gram"):
        assert getattr(found, part).tobytes() == getattr(everything, part).tobytes()


def test_scan_adds_to_what_was_found() -> None:
    options = {"tasks": 2, "kinds": [0, 2, 1], "brackets": ["wide", "one"], "member": 0, "delta": False, "seed": 5}
    one = case(2049, 3, options)
    once, twice = one.nothing_found(2049), one.nothing_found(2049)
    one.scan(once)
    one.scan(twice)
    one.scan(twice)
    assert (twice.counts == 2 * once.counts).all()
    assert once.counts.all()
    for found, wanted in ((twice.sums, once.sums), (twice.gram, once.gram)):
        assert np.any(wanted)
        np.testing.assert_allclose(found, 2 * wanted, rtol=1e-14)
    for part in ("bits", "inward", "peaks", "places", "values"):
        assert getattr(twice, part).tobytes() == getattr(once, part).tobytes()


@pytest.mark.parametrize("kind", [0, 1, 2])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 63, TILE - 1, TILE, TILE + 52])
@pytest.mark.parametrize("where", [[0], [1], [3], [0, 1, 2, 3]])
def test_peaks_tell_what_is_not_finite(kind: int, value: float, place: int, where: Sequence[int]) -> None:
    """Two tasks and a backbone. From an infinite base every difference is infinite, or no number."""
    values = np.random.default_rng(0).normal(size=(4, TILE + 53)).astype(np.float32)
    values[list(where), place] = value
    chunk = stored(values, [kind] * 4)
    options = {"kinds": [kind], "tasks": 2, "member": 1, "delta": False}
    one = Case(chunk, look(TILE + 53, TILE + 53, options), np.full(2, 1, np.uint32), np.full(2, LARGEST, np.uint32))
    found = one.nothing_found(TILE + 53)
    one.scan(found)
    spoilt = [0 in where or c in where for c in (1, 2, 3)]
    assert (found.peaks >= INFINITE).tolist() == spoilt


@pytest.mark.parametrize(("n", "row"), SHAPES)
@given(settings_of(), st.data())
@settings(max_examples=30)
def test_scan_and_resolve_make_exact_cores(n: int, row: int, options: dict[str, Any], data: st.DataObject) -> None:
    """A bracket that holds the k-th largest, the k-th itself as the limit, and as many ties as are needed for k."""
    one = case(n, row, options)
    tasks = options["tasks"]
    limits, ties, cores = np.zeros(tasks, np.uint32), np.zeros(tasks, np.int64), np.zeros((tasks, n), bool)
    for t in range(tasks):
        m = one.magnitude[t]
        ordered = np.lexsort((np.arange(n), -m.astype(np.int64)))
        k = data.draw(st.integers(0, int((m > 0).sum())))
        cores[t, ordered[:k]] = True
        if k == 0:
            one.low[t], one.high[t], limits[t] = LARGEST + 1, LARGEST + 1, 0xFFFFFFFF
            continue
        kth = m[ordered[k - 1]]
        one.low[t], one.high[t] = min(one.low[t], kth), max(one.high[t], kth)
        limits[t], ties[t] = kth, k - (m > kth).sum()
        if ties[t] == (m == kth).sum() and data.draw(st.booleans()):  # the other way to say it
            limits[t], ties[t] = kth - 1, 0
    found = one.nothing_found(n)
    opened = one.scan(found)
    found = found._replace(places=found.places[:opened], values=found.values[:opened])
    left = ties.copy()
    scanning.resolve(one.look, one.low, one.high, limits, left, found, scratch(len(options["kinds"])))
    assert (unpacked(found.bits, n) == cores).all()
    assert (unpacked(found.inward, n) == cores & one.inward).all()
    assert not left.any()
    scale = 1e-300 + one.magnitude[:tasks].view(np.float32).astype(np.float64).sum(axis=1, keepdims=True)
    check_close(found.sums, one.sums(cores, ~cores), scale)
    check_close(found.gram, one.gram(~cores.any(axis=0)), 1e-300 + np.abs(one.gram(np.ones(n, bool))).max())


def test_ties_that_are_left_wait_for_the_next_chunk() -> None:
    chunk = stored(np.array([[0, 0, 0, 0], [1, 2, 1, -1]], np.float32), [2, 2])
    one = Case(chunk, Look(4, 4, 1, 1, True, NEAR, np.uint32(1), np.float32(1)), *np.array([[1], [LARGEST]], np.uint32))
    for ties, members, left in ((1, [0, 1], 0), (2, [0, 1, 2], 0), (5, [0, 1, 2, 3], 2)):
        found = one.nothing_found(4)
        assert one.scan(found) == 4
        count = np.array([ties])
        scanning.resolve(one.look, one.low, one.high, bits_of(np.ones(1, np.float32)), count, found, scratch(2))
        assert np.flatnonzero(unpacked(found.bits, 4)[0]).tolist() == members
        assert count.tolist() == [left]


@pytest.mark.parametrize("run", [1, 3, 512, TILE])
@pytest.mark.parametrize("starts", [[], [0], [5000 - TILE, 0, 17, 17]])
@pytest.mark.parametrize("kinds", [[0, 0], [0, 1, 2], [2, 1, 0, 1], [1, 2]])
@pytest.mark.parametrize("backbone", [False, True])
def test_magnitudes(run: int, starts: list[int], kinds: list[int], backbone: bool) -> None:
    chunk = stored(near_the_base(np.random.default_rng(run), len(kinds), 5000), kinds)
    tasks = len(kinds) - 1 - backbone
    out = np.full((tasks, len(starts) * run), 0xFFFFFFFF, np.uint32)
    places = np.array(starts, np.int64)
    scanning.magnitudes(chunk.raw, chunk.kinds, places, run, out, scratch(len(kinds)))
    wanted = bits_of(chunk.values[1 : 1 + tasks] - chunk.values[0])
    chosen = [place for start in starts for place in range(start, start + run)]
    assert (out == wanted[:, chosen]).all()


# --- open elements ----------------------------------------------------------------------------------

small = st.integers(-3, 3).map(float)


@st.composite
def open_elements(draw: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """`values` [U, C], sometimes with a backbone; brackets [T], sometimes empty; and each task's magnitudes [T, U]."""
    tasks = draw(st.integers(1, 3))
    values = draw(hnp.arrays(np.float32, (draw(st.integers(0, 40)), 1 + tasks + draw(st.booleans())), elements=small))
    magnitude = bits_of(values[:, 1 : 1 + tasks] - values[:, :1]).T.copy()
    bounds = st.sampled_from([1, *(int(np.float32(v).view(np.uint32)) + d for v in range(1, 7) for d in (-1, 0, 1))])
    low, high = (np.array(draw(st.lists(bounds, min_size=tasks, max_size=tasks)), np.uint32) for _ in range(2))
    return values, low, high, magnitude


@given(open_elements(), st.integers(0, 31))
def test_count_bins(elements: tuple[np.ndarray, ...], shift: int) -> None:
    values, low, high, magnitude = elements
    widths = high.astype(np.int64) - low
    shifts = np.array([max(shift - t, 0, int(width).bit_length() - 12) for t, width in enumerate(widths)])
    wanted_bins = 1 << 12
    counts = np.ones((len(low), wanted_bins + 1), np.int64)
    scanning.count_bins(values, low, high, shifts, counts)
    for t in range(len(low)):
        inside = [int(m) for m in magnitude[t] if low[t] <= m <= high[t]]
        wanted = np.bincount([(m - int(low[t])) >> int(shifts[t]) for m in inside], minlength=wanted_bins)
        assert (counts[t, :-1] - 1 == wanted).all()
        assert counts[t, -1] - 1 == magnitude.shape[1] - len(inside)


@given(open_elements())
def test_gather(elements: tuple[np.ndarray, ...]) -> None:
    values, low, high, magnitude = elements
    out = np.empty((len(low), len(values) + 1), np.uint32)
    counts = scanning.gather(values, low, high, out)
    for t, count in enumerate(counts):
        assert out[t, :count].tolist() == [int(m) for m in magnitude[t] if low[t] <= m <= high[t]]


@given(open_elements())
def test_count_equal(elements: tuple[np.ndarray, ...]) -> None:
    values, limits, _, magnitude = elements
    counts = np.full(len(limits), 5, np.int64)
    scanning.count_equal(values, limits, counts)
    assert counts.tolist() == [5 + int((m == limit).sum()) for m, limit in zip(magnitude, limits, strict=True)]


@given(st.lists(st.integers(0, 4), min_size=1, max_size=9).filter(any), st.data())
def test_kth_bin(counts: list[int], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, sum(counts)))
    entries = sorted((bin_ for bin_, count in enumerate(counts) for _ in range(count)), reverse=True)
    bin_, wanted = scanning.kth_bin(np.array(counts), k)
    assert bin_ == entries[k - 1]
    assert wanted == k - sum(entry > bin_ for entry in entries)
