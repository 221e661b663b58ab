"""What every element of a chunk must be, by METHOD §1 and §3, in plain numpy.

Written from the method, not from the code that plans and fuses: of that, nothing is used here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import combinations_with_replacement

import numpy as np
import numpy.typing as npt

from .verify_numbers import NEAR, Bits, Bytes, Floats, bits_of, half_units, nonfinite, rounded, shown, values_of

__all__ = ["Extreme", "Fault", "Look", "Piece", "Rules", "Seen", "folded"]

Places = npt.NDArray[np.int64]
Counts = npt.NDArray[np.int64]
Extreme = tuple[float, int] | None  # a magnitude and its flat index
NOTHING = np.iinfo(np.int64).max
CORE = "is not the value of its core"


@dataclass(frozen=True)
class Rules:
    """What the plan says of all elements. Numbers count the inputs: 0 is the base, then come the tasks."""

    tasks: int
    order: tuple[int, ...]  # of the tasks, by stages
    fold: tuple[int, ...]
    delta: bool
    conflict: str


@dataclass(frozen=True)
class Piece:
    """One chunk: elements from flat index `start` on, as stored in every input and in the output.

    `places`: for each task the positions of its core within the chunk. `coefficients` float32 [rows, members].
    `update`: of a levelled tensor what its fold became, float32 [n], and how far from it an element may be.
    """

    start: int
    stored: Sequence[Bytes]
    dtypes: Sequence[str]
    output: Bytes
    dtype: str
    places: Sequence[Places] = ()
    coefficients: Floats | None = None
    update: Floats | None = None
    tolerance: float = 0.0


@dataclass(frozen=True)
class Fault:
    """The first element of a chunk that is wrong in one way."""

    index: int
    problem: str
    expected: str | None
    found: str


@dataclass
class Seen:
    """What was found in one chunk; T tasks, V members.

    `inside`: of each task the smallest magnitude in the core and the last place that has it. `outside`: the largest
    of the others and the first place. `gram` float64 [R, V, V] of the elements in no core.
    """

    same: bool
    faults: list[Fault]
    updates: Counts  # [T, 3] m > 0, m ≤ 1e-5, m ≤ half a unit in the last place of the base's dtype
    sums: npt.NDArray[np.float64]  # [T, 2] Σ m in the core and outside
    pairs: Counts  # [T, T] elements in both cores
    aligned: Counts  # [T, T] of these, both above the base or both below it
    inwards: Counts  # [T, T] of these, the first below a base of 0 or more, or above one below 0
    claimed: int = 0
    inside: list[Extreme] = field(default_factory=list)
    outside: list[Extreme] = field(default_factory=list)
    gram: npt.NDArray[np.float64] | None = None


class Look:
    """A look at one piece by the plan's rules."""

    def __init__(self, piece: Piece, rules: Rules) -> None:
        self.piece = piece
        self.rules = rules
        tasks = rules.tasks
        first = (piece.stored[0], piece.dtypes[0])
        same = all(
            dtype == first[1] and np.array_equal(raw, first[0])
            for raw, dtype in zip(piece.stored[1:], piece.dtypes[1:], strict=True)
        )
        pairs, aligned, inwards = (np.zeros((tasks, tasks), np.int64) for _ in range(3))
        self.seen = Seen(same, [], np.zeros((tasks, 3), np.int64), np.zeros((tasks, 2)), pairs, aligned, inwards)
        self.found = bits_of(piece.output, piece.dtype)

    def copied(self) -> Seen:
        """Of a tensor that must be the same in all inputs: the output has the base's values."""
        raw, dtype = self.piece.stored[0], self.piece.dtypes[0]
        same_dtype = dtype == self.piece.dtype
        expected = bits_of(raw, dtype) if same_dtype else rounded(values_of(raw, dtype), self.piece.dtype)
        for other, its in zip(self.piece.stored[1:], self.piece.dtypes[1:], strict=True):
            if its == dtype:
                self._compare(bits_of(raw, dtype), bits_of(other, its), dtype, "an input differs from the base")
        self._compare(expected, self.found, self.piece.dtype, "is not the base's value")
        self._finite()
        if dtype in ("F32", "BF16", "F16"):
            self._unchanged(values_of(raw, dtype), dtype)
        return self.seen

    def blended(self) -> Seen:
        """Of any other tensor: cores over a blend."""
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is told as such
            values = [values_of(raw, dtype) for raw, dtype in zip(self.piece.stored, self.piece.dtypes, strict=True)]
            base = values[0]
            masks = self._masks(base.size)
            claimed = np.flatnonzero(masks.any(axis=0))
            holders = masks[:, claimed]
            less = [values[1 + task][claimed] < base[claimed] for task in range(self.rules.tasks)]
            self._count_cores(holders, less, base[claimed] < 0)
            half = half_units(base, self.piece.dtypes[0])
            for task in range(self.rules.tasks):
                self._measure(task, values[1 + task], base, half)
            members = [values[number] - base if self.rules.delta else values[number] for number in self.rules.fold]
            expected = rounded(self._blend(members, base), self.piece.dtype)
            self.seen.gram = self._gram(members, claimed)
            expected[claimed] = self._core_bits(claimed, holders, values)
            wrong = np.flatnonzero(expected != self.found)
            if self.piece.update is not None:
                wrong = wrong[masks[:, wrong].any(axis=0) | ~self._is_near(wrong, base)]
        self._judge(expected, masks, wrong)
        return self.seen

    def _masks(self, size: int) -> npt.NDArray[np.bool_]:
        masks = np.zeros((self.rules.tasks, size), np.bool_)
        for mask, places in zip(masks, self.piece.places, strict=True):
            mask[places] = True
        return masks

    def _count_cores(
        self, holders: npt.NDArray[np.bool_], less: Sequence[npt.NDArray[np.bool_]], negative: npt.NDArray[np.bool_]
    ) -> None:
        """`holders` bool [T, K]: whose core has each of the claimed elements; `less`: whose value is below the base.

        `negative` [K]: where the base is below 0.
        """
        self.seen.claimed = holders.shape[1]
        for a, b in combinations_with_replacement(range(self.rules.tasks), 2):
            both = holders[a] & holders[b]
            self.seen.pairs[a, b] = self.seen.pairs[b, a] = np.count_nonzero(both)
            self.seen.aligned[a, b] = self.seen.aligned[b, a] = np.count_nonzero(both & (less[a] == less[b]))
            for one, other in ((a, b), (b, a)):
                self.seen.inwards[one, other] = np.count_nonzero(both & np.where(negative, ~less[one], less[one]))

    def _unchanged(self, base: Floats, dtype: str) -> None:
        """No task moved anything, and no core has anything: every element is near the base's."""
        self.seen.updates[:, 1:] = base.size
        self.seen.inside = [None] * self.rules.tasks
        self.seen.outside = [(0.0, self.piece.start)] * self.rules.tasks

    def _measure(self, task: int, values: Floats, base: Floats, half: Floats) -> None:
        """The task's update magnitudes: counts, sums, and the extremes in and outside its core."""
        seen, start, places = self.seen, self.piece.start, self.piece.places[task]
        sizes = np.abs(values - base)
        seen.updates[task] = [np.count_nonzero(some) for some in (sizes, sizes <= NEAR, sizes <= half)]
        core = sizes[places]
        sizes[places] = 0
        seen.sums[task] = core.sum(dtype=np.float64), sizes.sum(dtype=np.float64)
        if not np.isfinite(seen.sums[task]).all():  # of an input that changed: what it holds compares with nothing
            core, sizes = (np.nan_to_num(some, nan=np.inf) for some in (core, sizes))
        inside = outside = None
        if core.size:
            least = core.min()
            inside = float(least), start + int(places[core == least][-1])
            sizes[places] = -1
        if core.size < sizes.size:
            largest = int(sizes.argmax())
            outside = float(sizes[largest]), start + largest
        seen.inside.append(inside)
        seen.outside.append(outside)

    def _blend(self, members: Sequence[Floats], base: Floats) -> Floats:
        """The fold, or what it became; the base is added last where vectors are differences."""
        if self.piece.update is not None:
            return self.piece.update + base
        assert self.piece.coefficients is not None
        flat = folded(members, self.piece.coefficients)
        return np.add(flat, base, out=flat) if self.rules.delta else flat

    def _is_near(self, places: Places, base: Floats) -> npt.NDArray[np.bool_]:
        """Whether the elements at `places` are what an update gives that is nowhere farther off than the tolerance."""
        assert self.piece.update is not None
        exact = base[places].astype(np.float64) + self.piece.update[places]
        found = self._values(self.found[places])
        low, high = (
            self._values(rounded((exact + far).astype(np.float32), self.piece.dtype))
            for far in (-self.piece.tolerance, self.piece.tolerance)
        )
        near: npt.NDArray[np.bool_] = (low <= found) & (found <= high)
        return near

    def _values(self, bits: Bits) -> Floats:
        return values_of(bits.view(np.uint8), self.piece.dtype)

    def _gram(self, members: Sequence[Floats], claimed: Places) -> npt.NDArray[np.float64]:
        """⟨vᵢ, vⱼ⟩ of each row, of the elements in no core."""
        assert self.piece.coefficients is not None
        rows = len(self.piece.coefficients)
        vectors = np.empty((len(members), members[0].size))
        for vector, values in zip(vectors, members, strict=True):
            vector[:] = values
            vector[claimed] = 0
        by_row = vectors.reshape(len(members), rows, -1)
        gram = np.empty((rows, len(members), len(members)))
        for i, j in combinations_with_replacement(range(len(members)), 2):
            gram[:, i, j] = gram[:, j, i] = np.einsum("rk,rk->r", by_row[i], by_row[j])
        return gram

    def _core_bits(self, claimed: Places, holders: npt.NDArray[np.bool_], values: Sequence[Floats]) -> Bits:
        """What the elements in cores must be, as bits of the output dtype. `holders` bool [T, K]: whose they are."""
        order = list(self.rules.order)
        held = holders[order]
        stored = np.array([values[1 + task][claimed] for task in order], np.float32).reshape(held.shape)
        base = values[0][claimed]
        settle = _SETTLE[self.rules.conflict]
        if isinstance(settle, str):  # a claimant's own value, to the bit
            winners = _winners(settle, held, stored, base)
        else:
            winners = _winners("first", held, stored, base)
        bits = np.array([self._stored_bits(1 + task, claimed) for task in order]).reshape(held.shape)
        result: Bits = np.take_along_axis(bits, winners[None], axis=0)[0]
        if not isinstance(settle, str):
            contested = np.count_nonzero(held, axis=0) > 1
            mixed = settle(held[:, contested], stored[:, contested], base[contested])
            result[contested] = rounded(mixed, self.piece.dtype)
        return result

    def _stored_bits(self, number: int, claimed: Places) -> Bits:
        """As stored, where that is the output's dtype; else rounded to it."""
        raw, dtype = self.piece.stored[number], self.piece.dtypes[number]
        bits = bits_of(raw, dtype)[claimed]
        return bits if dtype == self.piece.dtype else rounded(values_of(bits.view(np.uint8), dtype), self.piece.dtype)

    def _judge(self, expected: Bits, masks: npt.NDArray[np.bool_], wrong: Places) -> None:
        """Tell the first of the places that are `wrong`."""
        if wrong.size:
            place = int(wrong[0])
            levelled = "" if self.piece.update is None else "levelled "
            kind = f"is not the {levelled}blend that its coefficients give"
            self._tell(place, expected, self.found, self.piece.dtype, kind if not masks[:, place].any() else CORE)
        self._finite()

    def _compare(self, expected: Bits, found: Bits, dtype: str, problem: str) -> None:
        wrong = expected != found
        if wrong.any():
            self._tell(int(wrong.argmax()), expected, found, dtype, problem)

    def _tell(self, place: int, expected: Bits, found: Bits, dtype: str, problem: str) -> None:
        values = shown(int(expected[place]), dtype), shown(int(found[place]), dtype)
        self.seen.faults.append(Fault(self.piece.start + place, problem, *values))

    def _finite(self) -> None:
        place = nonfinite(self.found, self.piece.dtype)
        if place is not None:
            value = shown(int(self.found[place]), self.piece.dtype)
            self.seen.faults.append(Fault(self.piece.start + place, "is not finite", "a finite number", value))


def folded(members: Sequence[Floats], coefficients: Floats) -> Floats:
    """Σ coefficient·vector in float32, in fold order. `members` [n] each; `coefficients` [rows, members]."""
    total = None
    for values, column in zip(members, coefficients.T, strict=True):
        term = values.reshape(len(coefficients), -1) * column[:, None]
        total = term if total is None else np.add(total, term, out=total)
    assert total is not None
    flat: Floats = total.reshape(-1)
    return flat


def _winners(rule: str, held: npt.NDArray[np.bool_], stored: Floats, base: Floats) -> Places:
    """Which claimant of each element prevails; tasks [T, K] in stage order."""
    last = len(held) - 1
    winners: Places = held.argmax(axis=0)
    if rule == "last":
        winners = last - held[::-1].argmax(axis=0)
    elif rule == "largest":
        sizes = np.where(held, np.abs(stored - base), np.float32(-1))
        winners = last - sizes[::-1].argmax(axis=0)
    return winners


def _mean(held: npt.NDArray[np.bool_], values: Floats) -> Floats:
    """The mean of those values that are `held`, both [T, K]: added up in float32, in their order."""
    total = np.zeros(held.shape[1], np.float32)
    count = np.zeros(held.shape[1], np.float32)
    for holds, some in zip(held, values, strict=True):
        first = holds & (count == 0)
        total = np.where(first, some, np.where(holds, total + some, total))
        count += holds
    mean: Floats = (total / np.maximum(count, np.float32(1))).astype(np.float32, copy=False)
    return mean


def _mean_of_claimants(held: npt.NDArray[np.bool_], stored: Floats, base: Floats) -> Floats:
    return _mean(held, stored)


def _elect(held: npt.NDArray[np.bool_], stored: Floats, base: Floats) -> Floats:
    """The base's value and the mean of those updates that have the sign of the sum of all."""
    updates = stored - base
    total = np.zeros(base.size, np.float32)
    for holds, update in zip(held, updates, strict=True):
        total = np.where(holds, total + update, total)
    agree = held & (np.sign(updates) == np.sign(total))
    return np.where(total == 0, base, base + _mean(agree, updates))


Settle = Callable[[npt.NDArray[np.bool_], Floats, Floats], Floats]
_SETTLE: dict[str, str | Settle] = {
    "last": "last",
    "first": "first",
    "largest": "largest",
    "mean": _mean_of_claimants,
    "elect": _elect,
}
