"""Stages from overlaps and coefficients from Gram matrices once more: METHOD §2, and §3's fold on all rows at once."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from .plan_file import Blend
    from .recipe import Recipe

__all__ = ["TOLERANCE", "Overlaps", "Steps", "deviation", "expected_of", "folded", "shares", "stages_of"]

TOLERANCE = 1e-3  # where a step is at the border of slerp and lerp, rounding decides, which changes less than this
EPSILON = 5e-4
BORDER = 1e-9  # of a cosine: so near to the border of slerp and lerp, either is right
CLOSE_DEGREES = 0.01
LEAST = 0.2  # agreement that is told from none
CHANCE = 3  # deviations that two tasks may agree by accident
CANCELLED = 1e-13  # of the terms of a norm: less is rounding, so it is 0

Doubles = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Overlaps:
    """Of every two tasks, [T, T] each: elements in both cores, and those of them in layers (or in all tensors).

    `aligned`: how many of the latter both moved to the same side of the base; `expected`: how many would be by chance.
    """

    pairs: npt.NDArray[np.int64]
    compared: npt.NDArray[np.int64]
    aligned: npt.NDArray[np.int64]
    expected: Doubles


def stages_of(recipe: Recipe, names: Sequence[str], overlaps: Overlaps) -> list[list[str]]:
    """METHOD §2: the recipe's stages, or groups of tasks whose cores overlap enough, or agree enough where they do."""
    if recipe.stages is not None:
        return [list(stage) for stage in recipe.stages]
    group = _standing_out(overlaps) if recipe.tau == "auto" else _overlapping(overlaps.pairs, recipe.tau)
    found = [[name for name, its in zip(names, group, strict=True) if its == first] for first in sorted({*group})]
    if recipe.order == "recipe":
        return found
    numbers = random.Random(recipe.order)
    return [stage for _, stage in sorted((numbers.random(), stage) for stage in found)]


def _overlapping(pairs: npt.NDArray[np.int64], tau: Fraction) -> list[int]:
    """Of each task the first task of its group: connected by Jaccard indices of `tau` or more."""
    group = list(range(len(pairs)))
    for _ in pairs:  # the smallest number of a group travels one edge a round
        for a, b in combinations(range(len(pairs)), 2):
            union = int(pairs[a, a] + pairs[b, b] - pairs[a, b])
            if Fraction(int(pairs[a, b]), max(1, union)) >= tau:
                group[a] = group[b] = min(group[a], group[b])
    return group


def _standing_out(overlaps: Overlaps) -> list[int]:
    """The same by agreement: clusters joined by the mean of their pairs, cut at its steepest fall from 1 to LEAST."""
    tasks = range(len(overlaps.pairs))
    agree = {}
    for a, b in combinations(tasks, 2):
        both, same = int(overlaps.compared[a, b]), int(overlaps.aligned[a, b])
        agree[a, b] = agree[b, a] = min(1.0, max(LEAST, _beyond(both, same, float(overlaps.expected[a, b]))))
    group = list(tasks)
    best, steepest, before = list(group), 0.0, 1.0
    while True:
        members = {first: [task for task in tasks if group[task] == first] for first in sorted({*group})}
        near, joined = LEAST, None
        for a, b in combinations(members, 2):
            between = [agree[x, y] for x in members[a] for y in members[b]]
            mean = math.fsum(between) / len(between)
            if joined is None or mean > near:
                near, joined = mean, (a, b)
        if before / near > steepest:
            best, steepest = list(group), before / near
        if joined is None:
            return best
        before = near
        group = [joined[0] if first == joined[1] else first for first in group]


def _beyond(both: int, same: int, expected: float) -> float:
    """Cohen's kappa, less what chance may add to it; 0 where chance alone leaves nothing apart."""
    if both <= expected:
        return 0.0
    apart = both - expected
    return (same - expected) / apart - CHANCE * (math.sqrt(expected * apart / both) / apart)


def expected_of(pairs: Sequence[Counts], inwards: Sequence[Counts], tasks: int) -> Doubles:
    """How many directions are the same by chance, [T, T], from what was counted of each tensor, [T, T] each.

    Of n elements, x inward in one task and y in the other, that is n − x − y + 2xy/n.
    """
    whole, products = np.zeros((tasks, tasks), np.int64), np.zeros((tasks, tasks))
    for both, inward in zip(pairs, inwards, strict=True):
        whole += both - inward - inward.T
        shares = np.divide(inward, both, out=np.zeros((tasks, tasks)), where=both > 0)
        products += 2 * shares * shares.T * both
    return whole + products


def shares(weights: Sequence[Fraction], constants: Sequence[Fraction | None]) -> list[tuple[float, float | None]]:
    """Of each step the new member's weight by that of all before it (inf: they have none; 0/0 is 0), and a constant ω.

    Both run over the members, the backbone first, whose constant has no meaning.
    """
    steps = []
    for number in range(1, len(weights)):
        before, constant = sum(weights[:number], Fraction(0)), constants[number]
        ratio = float(weights[number] / before) if before else math.inf if weights[number] else 0.0
        steps.append((ratio, None if constant is None else float(constant)))
    return steps


def folded(gram: Doubles, steps: Sequence[tuple[float, float | None]], rest: float) -> tuple[Doubles, Doubles]:
    """`gram` [R, V, V] in fold order → coefficients [R, V], and the steps' angles in degrees [R, V − 1], or NaN.

    Where ω is not constant, t is the part of the angle Ω for which sin(tΩ) / sin((1 − t)Ω) is the ratio of the weights
    times the mean coefficient so far, each weighted: then all weights count alike.
    """
    rows, members = gram.shape[:2]
    coefficients, angles = np.zeros((rows, members)), np.full((rows, members - 1), np.nan)
    coefficients[:, 0] = 1
    for number, (ratio, constant) in enumerate(steps, 1):
        known = coefficients[:, :number]
        terms = known[:, :, None] * known[:, None, :] * gram[:, :number, :number]
        square, size = terms.sum(axis=(1, 2)), np.abs(terms).sum(axis=(1, 2))
        dot = (known * gram[:, :number, number]).sum(axis=1)
        norms = np.sqrt(np.maximum(square, 0)) * np.sqrt(gram[:, number, number])
        none = (square <= CANCELLED * size) | (norms == 0)
        cosine = np.clip(dot / np.where(none, 1, norms), -1, 1)
        angle = np.arccos(cosine)
        straight = none | (np.abs(cosine) > 1 - EPSILON)
        sine = np.where(straight, 1, np.sin(angle))
        if constant is not None:
            t = along = np.full(rows, constant)
        elif math.isinf(ratio):
            t = along = np.ones(rows)
        else:
            wanted = ratio * known.sum(axis=1)
            t = wanted / (1 + wanted)
            along = np.arctan2(wanted * sine, 1 + wanted * cosine) / np.where(straight, 1, angle)
        coefficients[:, :number] *= np.where(straight, 1 - t, np.sin((1 - along) * angle) / sine)[:, None]
        coefficients[:, number] = np.where(straight, t, np.sin(along * angle) / sine)
        angles[:, number - 1] = np.where(none, np.nan, np.degrees(angle))
    return coefficients * rest, angles


def deviation(planned: npt.NDArray[np.float32], expected: Doubles) -> float:
    """How far the plan's coefficients are from the recipe's: the largest difference, relative where above 1."""
    if not planned.size:
        return 0.0
    return float((np.abs(planned - expected) / np.maximum(np.abs(expected), 1)).max())


@dataclass
class Steps:
    """The steps of a tensor's folds so far: how many, at least and at most how many slerps, and their angles."""

    count: int = 0
    slerps_least: int = 0
    slerps_most: int = 0
    angles: Doubles | None = None  # degrees, or NaN: of the last row
    known: int = 0
    total: float = 0.0
    smallest: float = np.inf
    largest: float = -np.inf

    def add(self, angles: Doubles) -> None:
        """`angles` [R, V − 1] in degrees, or NaN where a norm is 0."""
        self.count += angles.size
        if len(angles):
            self.angles = angles[-1]
        found = angles[~np.isnan(angles)]
        cosines = np.abs(np.cos(np.radians(found)))
        self.slerps_least += int(np.count_nonzero(cosines < 1 - EPSILON - BORDER))
        self.slerps_most += int(np.count_nonzero(cosines < 1 - EPSILON + BORDER))
        self.known += found.size
        self.total += float(found.sum())
        self.smallest = min(self.smallest, float(found.min(initial=np.inf)))
        self.largest = max(self.largest, float(found.max(initial=-np.inf)))

    def are(self, blend: Blend) -> bool:
        """Whether a plan says the same: each angle, or of rows the smallest, mean and largest."""
        slerps = self.slerps_least <= blend.slerped <= self.slerps_most
        return blend.steps == self.count and slerps and _same_angles(blend.angles, self._summary(blend))

    def _summary(self, blend: Blend) -> list[float]:
        if blend.coefficients is not None:
            return [] if self.angles is None else self.angles.tolist()
        return [self.smallest, self.total / self.known, self.largest] if self.known else []


def _same_angles(planned: Sequence[float | None], found: Sequence[float]) -> bool:
    if len(planned) != len(found):
        return False
    return all(
        np.isnan(other) if said is None else abs(said - other) <= CLOSE_DEGREES
        for said, other in zip(planned, found, strict=True)
    )
