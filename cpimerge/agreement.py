"""`tau: auto`: groups of tasks that move what their cores share in the same direction (METHOD §2, docs/grouping.md).

The cores of any two tasks overlap more than by chance, since all of them prefer the same elements. Only tasks that have
something in common also agree on the direction. So the agreement of directions has a zero point that depends neither on
the density nor on the scope or the model, which the Jaccard index lacks.

A direction is inward, towards zero or through it, or outward. Weight decay moves everything inward, in every task. So
what agrees by chance follows from how much each task moved inward; tensor by tensor, since the experts of a mixture are
not trained alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import combinations, pairwise

import numpy as np
import numpy.typing as npt

__all__ = ["Shares", "agreements", "beyond_chance", "by_chance", "clusters"]

FLOOR = 0.2  # unrelated tasks reach it: what agrees less is not told from what does not agree
DEVIATIONS = 3  # of chance: two tasks that share few elements may agree by accident

Counts = npt.NDArray[np.int64]
Shares = npt.NDArray[np.float64]


def by_chance(pairs: Counts, inwards: Counts) -> Shares:
    """Of one tensor, how many elements any two independent tasks would move in the same direction: float64 [T, T].

    `pairs` int64 [T, T]: elements in the cores of both; `inwards` [T, T]: how many of them the first moved inward.
    """
    one, other = inwards.astype(np.float64), inwards.T.astype(np.float64)
    both: Shares = (one * other + (pairs - one) * (pairs - other)) / np.maximum(pairs, 1)
    return both


def agreements(compared: Counts, aligned: Counts, expected: Shares) -> Shares:
    """As `beyond_chance`, float64 [T, T], but 1 at most and FLOOR at least: what is less is not told apart."""
    return np.clip(beyond_chance(compared, aligned, expected), FLOOR, 1)


def beyond_chance(compared: Counts, aligned: Counts, expected: Shares) -> Shares:
    """How far any two tasks agree beyond chance: float64 [T, T].

    `compared` int64 [T, T]: elements in the cores of both; `aligned` [T, T]: of these, those that both moved in the
    same direction; `expected` float64 [T, T]: how many these would be by chance, summed over tensors. It is Cohen's
    kappa less what chance may do. 0 where by chance all would be the same: then it cannot be told.
    """
    told = compared > expected
    room = np.where(told, compared - expected, 1)
    deviation = np.sqrt(expected * room / np.maximum(compared, 1))
    beyond: Shares = (aligned - expected) / room - DEVIATIONS * (deviation / room)
    return np.where(told, beyond, 0)


def clusters(similarity: Shares) -> list[list[int]]:
    """Groups of tasks, by first task, tasks ascending, from the `agreements` of all [T, T].

    Average linkage joins the two most similar clusters until one is left. The similarities at which that happens fall
    from 1, where every task is alone, to FLOOR, where all are one; the cut is where they fall by the largest ratio, of
    equal ones at the first, which has the most groups.
    """
    steps = list(_linkage(similarity))
    heights = [1.0, *(height for _, height in steps[:-1]), FLOOR]
    ratios = [above / below for above, below in pairwise(heights)]
    return steps[ratios.index(max(ratios))][0]


def _linkage(similarity: Shares) -> Iterator[tuple[list[list[int]], float]]:
    """The clusters from every task alone to all in one, each with the similarity of those two that are joined next."""
    found = [[task] for task in range(len(similarity))]
    while len(found) > 1:
        means = {pair: _mean(similarity, found[pair[0]], found[pair[1]]) for pair in combinations(range(len(found)), 2)}
        (a, b), height = max(means.items(), key=lambda item: item[1])  # of equal ones the first
        yield found, height
        found = sorted([sorted(found[a] + found[b]), *(found[n] for n in range(len(found)) if n not in (a, b))])
    yield found, FLOOR


def _mean(similarity: Shares, one: Sequence[int], other: Sequence[int]) -> float:
    """Of all pairs between two clusters; rounded once, so that no order of additions matters."""
    return math.fsum(float(similarity[a, b]) for a in one for b in other) / (len(one) * len(other))
