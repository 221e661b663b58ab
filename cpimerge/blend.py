"""Gram matrix → coefficients: a running fold of slerps is one linear combination (METHOD §3).

The fold never sees a vector. With v = Σ aᵢ·vᵢ, |v|² = aᵀGa and ⟨v, vⱼ⟩ = (Ga)ⱼ, so each step of the fold only needs
the Gram matrix G of the vectors. Formula of the step: METHOD §3, which is mergekit's usual slerp.

Weights divide the sum, not the angle: a step's ω is such that vectors of equal weight have equal coefficients. Where
all are nearly parallel, that is ω = wᵢ / Σw. But with that ω the sixth of six orthogonal vectors would have half of the
coefficient of the first, so that the direction of the result would depend on the order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import combinations_with_replacement
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .kernels.arrays import Doubles, compiled

__all__ = ["LERP_EPSILON", "Fold", "Share", "fold", "matrices", "shares"]

LERP_EPSILON = 5e-4  # slerp becomes lerp where |cos Ω| > 1 − ε
# A norm this far below the terms that cancelled in it is rounding noise, hence 0: float64 has about 1e-16 of it.
CANCELLED = 1e-13


class Share(NamedTuple):
    """What the new vector of a step of the fold gets, 0 to 1: of the angle if that is `constant`, else of the sum."""

    share: float
    constant: bool


@dataclass(frozen=True)
class Fold:
    """The outcome of a fold for R vectors (one, or one a row), over V members in fold order, the backbone first."""

    coefficients: npt.NDArray[np.float32]  # [R, V]
    angles: npt.NDArray[np.float64]  # [R, V − 1], radians, of each step; NaN where a norm is 0
    slerped: npt.NDArray[np.bool_]  # [R, V − 1], False where the step was a lerp


@lru_cache(1 << 10)  # most tensors have the same weights
def shares(weights: tuple[Fraction, ...], constant: tuple[Fraction | None, ...]) -> tuple[Share, ...]:
    """The share of each member after the backbone: `constant` where given, else w / (all weights up to it). 0/0 is 0.

    Both run over the members in fold order, the backbone first (whose `constant` is not used).
    """
    steps = []
    total = weights[0]
    for weight, t in zip(weights[1:], constant[1:], strict=True):
        total += weight
        equal = weight / total if total else Fraction(0)
        steps.append(Share(float(equal if t is None else t), t is not None))
    return tuple(steps)


def fold(gram: npt.NDArray[np.float64], order: Sequence[int], steps: Sequence[Share], scale: float) -> Fold:
    """Coefficients of the running fold v ← slerp(v, vᵢ, ω).

    `gram` float64 [R, P] holds the pairs i ≤ j of V vectors in row-major order; `order` [V] says which vector is
    folded when; `steps` [V − 1]; every coefficient is multiplied by `scale` (the recipe's `rest`) and then rounded
    to float32.
    """
    members = len(order)
    coefficients = np.zeros((len(gram), members))
    cosines = np.empty((len(gram), members - 1))
    _fold_rows(matrices(gram, order), np.array(steps, np.float64).reshape(-1, 2), coefficients, cosines)
    slerped = np.abs(cosines) <= 1 - LERP_EPSILON  # NaN compares False
    return Fold((coefficients * scale).astype(np.float32), np.arccos(cosines), slerped)


def matrices(gram: npt.NDArray[np.float64], order: Sequence[int]) -> npt.NDArray[np.float64]:
    """From pairs i ≤ j in row-major order, float64 [R, P], all dot products of V vectors in `order`: [R, V, V]."""
    full = np.empty((len(gram), len(order), len(order)))
    place = np.empty(len(order), np.int64)
    place[list(order)] = np.arange(len(order))
    for pair, (i, j) in enumerate(combinations_with_replacement(range(len(order)), 2)):
        full[:, place[i], place[j]] = full[:, place[j], place[i]] = gram[:, pair]
    return full


@compiled
def _fold_rows(gram: Doubles, steps: Doubles, coefficients: Doubles, cosines: Doubles) -> None:
    """`gram` float64 [R, V, V] in fold order, `steps` [V − 1, 2] → `coefficients` [R, V], `cosines` [R, V − 1] (NaN
    where a norm is 0)."""
    for r in range(gram.shape[0]):
        coefficients[r, 0] = 1.0
        for step in range(len(steps)):
            new = step + 1
            norm, size, dot, total = 0.0, 0.0, 0.0, 0.0
            for i in range(new):
                total += coefficients[r, i]
                dot += coefficients[r, i] * gram[r, i, new]
                for j in range(new):
                    term = coefficients[r, i] * coefficients[r, j] * gram[r, i, j]
                    norm += term
                    size += abs(term)
            scale = math.sqrt(max(norm, 0.0)) * math.sqrt(gram[r, new, new])
            cosine = math.nan if norm <= CANCELLED * size or scale == 0.0 else min(max(dot / scale, -1.0), 1.0)
            share = steps[step, 0]
            if steps[step, 1]:
                old_share, new_share = _slerp_shares(cosine, share)
            else:
                old_share, new_share = _even_shares(cosine, 1.0 - share, share * total)
            for i in range(new):
                coefficients[r, i] *= old_share
            coefficients[r, new] = new_share
            cosines[r, step] = cosine


@compiled
def _slerp_shares(cosine: float, t: float) -> tuple[float, float]:
    """The factors of v0 and v1 in slerp(v0, v1, t); a NaN cosine (a norm is 0) is a lerp."""
    if abs(cosine) <= 1.0 - LERP_EPSILON:
        omega = math.acos(cosine)
        return math.sin((1.0 - t) * omega) / math.sin(omega), math.sin(t * omega) / math.sin(omega)
    return 1.0 - t, t


@compiled
def _even_shares(cosine: float, old: float, new: float) -> tuple[float, float]:
    """The same with that t where the factors of v0 and v1 are to each other as `old` and `new`, one of them above 0.

    From sin(tΩ)/sin((1 − t)Ω) = k follows sin((1 − t)Ω)/sin Ω = 1/√(1 + 2k·cos Ω + k²).
    """
    length = old + new
    if abs(cosine) <= 1.0 - LERP_EPSILON:
        length = math.sqrt(old * old + 2.0 * old * new * cosine + new * new)
    return old / length, new / length
