"""The plan of an output: where it is, what the manifest must say by it, and that its parts fit each other."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from .card import hub_place, model_name, recipe_without_places
from .errors import PlanError
from .ordinary import open_ordinary
from .plan_file import COEFFICIENTS_FILE, PLAN_FILE, Input, Plan, TensorPlan
from .verify_arrays import open_npy
from .verify_cores import CoreFile, natural
from .verify_files import MANIFEST, Manifest
from .verify_numbers import Floats
from .verify_results import Findings

__all__ = ["check_chunks", "check_manifest", "find_plan", "open_cores", "read_coefficients"]

READ_BYTES = 1 << 20
AGAIN = "`cpimerge plan RECIPE -o PLAN_DIR` makes the same plan again from the same recipe, models and version"


def find_plan(out: Path, manifest: Manifest, given: Path | None) -> Path:
    """The directory of the plan that `out` was made by. Raises PlanError where it is not `given`, or not beside it."""
    if given is not None:
        found = _hash(given / PLAN_FILE)
        if found != manifest.plan_xxh3:
            raise PlanError(
                f"{given / PLAN_FILE}: is not the plan of {out}: its xxh3 is {found}, and {MANIFEST} says "
                f"{manifest.plan_xxh3}. It was edited since, or is of another merge"
            )
        return given
    try:
        above = dict.fromkeys((Path(os.path.abspath(out)).parent, out.resolve().parent))  # where a link is, and leads
        beside = sorted(path for place in above for path in place.iterdir())
    except OSError as error:
        raise PlanError(f"{error.filename}: cannot be read: {error.strerror}") from error
    places = [path for path in beside if os.path.isfile(path / PLAN_FILE)]  # not where nobody may look
    for place in places:
        try:
            if _hash(place / PLAN_FILE) == manifest.plan_xxh3:
                return place
        except PlanError:
            continue
    raise PlanError(
        f"{out}: no directory beside it holds its plan, whose xxh3 is {manifest.plan_xxh3} by {MANIFEST}. Give it with "
        f"--plan PLAN_DIR. A plan that was edited since is another. `cpimerge merge` keeps none: {AGAIN}"
    )


def _hash(file: Path) -> str:
    digest = xxhash.xxh3_128()
    try:
        with os.fdopen(open_ordinary(file), "rb") as stream:
            while block := stream.read(READ_BYTES):
                digest.update(block)
    except OSError as error:
        raise PlanError(f"{file}: cannot be read: {error.strerror}") from error
    return digest.hexdigest()


# --- the manifest --------------------------------------------------------------------------------


def check_manifest(out: Path, manifest: Manifest, raw: bytes, plan: Plan, findings: Findings) -> None:
    """Everything that the manifest says of the merge must follow from the plan, and be written as `fuse` does."""
    file = out / MANIFEST
    expected = {
        "cpimerge": plan.cpimerge,
        "recipe": recipe_without_places(plan),
        "inputs": [_identity(plan, entry) for entry in plan.inputs],
        "stages": plan.stages,
        "backbone": plan.backbone,
        "tensors": {tensor.name: _disposition(tensor) for tensor in plan.tensors},
    }
    for key, value in expected.items():
        for where in _differences(key, value, getattr(manifest, key)):
            findings.fail(file, f"{where}: is not what follows from the plan")
    text = json.dumps(json.loads(raw), indent=1, ensure_ascii=False) + "\n"
    if text.encode() != raw:
        findings.fail(file, "is not written as fuse writes it")


def _identity(plan: Plan, entry: Input) -> dict[str, Any]:
    content = json.dumps([[tensor.name, tensor.xxh3[entry.name]] for tensor in plan.tensors]).encode()
    place, adapter = hub_place(entry.path), entry.adapter and hub_place(entry.adapter)
    return {
        "name": entry.name,
        "shards": [shard.model_dump() for shard in entry.shards],
        "model": model_name(entry.path),
        "revision": place and place.revision,
        "adapter": entry.adapter and model_name(entry.adapter),
        "adapter_revision": adapter and adapter.revision,
        "content_xxh3": xxhash.xxh3_128_hexdigest(content),
    }


def _disposition(tensor: TensorPlan) -> dict[str, Any]:
    if tensor.blend is None:
        return {"action": tensor.action}
    elements = max(1, int(np.prod(tensor.shape, dtype=np.int64)))
    action = "slerp" if tensor.blend.slerped else "lerp"
    shown = {"action": action, "transplanted": tensor.claimed / elements, "angles": tensor.blend.angles}
    return shown | {"levelled": tensor.blend.levelled}


def _differences(where: str, expected: Any, found: Any) -> Iterator[str]:
    """The entries that differ, as `inputs.0.model`."""
    if isinstance(expected, dict) and isinstance(found, dict):
        for key in dict.fromkeys((*expected, *found)):
            if key in expected and key in found:
                yield from _differences(f"{where}.{key}", expected[key], found[key])
            else:
                yield f"{where}.{key}"
    elif isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        for number, pair in enumerate(zip(expected, found, strict=True)):
            yield from _differences(f"{where}.{number}", *pair)
    elif type(expected) is not type(found) or expected != found:
        yield where


# --- what lies beside plan.json ------------------------------------------------------------------


def open_cores(plan: Plan, directory: Path, chunks: int, findings: Findings) -> dict[str, CoreFile]:
    """The core file of each task, of so many chunks; what cannot be used is told. To be closed."""
    result = {}
    for number, task in enumerate(plan.tasks):
        try:
            if task.core_file != f"cores/{number:02d}.roaring":
                raise PlanError(
                    f"{directory / PLAN_FILE}: tasks.{number}.core_file: {task.core_file!r} is not its name"
                )
            result[task.name] = CoreFile(directory / task.core_file, chunks, task.core_xxh3)
        except PlanError as error:
            place, _, problem = error.problems[0].partition(": ")
            findings.fail(place, problem)
    return result


def read_coefficients(plan: Plan, directory: Path, count: int, findings: Findings) -> Floats | None:
    """coefficients.npy, mapped: float32 [count, members]; None where there is none, or none that fits."""
    if plan.coefficients_xxh3 is None:
        return None
    file = directory / COEFFICIENTS_FILE
    try:
        rows = open_npy(file, "<f4", (count, len(plan.fold)))
    except PlanError as error:
        place, _, problem = error.problems[0].partition(": ")
        findings.fail(place, problem)
        return None
    digest = xxhash.xxh3_128()
    for begin in range(0, len(rows), READ_BYTES // 4):
        digest.update(np.ascontiguousarray(rows[begin : begin + READ_BYTES // 4]))
    if digest.hexdigest() != plan.coefficients_xxh3:
        findings.fail(file, "is not what the plan was saved with")
        return None
    return rows


def check_chunks(plan: Plan, file: Path, sizes: Mapping[str, tuple[int, int]], findings: Findings) -> bool:
    """Whether blended tensors, of so many (chunks, rows) each, share the plan's files without holes or overlaps.

    `file` is plan.json.
    """
    names = [tensor.name for tensor in plan.tensors]
    if names != sorted({*names}, key=natural):
        findings.fail(file, "its tensors are not in natural order, each once")
    for number, key in enumerate(("first_chunk", "first_row")):
        if key == "first_row" and plan.coefficients_xxh3 is None:
            continue
        end = 0
        for tensor in sorted((tensor for tensor in plan.tensors if tensor.blend), key=lambda one: getattr(one, key)):
            if not sizes[tensor.name][number]:
                continue
            if getattr(tensor, key) != end:
                said = f"its {key} is {getattr(tensor, key)}, and the tensor before it ends at {end}"
                findings.fail(file, said, tensor.name)
                return False
            end += sizes[tensor.name][number]
    return True
