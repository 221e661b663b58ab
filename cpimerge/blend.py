"""Gram matrix → coefficients: a running fold of slerps is one linear combination (METHOD §3).

The fold never sees a vector. With v = Σ aᵢ·vᵢ, |v|² = aᵀGa and ⟨v, vⱼ⟩ = (Ga)ⱼ, so each step of the fold only needs
the Gram matrix G of the vectors. Formula of the step: METHOD §3, which is mergekit's usual slerp.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import combinations_with_replacement

import numpy as np
import numpy.typing as npt

from .kernels.arrays import Doubles, compiled

__all__ = ["LERP_EPSILON", "Fold", "fold", "shares"]

LERP_EPSILON = 5e-4  # slerp becomes lerp where |cos Ω| > 1 − ε
# A norm this far below the terms that cancelled in it is rounding noise, hence 0: float64 has about 1e-16 of it.
CANCELLED = 1e-13


@dataclass(frozen=True)
class Fold:
    """The outcome of a fold for R vectors (one, or one a row), over V members in fold order, the backbone first."""

    coefficients: npt.NDArray[np.float32]  # [R, V]
    angles: npt.NDArray[np.float64]  # [R, V − 1], radians, of each step; NaN where a norm is 0
    slerped: npt.NDArray[np.bool_]  # [R, V − 1], False where the step was a lerp


@lru_cache(1 << 10)  # most tensors have the same weights
def shares(weights: tuple[Fraction, ...], constant: tuple[Fraction | None, ...]) -> tuple[float, ...]:
    """ω of each step after the backbone: `constant` where given, else w / (all weights up to it). 0/0 is 0.

    Both run over the members in fold order, the backbone first (whose `constant` is not used).
    """
    steps = []
    total = weights[0]
    for weight, t in zip(weights[1:], constant[1:], strict=True):
        total += weight
        equal = weight / total if total else Fraction(0)
        steps.append(float(equal if t is None else t))
    return tuple(steps)


def fold(gram: npt.NDArray[np.float64], order: Sequence[int], omegas: Sequence[float], scale: float) -> Fold:
    """Coefficients of the running fold v ← slerp(v, vᵢ, ω).

    `gram` float64 [R, P] holds the pairs i ≤ j of V vectors in row-major order; `order` [V] says which vector is
    folded when; `omegas` [V − 1]; every coefficient is multiplied by `scale` (the recipe's `rest`) and then rounded
    to float32.
    """
    members = len(order)
    full = np.empty((len(gram), members, members))
    place = np.empty(members, np.int64)
    place[list(order)] = np.arange(members)
    for pair, (i, j) in enumerate(combinations_with_replacement(range(members), 2)):
        full[:, place[i], place[j]] = full[:, place[j], place[i]] = gram[:, pair]
    coefficients = np.zeros((len(gram), members))
    cosines = np.empty((len(gram), members - 1))
    _fold_rows(full, np.array(omegas, np.float64), coefficients, cosines)
    slerped = np.abs(cosines) <= 1 - LERP_EPSILON  # NaN compares False
    return Fold((coefficients * scale).astype(np.float32), np.arccos(cosines), slerped)


@compiled
def _fold_rows(gram: Doubles, omegas: Doubles, coefficients: Doubles, cosines: Doubles) -> None:
    """`gram` float64 [R, V, V] in fold order → `coefficients` [R, V], `cosines` [R, V − 1] (NaN where a norm is 0)."""
    for r in range(gram.shape[0]):
        coefficients[r, 0] = 1.0
        for step in range(omegas.size):
            new = step + 1
            norm, size, dot = 0.0, 0.0, 0.0
            for i in range(new):
                dot += coefficients[r, i] * gram[r, i, new]
                for j in range(new):
                    term = coefficients[r, i] * coefficients[r, j] * gram[r, i, j]
                    norm += term
                    size += abs(term)
            scale = math.sqrt(max(norm, 0.0)) * math.sqrt(gram[r, new, new])
            cosine = math.nan if norm <= CANCELLED * size or scale == 0.0 else min(max(dot / scale, -1.0), 1.0)
            old_share, new_share = _slerp_shares(cosine, omegas[step])
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
