"""plan and fuse against the slow reference, on generated checkpoints and recipes."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from fractions import Fraction
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import reference
import torch
from checkpoints import Case, cases, settings, ulps, write_case
from hypothesis import assume, given
from hypothesis import strategies as st
from safetensors.torch import load_file

from cpimerge import analysis, examination, fuse, load_recipe, passes, preflight, selection, stream
from cpimerge.budget import Budget
from cpimerge.cores import CoreReader
from cpimerge.plan_arrays import chunks_of
from cpimerge.plan_file import COEFFICIENTS_FILE, Plan
from cpimerge.planning import make_plan
from cpimerge.staging import Target, Watch
from cpimerge.stream import chunks, row_count

NOBODY = Watch(lambda *_: None, lambda *_: None)
FOLD_TOLERANCE = 1e-6  # coefficients are rounded to float32


@contextmanager
def small_chunks(elements: int) -> Iterator[None]:
    """Chunks so small that little tensors have many of them, and blocks of two chunks."""
    with (
        mock.patch.object(stream, "CHUNK", elements),
        mock.patch.object(stream, "CHUNK_ROWS", 3),
        mock.patch.object(examination, "BLOCK_CHUNKS", 2),
        mock.patch.object(analysis, "CHUNK", elements),
        mock.patch.object(passes, "CHUNK", max(elements, selection.RUN)),
    ):
        yield


@contextmanager
def rough_guesses(whole: int, run: int, deviations: float, crowded: float, gathered: int) -> Iterator[None]:
    """Samples of so few elements that brackets are wide or wrong, and so little room that it is soon used up.

    For every tensor, however small.
    """
    with (
        mock.patch.object(selection, "WHOLE", whole),
        mock.patch.object(selection, "RUN", run),
        mock.patch.object(passes, "RUN", run),
        mock.patch.object(selection, "DEVIATIONS", deviations),
        mock.patch.object(passes, "CROWDED", crowded),
        mock.patch.object(passes, "FEW", 0),
        mock.patch.object(examination, "GATHERED", gathered),
        mock.patch.object(analysis, "is_single", return_value=False),
    ):
        yield


def plan_and_fuse(directory: Path, case: Case, s: reference.Settings, *, shared: bool) -> Plan:
    """Plan with every pool shared by all workers or with none, and fuse into `out`."""
    recipe = load_recipe(write_case(directory, case, s, shards=min(2, len(case.base))))
    small = 0 if shared else 1 << 30
    with mock.patch.object(examination, "SMALL", small), mock.patch.object(examination, "SMALL_ROWS", small):
        plan = make_plan(preflight.check(recipe), Target(directory / "plan"), Budget(2, 0), NOBODY)
    fuse(directory / "plan", directory / "out", threads=2)
    return plan


def coefficients(plan: Plan, directory: Path, rest: Fraction) -> dict[str, np.ndarray]:
    """Each blended tensor's coefficients float64 [units, members], without `rest` (all 0 where that is 0)."""
    rows = None if plan.coefficients_xxh3 is None else np.load(directory / "plan" / COEFFICIENTS_FILE)
    result = {}
    for tensor in plan.tensors:
        if tensor.blend is None:
            continue
        if rows is None:
            found = np.array([tensor.blend.coefficients])
        else:
            found = rows[tensor.first_row :][: row_count(tuple(tensor.shape), "row")].astype(np.float64)
        result[tensor.name] = found / float(rest) if rest else found
    return result


def planned_cores(plan: Plan, directory: Path) -> dict[str, dict[str, list[int]]]:
    """Task -> float tensor -> flat indices, as the plan has them on disk."""
    result: dict[str, dict[str, list[int]]] = {}
    for task in plan.tasks:
        result[task.name] = {}
        with closing(CoreReader(directory / "plan" / task.core_file, task.core_xxh3, chunks_of(plan))) as reader:
            for tensor in plan.tensors:
                if tensor.action == "copy":
                    continue
                every = chunks(tuple(tensor.shape), plan.settings.granularity) if tensor.action == "blend" else []
                result[task.name][tensor.name] = [
                    chunk.start + int(place)
                    for number, chunk in enumerate(every)
                    for place in reader.positions(tensor.first_chunk + number, chunk.size)
                ]
    return result


def check_overlaps(plan: Plan, expected: reference.Result) -> None:
    for pair in plan.pairs:
        ab = (pair.a, pair.b)
        assert pair.jaccard == float(expected.jaccard[ab])
        assert pair.chance == float(expected.chance[ab] or 0)
        lift = expected.lift[ab]
        assert pair.lift == (None if lift is None else float(lift))
        assert (pair.compared, pair.aligned) == (expected.compared[ab], expected.aligned[ab])
        assert pair.expected == pytest.approx(float(expected.expected[ab]), rel=1e-12)
        assert pair.layers == {layer: float(found[ab]) for layer, found in expected.layer_jaccard.items()}
    assert plan.stages == expected.stages
    assert [name.replace("backbone", "path") for name in plan.fold] == expected.fold


def check_statistics(plan: Plan, expected: reference.Result) -> None:
    for tensor in plan.tensors:
        for task, found in tensor.tasks.items():
            stats = expected.stats[task][tensor.name]
            assert (found.changed, found.near, found.rounding) == (stats.changed, stats.tiny, stats.half_ulp)
            assert found.core == stats.core
            assert found.sum_in == pytest.approx(stats.sum_in, rel=1e-9, abs=1e-30)
            if tensor.action == "blend":
                assert found.sum_out == pytest.approx(stats.sum_out, rel=1e-9, abs=1e-30)


def check_output(directory: Path, case: Case, expected: reference.Result) -> None:
    out: dict[str, torch.Tensor] = {}
    for shard in (directory / "out").glob("*.safetensors"):
        out |= load_file(shard)
    assert out.keys() == case.base.keys()
    for name, tensor in expected.fused.items():
        assert (out[name].dtype, out[name].shape) == (tensor.dtype, tensor.shape)
        if name in expected.tolerance:
            check_levelled(out[name], expected.fused32[name], expected.tolerance[name], name)
        else:
            assert reference.same_bytes(out[name], tensor), f"{name}: {ulps(out[name], tensor)} units apart"


def check_levelled(found: torch.Tensor, wanted: np.ndarray, tolerance: np.ndarray, name: str) -> None:
    """Rounding keeps the order, so it must lie between what the two ends of the tolerance become; cores have none."""
    lowest, highest = (
        torch.from_numpy(wanted.astype(np.float64) + side * tolerance).to(found.dtype) for side in (-1, 1)
    )
    values = found.reshape(-1)
    outside = torch.nonzero((values < lowest) | (values > highest)).flatten().tolist()
    assert not outside, f"{name}: {len(outside)} of {values.numel()} too far away, the first is {outside[0]}"


def check_coefficients(plan: Plan, directory: Path, case: Case, s: reference.Settings) -> None:
    """Against the reference's running fold, where rounding alone cannot turn a slerp into a lerp."""
    own = reference.run(case.base, case.experts, s, case.extra)
    if own.fragile or not s.rest:
        return
    found = coefficients(plan, directory, s.rest)
    assert found.keys() == own.coefficients.keys()
    for name, wanted in own.coefficients.items():
        np.testing.assert_allclose(found[name], wanted, rtol=FOLD_TOLERANCE, atol=FOLD_TOLERANCE, err_msg=name)
    for tensor in plan.tensors:
        steps = [step for unit in own.steps.get(tensor.name, []) for step in unit]
        if tensor.blend is not None:
            assert (tensor.blend.steps, tensor.blend.slerped) == (len(steps), sum(step.slerp for step in steps))


def check_everything(directory: Path, case: Case, s: reference.Settings, *, shared: bool = False) -> Plan:
    """Plan, fuse, and compare every number and every byte with the reference."""
    plan = plan_and_fuse(directory, case, s, shared=shared)
    result = reference.run(case.base, case.experts, s, case.extra, coefficients(plan, directory, s.rest))
    assert planned_cores(plan, directory) == result.cores
    levelled = {tensor.name: tensor.blend.levelled for tensor in plan.tensors if tensor.blend is not None}
    assert levelled == pytest.approx(result.levelled, rel=1e-6, abs=1e-9)
    check_overlaps(plan, result)
    check_statistics(plan, result)
    check_output(directory, case, result)
    check_coefficients(plan, directory, case, s)
    return plan


@given(st.data(), st.booleans(), st.sampled_from([1, 5, 8, 1 << 18]))
def test_every_number_and_byte_is_the_references(data: st.DataObject, shared: bool, chunk: int) -> None:
    case = data.draw(cases())
    s = data.draw(settings(case))
    assume(s.t is not None or s.weight != 0 or s.backbone in ("base", "path"))
    with tempfile.TemporaryDirectory() as temporary, small_chunks(chunk):
        check_everything(Path(temporary), case, s, shared=shared)


@given(
    st.data(),
    st.booleans(),
    st.sampled_from([5, 1 << 18]),
    st.sampled_from([2, 6, 12]),
    st.sampled_from([1, 2]),
    st.sampled_from([0.0, 0.5, 3.5]),
    st.sampled_from([0.0, 0.3, 1.0]),
    st.sampled_from([0, 3, 1 << 20]),
)
def test_guesses_change_nothing(
    data: st.DataObject,
    shared: bool,
    chunk: int,
    whole: int,
    run: int,
    deviations: float,
    crowded: float,
    gathered: int,
) -> None:
    """Wrong brackets, too many open elements and too many candidates are found out, and cost only time."""
    case = data.draw(cases())
    s = data.draw(settings(case))
    assume(s.t is not None or s.weight != 0 or s.backbone in ("base", "path"))
    guesses = rough_guesses(whole, run, deviations, crowded, gathered)
    with tempfile.TemporaryDirectory() as temporary, guesses, small_chunks(chunk):
        check_everything(Path(temporary), case, s, shared=shared)


def fine_tunes(names: Sequence[str], *, seed: int = 0, step: float = 2.0**-7) -> Case:
    """A small model and fine-tunes of it whose updates take few values, so that ties are everywhere.

    A tenth of each update is 0; half of it is shared with the task before, so that cores meet.
    """
    rng = np.random.default_rng(seed)
    shapes = {
        "model.embed.weight": (9, 4),
        "model.layers.0.mlp.weight": (6, 5),
        "model.layers.1.mlp.weight": (6, 5),
        "model.layers.10.mlp.bias": (7,),
        "model.scale": (),
    }
    base = {name: torch.from_numpy(rng.normal(size=shape)).to(torch.bfloat16) for name, shape in shapes.items()}
    updates = {name: rng.integers(-5, 6, shape) for name, shape in shapes.items()}
    experts = {}
    for task in names:
        for name, shape in shapes.items():
            fresh = rng.integers(-5, 6, shape) * (rng.random(shape) > 0.1)
            updates[name] = np.where(rng.random(shape) < 0.5, updates[name], fresh)
        experts[task] = {
            name: (tensor.double() + step * torch.from_numpy(np.asarray(updates[name]))).to(torch.bfloat16)
            for name, tensor in base.items()
        }
    extra = {name: (tensor.double() + 0.25).to(torch.bfloat16) for name, tensor in base.items()}
    ids = {"ids": torch.arange(5)}
    return Case(base | ids, {task: tensors | ids for task, tensors in experts.items()}, extra | ids)


@pytest.mark.parametrize("space", ["weights", "delta"])
@pytest.mark.parametrize("granularity", ["tensor", "row"])
@pytest.mark.parametrize("scope", ["tensor", "layer", "global"])
def test_every_combination(tmp_path: Path, scope: str, granularity: str, space: str) -> None:
    case = fine_tunes(["a", "b", "c"])
    every = product(["last", "first", "largest", "mean", "elect"], ["last", "base", "b", "path"])
    for number, (conflict, backbone) in enumerate(every):
        s = reference.Settings(
            density=Fraction(3, 10),
            scope=scope,
            granularity=granularity,
            space=space,
            conflict=conflict,
            backbone=backbone,
            rest=Fraction(1, 2) if space == "delta" else Fraction(1),
        )
        check_everything(tmp_path / str(number), case, s)


@pytest.mark.parametrize(
    "s",
    [
        reference.Settings(stages=[["c", "a"], ["b"]], conflict="first"),
        reference.Settings(order=7, tau=Fraction(1), conflict="last"),
        reference.Settings(order=8, tau=Fraction(1), conflict="last"),
        reference.Settings(tau=Fraction(0), backbone="a"),
        reference.Settings(weight=lambda task, _: Fraction({"a": 1, "b": 3, "c": 0}[task])),
        reference.Settings(density=lambda task, _: Fraction({"a": 1, "b": 3, "c": 0}[task], 10)),
        reference.Settings(t=Fraction(3, 10), backbone="base"),
        reference.Settings(exclude=["*.bias", "embed"], conflict="mean"),
        reference.Settings(density=Fraction(1), conflict="largest"),
        reference.Settings(density=Fraction(0)),
        reference.Settings(density=Fraction(1), conflict="elect", space="delta", rest=Fraction(0)),
        reference.Settings(dtype=torch.float32, conflict="elect"),
        reference.Settings(dtype=torch.float16, conflict="mean", granularity="row", space="delta"),
    ],
)
def test_settings_one_by_one(tmp_path: Path, s: reference.Settings) -> None:
    if not callable(s.density) and s.density == Fraction(1, 100):
        s = replace(s, density=Fraction(3, 10))
    check_everything(tmp_path, fine_tunes(["a", "b", "c"]), s)


@pytest.mark.parametrize("conflict", ["last", "first", "largest", "mean", "elect"])
@pytest.mark.parametrize("tasks", [1, 2, 10])
def test_number_of_tasks(tmp_path: Path, tasks: int, conflict: str) -> None:
    case = fine_tunes([f"task{number}" for number in range(tasks)])
    s = reference.Settings(density=Fraction(1, 4), conflict=conflict, space="delta")
    plan = check_everything(tmp_path, case, s)
    assert len(plan.pairs) == tasks * (tasks - 1) // 2


def test_one_task_alone_is_that_task(tmp_path: Path) -> None:
    case = fine_tunes(["a"])
    check_everything(tmp_path, case, reference.Settings())
    out = load_file(tmp_path / "out" / "model.safetensors")
    assert all(reference.same_bytes(out[name], tensor) for name, tensor in case.experts["a"].items())


@pytest.mark.parametrize("space", ["weights", "delta"])
def test_duplicates_of_one_task_are_that_task(tmp_path: Path, space: str) -> None:
    one = fine_tunes(["a"])
    case = Case(one.base, dict.fromkeys("abc", one.experts["a"]), one.extra)
    settings = reference.Settings(density=Fraction(3, 10), space=space, tau=Fraction(1, 10))
    plan = check_everything(tmp_path, case, settings)
    assert plan.stages == [["a", "b", "c"]]
    assert {pair.jaccard for pair in plan.pairs} == {1.0}
    out = load_file(tmp_path / "out" / "model.safetensors")
    assert all(reference.same_bytes(out[name], tensor) for name, tensor in one.experts["a"].items())


def test_fewer_changes_than_core_elements(tmp_path: Path) -> None:
    case = fine_tunes(["a", "b"])
    for tensors in case.experts.values():
        changed = case.base["model.layers.0.mlp.weight"].clone()
        changed[2, 3] += 1
        tensors["model.layers.0.mlp.weight"] = changed
    plan = check_everything(tmp_path, case, reference.Settings(density=Fraction(1, 2)))
    (tensor,) = (t for t in plan.tensors if t.name == "model.layers.0.mlp.weight")
    assert [task.core for task in tensor.tasks.values()] == [1, 1]


def test_no_changes_at_all(tmp_path: Path) -> None:
    case = fine_tunes(["a", "b"])
    same = Case(case.base, dict.fromkeys("ab", case.base), case.base)
    plan = check_everything(tmp_path, same, reference.Settings(density=Fraction(1, 2)))
    assert plan.actions == {"copy": 1, "identical": 5, "lerp": 0, "slerp": 0}
    assert [pair.jaccard for pair in plan.pairs] == [0.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_chunks_of_the_real_size(tmp_path: Path, dtype: torch.dtype) -> None:
    """A tensor of several chunks, read once and read for every pass, against torch on the whole tensor."""
    generator = torch.Generator().manual_seed(0)
    shape = (1100, 1024)  # more than four chunks
    base = torch.randn(shape, generator=generator).to(dtype)
    experts = [(base.float() + 0.01 * torch.randn(shape, generator=generator)).to(dtype) for _ in range(3)]
    case = Case({"w": base}, {name: {"w": x} for name, x in zip("abc", experts, strict=True)}, {"w": base})
    s = reference.Settings(density=Fraction(1, 20), space="weights", conflict="largest")
    outputs = []
    for shared in (True, False):
        directory = tmp_path / str(shared)
        plan = plan_and_fuse(directory, case, s, shared=shared)
        outputs.append(load_file(directory / "out" / "model.safetensors")["w"])
        magnitudes = [(x.float() - base.float()).abs().flatten() for x in experts]
        k = base.numel() // 20
        cores = [set(torch.sort(m, descending=True, stable=True).indices[:k].tolist()) for m in magnitudes]
        found = planned_cores(plan, directory)
        assert [set(found[name]["w"]) for name in "abc"] == cores
        values = torch.stack([x.double().flatten() for x in experts])
        mean, terms = values.mean(0), values.abs().amax(0)
        one_rounding = (torch.finfo(dtype).eps / 2 * mean.abs()).clamp(min=2.0**-25)  # float16's subnormals
        error = (outputs[-1].double().flatten() - mean).abs()
        error[sorted(set().union(*cores))] = 0
        assert bool((error <= one_rounding + 4 * 2.0**-24 * terms).all())  # the blend itself is float32
    assert reference.same_bytes(*outputs)


@pytest.mark.parametrize("others", [0.0, 1.0])
def test_elect_sums_in_stage_order_whatever_else_is_contested(tmp_path: Path, others: float) -> None:
    """Ten updates whose float32 sum depends on its order, alone in their chunk or beside another contested element."""
    updates = [2.0**-30, 1.0, 2.0**-24, 2.0**-24, 2.0**-24, -1.0, 2.0**-25, -(2.0**-23), 2.0**-26, -(2.0**-24)]
    base = {"w": torch.zeros(2)}
    experts = {f"t{n}": {"w": torch.tensor([update, others])} for n, update in enumerate(updates)}
    s = reference.Settings(density=Fraction(1), conflict="elect", space="delta", rest=Fraction(0))
    check_everything(tmp_path, Case(base, experts, base), s)


def looks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the tensors whose chunks are looked at from now on, a name a look."""
    seen: list[str] = []
    look = passes.Passes._look

    def watched(self: passes.Passes, spec: preflight.TensorSpec, *rest: Any) -> Any:
        seen.append(spec.name)
        return look(self, spec, *rest)

    monkeypatch.setattr(passes.Passes, "_look", watched)
    return seen


@pytest.mark.parametrize("shared", [False, True])
def test_everything_is_looked_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared: bool) -> None:
    """Also where all of a little tensor lies at the threshold, and where many updates are equal."""
    rng = np.random.default_rng(0)
    update = rng.normal(size=(600, 1000)).astype(np.float32)
    threshold = np.sort(np.abs(update).ravel())[-30_000]
    base = {"l.0.norm": torch.zeros(64), "l.0.w": torch.zeros(600, 1000)}
    expert = {"l.0.norm": torch.full((64,), float(threshold)), "l.0.w": torch.from_numpy(update)}
    case = Case(base, {"a": expert}, base)
    s = reference.Settings(density=Fraction(1, 20), scope="layer", backbone="base")
    seen = looks(monkeypatch)
    check_everything(tmp_path, case, s, shared=shared)
    assert sorted(seen) == ["l.0.norm", "l.0.w", "l.0.w", "l.0.w"]


@pytest.mark.parametrize("shared", [False, True])
def test_a_crowd_of_equal_updates_is_looked_at_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared: bool
) -> None:
    rng = np.random.default_rng(0)
    update = rng.choice(np.array([0, 1, 2, 4], np.float32), size=(600, 1000), p=[0.4, 0.3, 0.2, 0.1])
    base = {"w": torch.zeros(600, 1000)}
    case = Case(base, {"a": {"w": torch.from_numpy(update)}}, base)
    seen = looks(monkeypatch)
    check_everything(tmp_path, case, reference.Settings(density=Fraction(1, 5)), shared=shared)
    assert sorted(seen) == ["w"] * 6
