"""The semantics of METHOD.md, sections 1-3 and 6, written out as slowly and plainly as possible.

Nothing here is shared with the package: it is the oracle the package is tested against. Inputs are dicts of
torch tensors, cores are python sets, tops come from a full sort with explicit tie-break keys, and a fold is a
loop of slerps over float64 vectors; singular values come from numpy's svd in float64. Only fit for small tensors.
"""

import fnmatch
import math
import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
Tensors = Mapping[str, torch.Tensor]
Number = Fraction | Callable[[str, str], Fraction]  # one value, or a function of (task, tensor)
Optional = Fraction | Callable[[str, str], Fraction | None] | None
Pairs = dict[tuple[str, str], Fraction]  # every ordered pair of tasks, the diagonal included

EPSILON = 5e-4
NEAR = 1e-6  # a cosine this close to 1 - EPSILON may fall on either side of it after other roundings
CANCELLED = 1e-4  # a fold whose norm is below this share of its terms' norms has no reliable direction

SIDE = 32  # of a matrix that is levelled, at least
GAIN = 12.0
CAP = 8.0
CAP_OF_LOW_RANK = 2.0
LIMIT = Fraction(3, 100)  # of the base's norm


@dataclass(frozen=True)
class Settings:
    """One recipe. `backbone="path"` means the extra checkpoint; `order` is "recipe" or a seed."""

    density: Number = Fraction(1, 100)
    weight: Number = Fraction(1)
    t: Optional = None
    scope: str = "tensor"
    tau: Fraction | Literal["auto"] = "auto"
    order: str | int = "recipe"
    stages: Sequence[Sequence[str]] | None = None
    backbone: str = "last"
    conflict: str = "mean"
    space: str = "delta"
    rest: Fraction = Fraction(1)
    singular_values: str | None = None  # None: "level" where `space` is delta
    granularity: str = "tensor"
    exclude: Sequence[str] = ()
    dtype: torch.dtype | None = None


@dataclass(frozen=True)
class Step:
    """One slerp of a fold. `cos`: None where a norm is 0; `fragile`: rounding may pick lerp or slerp."""

    task: str
    omega: float
    cos: float | None
    slerp: bool
    fragile: bool


@dataclass(frozen=True)
class Stats:
    """Counts and sums of m = |update| of one task in one tensor (or, see `total`, in several)."""

    elements: int
    changed: int
    tiny: int  # m <= 1e-5
    half_ulp: int  # m <= half a unit in the last place of the base's dtype at the base's value
    core: int
    sum_in: float
    sum_out: float

    @property
    def mean_in(self) -> float | None:
        """Mean m in the core; None if the core is empty."""
        return self.sum_in / self.core if self.core else None

    @property
    def mean_out(self) -> float | None:
        """Mean m outside of the core; None if nothing is outside."""
        outside = self.elements - self.core
        return self.sum_out / outside if outside else None


@dataclass(frozen=True)
class Result:
    """Everything METHOD.md settles. Arrays are flat and row-major; `units` is 1, or the rows of a tensor."""

    cores: dict[str, dict[str, list[int]]]  # task -> every float tensor -> sorted flat indices
    jaccard: Pairs
    chance: dict[tuple[str, str], Fraction | None]
    lift: dict[tuple[str, str], Fraction | None]
    layer_jaccard: dict[str, Pairs]
    compared: dict[tuple[str, str], int]  # elements in both cores, in the layers; in all tensors where none is in one
    aligned: dict[tuple[str, str], int]  # of these, how many both tasks moved in the same direction
    expected: dict[tuple[str, str], Fraction]  # of these, how many that would be by chance
    groups: list[list[str]]  # by their first task in the recipe
    stages: list[list[str]]
    backbone: str  # a task's name, "base" or "path"
    fold: list[str]  # the backbone, then the folded tasks: the columns of `coefficients`
    disposition: dict[str, str]  # tensor -> "copied" (not float) | "identical" | "fused"
    coefficients: dict[str, F64]  # fused tensor -> [units, len(fold)], without `rest`
    levelled: dict[str, float]  # fused tensor -> how far its singular values are made level, 0 to 1
    tolerance: dict[str, F64]  # levelled tensor -> [n]: how far `fused32` may be from what float32 gives; 0 in cores
    steps: dict[str, list[list[Step]]]  # fused tensor -> unit -> step
    stats: dict[str, dict[str, Stats]]  # task -> every float tensor -> counts
    fused: dict[str, torch.Tensor]  # the output: float32 arithmetic, rounded once to the output dtype
    ideal: dict[str, F64]  # float tensor -> [n]: the running fold in float64; core elements as in `fused32`
    fused32: dict[str, F32]  # float tensor -> [n]: `fused` before it is rounded to the output dtype
    scale: dict[str, F64]  # fused tensor -> [n]: sum of the blend's |terms|, what rounding errors scale with

    @property
    def fragile(self) -> bool:
        """Whether some step's choice between lerp and slerp hangs on rounding."""
        return any(step.fragile for units in self.steps.values() for unit in units for step in unit)


# --- names ----------------------------------------------------------------------------------------


def natural(name: str) -> tuple[list[str | int], str]:
    """Sort key: digit runs compare as integers; equal keys ('01', '1') fall back to the plain string."""
    runs = re.split("([0-9]+)", name)  # text, digits, text, digits, ..., text
    return [int(run) if i % 2 else run for i, run in enumerate(runs)], name


def layer(name: str) -> str:
    """The name up to and including its first all-digit component ('model.layers.3.'); '' without one."""
    parts = name.split(".")
    for i, part in enumerate(parts):
        if re.fullmatch("[0-9]+", part):
            return ".".join(parts[: i + 1]) + "."
    return ""


def matches(pattern: str, name: str) -> bool:
    """A glob if the pattern has any of * ? [, otherwise a substring."""
    if any(c in pattern for c in "*?["):
        return fnmatch.fnmatchcase(name, pattern)
    return pattern in name


def value(number: Number, task: str, tensor: str) -> Fraction:
    """A setting at one task and tensor."""
    return number(task, tensor) if callable(number) else number


# --- numbers --------------------------------------------------------------------------------------


def f32(tensor: torch.Tensor) -> F32:
    """The stored values decoded to float32, flat."""
    return np.asarray(tensor.detach().to(torch.float32).reshape(-1).numpy(), dtype=np.float32)


def delta(expert: torch.Tensor, base: torch.Tensor) -> F32:
    """The update, subtracted in float32."""
    return np.subtract(f32(expert), f32(base), dtype=np.float32)


def magnitude(expert: torch.Tensor, base: torch.Tensor) -> F32:
    """m of METHOD.md."""
    return np.abs(delta(expert, base))


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal dtype, shape and bit pattern (so 0.0 and -0.0 differ)."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    bits = [x.contiguous().reshape(-1).view(torch.uint8) for x in (a, b) if x.numel()]
    return not bits or torch.equal(*bits)


def ulp(x: float, dtype: torch.dtype) -> float:
    """The spacing of `dtype` from |x| to the next larger magnitude; its smallest subnormal at 0."""
    formats = {torch.float32: (23, -126), torch.float16: (10, -14), torch.bfloat16: (7, -126)}
    stored_bits, lowest = formats[dtype]
    exponent = math.frexp(abs(x))[1] - 1 if x else lowest
    return math.ldexp(1.0, max(exponent, lowest) - stored_bits)


# --- 1. cores -------------------------------------------------------------------------------------


def largest(pool: Sequence[tuple[str, F32]], k: int) -> dict[str, list[int]]:
    """The k largest m of a pool of tensors given in natural order; ties: earlier tensor, then lower index."""
    m = np.concatenate([values for _, values in pool])
    rank = np.concatenate([np.full(len(values), i) for i, (_, values) in enumerate(pool)])
    flat = np.concatenate([np.arange(len(values)) for _, values in pool])
    first = np.lexsort((flat, rank, -m))[:k]  # the last key is the primary one
    core: dict[str, list[int]] = {name: [] for name, _ in pool}
    for j in first:
        if m[j] > 0:
            core[pool[rank[j]][0]].append(int(flat[j]))
    return {name: sorted(indices) for name, indices in core.items()}


def pools(names: Iterable[str], scope: str) -> list[list[str]]:
    """The tensors that share one budget, each pool in natural order."""
    grouped: dict[str, list[str]] = {}
    for name in sorted(names, key=natural):
        key = {"tensor": name, "layer": layer(name), "global": ""}[scope]
        grouped.setdefault(key, []).append(name)
    return list(grouped.values())


def core_of(task: str, expert: Tensors, base: Tensors, eligible: Sequence[str], s: Settings) -> dict[str, list[int]]:
    """The core region of one task, per eligible tensor."""
    core: dict[str, list[int]] = {}
    for pool in pools(eligible, s.scope):
        densities = {value(s.density, task, name) for name in pool}
        if len(densities) != 1:
            raise ValueError(f"the density of {task} varies within one budget: {pool}")
        k = math.floor(densities.pop() * sum(base[name].numel() for name in pool))
        core.update(largest([(name, magnitude(expert[name], base[name])) for name in pool], k))
    return core


# --- 2. overlap, groups, stages -------------------------------------------------------------------


def jaccard(cores: Mapping[str, Mapping[str, Sequence[int]]], names: Iterable[str]) -> Pairs:
    """J of every ordered pair of tasks over some tensors; 0/0 is 0."""
    names = list(names)
    result: Pairs = {}
    for a in cores:
        for b in cores:
            both = sum(len(set(cores[a][x]) & set(cores[b][x])) for x in names)
            any_ = sum(len(set(cores[a][x]) | set(cores[b][x])) for x in names)
            result[a, b] = Fraction(both, any_) if any_ else Fraction(0)
    return result


def chance(a: str, b: str, sizes: Mapping[str, int], density: Number) -> Fraction | None:
    """J that independent cores of these densities would have; None without any element in a core."""
    both = any_ = Fraction(0)
    for name, n in sizes.items():
        pa, pb = value(density, a, name), value(density, b, name)
        both += n * pa * pb
        any_ += n * (pa + pb - pa * pb)
    return both / any_ if any_ else None


def groups(tasks: Sequence[str], overlap: Pairs, tau: Fraction) -> list[list[str]]:
    """Connected components of J >= tau, tasks in recipe order, groups by their first task."""
    label = {task: i for i, task in enumerate(tasks)}
    for _ in tasks:  # a label travels one edge a round, so len(tasks) rounds reach everyone
        for a in tasks:
            for b in tasks:
                if overlap[a, b] >= tau:
                    label[a] = label[b] = min(label[a], label[b])
    return [[task for task in tasks if label[task] == i] for i in sorted(set(label.values()))]


def directions(
    cores: Mapping[str, Mapping[str, Sequence[int]]], base: Tensors, experts: Mapping[str, Tensors], floats: list[str]
) -> tuple[dict[tuple[str, str], int], dict[tuple[str, str], int], dict[tuple[str, str], Fraction]]:
    """Of every ordered pair of tasks the elements in both cores, and those that both moved up or both moved down.

    And how many the latter would be by chance, from how many of each tensor each task moved inward: against the sign of
    the base, where 0 and -0 count as above 0.
    """
    names = [name for name in floats if layer(name)] or floats
    compared = {(a, b): 0 for a in cores for b in cores}
    aligned = dict(compared)
    expected = {pair: Fraction(0) for pair in compared}
    for name in names:
        signs = [-1 if x < 0 else 1 for x in f32(base[name])]
        moves = {task: np.sign(delta(experts[task][name], base[name])) for task in cores}
        for a in cores:
            for b in cores:
                both = set(cores[a][name]) & set(cores[b][name])
                for i in both:
                    compared[a, b] += 1
                    aligned[a, b] += bool(moves[a][i] == moves[b][i])
                if both:
                    p, q = (Fraction(sum(moves[t][i] != signs[i] for i in both), len(both)) for t in (a, b))
                    expected[a, b] += len(both) * (p * q + (1 - p) * (1 - q))
    return compared, aligned, expected


def agreement(compared: int, aligned: int, expected: float) -> float:
    """How far two tasks agree on the direction, from 0.2 (not told from not at all) to 1: kappa less 3 deviations."""
    if compared <= expected:
        return 0.2
    room = compared - expected
    deviation = math.sqrt(expected * room / compared)
    return min(1.0, max(0.2, (aligned - expected) / room - 3 * (deviation / room)))


def clusters(tasks: Sequence[str], agree: Mapping[tuple[str, str], float]) -> list[list[str]]:
    """`tau: auto`: average linkage, cut where the agreement of what is joined falls by the largest ratio."""
    levels = [[[task] for task in tasks]]  # from all alone to all in one
    heights = [1.0]  # and the agreement at which each of them came to be
    while len(levels[-1]) > 1:
        found = levels[-1]
        near = {}
        for i, one in enumerate(found):
            for j, other in enumerate(found[:i]):
                near[j, i] = math.fsum(agree[a, b] for a in one for b in other) / (len(one) * len(other))
        i, j = min(near, key=lambda pair: (-near[pair], pair))
        joined = sorted(found[i] + found[j], key=tasks.index)
        rest = [found[k] for k in range(len(found)) if k not in (i, j)]
        levels.append(sorted([joined, *rest], key=lambda group: tasks.index(group[0])))
        heights.append(near[i, j])
    heights.append(0.2)
    falls = [heights[k] / heights[k + 1] for k in range(len(levels))]
    return levels[falls.index(max(falls))]


def stages(found: list[list[str]], s: Settings) -> list[list[str]]:
    """The order of training and fusion."""
    if s.stages is not None:
        return [list(stage) for stage in s.stages]
    if isinstance(s.order, str):
        return found
    rng = random.Random(s.order)
    keys = [rng.random() for _ in found]
    return [found[i] for i in sorted(range(len(found)), key=lambda i: keys[i])]


# --- 3. fusion ------------------------------------------------------------------------------------


def cosine(v0: F64, v1: F64) -> float | None:
    """Clamped cosine; None where a norm is 0."""
    norms = math.sqrt(float(v0 @ v0)) * math.sqrt(float(v1 @ v1))
    return None if norms == 0 else max(-1.0, min(1.0, float(v0 @ v1) / norms))


def shares(cos: float | None, t: float) -> tuple[float, float, bool]:
    """The factors of v0 and v1 in slerp(v0, v1, t), and whether it is a slerp proper (not a lerp)."""
    if cos is None or abs(cos) > 1 - EPSILON:
        return 1 - t, t, False
    angle = math.acos(cos)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle), True


def slerp(v0: F64, v1: F64, t: float) -> F64:
    """METHOD.md's slerp of un-normalised float64 vectors."""
    a, b, _ = shares(cosine(v0, v1), t)
    return a * v0 + b * v1


def is_fragile(v: F64, v1: F64, cos: float | None, terms: float) -> bool:
    """Whether other roundings could choose the other branch of slerp (`terms`: sum of |c_i||v_i|)."""
    if not np.any(v1) or terms == 0:
        return False
    cancelled = math.sqrt(float(v @ v)) < CANCELLED * terms
    return cancelled or cos is None or abs(abs(cos) - (1 - EPSILON)) < NEAR


def even(cos: float | None, share: float, before: float) -> float:
    """The t for which a new vector of this share of the weight gets as much for its weight as those before it had.

    `before`: the sum of their coefficients. With the factors a and b of slerp, b / share = a·before / (1 - share).
    """
    low, high = 0.0, 1.0
    for _ in range(200):
        t = (low + high) / 2
        a, b, _ = shares(cos, t)
        low, high = (t, high) if b * (1 - share) < a * before * share else (low, t)
    return round((low + high) / 2) if share in (0, 1) else (low + high) / 2


def fold(
    vectors: Sequence[F64], tasks: Sequence[str], omega: Sequence[float], constant: Sequence[bool] = ()
) -> tuple[F64, F64, list[Step]]:
    """v <- slerp(v, v_i, omega_i), starting at vectors[0]: v, each vector's coefficient, the steps.

    Where a step is not `constant` (all are, if none is said), its omega is a share of the weight: see `even`.
    """
    v = vectors[0]
    coefficients = [1.0]
    steps: list[Step] = []
    norms = [math.sqrt(float(x @ x)) for x in vectors]
    for task, v1, share, fixed in zip(tasks, vectors[1:], omega, constant or [True] * len(omega), strict=True):
        cos = cosine(v, v1)
        terms = math.fsum(abs(c) * norm for c, norm in zip(coefficients, norms, strict=False))
        t = share if fixed else even(cos, share, math.fsum(coefficients))
        a, b, proper = shares(cos, t)
        steps.append(Step(task, t, cos, proper, is_fragile(v, v1, cos, terms)))
        v = slerp(v, v1, t)
        coefficients = [a * c for c in coefficients] + [b]
    return v, np.array(coefficients), steps


def omegas(fold_order: Sequence[str], tensor: str, tasks: Iterable[str], s: Settings) -> tuple[list[float], list[bool]]:
    """Of each folded task its constant t, or its share of the weight so far (0/0 is 0); and whether it is constant."""
    backbone, *folded = fold_order
    total = value(s.weight, backbone, tensor) if backbone in set(tasks) else Fraction(1)
    result: list[float] = []
    constant: list[bool] = []
    for task in folded:
        weight = value(s.weight, task, tensor)
        total += weight
        t = s.t(task, tensor) if callable(s.t) else s.t
        result.append(float(t if t is not None else weight / total if total else Fraction(0)))
        constant.append(t is not None)
    return result, constant


def unit_of(tensor: torch.Tensor, granularity: str) -> tuple[int, npt.NDArray[np.int64]]:
    """The number of vectors in a tensor, and for each element the vector it belongs to."""
    n = tensor.numel()
    if granularity == "tensor" or tensor.dim() <= 1:
        return 1, np.zeros(n, dtype=np.int64)
    rows = math.prod(tensor.shape[:-1])
    return rows, np.repeat(np.arange(rows), tensor.shape[-1])


def blend32(vectors: Sequence[F32], coefficients: F64, base: F32 | None, rest: Fraction) -> F32:
    """The blend in float32, backbone first; `base` is added last (delta space) or None (weights)."""
    factors = coefficients if base is None else coefficients * float(rest)
    c = factors.astype(np.float32)
    acc: F32 = c[0] * vectors[0]
    for ci, vi in zip(c[1:], vectors[1:], strict=True):
        acc = acc + ci * vi
    return acc if base is None else acc + base


def is_matrix_of_a_layer(name: str, tensor: torch.Tensor) -> bool:
    """What can be levelled: two dimensions, both of at least SIDE, and a layer."""
    return tensor.dim() == 2 and min(tensor.shape) >= SIDE and layer(name) != ""


def level(update: F64, most: float = math.inf) -> F64:
    """Every singular value sigma of [rows, columns] becomes min(GAIN sigma, cap), the singular vectors stay.

    Where the Frobenius norm of that is above `most`, it is scaled down to it.
    """
    u, sigma, vt = np.linalg.svd(update, full_matrices=False)
    if not sigma.any():
        return np.zeros_like(update)
    root_mean_square = math.sqrt(math.fsum(x * x for x in sigma) / len(sigma))
    mean_weighted_with_itself = math.fsum(x * x for x in sigma) / math.fsum(sigma)
    cap = max(CAP * root_mean_square, CAP_OF_LOW_RANK * mean_weighted_with_itself)
    levelled: F64 = (u * [min(GAIN * x, cap) for x in sigma]) @ vt
    return levelled * min(1.0, most / float(np.linalg.norm(levelled)))


def apart(vectors: Sequence[F32]) -> float:
    """How many updates these are in effect, less one, from 0 to 1; nothing below a hundredth."""
    moved = [vector.astype(np.float64) for vector in vectors if vector.any()]
    norms = [float(np.linalg.norm(vector)) for vector in moved]
    alike = [
        n * m * (float(v @ w) / (n * m)) ** 2 for v, n in zip(moved, norms, strict=True)
        for w, m in zip(moved, norms, strict=True)
    ]  # fmt: skip
    if not moved:
        return 0.0
    number = math.fsum(norms) ** 2 / math.fsum(alike)
    return 0.0 if number < 1.01 else min(1.0, number - 1)


def most(base: F32, rest: Fraction) -> float:
    """The norm of a levelled update, at most: so much of the base's; anything where the base is 0."""
    norm = float(np.linalg.norm(base.astype(np.float64)))
    return float(LIMIT * rest) * norm if norm else math.inf


def level_error(update: F64) -> F64:
    """How far each element of float32's result may be from `level(update)`.

    What is too strong is taken away in float32: an element loses its column (along the shorter side, of m elements)
    times m singular vectors, twice m terms that are added up, each with a few roundings of 2^-24. Such errors are as
    often up as down, so that they grow with the root of their number: GAIN 2^-24 sqrt(2m) |column|, and 4 times that
    for those that are larger than most. Beside that is what float64 leaves of the whole, also where a column is 0, and
    what float32 cannot hold at all.
    """
    short = int(np.argmin(update.shape))
    columns = np.sqrt(np.sum(update * update, axis=short, keepdims=True))
    error: F64 = 4 * GAIN * 2.0**-24 * math.sqrt(2 * update.shape[short]) * np.broadcast_to(columns, update.shape)
    doubles = GAIN * 2.0**-52 * update.shape[short] * float(np.linalg.norm(update))
    error = error + doubles + 4 * GAIN * 2.0**-149
    return error


def transplant(claimants: Sequence[tuple[np.float32, np.float32]], base: np.float32, conflict: str) -> np.float32:
    """The value of one core element. `claimants`: (stored value, update) in stage order, in float32."""
    if len(claimants) == 1 or conflict == "last":
        return claimants[-1][0]
    if conflict == "first":
        return claimants[0][0]
    if conflict == "largest":
        return max(enumerate(claimants), key=lambda item: (abs(item[1][1]), item[0]))[1][0]
    if conflict == "mean":
        return mean32([stored for stored, _ in claimants])
    if conflict != "elect":
        raise ValueError(conflict)
    elected = np.sign(sum32([d for _, d in claimants]))
    if elected == 0:
        return base
    return np.float32(base + mean32([d for _, d in claimants if np.sign(d) == elected]))


def sum32(values: Sequence[np.float32]) -> np.float32:
    """Sum in float32, in order."""
    total = values[0]
    for x in values[1:]:
        total = np.float32(total + x)
    return total


def mean32(values: Sequence[np.float32]) -> np.float32:
    """Mean in float32, summed in order."""
    return np.float32(sum32(values) / np.float32(len(values)))


# --- 6. update sparsity ---------------------------------------------------------------------------


def stats_of(expert: torch.Tensor, base: torch.Tensor, core: Sequence[int]) -> Stats:
    """Counts and sums of one task's updates in one tensor."""
    m = [float(x) for x in magnitude(expert, base)]
    spacing = [ulp(float(x), base.dtype) for x in f32(base)]
    inside = set(core)
    return Stats(
        elements=len(m),
        changed=sum(x != 0 for x in m),
        tiny=sum(x <= 1e-5 for x in m),
        half_ulp=sum(x <= u / 2 for x, u in zip(m, spacing, strict=True)),
        core=len(inside),
        sum_in=math.fsum(x for i, x in enumerate(m) if i in inside),
        sum_out=math.fsum(x for i, x in enumerate(m) if i not in inside),
    )


def total(stats: Iterable[Stats]) -> Stats:
    """The counts and sums of several tensors together."""
    sums = [sum(column) for column in zip(*(tuple(vars(s).values()) for s in stats), strict=True)]
    return Stats(*map(int, sums[:5]), *map(float, sums[5:])) if sums else Stats(0, 0, 0, 0, 0, 0.0, 0.0)


# --- the whole ------------------------------------------------------------------------------------


def check(checkpoints: Mapping[str, Tensors]) -> None:
    """Raise ValueError on a non-finite float or on non-float tensors that differ."""
    base = checkpoints["base"]
    for label, tensors in checkpoints.items():
        for name, tensor in tensors.items():
            if not tensor.is_floating_point():
                if not same_bytes(tensor, base[name]):
                    raise ValueError(f"{label}: {name} is not float and differs from the base")
            elif not np.isfinite(f32(tensor)).all():
                raise ValueError(f"{label}: {name}: flat index {int(np.argmin(np.isfinite(f32(tensor))))}")


@dataclass
class _Fuser:
    """The inputs of section 3, one tensor at a time."""

    base: Tensors
    experts: Mapping[str, Tensors]
    extra: Tensors | None
    s: Settings
    backbone: str
    order: list[str]  # every task, in stage order
    cores: Mapping[str, Mapping[str, Sequence[int]]]
    result: Result
    given: Mapping[str, F64] | None

    def source(self, who: str) -> Tensors:
        if who in self.experts:
            return self.experts[who]
        if who == "base":
            return self.base
        assert self.extra is not None, "the backbone is an extra checkpoint, and none is given"
        return self.extra

    def fuse(self, name: str) -> None:
        base, out = self.base[name], self.result
        others = [e[name] for e in self.experts.values()]
        if self.backbone == "path":
            others.append(self.source("path")[name])
        dtype = self.s.dtype or base.dtype
        if not base.is_floating_point():
            out.disposition[name], out.fused[name] = "copied", base.clone()
            return
        if base.numel() == 0 or all(same_bytes(x, base) for x in others):
            out.disposition[name], out.fused[name] = "identical", base.to(dtype)
            out.fused32[name], out.ideal[name] = f32(base), f32(base).astype(np.float64)
            return
        out.disposition[name] = "fused"
        self.blend(name)
        self.write_cores(name)
        out.fused[name] = torch.from_numpy(out.fused32[name]).to(dtype).reshape(base.shape)

    def vectors(self, name: str) -> list[F32]:
        """The vectors of a fold, backbone first: stored values, or updates in delta space."""
        stored = [self.source(who)[name] for who in self.result.fold]
        return [f32(x) if self.s.space == "weights" else delta(x, self.base[name]) for x in stored]

    def blend(self, name: str) -> None:
        """Sections 'Non-core' to 'Blend' for every element; the cores are written over it afterwards."""
        out, base32 = self.result, f32(self.base[name])
        plain = self.s.space == "weights"
        vectors = self.vectors(name)
        omega, constant = omegas(out.fold, name, self.experts, self.s)
        claimed = {i for task in self.order for i in self.cores[task][name]}
        free = np.array([i not in claimed for i in range(len(base32))], dtype=bool)
        units, unit = unit_of(self.base[name], self.s.granularity)
        out.fused32[name] = np.zeros(len(base32), dtype=np.float32)
        out.ideal[name], out.scale[name] = np.zeros(len(base32)), np.zeros(len(base32))
        out.coefficients[name], out.steps[name] = np.zeros((units, len(vectors))), []
        folded32, folded = out.fused32[name].copy(), out.ideal[name].copy()  # of all elements, those in cores too
        for u in range(units):
            here = free & (unit == u)
            parts = [v[here] for v in vectors]
            ideal, c, steps = fold([v.astype(np.float64) for v in parts], out.fold[1:], omega, constant)
            line = unit == u
            folded[line] = float(self.s.rest) * (c @ [v[line].astype(np.float64) for v in vectors])
            if self.given is not None:
                c = np.asarray(self.given[name], dtype=np.float64)[u]
            base = base32[here]
            out.coefficients[name][u] = c
            out.steps[name].append(steps)
            out.fused32[name][here] = blend32(parts, c, None if plain else base, self.s.rest)
            out.ideal[name][here] = ideal if plain else base + float(self.s.rest) * ideal
            terms = sum(abs(ci) * np.abs(v.astype(np.float64)) for ci, v in zip(c, parts, strict=True))
            out.scale[name][here] = terms if plain else float(self.s.rest) * terms + np.abs(base)
            folded32[line] = blend32([v[line] for v in vectors], c * float(self.s.rest), None, self.s.rest)
        out.levelled[name] = self.share(name, [vector[free] for vector in vectors])
        if out.levelled[name]:
            self.level(name, folded32, folded)

    def share(self, name: str, vectors: Sequence[F32]) -> float:
        """How far the singular values are made level, where `vectors` are folded: of a matrix of a layer."""
        on = self.s.space == "delta" and self.s.rest > 0 and self.s.singular_values != "keep"
        return apart(vectors) if on and is_matrix_of_a_layer(name, self.base[name]) else 0.0

    def level(self, name: str, folded32: F32, folded: F64) -> None:
        """Put the levelled fold in place of what `blend` has settled: `folded32` as float32 has it, and in float64."""
        out, base, shape = self.result, f32(self.base[name]), tuple(self.base[name].shape)
        matrix = folded32.astype(np.float64).reshape(shape)
        limit = most(base, self.s.rest)
        share = out.levelled[name]

        def partly(update: F64) -> F64:
            return (1 - share) * update + share * level(update, limit)

        out.fused32[name] = base + partly(matrix).reshape(-1).astype(np.float32)
        out.ideal[name] = base + partly(folded.reshape(shape)).reshape(-1)
        reached = float(np.linalg.norm(level(matrix)))
        scaled_down = min(1.0, limit / reached) if reached else 1.0
        out.tolerance[name] = (1 - share + share * scaled_down) * level_error(matrix).reshape(-1) + 2.0**-24 * np.abs(
            out.ideal[name]
        )

    def write_cores(self, name: str) -> None:
        """Transplant: every element in some task's core."""
        base = f32(self.base[name])
        stored = {task: f32(self.experts[task][name]) for task in self.order}
        update = {task: delta(self.experts[task][name], self.base[name]) for task in self.order}
        cores = {task: set(self.cores[task][name]) for task in self.order}
        for i in sorted(set().union(*cores.values())):
            claimants = [(stored[task][i], update[task][i]) for task in self.order if i in cores[task]]
            x = transplant(claimants, base[i], self.s.conflict)
            self.result.fused32[name][i] = self.result.ideal[name][i] = x
            self.result.scale[name][i] = abs(x)
            if name in self.result.tolerance:
                self.result.tolerance[name][i] = 0


def run(
    base: Tensors,
    experts: Mapping[str, Tensors],
    settings: Settings,
    extra: Tensors | None = None,
    coefficients: Mapping[str, F64] | None = None,
) -> Result:
    """Plan and fuse `experts` (task -> tensors, in recipe order).

    `coefficients` ([units, len(fold)] per fused tensor) replace the fold's own in `fused`, `fused32` and
    `coefficients`, so that a blend can be compared bit for bit with one that settled them in another order.
    Raises ValueError on non-finite values and on non-float tensors that differ.
    """
    s, tasks = settings, list(experts)
    check({"base": base, **experts} | ({"path": extra} if extra is not None else {}))
    floats = sorted((name for name in base if base[name].is_floating_point()), key=natural)
    eligible = [name for name in floats if not any(matches(pattern, name) for pattern in s.exclude)]
    nothing: dict[str, list[int]] = {name: [] for name in floats}
    cores = {task: nothing | core_of(task, experts[task], base, eligible, s) for task in tasks}
    overlap = jaccard(cores, eligible)
    sizes = {name: base[name].numel() for name in eligible}
    by_chance = {(a, b): chance(a, b, sizes, s.density) for a in tasks for b in tasks}
    compared, aligned, expected = directions(cores, base, experts, floats)
    agree = {pair: agreement(compared[pair], aligned[pair], float(expected[pair])) for pair in compared}
    found = clusters(tasks, agree) if s.tau == "auto" else groups(tasks, overlap, s.tau)
    staged = stages(found, s)
    order = [task for stage in staged for task in stage]
    assert sorted(order) == sorted(tasks), "every task is in one stage"
    backbone = order[-1] if s.backbone == "last" else s.backbone
    result = Result(
        cores=cores,
        jaccard=overlap,
        chance=by_chance,
        lift={pair: overlap[pair] / p if p else None for pair, p in by_chance.items()},
        layer_jaccard={layer(pool[0]): jaccard(cores, pool) for pool in pools(eligible, "layer")},
        compared=compared,
        aligned=aligned,
        expected=expected,
        groups=found,
        stages=staged,
        backbone=backbone,
        fold=[backbone] + [task for task in order if task != backbone],
        stats={t: {x: stats_of(experts[t][x], base[x], cores[t][x]) for x in floats} for t in tasks},
        disposition={}, coefficients={}, steps={}, fused={}, ideal={}, fused32={}, scale={}, levelled={}, tolerance={},
    )  # fmt: skip
    fuser = _Fuser(base, experts, extra, s, backbone, order, cores, result, coefficients)
    for name in base:
        fuser.fuse(name)
    return result
