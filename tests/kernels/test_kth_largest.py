"""Many small tensors in one go: the selection against sorting; what is found of each is tests/test_singles.py's."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cpimerge.kernels.singles import DIGIT, kth_largest

MAGNITUDES = st.one_of(st.integers(0, 0x7F7FFFFF), st.sampled_from([0, 1, 0x3F800000, 0x3F800001, 0x7F7FFFFF]))


def select(values: np.ndarray, k: int) -> int:
    spare, bins = np.full(values.size + 3, 7, np.uint32), np.full(1 << DIGIT, -1, np.int64)
    return int(kth_largest(values, k, spare, bins))


@given(st.data(), hnp.arrays(np.uint32, st.integers(1, 40), elements=MAGNITUDES))
def test_kth_largest(data: st.DataObject, values: np.ndarray) -> None:
    k = data.draw(st.integers(1, values.size))
    before = values.copy()
    assert select(values, k) == np.sort(values)[-k]
    np.testing.assert_array_equal(values, before)


@pytest.mark.parametrize("k", [1, 2, 41, 500, 2999, 3000])
@pytest.mark.parametrize("ties", [False, True])
def test_kth_largest_of_many(k: int, ties: bool) -> None:
    values = np.abs(np.random.default_rng(k).normal(size=3000).astype(np.float32))
    bits = (values.round(1) if ties else values).view(np.uint32)
    assert select(bits, k) == np.sort(bits)[-k]
