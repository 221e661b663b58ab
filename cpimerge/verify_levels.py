"""How far tensors must be levelled, and what levelling makes of a fold, by docs/levelling.md in float64.

Written once more from that rule, on purpose: of the code that plans and fuses, nothing is used here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from .plan_file import Plan, TensorPlan
from .verify_cores import layer_of
from .verify_numbers import SIZES, Floats
from .verify_sources import chunks_of

if TYPE_CHECKING:
    from .recipe import Recipe

__all__ = [
    "Levelled",
    "is_matrix_of_layer",
    "levelled",
    "matrix_bytes",
    "most_of",
    "must_level",
    "result_bytes",
    "sampled",
]

GAIN = 12.0  # on every singular value,
CAP = 8.0  # up to so many root mean squares of all,
LOW_RANK_CAP = 2.0  # or so many of their means, each weighted with itself, where that is more
LEAST = 0.01  # of levelling; less is none
LIMIT = 0.03  # of the Frobenius norm of the base, and times `rest`: no matrix is moved farther
SHORTEST = 32  # side of a matrix that is levelled
PACKED_BYTES = 4_000_000  # by BLAS, of small matrices; of large ones it is less than the columns
COLUMNS = 512  # at a time, so that there are never as many doubles as elements

# `fuse` multiplies the fold F by a matrix in float32: the levelled fold is GAIN·F less what is above the cap, and its
# error goes with the sizes of both, which cancel where one direction is far stronger than all others. Measured on 36
# matrices of 48 x 80 to 3072 x 4096 (random, of rank 1 and 8, with one huge element, one strong direction or heavy
# tails) it was at most 1e-6, and mostly below 4e-7, of these sizes; it grows slowly with the sides. The singular values
# of low rank, which are roots of what is 0 but for rounding, move the cap by less.
TOLERANCE = 4e-6  # of the largest |GAIN·F| and the largest |levelled F| together

Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Levelled:
    """The levelled fold of a whole tensor, float32 [elements], and how far from it an element may be."""

    values: Floats
    tolerance: float


def is_matrix_of_layer(tensor: TensorPlan) -> bool:
    """Whether a tensor is one of those that are levelled where their updates are apart."""
    return len(tensor.shape) == 2 and min(tensor.shape) >= SHORTEST and layer_of(tensor.name) != ""


def must_level(plan: Plan, recipe: Recipe, tensor: TensorPlan, gram: Doubles) -> float:
    """How far a blended tensor must be levelled, whose members have these dot products [V, V]: 0 to 1.

    The effective number of updates, less one: Σᵢⱼ nᵢ·nⱼ / Σᵢⱼ nᵢ·nⱼ·cos²ᵢⱼ with the norms n of those that are not 0.
    """
    levels = recipe.space == "delta" and recipe.rest > 0 and recipe.singular_values == "level"
    if not levels or not is_matrix_of_layer(tensor) or plan.settings.space != "delta":
        return 0.0
    norms = [math.sqrt(gram[i, i]) for i in range(len(gram))]
    every = [(i, j) for i in range(len(norms)) for j in range(len(norms)) if norms[i] > 0 and norms[j] > 0]
    if not every:
        return 0.0
    with np.errstate(all="ignore"):  # of inputs that changed
        alike = math.fsum(gram[i, j] ** 2 / (norms[i] * norms[j]) for i, j in every)
        beyond = math.fsum(norms[i] * norms[j] for i, j in every) / alike - 1
    return 0.0 if beyond < LEAST else min(1.0, beyond)


def levelled(fold: Floats, most: float, share: float = 1.0) -> Levelled:
    """Level `fold` float32 [rows, columns], in place: of each singular value σ comes min(GAIN·σ, cap).

    The cap is CAP·√(Σσ²/m) of the m singular values, or LOW_RANK_CAP·Σσ²/Σσ where that is more. The levelled matrix is
    U·diag(min(GAIN, cap/σ))·Uᵀ·F, where the columns of U are the left singular vectors of F; all of it scaled down to
    the norm `most` where that is less. Of a `share` below 1, the rest of F stays. All NaN where F is not finite, or
    cannot be decomposed: then nothing follows.
    """
    wide = fold if fold.shape[0] <= fold.shape[1] else fold.T
    before = _largest(wide)
    try:
        change, scale = _change(wide, most, share) if math.isfinite(before) else (None, 1.0)
    except np.linalg.LinAlgError:
        change, scale = None, 1.0
    if change is None:
        fold[:] = np.nan
        return Levelled(fold.reshape(-1), 0.0)
    for part in _parts(wide):
        part[:] = change @ part.astype(np.float64)
    least = len(wide) * float(np.finfo(np.float32).tiny)  # below that float32 has fewer digits, or none
    tolerance = TOLERANCE * ((1 - share + share * GAIN * scale) * before + _largest(wide)) + (least if before else 0.0)
    return Levelled(fold.reshape(-1), tolerance)


def most_of(square: float, rest: float) -> float:
    """The largest norm of what is added to a base of which this is the sum of squares."""
    return LIMIT * rest * math.sqrt(square) if square > 0 else math.inf


def _change(wide: Floats, most: float, share: float) -> tuple[Doubles, float]:
    """U·diag(min(GAIN, cap/σ))·Uᵀ, scaled, float64 [m, m], and the scale; the identity beside a `share` of it.

    The eigenvalues of F·Fᵀ are σ², its eigenvectors are U.
    """
    side = len(wide)
    gram = np.zeros((side, side))
    for part in _parts(wide):
        doubles = part.astype(np.float64)
        gram += doubles @ doubles.T
    squares, vectors = np.linalg.eigh(gram)
    del gram
    sigmas = np.sqrt(np.maximum(squares, 0))
    factors = np.full(side, GAIN)
    if sigmas.any():
        energy = math.fsum((sigmas * sigmas).tolist())
        cap = max(CAP * math.sqrt(energy / side), LOW_RANK_CAP * energy / math.fsum(sigmas.tolist()))
        strong = GAIN * sigmas > cap
        factors[strong] = cap / sigmas[strong]
    norm = float(np.linalg.norm(factors * sigmas))
    scale = most / norm if norm > most else 1.0
    change: Doubles = (vectors * (1 - share + share * scale * factors)) @ vectors.T
    return change, scale


def _parts(wide: Floats) -> Iterator[Floats]:
    """Views of some columns each."""
    for first in range(0, wide.shape[1], COLUMNS):
        yield wide[:, first : first + COLUMNS]


def _largest(wide: Floats) -> float:
    """The largest magnitude; NaN where there is one."""
    return float(np.max([np.abs(part).max() for part in _parts(wide)]))


# --- what is held at a time ----------------------------------------------------------------------


def matrix_bytes(plan: Plan) -> int:
    """What a thread needs beside `worker_bytes` while it holds the largest levelled tensor; 0 where there is none.

    The fold, its Gram matrix and what LAPACK makes of that (five such matrices of doubles), columns as doubles.
    """
    most = 0
    for tensor in plan.tensors:
        if tensor.is_levelled:
            side, elements = min(tensor.shape), math.prod(tensor.shape)
            work = 5 * 8 * side * side + 4 * 8 * side * COLUMNS + PACKED_BYTES
            most = max(most, 4 * elements + work + _result_bytes(plan, tensor))
    return most


def result_bytes(plan: Plan) -> int:
    """The largest result of a levelled tensor, which waits whole until its bytes are hashed."""
    return max((_result_bytes(plan, tensor) for tensor in plan.tensors if tensor.is_levelled), default=0)


def _result_bytes(plan: Plan, tensor: TensorPlan) -> int:
    """Its bytes of the output, and for each row a Gram matrix."""
    rows = sum(chunk.rows for chunk in chunks_of(tensor.shape, plan.settings.granularity))
    return math.prod(tensor.shape) * SIZES[tensor.dtype] + rows * 8 * len(plan.fold) ** 2


# --- a sample ------------------------------------------------------------------------------------


def sampled(tensors: Iterable[TensorPlan], share: Fraction) -> set[str]:
    """Which of the levelled among `tensors` a sample reads: about that share of their elements, and at least one.

    Each whole or not at all, because every element of one follows from all of it. They are spread over the model: one
    is read where, with it, what is read so far is nearer to the share.
    """
    chosen: set[str] = set()
    owed = Fraction(0)
    every = [(tensor.name, math.prod(tensor.shape)) for tensor in tensors if tensor.is_levelled]
    for name, size in every:
        owed += share * size
        if 2 * owed >= size:
            owed -= size
            chosen.add(name)
    if every and not chosen:
        chosen.add(min(every, key=lambda one: one[1])[0])
    return chosen
