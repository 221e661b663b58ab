"""Arrays of a plan directory, read by the .npy format's specification: of the shape that they must have, or none."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import PlanError
from .ordinary import open_ordinary

__all__ = ["open_npy"]

MAGIC = b"\x93NUMPY\x01\x00"  # with the version


def open_npy(file: Path, descr: str, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """The array in `file`, mapped. Raises PlanError where it is not of this dtype ("<f4") and shape."""
    try:
        with os.fdopen(open_ordinary(file), "rb") as stream:
            start = stream.read(len(MAGIC) + 2)
            length = int.from_bytes(start[len(MAGIC) :], "little")
            header = stream.read(length).decode("latin-1")
            size = os.fstat(stream.fileno()).st_size
    except OSError as error:
        raise PlanError(f"{file}: cannot be read: {error.strerror}") from error
    expected = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}, }}"
    begin = len(start) + length
    dtype = np.dtype(descr)
    elements = int(np.prod(shape, dtype=object))
    if start[: len(MAGIC)] != MAGIC or header.strip() != expected or size != begin + elements * dtype.itemsize:
        raise PlanError(f"{file}: is not an array of {dtype} {list(shape)}, as plan.json wants it")
    return np.memmap(file, dtype, "r", begin, shape) if elements else np.empty(shape, dtype)
