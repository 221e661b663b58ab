"""A whole plan directory with the hashes that a stranger would compute, given to `fuse`.

Oracles: a refusal leaves no output; an output is what safetensors reads, of the plan's tensors, with finite values.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

import cpimerge
from cpimerge.errors import CpimergeError
from cpimerge.plan_file import COEFFICIENTS_FILE, PLAN_FILE, Plan

from ..bundles import join, split, write
from ..mutation import bundle, json_text
from ..target import Run, Target
from .cores import _binary
from .plan_files import WORDS, inputs, made, resealed

CORES = ("cores/00.roaring", "cores/00.npy", "cores/01.roaring", "cores/01.npy")
FILES = (PLAN_FILE, COEFFICIENTS_FILE, *CORES)


def _prepare(scratch: Path) -> Run:
    inputs(scratch)
    directory, out = scratch / "plan", scratch / "runs" / "out"
    (directory / "cores").mkdir(parents=True)

    def run(data: bytes) -> None:
        shutil.rmtree(out.parent, ignore_errors=True)
        out.parent.mkdir()
        write(resealed(split(data, PLAN_FILE), scratch), directory, FILES)
        try:
            cpimerge.fuse(directory, out, threads=1)
        except CpimergeError:
            assert not out.exists()
            raise
        _check(out, Plan.load(directory))

    return run


def _check(out: Path, plan: Plan) -> None:
    found = {name: array for file in out.glob("*.safetensors") for name, array in load_file(file).items()}
    assert {name: list(array.shape) for name, array in found.items()} == {it.name: it.shape for it in plan.tensors}
    for array in found.values():
        assert np.isfinite(array.astype(np.float32)).all()


def _seeds() -> Mapping[str, bytes]:
    return {granularity: join(made(granularity)) for granularity in ("tensor", "row")}


TARGET = Target(
    _prepare,
    _seeds,
    CpimergeError,
    bundle(PLAN_FILE, {PLAN_FILE: json_text(WORDS), **dict.fromkeys(FILES[1:], _binary)}),
    WORDS,
    max_bytes=32768,
    memory=40_000_000,
)
