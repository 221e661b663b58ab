"""How far the tasks' cores overlap, and the groups and stages that follow (METHOD §2)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from fractions import Fraction
from itertools import combinations

import numpy as np
import numpy.typing as npt

from .recipe import Recipe

__all__ = ["chance", "groups", "jaccard", "stages"]

Counts = npt.NDArray[np.int64]


def jaccard(counts: Counts, a: int, b: int) -> Fraction:
    """|Ca ∩ Cb| / |Ca ∪ Cb| from the pair counts int64 [T, T] of the cores; 0/0 is 0. A fraction 0–1, exact."""
    shared = int(counts[a, b])
    union = int(counts[a, a]) + int(counts[b, b]) - shared
    return Fraction(shared, union) if union else Fraction(0)


def chance(sizes: Sequence[int], first: Sequence[Fraction], second: Sequence[Fraction]) -> Fraction:
    """The Jaccard index that independent cores of the given densities would have: p/(2 − p) where all are p.

    `sizes` are elements of eligible tensors, `first` and `second` the two tasks' densities there.
    """
    both = sum((n * p * q for n, p, q in zip(sizes, first, second, strict=True)), Fraction(0))
    either = sum((n * (p + q - p * q) for n, p, q in zip(sizes, first, second, strict=True)), Fraction(0))
    return both / either if either else Fraction(0)


def groups(counts: Counts, tau: Fraction) -> list[list[int]]:
    """Connected components of the tasks whose Jaccard index is at least tau; by first task, tasks ascending."""
    group_of = list(range(len(counts)))
    for a, b in combinations(range(len(counts)), 2):
        if jaccard(counts, a, b) >= tau:
            joined, gone = sorted((group_of[a], group_of[b]))
            group_of = [joined if group == gone else group for group in group_of]
    return [[task for task, group in enumerate(group_of) if group == first] for first in sorted(set(group_of))]


def stages(recipe: Recipe, counts: Counts) -> list[list[str]]:
    """Task names by stage: as the recipe states them, or the groups in recipe order or the seed's random order."""
    if recipe.stages is not None:
        return [list(stage) for stage in recipe.stages]
    found = groups(counts, recipe.tau)
    if recipe.order != "recipe":
        rng = random.Random(recipe.order)  # one number a group: the only use that Python keeps stable
        keys = [rng.random() for _ in found]
        found = [group for _, group in sorted(zip(keys, found, strict=True))]
    return [[recipe.tasks[task].name for task in group] for group in found]
