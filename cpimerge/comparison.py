"""What is found of how two checkpoints differ, and what follows from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from .checkpoint import layer_of
from .inspection import Contents, kind_of, stack_of

__all__ = ["Comparison", "Difference", "Fault", "Place", "TensorDifference", "Unequal", "Unlike", "combine"]


COUNTED = ("tensors", "identical", "elements", "left_out", "changed", "near", "rounding")
SUMMED = (*COUNTED, "base_square", "product", "other_square", "change_square")


@dataclass(frozen=True)
class Place:
    """An element: `value` is its |Δ|, `index` flat and row-major."""

    value: float
    tensor: str
    index: int


@dataclass(frozen=True)
class Difference:
    """How floating-point tensors of two checkpoints differ; Δ = other − base, as float32, and m = |Δ|.

    Of `elements`, those that are NaN or Inf in either, or whose Δ does not fit float32, are `left_out` of all else:
    of the counts `changed` (m > 0), `near` (m ≤ 1e-5) and `rounding` (m within half a unit in the last place of the
    base's dtype), of the dot products, and of `largest`, the first element of largest m, None where nothing changed.
    `identical` tensors are the same bytes.
    """

    tensors: int
    identical: int
    elements: int
    left_out: int
    changed: int
    near: int
    rounding: int
    base_square: float  # ⟨base, base⟩
    product: float  # ⟨base, other⟩
    other_square: float  # ⟨other, other⟩
    change_square: float  # ⟨Δ, Δ⟩
    largest: Place | None
    dtypes: tuple[tuple[str, str], ...]  # every pair of the base's and the other's that occurs, sorted

    @property
    def compared(self) -> int:
        """Elements that the counts are out of."""
        return self.elements - self.left_out

    @property
    def relative(self) -> float | None:
        """‖Δ‖ / ‖base‖; None where the base is 0 and the other is not."""
        if not self.base_square:
            return None if self.change_square else 0.0
        return math.sqrt(self.change_square / self.base_square)

    @property
    def cosine(self) -> float | None:
        """Of the angle between base and other; None where one of them is 0."""
        norms = math.sqrt(self.base_square) * math.sqrt(self.other_square)
        if not norms:
            return None
        return 1.0 if not self.change_square else max(-1.0, min(1.0, self.product / norms))

    def as_dict(self) -> dict[str, Any]:
        """Counts, norms and their quotients, ready for JSON."""
        counts = {key: getattr(self, key) for key in COUNTED}
        norms = {
            "base_norm": math.sqrt(self.base_square),
            "norm": math.sqrt(self.other_square),
            "change_norm": math.sqrt(self.change_square),
        }
        quotients = {"relative": self.relative, "cosine": self.cosine}
        largest = None if self.largest is None else vars(self.largest)
        return counts | norms | quotients | {"largest": largest, "dtypes": self.dtypes}


@dataclass(frozen=True)
class TensorDifference:
    """How one floating-point tensor differs."""

    name: str
    shape: tuple[int, ...]  # of what was compared
    difference: Difference


@dataclass(frozen=True)
class Unequal:
    """A tensor that is not floating-point: elements that differ, and the first flat index of one."""

    name: str
    dtype: str
    elements: int
    changed: int
    first: int | None


@dataclass(frozen=True)
class Unlike:
    """A tensor with another shape or kind of dtype. `rows` of it were compared: the first, where only they differ."""

    name: str
    base: str
    other: str
    rows: int


@dataclass(frozen=True)
class Fault:
    """Elements that are NaN or Inf: in the "base", in the "other", or only in the "difference" of the two."""

    where: str
    tensor: str
    count: int
    first: int  # flat index


@dataclass(frozen=True)
class Comparison:
    """How two checkpoints differ. Names are in natural order."""

    base: Contents
    other: Contents
    tensors: tuple[TensorDifference, ...]
    unequal: tuple[Unequal, ...]  # every tensor that is not floating-point, equal ones too
    only_base: tuple[str, ...]
    only_other: tuple[str, ...]
    unlike: tuple[Unlike, ...]
    faults: tuple[Fault, ...]
    notes: tuple[str, ...]  # names that differ as a whole

    @property
    def total(self) -> Difference:
        """Of all floating-point tensors together."""
        return combine(tensor.difference for tensor in self.tensors)

    def by(self, key: Callable[[str], str]) -> dict[str, Difference]:
        """Of the floating-point tensors with the same `key` of their name, in the order in which they come."""
        groups: dict[str, list[Difference]] = {}
        for tensor in self.tensors:
            groups.setdefault(key(tensor.name), []).append(tensor.difference)
        return {name: combine(some) for name, some in groups.items()}

    def as_dict(self) -> dict[str, Any]:
        """All of it, ready for JSON; the key '' is what lies outside the layers."""
        by: dict[str, Callable[[str], str]] = {"by_stack": stack_of, "by_layer": layer_of, "by_kind": kind_of}
        return {
            "base": self.base.as_dict(),
            "other": self.other.as_dict(),
            "total": self.total.as_dict(),
            **{name: {key: some.as_dict() for key, some in self.by(of).items()} for name, of in by.items()},
            "tensors": {t.name: {"shape": t.shape} | t.difference.as_dict() for t in self.tensors},
            "not_float": [vars(tensor) for tensor in self.unequal],
            "only_base": self.only_base,
            "only_other": self.only_other,
            "unlike": [vars(tensor) for tensor in self.unlike],
            "faults": [vars(fault) for fault in self.faults],
            "notes": self.notes,
        }


def combine(differences: Iterable[Difference]) -> Difference:
    """Of several tensors together; sums are added in their order."""
    every = list(differences)
    totals: dict[str, Any] = {key: sum(getattr(one, key) for one in every) for key in SUMMED}
    largest = max((one.largest for one in every if one.largest), key=lambda place: place.value, default=None)
    dtypes = tuple(sorted({pair for one in every for pair in one.dtypes}))
    return Difference(**totals, largest=largest, dtypes=dtypes)
