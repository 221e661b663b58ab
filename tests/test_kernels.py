"""Each kernel against a line of numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cpimerge import kernels
from cpimerge.stream import EXPONENT

finite = st.floats(-(2.0**100), 2.0**100, width=32)
sizes = st.sampled_from([0, 1, 7, 63, 64, 65, 200])


def floats(rows: int | None = None) -> st.SearchStrategy[np.ndarray]:
    return sizes.flatmap(lambda n: hnp.arrays(np.float32, n if rows is None else (rows, n), elements=finite))


def bits(top: int = 2**31 - 1) -> st.SearchStrategy[np.ndarray]:
    return sizes.flatmap(lambda n: hnp.arrays(np.uint32, n, elements=st.integers(0, top)))


@given(floats(2))
def test_magnitude(values: np.ndarray) -> None:
    out = np.full(values.shape[1], -1, np.float32)
    kernels.magnitude(values[0], values[1], out)
    assert out.tobytes() == np.abs(values[1] - values[0]).tobytes()


@given(floats())
def test_total(values: np.ndarray) -> None:
    wanted = math.fsum(map(float, values))
    assert kernels.total(values) == pytest.approx(wanted, abs=1e-13 * float(np.abs(values).astype(np.float64).sum()))


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
@pytest.mark.parametrize("place", [0, 1, 63, 64, 199])
@pytest.mark.parametrize("mantissa", [0, 1])
def test_first_nonfinite(dtype: str, place: int, mantissa: int) -> None:
    exponent = EXPONENT[dtype]
    largest_finite = exponent.dtype.type(int(exponent) - 1)
    values = np.full(200, largest_finite)
    assert kernels.first_nonfinite(values, exponent) == -1
    values[place:] = int(exponent) | mantissa
    assert kernels.first_nonfinite(values, exponent) == place


@given(bits(7), bits(7))
def test_tally(magnitude: np.ndarray, base: np.ndarray) -> None:
    n = min(magnitude.size, base.size)
    magnitude, base = magnitude[:n], base[:n] << np.uint32(23)  # small exponents
    half_ulp = np.arange(256, dtype=np.uint32) // 2
    found = kernels.tally(magnitude, base, half_ulp, np.uint32(3))
    wanted = (magnitude > 0).sum(), (magnitude <= 3).sum(), (magnitude <= half_ulp[(base >> 23) & 255]).sum()
    assert tuple(found) == wanted


@given(bits())
def test_histograms(magnitude: np.ndarray) -> None:
    high = np.ones(kernels.HIGH_BINS, np.int64)
    kernels.histogram_high(magnitude, high)
    assert (high - 1 == np.bincount(magnitude >> 16, minlength=kernels.HIGH_BINS)).all()
    for bin_ in {0, *(int(m) >> 16 for m in magnitude[:2])}:
        low = np.ones(kernels.LOW_BINS, np.int64)
        kernels.histogram_low(magnitude, np.uint32(bin_), low)
        inside = magnitude[magnitude >> 16 == bin_] & 0xFFFF
        assert (low - 1 == np.bincount(inside, minlength=kernels.LOW_BINS)).all()


@given(st.lists(st.integers(0, 4), min_size=1, max_size=9).filter(any), st.data())
def test_kth_bin(counts: list[int], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, sum(counts)))
    entries = sorted((bin_ for bin_, count in enumerate(counts) for _ in range(count)), reverse=True)
    bin_, wanted = kernels.kth_bin(np.array(counts), k)
    assert bin_ == entries[k - 1]
    assert wanted == k - sum(entry > bin_ for entry in entries)


@given(bits(5), st.integers(0, 6), st.integers(0, 4))
def test_select_and_count(magnitude: np.ndarray, threshold: int, ties: int) -> None:
    room = np.zeros(magnitude.size, np.uint32)
    count = kernels.select(magnitude, np.uint32(threshold), ties, room)
    equal = np.flatnonzero(magnitude == threshold)
    wanted = np.sort(np.concatenate([np.flatnonzero(magnitude > threshold), equal[:ties]]))
    assert room[:count].tolist() == wanted.tolist()
    assert kernels.count_equal(magnitude, np.uint32(threshold)) == equal.size


@given(st.integers(1, 4), st.sampled_from([1, 3, 64, 70]), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_gram_and_blend(members: int, row: int, rows: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(members, rows * row)).astype(np.float32)
    coefficients = rng.normal(size=(rows, members)).astype(np.float32)
    gram = np.full((rows, members * (members + 1) // 2), np.nan)
    kernels.gram(vectors, row, gram)
    by_row = vectors.reshape(members, rows, row).astype(np.float64)
    wanted = np.einsum("irk,jrk->rij", by_row, by_row)
    np.testing.assert_allclose(gram, wanted[:, *np.triu_indices(members)], rtol=1e-12, atol=1e-12)
    out = np.full(rows * row, np.nan, np.float32)
    kernels.blend(vectors, coefficients, row, out)
    running = np.zeros((rows, row), np.float32)
    for member in range(members):
        term = coefficients[:, member, np.newaxis] * vectors[member].reshape(rows, row)
        running = term if member == 0 else running + term
    assert out.tobytes() == running.tobytes()  # the order of the members, and no fused multiply-add


def test_writing_at_positions() -> None:
    positions = np.array([1, 3], np.uint32)
    vectors = np.ones((2, 4), np.float32)
    kernels.clear_at(vectors, positions)
    assert vectors.tolist() == [[1, 0, 1, 0]] * 2
    target = np.zeros(4, np.uint16)
    kernels.copy_at(positions, np.array([5, 6, 7, 8], np.uint16), target)
    assert target.tolist() == [0, 6, 0, 8]
    largest = np.array([9, 9, 9, 9], np.uint32)
    kernels.claim_largest(positions, np.array([0, 9, 0, 8], np.uint32), np.full(4, 1, np.uint16), largest, target)
    assert target.tolist() == [0, 1, 0, 8]  # equal magnitudes: the later task; smaller: not
