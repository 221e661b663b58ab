"""Plans and outputs to be verified, whole and spoilt: cores that are wrong under right hashes, flipped bits."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import test_semantics
import xxhash
from pyroaring import BitMap

from cpimerge import stream, verify_sources
from cpimerge.plan_file import PLAN_FILE, Plan

Cores = list[list[set[int]]]  # by task and chunk


@contextmanager
def small_chunks(elements: int) -> Iterator[None]:
    """Chunks so small that little tensors have many of them, also where they are verified."""
    with (
        test_semantics.small_chunks(elements),
        mock.patch.object(verify_sources, "CHUNK", elements),
        mock.patch.object(verify_sources, "CHUNK_ROWS", 3),
    ):
        yield


def flip(file: Path, bit: int) -> None:
    """Flip one bit of a file, counted from its first byte's lowest."""
    data = bytearray(file.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)


def edit(plan_dir: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change plan.json, and seal it again."""
    file = plan_dir / PLAN_FILE
    raw = json.loads(file.read_bytes())
    change(raw)
    Plan.model_validate(raw).sealed().save(plan_dir)


def read_cores(plan_dir: Path) -> Cores:
    """Every task's core, chunk by chunk."""
    cores: Cores = []
    for task in Plan.load(plan_dir).tasks:
        file = plan_dir / task.core_file
        steps = np.load(file.with_suffix(".npy")).tolist()
        data = file.read_bytes()
        cores.append([{*BitMap.deserialize(data[a:b])} for a, b in pairwise(steps)])
    return cores


def write_cores(plan_dir: Path, cores: Cores) -> None:
    """Replace the cores of a plan; hashes, counts and seal agree with them."""
    plan = Plan.load(plan_dir)
    hashes = []
    for task, chunks in zip(plan.tasks, cores, strict=True):
        parts = [BitMap(sorted(chunk)).serialize() for chunk in chunks]
        file = plan_dir / task.core_file
        offsets = np.cumsum([0, *map(len, parts)], dtype=np.uint64)
        file.write_bytes(b"".join(parts))
        np.save(file.with_suffix(".npy"), offsets)
        hashes.append(xxhash.xxh3_128_hexdigest(b"".join(parts) + offsets.tobytes()))
    edit(plan_dir, lambda raw: _count(raw, plan, cores, hashes))


def _count(raw: dict[str, Any], plan: Plan, cores: Cores, hashes: list[str]) -> None:
    """Counts and hashes of plan.json by these cores. The sums of magnitudes stay, whatever they were."""
    for number, task in enumerate(raw["tasks"]):
        task["core_xxh3"] = hashes[number]
        task["core"] = sum(map(len, cores[number]))
    for tensor in raw["tensors"]:
        if tensor["action"] != "blend":
            continue
        shape = tuple(tensor["shape"])
        some = range(tensor["first_chunk"], tensor["first_chunk"] + len(_chunks(shape, plan)))
        for number, task in enumerate(plan.tasks):
            tensor["tasks"][task.name]["core"] = sum(len(cores[number][chunk]) for chunk in some)
        tensor["claimed"] = sum(len(set().union(*(core[chunk] for core in cores))) for chunk in some)
    names = [task.name for task in plan.tasks]
    for pair in raw["pairs"]:
        a, b = (cores[names.index(pair[key])] for key in "ab")
        pair["shared"] = sum(len(x & y) for x, y in zip(a, b, strict=True))
        pair["union"] = sum(len(x | y) for x, y in zip(a, b, strict=True))


def _chunks(shape: tuple[int, ...], plan: Plan) -> list[stream.Chunk]:
    return stream.chunks(shape, plan.settings.granularity)
