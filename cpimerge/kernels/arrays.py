"""Types that the kernels share, and how they are compiled."""

from __future__ import annotations

import numba
import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Bits = npt.NDArray[np.uint32]
Words = npt.NDArray[np.uint64]
Counts = npt.NDArray[np.int64]
Stored = npt.NDArray[np.uint8]

WORD = 64  # elements of a word of bits
TILE = 4096  # elements that stay in the second-level cache at most

compiled = numba.njit(nogil=True, cache=True, error_model="numpy")
