"""Types that the kernels share, and how they are compiled."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar, cast

import numba
import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import extending

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Bits = npt.NDArray[np.uint32]
Words = npt.NDArray[np.uint64]
Counts = npt.NDArray[np.int64]
Stored = npt.NDArray[np.uint8]

intrinsic: Any = extending.intrinsic  # what it makes has other parameters than it is made from

Kernel = TypeVar("Kernel", bound=Callable[..., Any])

WORD = 64  # elements of a word of bits
LINE = 64  # bytes
TILE = 4096  # elements that stay in the second-level cache at most


def aligned(shape: int | tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """An array that begins with a line of the processor's cache, so that no vector register is loaded from two."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    room = np.empty(size + LINE, np.uint8)
    first = -room.ctypes.data % LINE
    return room[first : first + size].view(dtype).reshape(shape)


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


@intrinsic
def borrowed(typing, value):  # type: ignore[no-untyped-def]
    """Arrays, in tuples or not, whose owner stays longer than they are used: slicing them counts no references.

    Counting is atomic, so in a loop over tiles it takes longer than what slices are for. Only for a kernel's arguments,
    and not to be returned: an array that is made in it may end with its last use by name.
    """

    def lend(context: Any, builder: Any, kind: Any, value: Any) -> Any:
        types: Any = numba.types
        if isinstance(kind, types.BaseTuple):
            every = [builder.extract_value(value, number) for number in range(len(kind))]
            lent = [lend(context, builder, of, one) for of, one in zip(kind, every, strict=True)]
            return context.make_tuple(builder, kind, lent)
        if not isinstance(kind, types.Array):
            context.nrt.incref(builder, kind, value)  # what else is counted stays so
            return value
        array = context.make_array(kind)(context, builder, value)
        array.meminfo = ir.Constant(array.meminfo.type, None)
        array.parent = ir.Constant(array.parent.type, None)
        return array._getvalue()

    return value(value), lambda context, builder, signature, args: lend(context, builder, value, args[0])
