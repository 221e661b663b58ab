"""The few loops that touch every element. float32 in, nothing allocated in a loop, no global interpreter lock.

No kernel is compiled with fast-math: sums keep the order written here and multiply-adds are not contracted, so the
results do not depend on the machine. A magnitude |Δ| is kept as the bit pattern of its float32 (uint32): patterns
of non-negative floats order like the numbers themselves.

Shapes: n elements of a chunk, T tasks, V vectors, R rows, P = V·(V+1)/2 pairs (i ≤ j) in row-major order.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Bits = npt.NDArray[np.uint32]
Counts = npt.NDArray[np.int64]

HIGH_BINS = 1 << 15  # bits 30..16 of a magnitude; the sign bit is 0
LOW_BINS = 1 << 16  # bits 15..0

LANES = 64  # independent partial sums, so that a loop can use vector registers and yet has a fixed order
TILE = 2048  # elements that stay in the first-level cache
_compiled = numba.njit(nogil=True, cache=True, error_model="numpy")


@_compiled
def magnitude(base: Floats, task: Floats, out: Floats) -> None:
    """|task − base| of float32 [n] into `out` float32 [n]: METHOD's m."""
    for i in range(out.size):
        out[i] = abs(task[i] - base[i])


@_compiled
def total(values: Floats) -> float:
    """Σ of float32 [n] in float64."""
    lanes = np.zeros(LANES)
    whole = values.size - values.size % LANES
    for i in range(0, whole, LANES):
        for k in range(LANES):
            lanes[k] += np.float64(values[i + k])
    result = 0.0
    for k in range(LANES):
        result += lanes[k]
    for i in range(whole, values.size):
        result += np.float64(values[i])
    return result


@_compiled
def first_nonfinite(bits: npt.NDArray[Any], exponent: np.unsignedinteger[Any]) -> int:
    """Index of the first NaN or Inf among the bit patterns `bits` [n] of floats; -1 where all are finite.

    `exponent`, of the same unsigned dtype, has the bits of the float format's exponent field set.
    """
    found = False
    for i in range(bits.size):
        found |= (bits[i] & exponent) == exponent
    if found:
        for i in range(bits.size):
            if (bits[i] & exponent) == exponent:
                return i
    return -1


@_compiled
def tally(magnitude: Bits, base: Bits, half_ulp: Bits, near: np.uint32) -> tuple[int, int, int]:
    """Count elements changed, with m ≤ `near`, and within half a unit in the last place of the base.

    `magnitude` and `base` are uint32 [n] bit patterns; `half_ulp` uint32 [256] gives half a unit in the last place
    by the base's exponent; `near` is the bit pattern of the threshold. Returns three counts.
    """
    changed = 0
    nearly = 0
    rounding = 0
    for i in range(magnitude.size):
        m = magnitude[i]
        changed += m != 0
        nearly += m <= near
        rounding += m <= half_ulp[(base[i] >> np.uint32(23)) & np.uint32(0xFF)]
    return changed, nearly, rounding


@_compiled
def histogram_high(magnitude: Bits, counts: Counts) -> None:
    """Add to `counts` int64 [HIGH_BINS] the high halves of `magnitude` uint32 [n]."""
    for i in range(magnitude.size):
        counts[magnitude[i] >> np.uint32(16)] += 1


@_compiled
def histogram_low(magnitude: Bits, high: np.uint32, counts: Counts) -> None:
    """Add to `counts` int64 [LOW_BINS] the low halves of those `magnitude` uint32 [n] whose high half is `high`."""
    for i in range(magnitude.size):
        if magnitude[i] >> np.uint32(16) == high:
            counts[magnitude[i] & np.uint32(0xFFFF)] += 1


@_compiled
def kth_bin(counts: Counts, k: int) -> tuple[int, int]:
    """The bin of `counts` int64 [bins] that holds the k-th largest entry, and how many of the k lie in that bin.

    1 ≤ k ≤ the sum of the counts.
    """
    place = counts.size - 1
    while counts[place] < k:
        k -= counts[place]
        place -= 1
    return place, k


@_compiled
def count_equal(magnitude: Bits, threshold: np.uint32) -> int:
    """How many of `magnitude` uint32 [n] equal `threshold`."""
    count = 0
    for i in range(magnitude.size):
        count += magnitude[i] == threshold
    return count


@_compiled
def select(magnitude: Bits, threshold: np.uint32, ties: int, positions: Bits) -> int:
    """Write to `positions` uint32 [n] where magnitude > threshold, and the first `ties` places where it is equal.

    Returns how many were written; they ascend.
    """
    count = 0
    for i in range(magnitude.size):
        m = magnitude[i]
        if m >= threshold:
            if m > threshold:
                positions[count] = i
                count += 1
            elif ties > 0:
                positions[count] = i
                count += 1
                ties -= 1
    return count


@_compiled
def clear_at(vectors: Floats, positions: Bits) -> None:
    """Set `vectors` float32 [V, n] to 0 at `positions` uint32 [k]."""
    for v in range(vectors.shape[0]):
        for i in range(positions.size):
            vectors[v, positions[i]] = 0.0


@_compiled
def _dot(a: Floats, b: Floats, lanes: npt.NDArray[np.float64]) -> float:
    """Σ a·b of float32 [n] in float64; the products are exact, the sums run in `lanes` float64 [LANES]."""
    whole = a.size - a.size % LANES
    for k in range(LANES):
        lanes[k] = 0.0
    for i in range(0, whole, LANES):
        for k in range(LANES):
            lanes[k] += np.float64(a[i + k]) * np.float64(b[i + k])
    result = 0.0
    for k in range(LANES):
        result += lanes[k]
    for i in range(whole, a.size):
        result += np.float64(a[i]) * np.float64(b[i])
    return result


@_compiled
def gram(vectors: Floats, row: int, out: npt.NDArray[np.float64]) -> None:
    """Dot products of `vectors` float32 [V, n], for each run of `row` elements: `out` float64 [R, P], R·row = n."""
    lanes = np.empty(LANES)
    for r in range(out.shape[0]):
        begin = r * row
        end = begin + row
        pair = 0
        for i in range(vectors.shape[0]):
            for j in range(i, vectors.shape[0]):
                out[r, pair] = _dot(vectors[i, begin:end], vectors[j, begin:end], lanes)
                pair += 1


@_compiled
def blend(vectors: Floats, coefficients: Floats, row: int, out: Floats) -> None:
    """Σ_v c_v·vector_v in float32, in the order of v: `out` float32 [n].

    `vectors` float32 [V, n]; `coefficients` float32 [R, V], one line for each run of `row` elements.
    """
    for r in range(coefficients.shape[0]):
        for begin in range(r * row, (r + 1) * row, TILE):
            end = min(begin + TILE, (r + 1) * row)
            _scale(coefficients[r, 0], vectors[0, begin:end], out[begin:end])
            for v in range(1, vectors.shape[0]):
                _add_scaled(coefficients[r, v], vectors[v, begin:end], out[begin:end])


@_compiled
def _scale(factor: np.float32, values: Floats, out: Floats) -> None:
    for i in range(out.size):
        out[i] = factor * values[i]


@_compiled
def _add_scaled(factor: np.float32, values: Floats, out: Floats) -> None:
    for i in range(out.size):
        out[i] += factor * values[i]


@_compiled
def copy_at(positions: Bits, source: npt.NDArray[Any], target: npt.NDArray[Any]) -> None:
    """target[p] = source[p] at `positions` uint32 [k]; both are [n] of one dtype."""
    for i in range(positions.size):
        target[positions[i]] = source[positions[i]]


@_compiled
def claim_largest(
    positions: Bits, magnitude: Bits, source: npt.NDArray[Any], largest: Bits, target: npt.NDArray[Any]
) -> None:
    """As `copy_at`, where `magnitude` uint32 [n] is at least what `largest` uint32 [n] holds; keeps it there."""
    for i in range(positions.size):
        p = positions[i]
        if magnitude[p] >= largest[p]:
            largest[p] = magnitude[p]
            target[p] = source[p]
