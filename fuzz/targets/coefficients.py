"""coefficients.npy, with the hash that a stranger would compute: all of `fuse` follows from it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import xxhash

from cpimerge.errors import PlanError
from cpimerge.plan_arrays import open_coefficients
from cpimerge.plan_file import COEFFICIENTS_FILE, PLAN_FILE, Plan

from ..target import Run, Target
from .cores import _binary
from .plan_files import made, npy, npy_data, resealed


def _prepare(scratch: Path) -> Run:
    files = resealed(made("row"), scratch)
    (scratch / PLAN_FILE).write_bytes(files[PLAN_FILE])
    plan = Plan.load(scratch)

    def run(data: bytes) -> None:
        (scratch / COEFFICIENTS_FILE).write_bytes(data)
        stranger = plan.model_copy(update={"coefficients_xxh3": xxhash.xxh3_128_hexdigest(npy_data(data))})
        rows = open_coefficients(stranger, scratch)
        assert rows.dtype == np.float32
        assert rows.ndim == 2
        assert rows.shape[1] == len(plan.fold)
        assert np.isfinite(rows).all()

    return run


def _seeds() -> Mapping[str, bytes]:
    return {
        "rows": made("row")[COEFFICIENTS_FILE],
        "fortran": npy(np.asfortranarray(np.ones((3, 2), np.float32))),
        "doubles": npy(np.ones((3, 2))),
        "objects": npy(np.array([[b"x"]], "S1")),
    }


WORDS = ("descr", "fortran_order", "shape", "<f4", ">f4", "|O", "True", "False", "(1, 2)", "1099511627776", "\x93NUMPY")
TARGET = Target(_prepare, _seeds, PlanError, _binary, WORDS, max_bytes=1024)
