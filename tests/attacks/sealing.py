"""Plans as an attacker would edit them: with hashes and seal that agree with what was changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash
from pydantic import ValidationError
from pydantic_core import PydanticSerializationError

from attacks.attack import Spoil
from cpimerge.plan_file import Plan

__all__ = ["core", "edited", "rows", "tensor"]

PLAN = "plan/plan.json"
Edit = Callable[[dict[str, Any]], object]
Array = npt.NDArray[Any]


def edited(change: Edit) -> Spoil:
    """plan.json changed and sealed again, as far as there is a seal for such a thing."""

    def spoil(home: Path) -> None:
        content = json.loads((home / PLAN).read_bytes())
        change(content)
        with suppress(ValidationError, PydanticSerializationError):
            content["seal"] = Plan.model_validate(content).sealed().seal
        (home / PLAN).write_text(json.dumps(content))

    return spoil


def tensor(change: Edit, name: str = "layers.0.w") -> Spoil:
    """The same for the entry of one tensor."""
    return edited(lambda plan: [change(entry) for entry in plan["tensors"] if entry["name"] == name])


def core(
    bitmaps: Callable[[bytes, int], bytes] = lambda data, chunks: data,
    offsets: Callable[[Array, int], Array] = lambda old, size: old,
) -> Spoil:
    """The core of the first task with other bitmaps (of the old ones and their number), or other offsets."""

    def spoil(home: Path) -> None:
        file, index = home / "plan/cores/00.roaring", home / "plan/cores/00.npy"
        old = np.load(index)
        data = bitmaps(file.read_bytes(), len(old) - 1)
        new = offsets(old, len(data))
        file.write_bytes(data)
        np.save(index, new)
        digest = xxhash.xxh3_128_hexdigest(data + np.asarray(new).tobytes())
        edited(lambda plan: plan["tasks"][0].update(core_xxh3=digest))(home)

    return spoil


def rows(change: Callable[[Array], Array]) -> Spoil:
    """Other coefficients."""

    def spoil(home: Path) -> None:
        file = home / "plan/coefficients.npy"
        new = change(np.load(file))
        np.save(file, new)
        digest = xxhash.xxh3_128_hexdigest(np.ascontiguousarray(new))
        edited(lambda plan: plan.update(coefficients_xxh3=digest))(home)

    return spoil
