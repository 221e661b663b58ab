"""What the read of `verify` adds up, by tensor and by pool, and how the plan's numbers compare with it."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .checkpoint import Checkpoint
from .plan_file import PLAN_FILE, Plan, TensorPlan
from .stream import Chunk
from .verify_cores import Pool, RecipeNumbers, layer_of
from .verify_elements import Fault, Seen
from .verify_fold import TOLERANCE, Overlaps, Steps, deviation, expected_of, folded, shares, stages_of
from .verify_levels import must_level
from .verify_results import Failure, Findings
from .verify_sources import changed_content, content_hash

__all__ = ["Tallies", "Tally"]

CLOSE = 1e-9  # of sums that were added up in another order
FLOATS = ("F32", "BF16", "F16")


@dataclass
class Tally:
    """What was seen of one tensor so far; chunks come in order. T tasks, V members."""

    planned: TensorPlan
    updates: npt.NDArray[np.int64]
    sums: npt.NDArray[np.float64]
    pairs: npt.NDArray[np.int64]
    aligned: npt.NDArray[np.int64]
    inwards: npt.NDArray[np.int64]
    digests: list[array[int]]
    claimed: int = 0
    same: bool = True
    fault: Fault | None = None
    problem: str = ""
    gram: npt.NDArray[np.float64] | None = None  # of the row that is not complete
    products: npt.NDArray[np.float64] | None = None  # [V, V] ⟨vᵢ, vⱼ⟩ over all rows that are complete
    deviation: float = 0.0
    steps: Steps = field(default_factory=Steps)

    def add_digests(self, digests: Sequence[int]) -> None:
        for known, new in zip(self.digests, digests, strict=False):
            known.append(new)


class Tallies:
    """All tensors and pools of a plan."""

    def __init__(
        self,
        plan: Plan,
        numbers: RecipeNumbers | None,
        pools: Sequence[Pool],
        files: Mapping[str, Path],
    ) -> None:
        """`files`: of the output's tensors."""
        self.plan = plan
        self.numbers = numbers
        self.pools = pools
        self.files = files
        self.read: dict[str, Tally] = {}
        self._names = [task.name for task in plan.tasks]
        self._planned = {tensor.name: tensor for tensor in plan.tensors}
        self._pool_of = {tensor.name: pool for pool in pools for tensor in pool.tensors}

    @property
    def cores(self) -> int:
        """Cores that are judged: of each task, one a pool."""
        return sum(pool.eligible for pool in self.pools) * len(self.plan.tasks)

    def of(self, name: str) -> Tally:
        """The tensor's tally."""
        if name not in self.read:
            tasks = len(self.plan.tasks)
            self.read[name] = Tally(
                planned=self._planned[name],
                updates=np.zeros((tasks, 3), np.int64),
                sums=np.zeros((tasks, 2)),
                pairs=np.zeros((tasks, tasks), np.int64),
                aligned=np.zeros((tasks, tasks), np.int64),
                inwards=np.zeros((tasks, tasks), np.int64),
                digests=[array("Q") for _ in self.plan.inputs],
            )
        return self.read[name]

    def add(self, name: str, chunk: Chunk, seen: Seen, rows: npt.NDArray[np.float32] | None) -> None:
        """What was seen in the tensor's next chunk."""
        tally = self.of(name)
        tally.updates += seen.updates
        tally.sums += seen.sums
        tally.pairs += seen.pairs
        tally.aligned += seen.aligned
        tally.inwards += seen.inwards
        tally.claimed += seen.claimed
        tally.same &= seen.same
        if seen.faults and tally.fault is None:
            tally.fault = min(seen.faults, key=lambda fault: fault.index)
        if name in self._pool_of:
            self._pool_of[name].add(name, seen)
        if seen.gram is not None and self.numbers is not None:
            self._fold(tally, chunk, seen.gram, rows)

    def coefficients(
        self, tensor: TensorPlan, chunk: Chunk, rows: npt.NDArray[np.float32] | None
    ) -> npt.NDArray[np.float32]:
        """float32 [R, V] of the rows that the chunk touches."""
        assert tensor.blend is not None
        if tensor.blend.coefficients is not None:
            with np.errstate(over="ignore"):  # what no float32 holds gives nothing finite, which is told
                return np.array([tensor.blend.coefficients], np.float32)
        assert rows is not None
        first = tensor.first_row + chunk.start // chunk.row
        return np.array(rows[first : first + chunk.rows])

    # --- coefficients ---

    def _fold(
        self, tally: Tally, chunk: Chunk, gram: npt.NDArray[np.float64], rows: npt.NDArray[np.float32] | None
    ) -> None:
        """Fold the rows that end in this chunk, and note how far the plan's coefficients are from it."""
        if tally.gram is not None:
            gram = tally.gram + gram
        if chunk.stop % chunk.row:
            tally.gram = gram
            return
        tally.gram = None
        products = gram.sum(axis=0)
        tally.products = products if tally.products is None else tally.products + products
        assert self.numbers is not None
        rest = float(self.numbers.recipe.rest) if self.plan.settings.space == "delta" else 1.0
        found = self.coefficients(tally.planned, chunk, rows)
        with np.errstate(invalid="ignore", over="ignore"):  # of inputs that changed
            expected, angles = folded(gram, self._shares(tally.planned.name), rest)
            tally.deviation = max(tally.deviation, deviation(found, expected))
            tally.steps.add(angles)

    def _shares(self, name: str) -> list[tuple[float, float | None]]:
        assert self.numbers is not None
        numbers, tasks = self.numbers.of[name], [task.name for task in self.plan.tasks]
        places = [tasks.index(member) if member in tasks else None for member in self.plan.fold]
        weights = [Fraction(1) if place is None else numbers.weight[place] for place in places]
        return shares(weights, [None if place is None else numbers.t[place] for place in places])

    # --- what is concluded ---

    def conclude(self, plan_dir: Path, inputs: Mapping[str, Checkpoint], whole: bool, findings: Findings) -> None:
        """Tell all that is wrong. `whole`: everything was read, so that counts must agree."""
        file = plan_dir / PLAN_FILE
        for tensor in self.plan.tensors:
            if tensor.name in self.read:
                findings.extend(list(self._elements(self.read[tensor.name])))
        for tensor in self.plan.tensors:
            self._dtypes(tensor, inputs, findings, file)
            if whole:
                self._counts(tensor, inputs, findings, file)
        if whole:
            self._totals(findings, file)
            self._edits(findings, file)
        for pool in self.pools:
            for name, tally in ((tensor.name, self.of(tensor.name)) for tensor in pool.tensors):
                for task, its in enumerate(map(self._planned[name].tasks.__getitem__, self._names)):
                    pool.changed[task] += int(tally.updates[task, 0]) if whole else its.changed
                    pool.core[task] += int(tally.pairs[task, task]) if whole else its.core
            self._judge(pool, plan_dir, findings)

    def _elements(self, tally: Tally) -> Iterator[Failure]:
        """The tensor's first element that is wrong."""
        if tally.problem:
            place, _, problem = tally.problem.partition(": ")
            yield Failure(place, problem, tally.planned.name)
        if fault := tally.fault:
            yield Failure(
                str(self.files[tally.planned.name]),
                fault.problem,
                tally.planned.name,
                fault.index,
                fault.expected,
                fault.found,
            )

    def _judge(self, pool: Pool, plan_dir: Path, findings: Findings) -> None:
        for number, task in enumerate(self.plan.tasks):
            for tensor, index, problem in pool.faults(number):
                where = str(plan_dir / task.core_file)
                name = tensor if tensor is not None or len(pool.tensors) > 1 else pool.tensors[0].name
                said = f"{pool.name}: {problem}" if name is None else problem
                findings.failures.append(Failure(where, said, name, index))

    def _dtypes(self, tensor: TensorPlan, inputs: Mapping[str, Checkpoint], findings: Findings, file: Path) -> None:
        """The plan's dtypes, and what follows from them: what is not floating-point is copied."""
        stored = {name: model.tensors[tensor.name].dtype for name, model in inputs.items()}
        said = {"base": tensor.base_dtype} | {name: task.dtype for name, task in tensor.tasks.items()}
        for name, dtype in said.items():
            if stored[name] != dtype:
                findings.fail(file, f"says {dtype} of {name!r}, which has {stored[name]}", tensor.name)
        if tensor.tasks and sorted(tensor.tasks) != sorted(self._names):
            findings.fail(file, "its tasks are not those of the plan", tensor.name)
        is_float = stored["base"] in FLOATS
        if is_float == (tensor.action == "copy") or is_float != bool(tensor.tasks or not self.plan.tasks):
            findings.fail(file, f"its action is {tensor.action!r}, and it is {stored['base']}", tensor.name)

    def _counts(self, tensor: TensorPlan, inputs: Mapping[str, Checkpoint], findings: Findings, file: Path) -> None:
        """The plan's hashes, action, counts and sums of one tensor."""
        tally = self.of(tensor.name)
        hashes = {name: content_hash(digests) for name, digests in zip(inputs, tally.digests, strict=True)}
        findings.extend(changed_content(inputs, tensor.name, tensor.xxh3, hashes))
        if tensor.action != "copy" and tally.same != (tensor.action == "identical"):
            which = "are the same bytes everywhere" if tally.same else "differ"
            findings.fail(file, f"its action is {tensor.action!r}, and its inputs {which}", tensor.name)
        found: dict[str, Any] = {"claimed": tally.claimed}
        said: dict[str, Any] = {"claimed": tensor.claimed}
        if tensor.blend is not None and self.numbers is not None and tally.products is not None:
            found["levelled"] = must_level(self.plan, self.numbers.recipe, tensor, tally.products)
            said["levelled"] = tensor.blend.levelled
        for number, name in enumerate(self._names if tensor.tasks else ()):
            task = tensor.tasks[name]
            changed, near, rounding = tally.updates[number].tolist()
            counts = {"changed": changed, "near": near, "rounding": rounding, "core": int(tally.pairs[number, number])}
            sums = zip(("sum_in", "sum_out"), tally.sums[number].tolist(), strict=True)
            its: dict[str, Any] = {**counts, **dict(sums)}
            found |= {f"tasks.{name}.{key}": value for key, value in its.items()}
            said |= {f"tasks.{name}.{key}": getattr(task, key) for key in its}
        _compare(said, found, findings, file, tensor.name)

    def _totals(self, findings: Findings, file: Path) -> None:
        """The plan's sums over all tensors, and how cores overlap."""
        floats = [self.of(tensor.name) for tensor in self.plan.tensors if tensor.tasks]
        elements = sum(tally.planned.output.elements for tally in floats)
        updates = _sum((tally.updates for tally in floats), (len(self.plan.tasks), 3))
        sums = _sum((tally.sums for tally in floats), (len(self.plan.tasks), 2))
        shape = (len(self.plan.tasks),) * 2
        inside = [tally for tally in floats if layer_of(tally.planned.name)] or floats
        overlaps = Overlaps(
            pairs=_sum((tally.pairs for tally in floats), shape),
            compared=_sum((tally.pairs for tally in inside), shape),
            aligned=_sum((tally.aligned for tally in inside), shape),
            expected=expected_of([tally.pairs for tally in inside], [tally.inwards for tally in inside], shape[0]),
        )
        for number, task in enumerate(self.plan.tasks):
            core = int(overlaps.pairs[number, number])
            changed, near, rounding = (int(count) for count in updates[number])
            found: dict[str, Any] = {
                "elements": elements,
                "changed": changed,
                "near": near,
                "rounding": rounding,
                "core": core,
            }
            means = sums[number, 0] / max(1, core), sums[number, 1] / max(1, elements - core)
            found |= {"mean_in": float(means[0]), "mean_out": float(means[1])}
            said = {key: getattr(task, key) for key in found}
            where = f"tasks.{number}."
            _compare(_within(where, said), _within(where, found), findings, file)
        layers: dict[str, Any] = {}
        for tally in floats:
            if self.numbers is None or self.numbers.of[tally.planned.name].eligible:
                name = layer_of(tally.planned.name)
                layers[name] = layers.get(name, 0) + tally.pairs
        self._pairs(overlaps, layers, findings, file)
        self._order(overlaps, findings, file)

    def _pairs(self, overlaps: Overlaps, layers: Mapping[str, Any], findings: Findings, file: Path) -> None:
        names = [task.name for task in self.plan.tasks]
        every = list(combinations(range(len(names)), 2))
        if [(pair.a, pair.b) for pair in self.plan.pairs] != [(names[a], names[b]) for a, b in every]:
            findings.fail(file, "its pairs are not those of its tasks")
            return
        for (a, b), pair in zip(every, self.plan.pairs, strict=True):
            shared, union, index = _overlap(overlaps.pairs, a, b)
            found: dict[str, Any] = {"shared": shared, "union": union, "jaccard": index}
            found |= {"compared": int(overlaps.compared[a, b]), "aligned": int(overlaps.aligned[a, b])}
            found |= {"expected": float(overlaps.expected[a, b])}
            said: dict[str, Any] = {key: getattr(pair, key) for key in found}
            if self.numbers is not None:
                chance = self._chance(a, b)
                found |= {"chance": float(chance), "lift": index / float(chance) if chance else None}
                said |= {"chance": pair.chance, "lift": pair.lift}
                found |= {f"layers.{name}": _overlap(counts, a, b)[2] for name, counts in layers.items()}
                said |= {f"layers.{name}": value for name, value in pair.layers.items()}
            where = f"pairs.{pair.a}+{pair.b}."
            _compare(_within(where, said), _within(where, found), findings, file)

    def _order(self, overlaps: Overlaps, findings: Findings, file: Path) -> None:
        """A note where stages, backbone or the order of the fold are not what recipe and cores give."""
        if self.numbers is None:
            return
        recipe, plan = self.numbers.recipe, self.plan
        stages = stages_of(recipe, self._names, overlaps)
        backbone = recipe.backbone if isinstance(recipe.backbone, str) else "backbone"
        backbone = stages[-1][-1] if backbone == "last" else backbone
        fold = [backbone, *(task for stage in stages for task in stage if task != backbone)]
        for key, expected in (("stages", stages), ("backbone", backbone), ("fold", fold)):
            if getattr(plan, key) != expected:
                findings.notes.append(f"{file}: its {key} are not those that recipe and cores give: edited by hand?")
                return

    def _chance(self, a: int, b: int) -> Fraction:
        """The Jaccard index that independent cores of these densities would have."""
        assert self.numbers is not None
        both = either = Fraction(0)
        for name, numbers in self.numbers.of.items():
            if numbers.eligible:
                p, q, n = numbers.density[a], numbers.density[b], self._planned[name].output.elements
                both += n * p * q
                either += n * (p + q - p * q)
        return both / either if either else Fraction(0)

    def _edits(self, findings: Findings, file: Path) -> None:
        """A note where coefficients are not those that the recipe gives: they may be edited."""
        if self.numbers is None:
            return
        every = [(self.of(tensor.name), tensor.blend) for tensor in self.plan.tensors if tensor.blend is not None]
        other = [tally for tally, blend in every if tally.deviation > TOLERANCE or not tally.steps.are(blend)]
        if other:
            first = other[0].planned.name
            findings.notes.append(
                f"{file}: coefficients, angles or slerps of {len(other):,} tensors, the first {first!r}, are not those "
                "that the recipe gives: edited by hand? The output was compared with them as they are"
            )


def _sum(parts: Iterable[Any], shape: tuple[int, ...]) -> Any:
    total: Any = np.zeros(shape, np.int64)
    for part in parts:
        total = total + part
    return total


def _overlap(pairs: Any, a: int, b: int) -> tuple[int, int, float]:
    """Elements in both cores and in either, and their quotient."""
    shared = int(pairs[a, b])
    union = int(pairs[a, a]) + int(pairs[b, b]) - shared
    return shared, union, shared / union if union else 0.0


def _within(where: str, numbers: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers of an entry, by their places in the plan."""
    return {where + key: number for key, number in numbers.items()}


def _compare(
    said: Mapping[str, Any], found: Mapping[str, Any], findings: Findings, file: Path, tensor: str | None = None
) -> None:
    """A failure for each number that differs; sums and quotients may differ by roundings."""
    for key in dict.fromkeys((*said, *found)):
        one, other = said.get(key), found.get(key)
        if isinstance(one, float) and isinstance(other, float):
            same = abs(one - other) <= CLOSE * max(abs(one), abs(other))
        else:
            same = one == other
        if not same:
            findings.fail(file, f"{key} is {one}, and {other} by what was read", tensor)
