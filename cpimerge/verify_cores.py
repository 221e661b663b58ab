"""Cores as `verify` sees them: read from the plan's files by the Roaring format's specification, judged by METHOD §1.

No core is made here. That one is right follows from its size and a few extremes: k elements, none unchanged, none
smaller than one outside, and of equals at the border those inside first.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from .errors import PlanError, RecipeError
from .ordinary import open_ordinary
from .plan_file import Plan, TensorPlan
from .recipe import Recipe
from .verify_arrays import open_npy
from .verify_elements import Seen
from .verify_results import Findings

__all__ = [
    "CoreFile",
    "Numbers",
    "Pool",
    "RecipeNumbers",
    "layer_of",
    "natural",
    "numbers_of",
    "pools_of",
    "positions_in",
]

WITHOUT_RUNS, WITH_RUNS = 12346, 12347  # the format's cookies
CONTAINER = 1 << 16  # elements
ARRAY_MOST = 4096  # elements of an array container
OFFSETS_FROM = 4  # containers, in a file with runs
MAX_KEYS = 1 << 16
READ_BYTES = 1 << 20
MAX_ELEMENTS = 1 << 18  # of a chunk
LAYER = re.compile(r"(?:[^.]*\.)*?[0-9]+\.", re.ASCII)
MAX_STEPS = 16  # directories that a recipe climbs

Places = npt.NDArray[np.int64]


class CoreFile:
    """The core file of one task, read on any thread; to be closed."""

    def __init__(self, file: Path, chunks: int, expected_xxh3: str) -> None:
        """`chunks`: how many the plan has. Raises PlanError where it is not what the plan was saved with."""
        self.file = file
        self.offsets = np.array(open_npy(file.with_suffix(".npy"), "<u8", (chunks + 1,)))
        try:
            self._handle = open_ordinary(file)
        except OSError as error:
            raise PlanError(f"{file}: cannot be read: {error.strerror}") from error
        try:
            size = os.fstat(self._handle).st_size
            fits = size <= chunks * _most_bytes(MAX_ELEMENTS) and self.offsets[0] == 0 and self.offsets[-1] == size
            if not fits or self._hash() != expected_xxh3:
                raise PlanError(f"{file}: it or its offsets are not what the plan was saved with")
        except PlanError:
            self.close()
            raise

    def close(self) -> None:
        os.close(self._handle)

    def positions(self, chunk: int, elements: int) -> Places:
        """Ascending positions within a chunk of so many elements. Raises PlanError where they are not."""
        begin, end = int(self.offsets[chunk]), int(self.offsets[chunk + 1])
        if not 0 <= end - begin <= _most_bytes(elements):
            raise PlanError(f"{self.file}: chunk {chunk}: {end - begin} bytes are no bitmap of {elements} elements")
        try:
            found = positions_in(self._read(end - begin, begin))
        except ValueError as error:
            raise PlanError(f"{self.file}: chunk {chunk}: {error}") from error
        if found.size and (found[-1] >= elements or (np.diff(found) <= 0).any()):
            raise PlanError(f"{self.file}: chunk {chunk}: positions do not ascend within its {elements} elements")
        return found

    def _read(self, size: int, place: int) -> bytes:
        try:
            return os.pread(self._handle, size, place)
        except OSError as error:
            raise PlanError(f"{self.file}: cannot be read: {error.strerror}") from error

    def _hash(self) -> str:
        digest = xxhash.xxh3_128()
        place = 0
        while block := self._read(READ_BYTES, place):
            digest.update(block)
            place += len(block)
        digest.update(self.offsets.tobytes())
        return digest.hexdigest()


def _most_bytes(elements: int) -> int:
    """No bitmap of so few elements is larger, however it is written."""
    return 8 + -(-elements // CONTAINER) * (16 + CONTAINER // 8 + 4 * CONTAINER)


def positions_in(data: bytes) -> Places:
    """What a Roaring bitmap in the portable format holds. Raises ValueError where it is none."""
    halves = np.frombuffer(data[: len(data) // 2 * 2], "<u2")
    if len(halves) < 2:
        raise ValueError("no bitmap")
    cookie, place = int(halves[0]), 2
    if cookie == WITH_RUNS:
        count = int(halves[1]) + 1
        flag_bytes = np.frombuffer(data[4 : 4 + -(-count // 8)], np.uint8)
        is_run = np.unpackbits(flag_bytes, bitorder="little")[:count].astype(bool)
        begin = 4 + -(-count // 8)
    elif cookie == WITHOUT_RUNS and len(data) >= 8:
        count = int.from_bytes(data[4:8], "little")
        is_run, begin = np.zeros(min(count, MAX_KEYS), bool), 8
    else:
        raise ValueError("no bitmap")
    table = np.frombuffer(data[begin : begin + 4 * count], np.uint8)
    if count > MAX_KEYS or len(is_run) != count or table.size != 4 * count:
        raise ValueError("the bitmap ends early")
    keys, cards = table.view("<u2").reshape(count, 2).T.astype(np.int64)
    place = begin + 4 * count
    if cookie == WITHOUT_RUNS or count >= OFFSETS_FROM:
        place += 4 * count
    parts = [np.empty(0, np.int64)]
    for key, card, run in zip(keys.tolist(), (cards + 1).tolist(), is_run.tolist(), strict=True):
        values, place = _container(data, place, card, run)
        parts.append(key * CONTAINER + values)
    if place != len(data):
        raise ValueError("the bitmap has another length than its containers")
    return np.concatenate(parts)


def _container(data: bytes, place: int, card: int, run: bool) -> tuple[Places, int]:
    """The values of the container that begins at `place`, and where it ends."""
    if run:
        count = int.from_bytes(data[place : place + 2], "little")
        begin, size = place + 2, 4 * count
    else:
        begin, size = place, 2 * card if card <= ARRAY_MOST else CONTAINER // 8
    raw = np.frombuffer(data[begin : begin + size], np.uint8)
    if raw.size != size:
        raise ValueError("a container ends early")
    if run:
        starts, more = raw.view("<u2").reshape(-1, 2).T.astype(np.int64)
        if int((more + 1).sum()) != card:
            raise ValueError("a container's runs are not as many elements as it says")
        values = np.concatenate([np.arange(a, a + b + 1) for a, b in zip(starts, more, strict=True)] or [starts])
    elif card <= ARRAY_MOST:
        values = raw.view("<u2").astype(np.int64)
    else:
        values = np.flatnonzero(np.unpackbits(raw, bitorder="little"))
        if len(values) != card:
            raise ValueError("a container has not as many elements as it says")
    return values.astype(np.int64), begin + size


# --- what the recipe says ------------------------------------------------------------------------


@dataclass(frozen=True)
class Numbers:
    """A tensor's numbers from the recipe, by task. Not `eligible`: excluded, or not floating-point."""

    eligible: bool
    density: tuple[Fraction, ...]
    weight: tuple[Fraction, ...]
    t: tuple[Fraction | None, ...]


@dataclass(frozen=True)
class RecipeNumbers:
    """The recipe of a plan, and what it says of each tensor."""

    recipe: Recipe
    of: Mapping[str, Numbers]


def numbers_of(plan: Plan, findings: Findings, file: Path) -> RecipeNumbers | None:
    """What the plan's recipe says of each tensor; None where it has no recipe that can be read, which is told."""
    from .depths import positions
    from .recipe import matches

    if not plan.recipe.strip():
        findings.notes.append(f"{file}: holds no recipe, so sizes of cores and what is levelled are taken as they are")
        return None
    recipe = _recipe_of(plan)
    if recipe is None:
        findings.fail(file, "the recipe in it cannot be read, or is not that of these tasks")
        return None
    places = positions((tensor.name for tensor in plan.tensors), recipe.slices)
    result = {}
    for tensor in plan.tensors:
        place = places[tensor.name]
        where = tensor.name, place.depth, place.slices[0]
        excluded = any(matches(exclude.filter, tensor.name) for exclude in recipe.exclude)
        eligible = bool(tensor.tasks) and not excluded
        result[tensor.name] = Numbers(
            eligible=eligible,
            density=tuple(recipe.density_of(task, *where) for task in recipe.tasks),
            weight=tuple(recipe.weight_of(task, *where) for task in recipe.tasks),
            t=tuple(recipe.t_of(task, *where) for task in recipe.tasks),
        )
    _compare_settings(plan, recipe, findings, file)
    return RecipeNumbers(recipe, result)


def _recipe_of(plan: Plan) -> Recipe | None:
    """The recipe as parsed where it lay, which the plan does not say: somewhere about the models.

    It matters where a model is called `.` or so, or the base is listed among the models under another path: as deep
    below one of them as the recipe climbs.
    """
    from .recipe import parse_recipe

    paths = [Path(path) for entry in plan.inputs for path in (entry.path, entry.adapter) if path]
    near = [parent for path in paths if path.is_absolute() for parent in (path, *path.parents)]
    deeper = ["_/" * steps for steps in range(1 + min(plan.recipe.count(".."), MAX_STEPS))]
    for directory in dict.fromkeys(place / inner for inner in deeper for place in (*near, Path("/"))):
        try:
            recipe = parse_recipe(plan.recipe, None, directory)
        except RecipeError:
            continue
        if [task.name for task in recipe.tasks] == [task.name for task in plan.tasks]:
            return recipe
    return None


def _compare_settings(plan: Plan, recipe: Recipe, findings: Findings, file: Path) -> None:
    """Scope and granularity decided what was planned; the rest may have been edited."""
    for key in ("scope", "granularity"):
        if getattr(plan.settings, key) != getattr(recipe, key):
            said = f"settings.{key} is {getattr(plan.settings, key)}, in its recipe {getattr(recipe, key)}"
            findings.fail(file, said)
    tau = "auto" if recipe.tau == "auto" else float(recipe.tau)
    given = {"space": recipe.space, "conflict": recipe.conflict, "tau": tau, "rest": float(recipe.rest)}
    for key, expected in given.items():
        if getattr(plan.settings, key) != expected:
            said = f"settings.{key} is {getattr(plan.settings, key)}, in its recipe {expected}"
            findings.notes.append(f"{file}: {said}: edited by hand?")


# --- pools ---------------------------------------------------------------------------------------


@dataclass
class Pool:
    """Tensors that share a budget, in natural order of their names, and what was seen of their cores."""

    name: str
    tensors: list[TensorPlan]
    eligible: bool
    density: tuple[Fraction, ...] | None
    changed: list[int]
    core: list[int]
    _inside: dict[int, tuple[float, int, int]] = field(default_factory=dict)  # m, then place, negative: the last
    _outside: dict[int, tuple[float, int, int]] = field(default_factory=dict)  # −m, then place: the first
    _ranks: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._ranks = {tensor.name: rank for rank, tensor in enumerate(self.tensors)}

    @property
    def elements(self) -> int:
        return sum(tensor.output.elements for tensor in self.tensors)

    def add(self, tensor: str, seen: Seen) -> None:
        """What one chunk shows."""
        rank = self._ranks[tensor]
        for task, (inside, outside) in enumerate(zip(seen.inside, seen.outside, strict=True)):
            if inside is not None:
                key = inside[0], -rank, -inside[1]
                self._inside[task] = min(self._inside.get(task, key), key)
            if outside is not None:
                key = -outside[0], rank, outside[1]
                self._outside[task] = min(self._outside.get(task, key), key)

    def faults(self, task: int) -> Iterator[tuple[str | None, int | None, str]]:
        """(tensor, flat index, problem) of a task's core, where it is not what METHOD §1 says."""
        yield from ((None, None, problem) for problem in self._wrong_size(task))
        inside, outside = self._inside.get(task), self._outside.get(task)
        if inside is None or not self.eligible:
            return
        least, rank, index = inside[0], -inside[1], -inside[2]
        name = self.tensors[rank].name
        if least == 0:
            yield name, index, "is in the core, and did not change"
        if outside is None:
            return
        largest, first = -outside[0], (outside[1], outside[2])
        where = f"flat index {first[1]} of {self.tensors[first[0]].name!r}, which is not"
        if largest > least:
            yield name, index, f"is in the core and moved by {least:.9g}, less than {where} ({largest:.9g})"
        elif largest == least and first < (rank, index):
            yield name, index, f"is in the core and moved as much ({least:.9g}) as the earlier {where}"

    def _wrong_size(self, task: int) -> Iterator[str]:
        core = self.core[task]
        if not self.eligible:
            if core:
                yield f"has a core of {core:,} elements, and is excluded"
            return
        if self.density is None:
            return
        density = self.density[task]
        most = density.numerator * self.elements // density.denominator
        if core != min(most, self.changed[task]):
            yield (
                f"its core has {core:,} of {self.elements:,} elements; {float(density):.9g} of them are {most:,}, "
                f"and {self.changed[task]:,} changed"
            )


def pools_of(plan: Plan, numbers: RecipeNumbers | None, findings: Findings, file: Path) -> list[Pool]:
    """Tensors by the budget they share; those that have none are alone."""
    grouped: dict[tuple[str, str], list[TensorPlan]] = {}
    for tensor in sorted(plan.tensors, key=lambda tensor: natural(tensor.name)):
        if not tensor.tasks:
            continue
        eligible = tensor.claimed > 0 if numbers is None else numbers.of[tensor.name].eligible
        shared = str(plan.settings.scope) if eligible else "none"
        key = {"tensor": tensor.name, "none": tensor.name, "layer": layer_of(tensor.name), "global": ""}[shared]
        grouped.setdefault((shared, key), []).append(tensor)
    nothing = [0] * len(plan.tasks)
    result = []
    for (shared, key), tensors in grouped.items():
        name = {"layer": f"layer {key!r}" if key else "the tensors outside the layers", "global": "the model"}.get(
            shared
        )
        density = None if numbers is None else numbers.of[tensors[0].name].density
        if numbers is not None and any(numbers.of[tensor.name].density != density for tensor in tensors):
            findings.fail(file, f"the densities in its recipe differ within {name}")
        eligible = shared != "none" or numbers is None
        result.append(Pool(name or "", tensors, eligible, density, list(nothing), list(nothing)))
    return result


def layer_of(name: str) -> str:
    """Up to and including the first component that is all digits, and a dot; '' where there is none (METHOD §1)."""
    found = LAYER.match(f"{name}.")
    return "" if found is None else found[0]


def natural(name: str) -> tuple[list[tuple[int, str] | tuple[int, int]], str]:
    """Sort key: runs of digits compare as numbers, and come before text."""
    runs = [run for run in re.split("([0-9]+)", name) if run]
    return [(0, int(run)) if run.isascii() and run.isdigit() else (1, run) for run in runs], name
