"""verify of tensors whose singular values are levelled: what is right passes, and nothing else; svd in float64 says."""

from __future__ import annotations

import json
import math
import shutil
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import pytest
import torch
from checkpoints import save, write_recipe
from safetensors.torch import load_file, save_file
from test_verify_failures import change_manifest, only, refuse, reseal, verify
from verified import edit, flip, read_cores, small_chunks

import cpimerge
from cpimerge import levelling, verify_levels, verifying
from cpimerge.budget import RUNTIME_BYTES
from cpimerge.errors import PlanError
from cpimerge.plan_file import Plan
from cpimerge.stream import Workers, workers
from cpimerge.verify_results import Failure

LIMITS: dict[str, Any] = {"threads": 1}
WIDE, TALL, ALONE, SHORT = "layers.0.wide", "layers.0.tall", "layers.1.alone", "layers.1.short"
SHAPES = {"embed": (60, 40), WIDE: (48, 80), TALL: (80, 48), ALONE: (40, 40), SHORT: (31, 70), "layers.1.bias": (50,)}
TASKS = ("a", "b", "c")
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
GIVES = "is not the levelled blend that its coefficients give"
Floats = npt.NDArray[np.float32]


def write(directory: Path, dtype: torch.dtype = torch.bfloat16, **parameters: Any) -> Path:
    """A base and three fine-tunes that move every tensor, but ALONE, which only the first moves; returns a recipe.

    Each moves WIDE in one direction far more than in all others, so that the limit holds; of TALL it does not.
    """
    generator = torch.Generator().manual_seed(0)

    def noise(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    base = {name: noise(shape).to(dtype) for name, shape in SHAPES.items()}
    save(directory / "base", base)
    for task in TASKS:
        tuned = {name: (x + noise(SHAPES[name]) / 900).to(dtype) for name, x in base.items()}
        strong = (noise((48, 1)) @ noise((1, 80)) / 9 + noise((48, 80)) / 900 + base[WIDE]).to(dtype)
        save(directory / task, tuned | {WIDE: strong} | ({} if task == "a" else {ALONE: base[ALONE]}))
    models = [{"model": directory / task} for task in TASKS]
    return write_recipe(
        directory / "recipe.yml", base_model=directory / "base", models=models, parameters={"density": 0.1} | parameters
    )


def make(directory: Path, recipe: Path) -> Path:
    cpimerge.plan(recipe, directory / "plan", **LIMITS)
    cpimerge.fuse(directory / "plan", directory / "out", **LIMITS)
    return directory


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By dtype a directory with inputs, `plan` and `out`. Not to be changed."""
    made = {}
    for name, dtype in DTYPES.items():
        directory = tmp_path_factory.mktemp(name)
        made[name] = make(directory, write(directory, dtype))
    return made


def copied(original: Path, to: Path) -> Path:
    for name in ("plan", "out"):
        shutil.copytree(original / name, to / name)
    return to


@pytest.fixture
def home(originals: dict[str, Path], tmp_path: Path) -> Path:
    """The one in float32, to be spoilt. Its inputs stay where they are."""
    return copied(originals["F32"], tmp_path)


# --- what is right ----------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["tensor", "row"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk", [1 << 9, 1 << 18])
def test_levelled_merges(tmp_path: Path, dtype: str, granularity: str, chunk: int) -> None:
    """In one chunk or in many, also of a part of a row; and every element is counted once."""
    with small_chunks(chunk):
        make(tmp_path, write(tmp_path, DTYPES[dtype], granularity=granularity, scope="layer", conflict="elect"))
        found = cpimerge.verify(tmp_path / "out", threads=2)
        plan = Plan.load(tmp_path / "plan")
        assert [tensor.name for tensor in plan.tensors if tensor.is_levelled] == [TALL, WIDE]
        assert (found.failures, found.notes) == ((), ())
        assert found == cpimerge.verify(tmp_path / "out", **LIMITS)
    elements = sum(math.prod(shape) for shape in SHAPES.values())
    item = 4 if dtype == "F32" else 2
    assert (found.tensors, found.elements, found.core + found.blended) == (len(SHAPES), elements, elements)
    assert found.core == sum(tensor.claimed for tensor in plan.tensors) > 0
    assert (found.input_bytes, found.output_bytes) == (4 * item * elements, item * elements)


@pytest.mark.parametrize(
    "parameters",
    [
        {"rest": 0.5, "backbone": "base"},
        {"rest": 0},
        {"density": 0},
        {"density": 1, "conflict": "largest"},
        {"singular_values": "keep"},
        {"space": "weights"},
    ],
)
def test_settings(tmp_path: Path, parameters: dict[str, Any]) -> None:
    make(tmp_path, write(tmp_path, **parameters))
    found = verify(tmp_path)
    assert (found.failures, found.notes) == ((), ())
    levels = (
        parameters.get("rest") != 0
        and parameters.get("density") != 1
        and not parameters.keys() & {"singular_values", "space"}
    )
    assert Plan.load(tmp_path / "plan").tensors[2].is_levelled is levels


def test_other_dtypes_of_output_and_tasks(tmp_path: Path) -> None:
    write(tmp_path, torch.float32)
    for task in "ab":
        save(tmp_path / task, {k: v.bfloat16() for k, v in load_file(tmp_path / task / "model.safetensors").items()})
    models = [{"model": tmp_path / task} for task in TASKS]
    recipe = write_recipe(tmp_path / "recipe.yml", base_model=tmp_path / "base", models=models, dtype="float16")
    assert verify(make(tmp_path, recipe)).failures == ()


# --- levelling by svd -------------------------------------------------------------------------------


def by_svd(fold: Floats, most: float = math.inf) -> npt.NDArray[np.float64]:
    u, sigmas, v = np.linalg.svd(fold.astype(np.float64), full_matrices=False)
    if not sigmas.any():
        return np.zeros(fold.shape)
    cap = max(8 * math.sqrt(float(np.mean(sigmas**2))), 2 * float(np.sum(sigmas**2) / np.sum(sigmas)))
    result: npt.NDArray[np.float64] = (u * np.minimum(12 * sigmas, cap)) @ v
    return result * min(1.0, most / float(np.linalg.norm(result)))


def matrices() -> dict[str, Floats]:
    rng = np.random.default_rng(0)
    rows, columns = rng.normal(size=(100, 60)), rng.normal(size=(60, 700))
    made = {
        "square": rng.normal(size=(64, 64)),
        "wide, of more than a block": rng.normal(size=(60, 1100)),
        "tall": rng.normal(size=(600, 40)) ** 3,
        "of rank 1": np.outer(rows[:, 0], columns[0]),
        "of rank 8": rows[:, :8] @ columns[:8],
        "one strong direction": rng.normal(size=(100, 700)) + 300 * np.outer(rows[:, 0], columns[0]),
        "one large element": rng.normal(size=(100, 700)) + 3000 * np.eye(100, 700) * (np.arange(700) == 5),
        "heavy tails": rng.standard_t(1.5, size=(300, 500)),
        "few rows": rows[:, :1] * columns[:1] * (np.arange(100) % 10 == 3)[:, None],
        "small": 1e-20 * rng.normal(size=(40, 60)),
        "so small that digits are lost": 1e-41 * rng.normal(size=(40, 60)),
        "large": 1e37 * rng.normal(size=(40, 60)) / 9,
        "one element": 1.0 * np.eye(32, 33) * (np.arange(33) == 5),
        "zero": np.zeros((32, 40)),
    }
    return {name: values.astype(np.float32) for name, values in made.items()}


@pytest.mark.parametrize("name", matrices())
@pytest.mark.parametrize("share", [0.01, 0.9, math.inf])
def test_levelling(name: str, share: float) -> None:
    """In float64 from first principles, and what fuse computes in float32 is within a tolerance that is no larger."""
    fold = matrices()[name]
    expected, largest = by_svd(fold), float(np.abs(fold).max())
    most = share * float(np.linalg.norm(expected)) if expected.any() else math.inf
    expected *= min(1.0, share)
    own = verify_levels.levelled(given := fold.copy(), most)
    assert np.shares_memory(own.values, given)
    error = np.abs(own.values.reshape(fold.shape) - expected).max()
    assert error <= own.tolerance / 4
    with levelling.one_thread():
        levelling.level(its := fold.copy(), most)
    assert np.abs(its - expected).max() <= own.tolerance / 2
    assert own.tolerance <= 4e-6 * (12 * largest * min(1.0, share) + np.abs(expected).max()) * 1.001 + 40 * 1.2e-38 * (
        largest > 0
    )


@pytest.mark.parametrize("name", ["square", "tall", "one strong direction", "heavy tails", "of rank 1"])
@pytest.mark.parametrize("constant", ["GAIN", "CAP", "CAP_OF_LOW_RANK"])
def test_another_rule_is_beyond_the_tolerance(name: str, constant: str) -> None:
    """Each constant that counts in a matrix, a thousandth off."""
    fold = matrices()[name]
    own = verify_levels.levelled(fold.copy(), math.inf)
    with mock.patch.object(levelling, constant, getattr(levelling, constant) * 1.001):
        levelling.level(other := fold.copy())
    difference = np.abs(other.reshape(-1) - own.values).max()
    counts = {
        "GAIN": name in ("square", "heavy tails"),
        "CAP": name in ("square", "tall"),
        "CAP_OF_LOW_RANK": name == "of rank 1",
    }
    assert difference > 2 * own.tolerance or not counts[constant]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nothing_follows_from_what_is_not_finite(value: float) -> None:
    fold = matrices()["square"]
    fold[3, 4] = value
    with np.errstate(invalid="ignore"):
        assert np.isnan(verify_levels.levelled(fold, math.inf).values).all()


def test_nothing_follows_from_what_cannot_be_decomposed() -> None:
    with mock.patch.object(np.linalg, "eigh", side_effect=np.linalg.LinAlgError("did not converge")):
        assert np.isnan(verify_levels.levelled(matrices()["square"], math.inf).values).all()


# --- what is wrong ----------------------------------------------------------------------------------


def fold_of(home: Path, original: Path, tensor: str) -> Floats:
    """Of a plan of float32 with granularity tensor."""
    plan = Plan.load(home / "plan")
    blend = next(one.blend for one in plan.tensors if one.name == tensor)
    assert blend is not None
    assert blend.coefficients is not None
    base = load_file(original / "base" / "model.safetensors")[tensor].numpy()
    members = [load_file(original / name / "model.safetensors")[tensor].numpy() - base for name in plan.fold]
    total: Floats = np.float32(blend.coefficients[0]) * members[0]
    for coefficient, member in zip(blend.coefficients[1:], members[1:], strict=True):
        total = total + np.float32(coefficient) * member
    return total


def claimed(home: Path, tensor: str) -> set[int]:
    entry = next(one for one in Plan.load(home / "plan").tensors if one.name == tensor)
    return set().union(*(core[entry.first_chunk] for core in read_cores(home / "plan")))


def constant(value: float) -> Callable[[float], float]:
    return lambda _: value


def set_element(home: Path, tensor: str, index: int, change: Callable[[float], float]) -> None:
    """One float32 of the output, under right hashes."""
    file = home / "out" / "model.safetensors"
    raw = bytearray(file.read_bytes())
    (length,) = struct.unpack("<Q", raw[:8])
    place = 8 + length + json.loads(raw[8 : 8 + length])[tensor]["data_offsets"][0] + 4 * index
    (value,) = struct.unpack_from("<f", raw, place)
    struct.pack_into("<f", raw, place, change(value))
    file.write_bytes(raw)
    reseal(home)


@pytest.mark.parametrize("tensor", [WIDE, TALL])
@pytest.mark.parametrize("sign", [1, -1])
def test_an_element_beyond_the_tolerance(originals: dict[str, Path], home: Path, tensor: str, sign: int) -> None:
    """It is told with what svd says that it should be; half as far from it is no failure."""
    fold = fold_of(home, originals["F32"], tensor)
    base = load_file(originals["F32"] / "base" / "model.safetensors")[tensor].numpy()
    free_of_limit, most = by_svd(fold), 0.03 * float(np.linalg.norm(base.astype(np.float64)))
    scale = min(1.0, most / float(np.linalg.norm(free_of_limit)))
    assert (scale < 1) is (tensor == WIDE)
    levelled = scale * free_of_limit
    tolerance = 4e-6 * (12 * scale * np.abs(fold).max() + np.abs(levelled).max())
    exact = (base + levelled).reshape(-1)
    cores = claimed(home, tensor)
    free = [index for index in range(fold.size) if index not in cores and abs(exact[index]) < 0.1]  # so as to set it
    whole = (home / "out" / "model.safetensors").read_bytes()
    for index in (free[0], free[len(free) // 2], free[-1]):
        set_element(home, tensor, index, constant(exact[index] + sign * tolerance / 2))
        assert verify(home).ok
        set_element(home, tensor, index, constant(exact[index] + sign * 1.5 * tolerance))
        failure = only(refuse(home))
        assert (failure.tensor, failure.index, failure.problem) == (tensor, index, GIVES)
        assert failure.expected is not None
        assert float(failure.expected.split()[0]) == pytest.approx(exact[index], abs=tolerance / 8)
        (home / "out" / "model.safetensors").write_bytes(whole)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.0])
def test_an_element_that_is_anything_else(home: Path, value: float) -> None:
    index = next(index for index in range(48 * 80) if index not in claimed(home, WIDE))
    set_element(home, WIDE, index, lambda _: value)
    failure = only(refuse(home))
    assert (failure.tensor, failure.index, failure.problem) == (WIDE, index, GIVES)


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_any_bit_of_16(originals: dict[str, Path], tmp_path: Path, dtype: str) -> None:
    """The lowest bit of an element, too, is more than the tolerance."""
    home = copied(originals[dtype], tmp_path)
    file = home / "out" / "model.safetensors"
    whole = file.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    entries = json.loads(whole[8 : 8 + length])
    for tensor in (WIDE, TALL):
        cores = claimed(home, tensor)
        for index in range(0, 48 * 80, 97):
            bit = index // 97 % 16
            flip(file, 8 * (8 + length + entries[tensor]["data_offsets"][0] + 2 * index) + bit)
            reseal(home)
            failure = only(refuse(home))
            problem = "is not the value of its core" if index in cores else GIVES
            assert (failure.tensor, failure.index) == (tensor, index)
            assert failure.problem in (problem, "is not finite")
            file.write_bytes(whole)


def test_a_core_of_a_levelled_tensor_is_exact(home: Path) -> None:
    """However near the tolerance says that an element may be."""
    index = min(claimed(home, WIDE))
    set_element(home, WIDE, index, lambda value: float(np.nextafter(np.float32(value), np.float32(9))))
    failure = only(refuse(home))
    assert (failure.tensor, failure.index, failure.problem) == (WIDE, index, "is not the value of its core")


def test_an_output_that_is_not_levelled(originals: dict[str, Path], home: Path, tmp_path: Path) -> None:
    """What `singular_values: keep` gives, in the place of it: all elements but those of cores are another's."""
    recipe = write(tmp_path / "kept", torch.float32, singular_values="keep")
    make(tmp_path / "kept", recipe)
    shutil.copyfile(tmp_path / "kept" / "out" / "model.safetensors", home / "out" / "model.safetensors")
    reseal(home)
    assert {failure.tensor for failure in refuse(home)} == {WIDE, TALL}


# --- what must be levelled --------------------------------------------------------------------------


def switch(name: str, levelled: bool) -> Callable[[dict[str, Any]], None]:
    def change(raw: dict[str, Any]) -> None:
        (entry,) = (entry for entry in raw["tensors"] if entry["name"] == name)
        assert (entry["blend"]["levelled"] > 0) is not levelled
        entry["blend"]["levelled"] = float(levelled)

    return change


@pytest.mark.parametrize(
    ("parameters", "tensor", "said"),
    [({}, WIDE, False), ({}, ALONE, True), ({"singular_values": "keep"}, TALL, True)],
)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_plan_that_levels_others(
    tmp_path: Path, parameters: dict[str, Any], tensor: str, said: bool, when: str
) -> None:
    """Before it was fused, or after, where the elements are others, too."""
    cpimerge.plan(write(tmp_path, **parameters), tmp_path / "plan", **LIMITS)
    (right,) = (
        each.blend.levelled for each in Plan.load(tmp_path / "plan").tensors if each.name == tensor and each.blend
    )
    if when == "after":
        cpimerge.fuse(tmp_path / "plan", tmp_path / "out", **LIMITS)
    edit(tmp_path / "plan", switch(tensor, said))
    if when == "before":
        cpimerge.fuse(tmp_path / "plan", tmp_path / "out", **LIMITS)
    else:
        change_manifest(tmp_path)
    failures = refuse(tmp_path)
    expected = Failure(
        str(tmp_path / "plan" / "plan.json"), f"levelled is {float(said)}, and {right} by what was read", tensor
    )
    assert failures[-1] == expected
    elements = [(failure.tensor, failure.problem) for failure in failures[:-1]]
    gives = GIVES if said else "is not the blend that its coefficients give"
    assert elements == ([] if when == "before" else [(tensor, gives)])
    if when == "before":
        assert verify(tmp_path, sample="99%").failures == ()  # which counts nothing


def test_deltas_that_became_weights(tmp_path: Path) -> None:
    """A plan whose space was edited levels nothing, so it must not say that it does."""
    make(tmp_path, write(tmp_path))
    edit(tmp_path / "plan", lambda raw: raw["settings"].update(space="weights"))
    with pytest.raises(PlanError) as raised:
        Plan.load(tmp_path / "plan")
    assert [problem.partition(": ")[2] for problem in raised.value.problems] == [
        f"tensor {name!r}: `levelled` is for differences: space is weights. Run `cpimerge plan` again"
        for name in (TALL, WIDE)
    ]


@pytest.mark.parametrize("switched", [False, True])
def test_without_a_recipe(tmp_path: Path, switched: bool) -> None:
    """How far what is levelled is taken as it is planned."""
    recipe = replace(cpimerge.load_recipe(write(tmp_path)), text="")
    cpimerge.plan(recipe, tmp_path / "plan", **LIMITS)
    edit(tmp_path / "plan", switch(WIDE, levelled=False))
    if switched:
        edit(tmp_path / "plan", switch(ALONE, levelled=True))
    cpimerge.fuse(tmp_path / "plan", tmp_path / "out", **LIMITS)
    found = verify(tmp_path)
    assert found.failures == ()
    (note,) = found.notes
    assert note.endswith("so sizes of cores and what is levelled are taken as they are")


# --- inputs that changed ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["base", "a"])
@pytest.mark.parametrize("value", [math.nan, math.inf, 1.0, 3e38])
def test_inputs_that_changed(tmp_path: Path, name: str, value: float) -> None:
    """Told as of any other tensor, without a warning of numpy's, which pytest makes an error."""
    make(tmp_path, write(tmp_path, torch.float32))
    file = tmp_path / name / "model.safetensors"
    tensors = load_file(file)
    tensors[WIDE].view(-1)[-3:] = torch.tensor([value, -value, value])
    save_file(tensors, file, metadata={"format": "pt"})
    for options in ({}, {"sample": "90%"}):
        failures = refuse(tmp_path, **options)
        assert {failure.tensor for failure in failures} <= {WIDE, None}  # None: sums over all
        assert any(failure.problem == GIVES for failure in failures)
        assert any(failure.problem == "changed since it was planned" for failure in failures) == (not options)


# --- a sample ---------------------------------------------------------------------------------------


def test_a_sample_reads_a_levelled_tensor_whole_or_not_at_all(tmp_path: Path) -> None:
    """And counts nothing of those that it does not read."""
    with small_chunks(100):
        make(tmp_path, write(tmp_path, torch.float32))
        every = sum(math.prod(shape) for shape in SHAPES.values())
        found = verify(tmp_path, sample="1%")
        assert found.failures == ()
        assert found.tensors == len(SHAPES) - 1
        assert found.elements == found.core + found.blended == 48 * 80 + 3 * 100 + 50
        assert found.output_bytes == 4 * found.elements
        assert found.input_bytes == 4 * 4 * found.elements
        (note,) = found.notes
        assert note.startswith("1 of 2 tensors whose singular values are levelled were not looked at")
        assert found == cpimerge.verify(tmp_path / "out", sample="1%", threads=3)
        whole = verify(tmp_path, sample="80%")
        assert (whole.failures, whole.notes, whole.tensors) == ((), (), len(SHAPES))
        assert whole.elements < every


def test_a_sample_finds_what_it_reads(home: Path) -> None:
    """A change of either of two is seen where that one is read, with its place, and else not."""
    seen = []
    whole = (home / "out" / "model.safetensors").read_bytes()
    for tensor in (WIDE, TALL):
        last = max(set(range(48 * 80)) - claimed(home, tensor))
        set_element(home, tensor, last, lambda value: value + 1)
        seen.append([(failure.tensor, failure.index) for failure in verify(home, sample="1%").failures])
        assert only(refuse(home, sample="99%")).index == last
        (home / "out" / "model.safetensors").write_bytes(whole)
        if seen[-1]:
            assert seen[-1] == [(tensor, last)]
    assert sorted(map(len, seen)) == [0, 1]


@pytest.mark.parametrize("share", ["1/1000", "1/100", "1/7", "1/2", "9/10", "999/1000"])
def test_which_a_sample_reads(originals: dict[str, Path], share: str) -> None:
    """So many that their elements are nearest to the share, of all sizes, spread over the model."""
    plan = Plan.load(originals["BF16"] / "plan")
    one = next(tensor for tensor in plan.tensors if tensor.is_levelled)
    rng = np.random.default_rng(0)
    shapes = [(int(rows), 32) for rows in rng.integers(32, 500, 300)]
    tensors = [one.model_copy(update={"name": f"layers.{i}.w", "shape": [*shape]}) for i, shape in enumerate(shapes)]
    chosen = verify_levels.sampled(tensors, Fraction(share))
    sizes = [math.prod(shape) * (f"layers.{i}.w" in chosen) for i, shape in enumerate(shapes)]
    assert len(chosen) >= 1
    for half in (slice(150), slice(300)):
        every = sum(math.prod(shape) for shape in shapes[half])
        assert abs(sum(sizes[half]) - Fraction(share) * every) <= 500 * 32
    others = [tensor for tensor in plan.tensors if not tensor.is_levelled]
    assert verify_levels.sampled(others, Fraction(share)) == set()


# --- memory -----------------------------------------------------------------------------------------


def test_memory_for_a_whole_matrix(originals: dict[str, Path]) -> None:
    """A budget without room for it is refused; with it, one is held at a time."""
    made = originals["BF16"]
    plan = Plan.load(made / "plan")
    assert verify_levels.matrix_bytes(plan) >= 4 * 48 * 80 + 5 * 8 * 48 * 48 + 2 * 48 * 80
    pools: list[Workers] = []
    held: list[bool] = []

    def recorded(fold: Floats, most: float, share: float) -> verify_levels.Levelled:
        held.append(not pools[0].whole.acquire(blocking=False))
        return verify_levels.levelled(fold, most, share)

    @contextmanager
    def opened(threads: int, checkpoints: int, matrices: int) -> Iterator[Workers]:
        assert matrices == 1
        with workers(threads, checkpoints, matrices) as pool:
            pools.append(pool)
            yield pool

    least = RUNTIME_BYTES + 3 * verifying.worker_bytes(plan) + verify_levels.matrix_bytes(plan)
    with pytest.raises(cpimerge.ResourceError, match="is too little for 3 threads"):
        cpimerge.verify(made / "out", threads=3, memory=least - 1)
    with mock.patch.object(verifying, "levelled", recorded), mock.patch.object(verifying, "workers", opened):
        assert cpimerge.verify(made / "out", threads=3, memory=least).ok
    assert held == [True, True]
