"""Types that the kernels share, and how they are compiled."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar, cast

import numba
import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Bits = npt.NDArray[np.uint32]
Words = npt.NDArray[np.uint64]
Counts = npt.NDArray[np.int64]
Stored = npt.NDArray[np.uint8]

Kernel = TypeVar("Kernel", bound=Callable[..., Any])

WORD = 64  # elements of a word of bits
TILE = 4096  # elements that stay in the second-level cache at most


def compiled(function: Kernel) -> Kernel:
    """Compile a kernel when it is first called, and keep it for later runs, where there is a place for it."""
    compiles: Any = numba.njit(nogil=True, error_model="numpy")(function)
    with suppress(RuntimeError):  # where nothing may be written, neither beside the source nor at home
        compiles.enable_caching()
        save = compiles._cache.save_overload

        def save_if_possible(*what: object) -> None:
            with suppress(OSError):  # numba lets a full disk end the run
                save(*what)

        compiles._cache.save_overload = save_if_possible
    return cast(Kernel, compiles)
