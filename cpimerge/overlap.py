"""How far the tasks' cores overlap, and the groups and stages that follow (METHOD §2)."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import combinations
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from .agreement import Shares, clusters
from .recipe import Recipe

if TYPE_CHECKING:
    from .plan_file import Pair

__all__ = ["chance", "grouped", "groups", "jaccard", "stages", "tau_notes"]

Counts = npt.NDArray[np.int64]
Tau = Fraction | Literal["auto"]


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


def grouped(tau: Tau, counts: Counts, similarity: Shares) -> list[list[int]]:
    """Groups of tasks by the recipe's `tau`: by the Jaccard index of `counts`, or by the `agreements` of all."""
    return clusters(similarity) if tau == "auto" else groups(counts, tau)


def stages(recipe: Recipe, counts: Counts, similarity: Shares) -> list[list[str]]:
    """Task names by stage: as the recipe states them, or the groups in recipe order or the seed's random order."""
    if recipe.stages is not None:
        return [list(stage) for stage in recipe.stages]
    found = grouped(recipe.tau, counts, similarity)
    if recipe.order != "recipe":
        rng = random.Random(recipe.order)  # one number a group: the only use that Python keeps stable
        keys = [rng.random() for _ in found]
        found = [group for _, group in sorted(zip(keys, found, strict=True))]
    return [[recipe.tasks[task].name for task in group] for group in found]


def tau_notes(recipe: Recipe, pairs: Sequence[Pair], sizes: Sequence[int], count: int) -> Iterator[str]:
    """Why `tau` groups nothing, or everything, where that is so; `sizes` [T] of the cores, `count` groups were found.

    Nothing where the recipe states the stages, which leaves `tau` unused.
    """
    if recipe.stages is not None or not pairs:
        return
    highest = max(pairs, key=lambda pair: pair.jaccard)
    most = (
        f"the cores of {highest.a!r} and {highest.b!r} overlap by {highest.jaccard:.2%}, {highest.chance:.2%} by chance"
    )
    alone = count == len(recipe.tasks)
    if recipe.tau == "auto":
        if alone and "parameters.tau" in recipe.lines:  # unrelated tasks are the usual case: an answer to who asked
            yield f"tau: auto groups nothing: {_least_apart(pairs)}"
        return
    tau = f"tau = {float(recipe.tau):g}"
    likely = max(pairs, key=lambda pair: pair.chance)
    if alone and not any(size and other for size, other in combinations(sizes, 2)):
        yield f"{tau} cannot group anything: no two tasks have a core. Give them a density above 0"
    elif alone and _most_possible(sizes) < recipe.tau:
        yield (
            f"{tau} cannot group anything: cores of so different sizes overlap by {float(_most_possible(sizes)):.2%} "
            "at most. Write tau: auto, a smaller number, or densities that are nearer to each other"
        )
    elif alone:
        yield f"{tau} groups nothing: at most, {most}. Write tau: auto, or a smaller number"
    elif 0 < recipe.tau <= likely.chance:
        yield (
            f"{tau} groups by chance: independent cores of the sizes of {likely.a!r} and {likely.b!r} overlap by "
            f"{likely.chance:.2%}. Write tau: auto, or a number well above that"
        )


def _most_possible(sizes: Sequence[int]) -> Fraction:
    """The largest Jaccard index that any two of such cores can have: that of one inside the other."""
    return max(Fraction(min(pair), max(*pair, 1)) for pair in combinations(sizes, 2))


def _least_apart(pairs: Sequence[Pair]) -> str:
    """Which two tasks agree most on the direction."""
    known = [pair for pair in pairs if pair.compared]
    if not known:
        return "in no layer do the cores of two tasks share an element"
    nearest = max(known, key=lambda pair: pair.kappa)
    return (
        f"no tasks stand out; at most, {nearest.a!r} and {nearest.b!r} move {nearest.aligned / nearest.compared:.1%} "
        f"of {nearest.compared:,} shared elements in the same direction, {nearest.expected / nearest.compared:.1%} by "
        "chance"
    )
