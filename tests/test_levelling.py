"""Singular values made level: against svd, the memory it takes, and `fuse` where it takes a matrix whole."""

from __future__ import annotations

import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import reference
import torch
from checkpoints import save, write_recipe
from files import tree
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import cpimerge
from cpimerge import (
    IncompatibleError,
    PlanError,
    RecipeError,
    ResourceError,
    budget,
    fusion,
    levelling,
    needs,
    preflight,
    probe,
)
from cpimerge import stream as streaming
from cpimerge import writer as writing
from cpimerge.budget import RUNTIME_BYTES, Budget, format_size
from cpimerge.levelling import (
    BLOCK,
    CAP,
    CAP_OF_LOW_RANK,
    GAIN,
    LEAST,
    LIMIT,
    apart,
    can_level,
    level,
    level_bytes,
    level_work,
    reach,
)
from cpimerge.plan_file import Plan
from cpimerge.stream import PENDING

MB = 1_000_000
LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
ROOT = Path(cpimerge.__file__).parents[1]


# --- the computation --------------------------------------------------------------------------------


def levelled(update: np.ndarray) -> np.ndarray:
    result = update.astype(np.float32)
    level(result)
    return result


def with_values(rng: np.random.Generator, shape: tuple[int, int], values: np.ndarray) -> np.ndarray:
    """A float32 matrix of random directions and these singular values."""
    left, _ = np.linalg.qr(rng.normal(size=(shape[0], len(values))))
    right, _ = np.linalg.qr(rng.normal(size=(shape[1], len(values))))
    return np.asarray((left * values) @ right.T, np.float32)


def spiked(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Noise, and one element a million times as large."""
    update = rng.normal(size=shape)
    update[shape[0] // 2, shape[1] // 3] = 1e6
    return update.astype(np.float32)


KINDS: dict[str, Callable[[np.random.Generator, tuple[int, int]], np.ndarray]] = {
    "noise": lambda rng, shape: rng.normal(size=shape).astype(np.float32),
    "falling": lambda rng, shape: with_values(rng, shape, 1 / np.arange(1.0, min(shape) + 1)),
    "alike": lambda rng, shape: with_values(rng, shape, np.ones(min(shape))),
    "low rank": lambda rng, shape: with_values(rng, shape, np.array([3.0, 2.0, 1.0, 1.0])),
    "one direction": lambda rng, shape: with_values(rng, shape, np.array([0.01])),
    "few steps": lambda rng, shape: (rng.integers(-1, 2, shape) * (rng.random(shape) < 0.01) / 128).astype(np.float32),
    "a spike": spiked,
}
SHAPES = [
    (32, 32), (33, 700), (700, 33), (64, BLOCK - 1), (BLOCK, 64), (48, BLOCK + 1), (40, 2 * BLOCK + 1), (150, 151),
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", list(KINDS))
def test_it_is_what_svd_makes_of_it(kind: str, shape: tuple[int, int]) -> None:
    update = KINDS[kind](np.random.default_rng(7), shape)
    wanted, found = reference.level(update.astype(np.float64)), levelled(update)
    assert (np.abs(found - wanted) <= reference.level_error(update.astype(np.float64))).all()


def test_the_tolerance_tells_other_caps_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the test above shows little: a cap of a thousandth more is seen."""
    for name, kind in (("CAP", "noise"), ("CAP_OF_LOW_RANK", "one direction"), ("GAIN", "falling")):
        update = KINDS[kind](np.random.default_rng(7), (64, 300))
        wanted, error = reference.level(update.astype(np.float64)), reference.level_error(update.astype(np.float64))
        with monkeypatch.context() as patched:
            patched.setattr(levelling, name, getattr(levelling, name) * 1.001)
            assert (np.abs(levelled(update) - wanted) > error).any(), name


def test_the_numbers_are_the_references() -> None:
    assert (GAIN, CAP, CAP_OF_LOW_RANK) == (reference.GAIN, reference.CAP, reference.CAP_OF_LOW_RANK)
    assert float(reference.LIMIT) == LIMIT
    assert can_level((reference.SIDE, reference.SIDE), "l.0.")
    assert not can_level((reference.SIDE - 1, reference.SIDE), "l.0.")


def values_of(update: np.ndarray) -> np.ndarray:
    return np.linalg.svd(update.astype(np.float64), compute_uv=False)


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("share", [0.01, 0.999, 1.001])
def test_it_is_scaled_down_to_the_most_that_it_may_be(kind: str, share: float) -> None:
    update = KINDS[kind](np.random.default_rng(5), (64, 600))
    free, limited = levelled(update), update.copy()
    most = share * float(np.linalg.norm(free.astype(np.float64)))
    level(limited, most)
    error = 2 * reference.level_error(update.astype(np.float64))
    assert (np.abs(limited - min(1.0, share) * free) <= error).all()
    assert np.linalg.norm(limited.astype(np.float64)) <= most * (1 + 1e-5)
    wanted = reference.level(update.astype(np.float64), most)
    assert (np.abs(limited - wanted) <= error).all()


def test_how_far_a_matrix_may_be_moved() -> None:
    base = np.random.default_rng(0).normal(size=(40, 50)).astype(np.float32)
    squares = float(np.sum(base.astype(np.float64) ** 2))
    for rest in (Fraction(1), Fraction(3, 10)):
        assert reach(squares, float(rest)) == pytest.approx(reference.most(base, rest), rel=1e-12)
    assert reach(0.0, 1.0) == reference.most(0 * base, Fraction(1)) == math.inf


def test_low_rank_has_a_higher_cap() -> None:
    """One value of 64: the root mean square is an eighth of it, and eight times that would be the cap."""
    update = with_values(np.random.default_rng(0), (64, 300), np.full(1, 2.0))
    np.testing.assert_allclose(values_of(levelled(update))[:1], CAP_OF_LOW_RANK * 2.0, rtol=1e-5)


def test_a_strong_direction_is_capped_and_others_keep_their_order() -> None:
    values = np.r_[50.0, np.linspace(1.0, 0.5, 199)]
    found = values_of(levelled(with_values(np.random.default_rng(0), (200, 300), values)))
    cap = max(CAP * np.sqrt(np.mean(values**2)), CAP_OF_LOW_RANK * np.sum(values**2) / np.sum(values))
    assert cap < 50
    np.testing.assert_allclose(found, [cap, *(GAIN * values[1:])], rtol=1e-5)


def test_rounding_stays_next_to_nothing() -> None:
    """Three directions, and what rounding to bfloat16 adds in all others: it grows by GAIN and no more."""
    rng = np.random.default_rng(0)
    exact = with_values(rng, (96, 400), np.array([4.0, 3.0, 2.0]))
    rounded = torch.from_numpy(exact).bfloat16().float().numpy()
    noise, found = values_of(rounded)[3:], values_of(levelled(rounded))
    assert 0 < noise[0] < 0.01
    np.testing.assert_allclose(found[3:], GAIN * noise, rtol=1e-3)


@pytest.mark.parametrize("kind", list(KINDS))
def test_nothing_is_strengthened_by_more_than_the_gain(kind: str) -> None:
    update = KINDS[kind](np.random.default_rng(3), (80, 200))
    before, after = values_of(update), values_of(levelled(update))
    roundings = 1e-6 * before[0]  # of what the cap is taken from
    assert (after <= GAIN * before + roundings).all()
    cap = max(CAP * np.sqrt(np.mean(before**2)), CAP_OF_LOW_RANK * np.sum(before**2) / np.sum(before))
    assert (after <= cap + roundings).all()
    assert (np.diff(after) <= 0).all()


@pytest.mark.parametrize("factor", [2.0**-40, 1e-6, 3.7, 2.0**30])
def test_it_scales_with_the_update(factor: float) -> None:
    update = KINDS["falling"](np.random.default_rng(1), (64, 600))
    scaled = (factor * update).astype(np.float32)
    error = 2 * reference.level_error(scaled.astype(np.float64))
    assert (np.abs(levelled(scaled) - factor * levelled(update).astype(np.float64)) <= error).all()


@pytest.mark.parametrize("kind", list(KINDS))
def test_rows_and_columns_are_alike(kind: str) -> None:
    update = KINDS[kind](np.random.default_rng(2), (70, 600))
    error = 2 * reference.level_error(update.astype(np.float64))
    assert (np.abs(levelled(update.T).T - levelled(update)) <= error).all()


@pytest.mark.parametrize("shape", [(32, 32), (40, 600), (600, 40)], ids=str)
def test_nothing_stays_nothing(shape: tuple[int, int]) -> None:
    update = np.zeros(shape, np.float32)
    level(update)
    assert not update.any()


@pytest.mark.parametrize(
    ("shape", "layer", "expected"),
    [
        ((32, 32), "model.layers.0.", True),
        ((32, 5000), "0.", True),
        ((31, 5000), "model.layers.0.", False),
        ((5000, 31), "model.layers.0.", False),
        ((5000, 512), "", False),
        ((5000,), "model.layers.0.", False),
        ((), "model.layers.0.", False),
        ((64, 64, 64), "model.layers.0.", False),
        ((0, 64), "model.layers.0.", False),
    ],
)
def test_what_can_be_levelled(shape: tuple[int, ...], layer: str, expected: bool) -> None:
    assert can_level(shape, layer) is expected


PEAK = """
import sys, threading, time
import numpy as np
from cpimerge.levelling import level, one_thread

def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))

shape, samples, over = (int(sys.argv[1]), int(sys.argv[2])), [0], threading.Event()

def watch():
    while not over.is_set():
        samples.append(anonymous())
        time.sleep(0.0005)

with one_thread():
    level(np.eye(40, dtype=np.float32))
    before = anonymous()
    update = np.random.default_rng(0).standard_normal(shape, np.float32)
    watching = threading.Thread(target=watch)
    watching.start()
    level(update)
    over.set()
    watching.join()
print(max(samples) - before, len(samples))
"""


@LINUX
@pytest.mark.parametrize("shape", [(1100, 1100), (700, 4000), (4000, 700), (64, 200_000), (200_000, 64)], ids=str)
def test_it_takes_no_more_memory_than_it_says(shape: tuple[int, int]) -> None:
    """LAPACK's own work is in it, which Python does not see. And it says at most twice of what is taken."""
    command = [sys.executable, "-c", PEAK, *map(str, shape)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    peak, samples = map(int, done.stdout.split())
    assert samples > 20
    assert level_bytes(shape) / 2 < peak <= level_bytes(shape)


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "7"} | more


# --- in a merge -------------------------------------------------------------------------------------

# Several chunks each; all but the embedding, the bias and the narrow matrix are levelled.
MATRICES = {f"model.layers.{number}.w": shape for number, shape in enumerate([(70, 100), (100, 70), (64, 64)])}
OTHERS = {"model.embed.weight": (90, 64), "model.layers.0.b": (70,), "model.layers.3.narrow": (31, 200)}


def save_models(home: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype = torch.float32) -> None:
    """A base and two fine-tunes that share a direction."""
    generator = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save(home / "base", {name: tensor.to(dtype) for name, tensor in base.items()})
    for task in ("a", "b"):
        updates = {name: torch.randn(tensor.shape, generator=generator) / 50 + 0.01 for name, tensor in base.items()}
        save(home / task, {name: (tensor + updates[name]).to(dtype) for name, tensor in base.items()})


def recipe(home: Path, **more: Any) -> Path:
    models = [{"model": home / "a"}, {"model": home / "b"}]
    parameters = {"density": 0.1, "conflict": "largest"} | more.pop("parameters", {})
    return write_recipe(home / "recipe.yml", base_model=home / "base", models=models, parameters=parameters, **more)


@contextmanager
def small_chunks() -> Iterator[None]:
    """Chunks of 1,000 elements, and a record whenever something was written."""
    with mock.patch.object(streaming, "CHUNK", 1_000), mock.patch.object(writing, "FLUSH_BYTES", 1):
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints, their plan and what comes of it. Not to be changed."""
    home = tmp_path_factory.mktemp("models")
    save_models(home, MATRICES | OTHERS)
    with small_chunks():
        cpimerge.plan(recipe(home, dtype="bfloat16"), home / "plan", threads=1)
        cpimerge.fuse(home / "plan", home / "out", threads=1)
    return home


def test_the_plan_says_what_is_levelled(models: Path) -> None:
    tensors = Plan.load(models / "plan").tensors
    assert {tensor.name for tensor in tensors if tensor.is_levelled} == set(MATRICES)
    assert {tensor.name for tensor in tensors if tensor.blend and not tensor.blend.levelled} == set(OTHERS)


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({"singular_values": "level"}, True),
        ({"rest": 0.01}, True),
        ({"granularity": "row"}, True),
        ({"singular_values": "keep"}, False),
        ({"rest": 0}, False),
        ({"rest": 0, "singular_values": "level"}, False),
        ({"space": "weights"}, False),
        ({"space": "weights", "singular_values": "keep"}, False),
    ],
)
def test_when_it_is_levelled(models: Path, tmp_path: Path, parameters: dict[str, Any], expected: bool) -> None:
    path = write_recipe(
        tmp_path / "recipe.yml",
        base_model=models / "base",
        models=[{"model": models / "a"}, {"model": models / "b"}],
        parameters=parameters,
    )
    plan = cpimerge.plan(path, tmp_path / "plan", threads=1)
    assert {tensor.name for tensor in plan.tensors if tensor.is_levelled} == (set(MATRICES) if expected else set())
    inputs = preflight.check(cpimerge.load_recipe(path))
    assert {spec.name for spec in needs.levelled(inputs)} == (set(MATRICES) if expected else set())


def test_what_is_all_in_cores_is_not_levelled(models: Path, tmp_path: Path) -> None:
    both = [{"model": models / "a"}, {"model": models / "b"}]
    path = write_recipe(tmp_path / "r.yml", base_model=models / "base", models=both, parameters={"density": 1})
    assert not any(tensor.is_levelled for tensor in cpimerge.plan(path, tmp_path / "plan", threads=1).tensors)


def together(*updates: torch.Tensor) -> float:
    """How far these updates are apart."""
    flat = torch.stack([update.flatten() for update in updates]).double()
    return apart((flat @ flat.T).numpy())


def test_how_far_updates_are_apart() -> None:
    a, b, c = torch.eye(3)
    assert together(a, a) == together(a, 2 * a, 0 * a) == together(a) == together(0 * a, 0 * a) == 0
    assert together(a, -3 * a) == 0  # one direction, too
    assert together(a, b) == together(a, b, c) == together(a, b, 0 * a) == 1
    assert together(a, b + a) == pytest.approx((1 + 2**0.5) ** 2 / (3 + 2**0.5) - 1)
    assert together(a, 0.25 * b) == pytest.approx(1.25**2 / (1 + 0.25**2) - 1)
    assert together(a, 1e-3 * b) == 0  # less than LEAST
    assert together(a, 0.006 * b) == pytest.approx(1.006**2 / (1 + 0.006**2) - 1)
    assert together(a, 0.006 * b) > LEAST


@given(st.integers(0, 2**32 - 1), st.integers(1, 5))
@settings(max_examples=50)
def test_it_depends_on_no_scale_and_no_order(seed: int, count: int) -> None:
    updates = torch.randn(count, 20, generator=torch.Generator().manual_seed(seed)).double()
    updates[0] *= 3
    share = together(*updates)
    assert 0 <= share <= 1
    assert together(*(7 * updates)) == pytest.approx(share, rel=1e-9, abs=1e-12)
    assert together(*updates.flip(0)) == pytest.approx(share, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("most", [math.inf, 0.5])
def test_of_a_share_the_rest_stays(share: float, most: float) -> None:
    update = np.random.default_rng(0).normal(size=(40, 70)).astype(np.float32)
    found, whole = update.copy(), update.copy()
    level(found, most, share)
    level(whole, most)
    np.testing.assert_allclose(found, (1 - share) * update + share * whole, rtol=0, atol=2e-5)


def test_a_model_with_itself_is_that_model(models: Path, tmp_path: Path) -> None:
    """And one beside another that hardly moved is what the fold makes of the two."""
    moved = load_file(models / "a" / "model.safetensors")
    base = load_file(models / "base" / "model.safetensors")
    hardly = {name: tensor + (moved[name] - tensor).flip(0) * 1e-4 for name, tensor in base.items()}
    for name, tensors in {"base": base, "a": moved, "b": moved, "hardly": hardly}.items():
        save(tmp_path / name, tensors)
    cpimerge.merge(recipe(tmp_path, parameters={"density": 0}), tmp_path / "out", threads=1)
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        torch.testing.assert_close(tensor, moved[name])
    save(tmp_path / "b", hardly)
    written = []
    for values in ("level", "keep"):
        path = recipe(tmp_path, parameters={"density": 0, "singular_values": values})
        cpimerge.merge(path, tmp_path / values, threads=1)
        written.append(load_file(tmp_path / values / "model.safetensors"))
    assert all(torch.equal(written[0][name], written[1][name]) for name in base)


def test_one_tasks_update_is_left_as_it_is(models: Path, tmp_path: Path) -> None:
    """Also where another checkpoint, which is no task, has moved the matrix too."""
    base = load_file(models / "base" / "model.safetensors")
    moved = load_file(models / "a" / "model.safetensors")
    only = base | {"model.layers.0.w": moved["model.layers.0.w"], "model.layers.1.w": base["model.layers.1.w"] + 1}
    for name, tensors in {"base": base, "a": only, "b": base | {"model.layers.1.w": moved["model.layers.1.w"]}}.items():
        save(tmp_path / name, tensors)
    save(tmp_path / "other", moved)
    for backbone in ("last", "./other"):
        plan = cpimerge.plan(
            recipe(tmp_path, parameters={"backbone": backbone}), tmp_path / "plan", threads=1, force=True
        )
        assert [tensor.name for tensor in plan.tensors if tensor.is_levelled] == ["model.layers.1.w"]


def test_one_task_alone_needs_no_memory_for_it(models: Path, tmp_path: Path) -> None:
    path = write_recipe(tmp_path / "r.yml", base_model=models / "base", models=[{"model": models / "a"}])
    plan = cpimerge.plan(path, tmp_path / "plan", threads=1)
    assert not any(tensor.is_levelled for tensor in plan.tensors)
    assert needs.matrix_bytes(preflight.check(cpimerge.load_recipe(path))) == needs.fuse_matrix_bytes(plan) == 0


def test_every_fine_tune_is_still_in_its_core(models: Path) -> None:
    """With cores of everything the result is what it is without levelling."""
    outputs = []
    for values in ("level", "keep"):
        path = recipe(models, parameters={"density": 1, "singular_values": values})
        cpimerge.merge(path, models / values, threads=1)
        outputs.append(tree(models / values)["model.safetensors"])
    assert outputs[0] == outputs[1]


# --- the same bytes ---------------------------------------------------------------------------------

LARGE = {f"model.layers.{number}.w": shape for number, shape in enumerate([(500, 700), (700, 500), (600, 520)])}


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Matrices of more than one chunk and more than one block of columns, their plan and what comes of it."""
    home = tmp_path_factory.mktemp("large")
    save_models(home, LARGE | {"model.embed.weight": (900, 500)}, torch.bfloat16)
    cpimerge.plan(recipe(home, parameters={"granularity": "row"}), home / "plan", threads=1)
    cpimerge.fuse(home / "plan", home / "out", threads=1)
    yield home
    shutil.rmtree(home)


def least(plan_dir: Path, threads: int) -> int:
    plan = Plan.load(plan_dir)
    return RUNTIME_BYTES + threads * needs.fuse_worker_bytes(plan) + needs.fuse_matrix_bytes(plan)


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("more", [0, 100 * MB, None])
def test_the_same_bytes_for_every_thread_count_and_budget(
    large: Path, tmp_path: Path, threads: int, more: int | None
) -> None:
    memory = None if more is None else least(large / "plan", threads) + more
    cpimerge.fuse(large / "plan", tmp_path / "out", threads=threads, memory=memory)
    assert same_files(tmp_path / "out", large / "out")


@pytest.mark.parametrize("blas", ["1", "2", "4", None])
def test_the_same_bytes_however_many_threads_blas_has(large: Path, tmp_path: Path, blas: str | None) -> None:
    names = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
    setting = {} if blas is None else dict.fromkeys(names, blas)
    unset = {name: value for name, value in environment().items() if not name.endswith("_NUM_THREADS")}
    command = [sys.executable, "-m", "cpimerge", "fuse", str(large / "plan"), "-o", str(tmp_path / "out"), "--quiet"]
    subprocess.run([*command, "--threads", "2"], env=unset | setting, check=True)
    assert same_files(tmp_path / "out", large / "out")


def same_files(one: Path, other: Path) -> bool:
    """Without showing megabytes of difference."""
    return tree(one) == tree(other)


def test_a_merge_is_a_plan_and_a_fuse(large: Path, tmp_path: Path) -> None:
    cpimerge.merge(large / "recipe.yml", tmp_path / "out", threads=2)
    assert same_files(tmp_path / "out", large / "out")


def test_as_many_matrices_at_a_time_as_there_is_room_for(
    large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They wait for each other, so that it would not end with fewer than there may be."""
    inside, most, lock = 0, [0], threading.Lock()
    meeting = threading.Barrier(1)

    def counted(update: np.ndarray, most_of_it: float, share: float) -> None:
        nonlocal inside
        with lock:
            inside += 1
            most.append(inside)
        meeting.wait(timeout=60)
        level(update, most_of_it, share)
        with lock:
            inside -= 1

    monkeypatch.setattr(fusion, "level", counted)
    matrix = needs.fuse_matrix_bytes(Plan.load(large / "plan"))
    for matrices, parties in ((1, 1), (3, 3)):
        meeting, most[:] = threading.Barrier(parties), [0]
        memory = least(large / "plan", 4) + (matrices - 1) * matrix
        cpimerge.fuse(large / "plan", tmp_path / "out", threads=4, memory=memory, force=True)
        assert max(most) == matrices
        assert same_files(tmp_path / "out", large / "out")


# --- cut off ----------------------------------------------------------------------------------------


class Stop(BaseException):
    """In place of Ctrl-C, at a chosen moment."""


def failing(at: int, error: BaseException) -> Callable[[np.ndarray, float, float], None]:
    """`level`, which raises at call `at`, from 1, with half of its work done."""
    calls = 0

    def fail(update: np.ndarray, most: float, share: float) -> None:
        nonlocal calls
        calls += 1
        if calls == at:
            update[: len(update) // 2] *= 3
            raise error
        level(update, most, share)

    return fail


@pytest.mark.parametrize("place", [1, 2, 3])
def test_a_run_that_stops_while_it_levels_goes_on(models: Path, tmp_path: Path, place: int) -> None:
    with small_chunks():
        with mock.patch.object(fusion, "level", failing(place, Stop())), pytest.raises(Stop):
            cpimerge.fuse(models / "plan", tmp_path / "out", threads=1)
        assert not (tmp_path / "out").exists()
        cpimerge.fuse(models / "plan", tmp_path / "out", threads=2)
    assert same_files(tmp_path / "out", models / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_run_that_stops_at_any_chunk_goes_on(models: Path, tmp_path: Path) -> None:
    """Also where the chunk is one of a levelled tensor, of which a part is written by then."""
    write, writes = writing.ShardWriter.write, 0

    def stop(self: writing.ShardWriter, data: memoryview, offset: int) -> None:
        nonlocal writes
        writes += 1
        if writes == place:
            raise Stop
        write(self, data, offset)

    place, stopped = 0, True
    while stopped:
        place, writes, stopped = place + 1, 0, False
        with small_chunks():
            with mock.patch.object(writing.ShardWriter, "write", stop):
                try:
                    cpimerge.fuse(models / "plan", tmp_path / "out", threads=1)
                except Stop:
                    stopped = True
                    assert not (tmp_path / "out").exists()
            if stopped:
                cpimerge.fuse(models / "plan", tmp_path / "out", threads=2)
        assert same_files(tmp_path / "out", models / "out")
        shutil.rmtree(tmp_path / "out")
    with small_chunks():
        every = sum(len(streaming.chunks(shape, "tensor")) for shape in (MATRICES | OTHERS).values())
    assert place == 1 + every + 1  # the header is written, too


KILLED = """
import os, signal, sys
from cpimerge import fuse, fusion, stream, writer

stream.CHUNK, writer.FLUSH_BYTES = 1_000, 1
level, calls = fusion.level, []

def kill(update, most, share):
    calls.append(1)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    level(update, most, share)

fusion.level = kill
fuse(sys.argv[1], sys.argv[2], threads=1)
"""


def test_a_killed_run_goes_on(models: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(models / "plan"), str(tmp_path / "out")]
    assert subprocess.run(command, env=environment(), check=False).returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    with small_chunks():
        cpimerge.fuse(models / "plan", tmp_path / "out", threads=2)
    assert same_files(tmp_path / "out", models / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_decomposition_that_fails(models: Path, tmp_path: Path) -> None:
    error = np.linalg.LinAlgError("Eigenvalues did not converge")
    failing_once = mock.patch.object(fusion, "level", failing(2, error))
    with small_chunks(), failing_once, pytest.raises(IncompatibleError) as raised:
        cpimerge.fuse(models / "plan", tmp_path / "out", threads=1)
    assert str(raised.value) == (
        "tensor 'model.layers.1.w': its singular values cannot be computed (Eigenvalues did not converge). "
        "Set singular_values: keep in the recipe"
    )
    assert not (tmp_path / "out").exists()


# --- what does not fit, and what changes meanwhile --------------------------------------------------

PLACE = (3, 17)
INDEX = PLACE[0] * 40 + PLACE[1]


def save_at(home: Path, base: float, update: float, own: float) -> None:
    """Matrices of 32 x 40 that are `base`, each moved by `update` in one place, by `own` in a place of its own, and by
    hardly anything elsewhere. Without `own`, the place of the second is another one."""
    start = torch.full((32, 40), base)
    save(home / "base", {"model.layers.0.w": start})
    for number, task in enumerate("ab"):
        noise = torch.randn(32, 40, generator=torch.Generator().manual_seed(number)) * (update * 1e-6)
        noise[10 + number, 2] = own
        noise[PLACE if own or not number else (20, 5)] = update
        save(home / task, {"model.layers.0.w": start + noise})


TOO_LARGE = "does not fit float32. The inputs are too large to merge"
TOO_LARGE_FOR_HALF = "does not fit float16. Set dtype: bfloat16 or float32 in the recipe"


@pytest.mark.parametrize(
    ("base", "update", "own", "dtype", "message", "levelled"),
    [
        (65_000.0, 500.0, 0.0, "float16", TOO_LARGE_FOR_HALF, True),
        (0.0, 3.3e38, 3.3e38, None, TOO_LARGE, False),  # the fold is: at an angle of 60 degrees, 1.15 times as large
        (0.0, 3.3e38, 0.0, None, TOO_LARGE, True),  # what it is levelled to is
    ],
    ids=["output", "fold", "levelled"],
)
def test_results_that_do_not_fit(
    tmp_path: Path, base: float, update: float, own: float, dtype: str | None, message: str, levelled: bool
) -> None:
    save_at(tmp_path, base, update, own)
    path = recipe(tmp_path, parameters={"density": 0}, **({"dtype": dtype} if dtype else {}))
    cpimerge.plan(path, tmp_path / "plan", threads=1)
    before = tree(tmp_path)
    with mock.patch.object(fusion, "level", wraps=level) as watched, pytest.raises(IncompatibleError) as raised:
        cpimerge.fuse(tmp_path / "plan", tmp_path / "out", threads=1)
    assert watched.called is levelled
    assert str(raised.value) == f"tensor 'model.layers.0.w': flat index {INDEX}: the result {message}"
    assert tree(tmp_path) == before


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("model", ["base", "a", "b"])
def test_an_input_that_changed_since_it_was_planned(models: Path, tmp_path: Path, model: str) -> None:
    home = tmp_path / "models"
    shutil.copytree(models, home)
    cpimerge.plan(recipe(home), home / "plan", threads=1, force=True)
    file = home / model / "model.safetensors"
    flip(file, file.stat().st_size - 10)  # of model.layers.3.narrow, which is not levelled
    changed(home, tmp_path, model, "model.layers.3.narrow")
    flip(file, file.stat().st_size - 10)
    narrow = 4 * math.prod(OTHERS["model.layers.3.narrow"])
    flip(file, file.stat().st_size - narrow - 10)
    changed(home, tmp_path, model, "model.layers.2.w")


def changed(home: Path, tmp_path: Path, model: str, tensor: str) -> None:
    with pytest.raises(PlanError) as raised:
        cpimerge.fuse(home / "plan", tmp_path / "out", threads=1)
    assert raised.value.problems[0] == f"{home / model}: tensor {tensor!r}: changed since planned"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["models"]


@pytest.mark.parametrize("model", ["base", "a", "b"])
def test_an_input_that_changes_between_its_two_reads(models: Path, tmp_path: Path, model: str) -> None:
    """A levelled tensor is read once for its singular values and once for the base and the cores."""
    home = tmp_path / "models"
    shutil.copytree(models, home)
    file = home / model / "model.safetensors"
    offset = file.stat().st_size - 4 * math.prod(OTHERS["model.layers.3.narrow"]) - 10
    calls = 0
    with small_chunks():
        cpimerge.plan(recipe(home), home / "plan", threads=1, force=True)

    def change(update: np.ndarray, most: float, share: float) -> None:
        nonlocal calls
        calls += 1
        level(update, most, share)
        if calls == len(MATRICES):
            with file.open("r+b") as handle:
                handle.seek(offset)
                byte = handle.read(1)[0]
                handle.seek(offset)
                handle.write(bytes([byte ^ 1]))

    with small_chunks(), mock.patch.object(fusion, "level", change):
        changed(home, tmp_path, model, "model.layers.2.w")


# --- recipes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        (
            "  singular_values: level\n  space: weights",
            "5: parameters.singular_values: is for deltas, and space is weights; remove one of the two",
        ),
        (
            "  singular_values: leveled",
            "5: parameters.singular_values: unknown value 'leveled'; did you mean 'level'?",
        ),
        ("  singular_values: 5", "5: parameters.singular_values: unknown value '5'; valid values: level, keep"),
        ("  singular_value: keep", "5: parameters.singular_value: unknown key; did you mean 'singular_values'?"),
    ],
)
def test_recipes_that_are_wrong(tmp_path: Path, lines: str, problem: str) -> None:
    path = tmp_path / "recipe.yml"
    opening = "merge_method: cpi\nbase_model: ./base\nmodels: [{model: ./a}, {model: ./b}]\nparameters:\n"
    path.write_text(f"{opening}{lines}\n", encoding="utf-8")
    with pytest.raises(RecipeError) as raised:
        cpimerge.load_recipe(path)
    assert raised.value.problems == (f"{path}:{problem}",)


@pytest.mark.parametrize(
    ("values", "space", "rest", "expected"),
    [
        (None, None, None, True),
        ("level", "delta", 0.5, True),
        ("keep", "delta", None, False),
        (None, "weights", None, False),
        ("keep", "weights", None, False),
        ("level", None, 0, False),
    ],
)
def test_what_a_recipe_says(
    tmp_path: Path, values: str | None, space: str | None, rest: float | None, expected: bool
) -> None:
    given = {"singular_values": values, "space": space, "rest": rest}
    recipe(tmp_path, parameters={key: value for key, value in given.items() if value is not None})
    assert cpimerge.load_recipe(tmp_path / "recipe.yml").levels is expected


# --- what it needs ----------------------------------------------------------------------------------


def test_what_is_needed_for_the_largest_matrix(models: Path) -> None:
    inputs = preflight.check(cpimerge.load_recipe(recipe(models)))
    largest = max(level_bytes(shape) + 4 * math.prod(shape) for shape in MATRICES.values())
    assert needs.matrix_bytes(inputs) == largest
    assert needs.fuse_matrix_bytes(Plan.load(models / "plan")) == largest - 2 * 70 * 100  # bfloat16


def test_what_waits_is_counted_for_each_thread(large: Path) -> None:
    """Whole results of 2 bytes an element, beside what `fuse` needs where nothing is levelled."""
    kept = recipe(large, parameters={"granularity": "row", "singular_values": "keep"})
    without = cpimerge.plan(kept, large / "kept", threads=1)
    recipe(large, parameters={"granularity": "row"})
    plan = Plan.load(large / "plan")
    elements = max(math.prod(shape) for shape in LARGE.values())
    assert needs.fuse_worker_bytes(plan) - needs.fuse_worker_bytes(without) == PENDING * 2 * elements
    assert needs.fuse_matrix_bytes(without) == 0
    assert needs.fuse_matrix_bytes(plan) == max(level_bytes(shape) + 2 * math.prod(shape) for shape in LARGE.values())
    inputs = preflight.check(cpimerge.load_recipe(large / "recipe.yml"))
    assert needs.matrix_bytes(inputs) == needs.fuse_matrix_bytes(plan)
    assert needs.worker_bytes(inputs) >= needs.fuse_worker_bytes(plan)


def test_an_estimate_has_the_memory_and_the_time(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_disk_rate", lambda target: 1e15)  # so that the disk decides nothing
    monkeypatch.setattr(probe, "_level_seconds", lambda inputs: 7e6)
    found = cpimerge.estimate(large / "recipe.yml", threads=2, memory=least(large / "plan", 2) + 500 * MB)
    assert found.memory_bytes == least(large / "plan", 2) + 500 * MB
    assert found.fuse_seconds is not None
    assert 7e6 / 2 < found.fuse_seconds < 7e6 / 2 + 1000
    assert found.output_bytes == 2 * sum(map(math.prod, [*LARGE.values(), (900, 500)]))


def test_the_time_of_levelling_grows_with_what_is_levelled(large: Path) -> None:
    recipe(large, parameters={"singular_values": "keep"})
    assert probe._level_seconds(preflight.check(cpimerge.load_recipe(large / "recipe.yml"))) == 0
    recipe(large, parameters={"granularity": "row"})
    assert probe._level_seconds(preflight.check(cpimerge.load_recipe(large / "recipe.yml"))) > 0
    assert level_work((100, 300)) == level_work((300, 100)) < level_work((200, 300))
    assert level_work((100, 600)) - level_work((100, 300)) == 100 * 100 * 300


WORKER, MATRIX = 10 * MB, 100 * MB


def test_a_budget_has_room_for_one_matrix_at_least() -> None:
    least = RUNTIME_BYTES + 3 * WORKER + MATRIX
    assert Budget.divide(WORKER, 3, least, MATRIX) == Budget(3, least, 1)
    message = (
        f"memory: {format_size(least - 1)} is too little for 3 threads and this many models: at least "
        rf"\S+ MB is needed. Raise it, or use one thread \(\S+ MB\). Levelled matrices take "
        r"100 MB of it \(singular_values\)"
    )
    with pytest.raises(ResourceError) as raised:
        Budget.divide(WORKER, 3, least - 1, MATRIX)
    assert re.fullmatch(message, str(raised.value))
    with pytest.raises(ResourceError, match=r"Raise the budget\. Levelled matrices take 100 MB of it"):
        Budget.divide(WORKER, 1, 5, MATRIX)
    with pytest.raises(ResourceError) as plain:
        Budget.divide(WORKER, 1, 5)
    assert "singular_values" not in str(plain.value)


@pytest.mark.parametrize(
    ("threads", "more", "matrices"),
    [(3, MATRIX - 1, 1), (3, MATRIX, 2), (3, 2 * MATRIX, 3), (3, 9 * MATRIX, 3), (1, 9 * MATRIX, 1)],
)
def test_the_rest_of_a_budget_is_for_more_matrices(threads: int, more: int, matrices: int) -> None:
    total = RUNTIME_BYTES + threads * WORKER + MATRIX + more
    assert Budget.divide(WORKER, threads, total, MATRIX) == Budget(threads, total, matrices)


@pytest.mark.parametrize(
    ("machine", "matrices"), [(100_000, 4), (2 * (RUNTIME_BYTES // MB + 40 + 250), 2), (700, 1), (400, 1)]
)
def test_the_default_is_a_matrix_for_each_thread_in_half_of_the_machine(
    monkeypatch: pytest.MonkeyPatch, machine: int, matrices: int
) -> None:
    """A megabyte at most is the default where nothing is levelled, so that it decides nothing here."""
    monkeypatch.setattr(budget, "_machine_bytes", lambda: machine * MB)
    monkeypatch.setattr(budget, "DEFAULT_SHARED_BYTES", 0)
    monkeypatch.setattr(budget, "DEFAULT_THREAD_BYTES", 0)
    found = Budget.divide(WORKER, 4, None, MATRIX)
    least = RUNTIME_BYTES + 4 * WORKER + MATRIX
    assert found.matrices == matrices
    assert found.peak_bytes == max(least, min(least + 3 * MATRIX, machine * MB // 2))


def test_a_machine_that_cannot_hold_one() -> None:
    with pytest.raises(ResourceError, match="and this machine has"):
        Budget.divide(WORKER, 1, None, 1 << 60)


def test_without_matrices_the_default_is_what_it_was() -> None:
    assert Budget.divide(WORKER, 2, None) == Budget(2, 400 * MB + 2 * 64 * MB, 1)
