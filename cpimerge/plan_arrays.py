"""Arrays in files of a plan: `.npy` as numpy saves them, byte for byte, and nothing else that numpy could read."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from .errors import PlanError
from .ordinary import open_ordinary
from .plan_file import COEFFICIENTS_FILE, Plan
from .stream import Floats, chunk_count, row_count

__all__ = ["chunks_of", "open_array", "open_coefficients"]

PLAN_AGAIN = "Run `cpimerge plan` again"
BLOCK = 1 << 16  # rows that are looked at together


def chunks_of(plan: Plan) -> int:
    """How many chunks every core file of the plan has."""
    granularity = plan.settings.granularity
    return sum(chunk_count(tensor.output.shape, granularity) for tensor in plan.tensors if tensor.blend)


def open_coefficients(plan: Plan, plan_dir: Path) -> Floats:
    """coefficients.npy, mapped: float32 [rows, members]; without rows where every tensor is one vector.

    Raises PlanError where it is not what the plan was saved with, or a coefficient is NaN or Inf.
    """
    if plan.coefficients_xxh3 is None:
        return np.empty((0, len(plan.fold)), np.float32)
    file = plan_dir / COEFFICIENTS_FILE
    count = sum(row_count(tensor.output.shape, "row") for tensor in plan.tensors if tensor.blend)
    rows: Floats = open_array(file, "<f4", (count, len(plan.fold)))
    digest = xxhash.xxh3_128()
    finite = True
    for begin in range(0, count, BLOCK):
        block = rows[begin : begin + BLOCK]
        digest.update(block)
        finite = finite and bool(np.isfinite(block).all())
    if digest.hexdigest() != plan.coefficients_xxh3:
        raise PlanError(f"{file}: is not what the plan was saved with. {PLAN_AGAIN}")
    if not finite:
        raise PlanError(f"{file}: has a coefficient that is NaN or Inf. {PLAN_AGAIN}")
    return rows


def open_array(file: Path, dtype: npt.DTypeLike, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """The array of `dtype` and `shape` in `file`, not loaded but mapped, read-only.

    What its header says is not followed but compared. Raises PlanError where the file is another.
    """
    header = _header(np.dtype(dtype), shape)
    nbytes = np.dtype(dtype).itemsize * int(np.prod(shape, dtype=object))
    try:
        handle = open_ordinary(file)
        with os.fdopen(handle, "rb") as stream:
            size = os.fstat(handle).st_size
            if size != len(header) + nbytes or stream.read(len(header)) != header:
                raise PlanError(f"{file}: is not {np.dtype(dtype)} {list(shape)}, as plan.json wants. {PLAN_AGAIN}")
            if not nbytes:
                return np.empty(shape, dtype)
            return np.memmap(stream, dtype, "r", len(header), shape)
    except OSError as error:
        raise PlanError(f"{file}: cannot be read: {error.strerror}. {PLAN_AGAIN}") from error


def _header(dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    """With what `numpy.save` begins the file."""
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"descr": dtype.str, "fortran_order": False, "shape": shape})
    return out.getvalue()
