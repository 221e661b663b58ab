"""Singular values made level: the few directions in which a matrix moved most are capped, all others strengthened.

Added up, the updates of several tasks have a few directions that are many times as strong as the rest, and in these the
tasks get in each other's way. Isotropic merging (Iso-C, arXiv 2502.04959) gives every direction the same strength. Here
they are strengthened by one factor and capped, so that what is next to nothing, such as the rounding of 16-bit weights,
stays next to nothing. And no matrix is moved farther than a model bears, however far its fine-tunes moved.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a plan is read, and what can be levelled is asked, without a numeric library
    import numpy as np
    import numpy.typing as npt

    Floats = npt.NDArray[np.float32]
    Doubles = npt.NDArray[np.float64]

__all__ = [
    "CAP",
    "CAP_OF_LOW_RANK",
    "GAIN",
    "LEAST",
    "LIMIT",
    "apart",
    "can_level",
    "level",
    "level_bytes",
    "level_work",
    "one_thread",
    "reach",
]

GAIN = 12.0  # what a singular value is multiplied by
CAP = 8.0  # what it is at most, in root mean squares of all,
CAP_OF_LOW_RANK = 2.0  # or in means of all, each weighted with itself, where that is more
LIMIT = 0.03  # how far a matrix is moved at most, as a share of its norm in the base
LEAST = 0.01  # share of levelling that is worth a decomposition
SMALLEST = 32  # the shorter side of a matrix: below that there are too few directions
BLOCK = 1024  # columns at a time; a constant, because it enters sums
PACKED_BYTES = 4_000_000  # by BLAS, of small matrices; of large ones it is less than a block of columns


def can_level(shape: Sequence[int], layer: str) -> bool:
    """Whether a tensor of `layer` ('': of none) is levelled where its updates are apart: a matrix of a layer.

    Embeddings are not: their rows are tokens, and most rows nobody moved.
    """
    return bool(layer) and len(shape) == 2 and min(shape) >= SMALLEST


def apart(gram: Doubles) -> float:
    """How far apart updates are, 0 to 1, from float64 [V, V] of their dot products: how far they are to be levelled.

    That is how many they are in effect, less one: (Σ nᵢ)² / Σ nᵢ·nⱼ·cos²(i, j) with the norms n, 1 where all are the
    same or one alone is not 0, and V where they are orthogonal and of one norm. From 2 on it is 1, and below LEAST 0.
    """
    import numpy as np

    norms = np.sqrt(np.diagonal(gram))
    moved = norms > 0
    if not moved.any():
        return 0.0
    norms, products = norms[moved], gram[np.ix_(moved, moved)]
    effective = float(np.sum(norms)) ** 2 / float(np.sum(products**2 / np.outer(norms, norms)))
    return 0.0 if effective < 1 + LEAST else min(1.0, effective - 1)


def level(update: Floats, most: float = math.inf, share: float = 1.0) -> None:
    """Level the singular values of float32 [rows, columns], finite, in place: each σ becomes min(GAIN·σ, cap).

    The cap is CAP·√(Σσ²/m) of the m singular values, or CAP_OF_LOW_RANK·Σσ²/Σσ where that is more: in an update of low
    rank, such as a LoRA's, most of the m are 0. All are then scaled down together where √Σσ², the Frobenius norm of the
    result, would be above `most`. Only a `share` of each σ, 0 to 1, becomes so, the rest stays as it is. Sums are
    float64; the matrix is multiplied in float32. Raises numpy.linalg.LinAlgError where the decomposition fails.
    """
    import numpy as np

    wide = update if update.shape[0] <= update.shape[1] else update.T
    gram = np.zeros((len(wide), len(wide)))
    for part in _blocks(wide):
        doubles = part.astype(np.float64)
        gram += doubles @ doubles.T
    squares, vectors = np.linalg.eigh(gram)
    del gram
    values = np.sqrt(np.maximum(squares, 0))
    energy, total = float(np.sum(values * values)), float(np.sum(values))
    if energy == 0:
        return
    cap = max(CAP * math.sqrt(energy / len(values)), CAP_OF_LOW_RANK * energy / total)
    strong = GAIN * values > cap
    reached = float(np.linalg.norm(np.minimum(GAIN * values, cap)))
    scale = min(1.0, most / reached)
    gain = 1 - share + share * scale * GAIN
    capped = 1 - share + share * scale * cap / values[strong]
    basis = vectors[:, strong]
    change = basis * (capped - gain)
    del vectors
    if 2 * basis.shape[1] <= len(wide):  # then two narrow products are less work than a square one
        thin, weights = basis.T.astype(np.float32), change.astype(np.float32)
        for part in _blocks(wide):
            changed = weights @ (thin @ part)
            part *= np.float32(gain)
            part += changed
    else:
        square = change @ basis.T
        square[np.diag_indices(len(wide))] += gain
        single = square.astype(np.float32)
        for part in _blocks(wide):
            part[:] = single @ part


def reach(squares: float, rest: float) -> float:
    """The most that `level` may make of an update of a base whose elements have this sum of squares."""
    return LIMIT * rest * math.sqrt(squares) if squares else math.inf


def _blocks(wide: Floats) -> Iterator[Floats]:
    """Views of some columns each."""
    for first in range(0, wide.shape[1], BLOCK):
        yield wide[:, first : first + BLOCK]


def level_bytes(shape: Sequence[int]) -> int:
    """What levelling a matrix takes at most: the matrix, its Gram matrix twice, its vectors, LAPACK's work of twice
    their size, a block of columns, and what matrix products pack."""
    short = min(shape)
    return 4 * math.prod(shape) + 5 * 8 * short * short + 4 * 8 * short * BLOCK + PACKED_BYTES


def level_work(shape: Sequence[int]) -> float:
    """How long levelling takes, in a unit that is the same for all shapes; measured."""
    short, long = sorted(shape)
    return short * short * (long + 4.0 * short)


class _Limit:
    """How many threads BLAS has is the whole process's: the first block that limits it does so, the last ends that."""

    lock = threading.Lock()
    blocks = 0
    before: Sequence[tuple[Any, int]] = ()  # libraries, and how many threads each had


@contextmanager
def one_thread() -> Iterator[None]:
    """Matrix products run on the thread that asks for them as long as any such block of the process lasts.

    How many threads there are must not change a sum.
    """
    from threadpoolctl import ThreadpoolController

    with _Limit.lock:
        if not _Limit.blocks:
            libraries = ThreadpoolController().select(user_api="blas").lib_controllers
            _Limit.before = [(library, library.num_threads) for library in libraries]
            _set_threads([(library, 1) for library in libraries])
        _Limit.blocks += 1
    try:
        yield
    finally:
        with _Limit.lock:
            _Limit.blocks -= 1
            if not _Limit.blocks:
                _set_threads(_Limit.before)
                _release(_Limit.before)


def _set_threads(libraries: Sequence[tuple[Any, int]]) -> None:
    """Give each so many threads, whichever thread of the process asked for a limit before."""
    _release(libraries)
    for library, count in libraries:
        library.set_num_threads(count)


def _release(libraries: Sequence[tuple[Any, int]]) -> None:
    """Newer versions of threadpoolctl let the thread that was first set a limit, and ignore what all others set."""
    for library, _ in libraries:
        if hasattr(library, "clear_controlling_thread"):
            library.clear_controlling_thread(force=True)
