"""How two checkpoints differ, against lines of numpy over whole tensors."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import FLOATS, Case, cases, checkpoint, save, write_recipe
from files import stored_bytes
from hypothesis import given, settings
from hypothesis import strategies as st

import cpimerge
from cpimerge.comparison import Comparison, Difference
from cpimerge.errors import CheckpointError, ResourceError
from cpimerge.inspection import kind_of, stack_of
from cpimerge.stream import CHUNK

Tensors = Mapping[str, torch.Tensor]
DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
FRACTION = {torch.float32: (23, -126), torch.float16: (10, -14), torch.bfloat16: (7, -126)}
NEAR = np.float32(1e-5)


def compare(directory: Path, base: Tensors, other: Tensors, **options: Any) -> Comparison:
    save(directory / "base", base)
    save(directory / "other", other)
    return cpimerge.inspect(directory / "base", directory / "other", **{"threads": 1, **options})


def half_units(base: torch.Tensor) -> np.ndarray:
    """float64 [n]: half a unit in the last place of each base value, in its own dtype."""
    fraction, least = FRACTION[base.dtype]
    values = base.double().flatten().numpy()
    _, exponents = np.frexp(values)
    units: np.ndarray = np.ldexp(1.0, np.where(values == 0, least, np.maximum(exponents - 1, least)) - fraction - 1)
    return units


def slow(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, Any]:
    """What METHOD §6 counts of all elements of some pairs of tensors, and the vectors' norms and angle."""
    bases, others, halves, left_out = [], [], [], 0
    for base, other in pairs:
        b, o = base.float().flatten().numpy(), other.float().flatten().numpy()
        with np.errstate(over="ignore", invalid="ignore"):
            kept = np.isfinite(o - b)
        left_out += int((~kept).sum())
        bases.append(b[kept])
        others.append(o[kept])
        halves.append(half_units(torch.where(base.isfinite(), base, 0))[kept])
    b, o, half = np.concatenate(bases), np.concatenate(others), np.concatenate(halves)
    size = np.abs(o - b)
    norms = [math.sqrt(math.fsum(float(x) ** 2 for x in values)) for values in (b, o, size)]
    product = math.fsum(float(x) * float(y) for x, y in zip(b, o, strict=True))
    return {
        "elements": size.size + left_out,
        "left_out": left_out,
        "changed": int((size > 0).sum()),
        "near": int((size <= NEAR).sum()),
        "rounding": int((size <= half).sum()),
        "largest": float(size.max(initial=0)),
        "norms": norms,
        "cosine": product / (norms[0] * norms[1]) if norms[0] * norms[1] else None,
    }


def check(found: Difference, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
    pairs = list(pairs)
    wanted = slow(pairs)
    counts = {key: getattr(found, key) for key in ("elements", "left_out", "changed", "near", "rounding")}
    assert counts == {key: wanted[key] for key in counts}
    assert (found.largest.value if found.largest else 0) == wanted["largest"]
    given_norms = found.as_dict()["base_norm"], found.as_dict()["norm"], found.as_dict()["change_norm"]
    assert given_norms == pytest.approx(wanted["norms"], rel=1e-13)
    assert (found.cosine is None) == (wanted["cosine"] is None)
    if found.cosine is not None:
        assert found.cosine == pytest.approx(wanted["cosine"], abs=1e-13)
    if wanted["norms"][0]:
        assert found.relative == pytest.approx(wanted["norms"][2] / wanted["norms"][0], rel=1e-13)
    else:
        assert found.relative == (None if wanted["norms"][2] else 0)
    assert found.tensors == len(pairs)
    assert found.dtypes == tuple(sorted({(DTYPES[base.dtype], DTYPES[other.dtype]) for base, other in pairs}))
    assert found.identical == sum(same_bytes(base, other) for base, other in pairs)


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and (not a.numel() or stored_bytes(a) == stored_bytes(b))


def check_all(found: Comparison, base: Tensors, other: Tensors) -> None:
    """Every tensor, layer, stack and kind, and the total."""
    floats = [name for name in base if base[name].is_floating_point()]
    assert {t.name for t in found.tensors} == set(floats)
    for tensor in found.tensors:
        check(tensor.difference, [(base[tensor.name], other[tensor.name])])
        assert tensor.shape == tuple(base[tensor.name].shape)
        check_place(tensor.difference, base, other)
    for key in (stack_of, kind_of):
        for group, difference in found.by(key).items():
            check(difference, [(base[name], other[name]) for name in floats if key(name) == group])
            check_place(difference, base, other)
    if floats:
        check(found.total, [(base[name], other[name]) for name in floats])


def check_place(found: Difference, base: Tensors, other: Tensors) -> None:
    """The largest difference is where it is said to be, and is the first such in its tensor."""
    if found.largest is not None:
        name = found.largest.tensor
        size = (other[name].float() - base[name].float()).abs().flatten().numpy()
        size = np.where(np.isfinite(size), size, 0)
        assert int(size.argmax()) == found.largest.index
        assert float(size[found.largest.index]) == found.largest.value


# --- values -----------------------------------------------------------------------------------------


@given(cases(max_tasks=1), st.booleans())
@settings(max_examples=60)
def test_every_group_as_the_slow_reference_has_it(case: Case, poisoned: bool) -> None:
    base = dict(case.base)
    (other,) = (dict(expert) for expert in case.experts.values())
    if poisoned:
        for seed, tensors in enumerate((base, other)):
            poison(tensors, np.random.default_rng(seed))
    with TemporaryDirectory() as directory:
        found = compare(Path(directory), base, other)
    check_all(found, base, other)
    assert all(not tensor.changed for tensor in found.unequal)
    assert {tensor.name for tensor in found.unequal} == {name for name in base if not base[name].is_floating_point()}
    assert json.loads(json.dumps(found.as_dict(), allow_nan=False))["total"]["elements"] == found.total.elements


def poison(tensors: dict[str, torch.Tensor], rng: np.random.Generator) -> None:
    """NaN and Inf in some float tensors."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.numel() and rng.random() < 0.5:
            flat = tensor.clone().flatten()
            flat[int(rng.integers(flat.numel()))] = float(rng.choice([np.nan, np.inf, -np.inf]))
            tensors[name] = flat.reshape(tensor.shape)


def large(seed: int, dtype: torch.dtype = torch.bfloat16) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Tensors of several chunks and many small ones, and a fine-tune of them."""
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (700, 1000), "flat": (3 * CHUNK + 17,), "one": (CHUNK,)}
    shapes |= {f"layers.{i}.{kind}": (40, 5) for i in range(300) for kind in ("a", "b")}
    base = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    other = {name: (t + torch.randn(t.shape, generator=generator) / 64).to(dtype) for name, t in base.items()}
    return base, other


@pytest.mark.parametrize("dtype", FLOATS)
def test_tensors_of_many_chunks_and_many_tensors(dtype: torch.dtype, tmp_path: Path) -> None:
    base, other = large(1, dtype)
    other["layers.7.a"] = base["layers.7.a"]
    found = compare(tmp_path, base, other, threads=2)
    check(found.total, [(base[name], other[name]) for name in base])
    for name in ("embed.weight", "flat", "one", "layers.7.a", "layers.299.b"):
        difference = found.by(str)[name]
        check(difference, [(base[name], other[name])])
        check_place(difference, base, other)
    assert list(found.by(stack_of)) == ["", "layers.*"]
    assert found.by(stack_of)["layers.*"].tensors == 600


def test_the_same_for_any_number_of_threads(tmp_path: Path) -> None:
    one = compare(tmp_path, *large(2), threads=1)
    for threads in (2, 3, 5):
        other = cpimerge.inspect(tmp_path / "base", tmp_path / "other", threads=threads, memory="2GB")
        assert json.dumps(one.as_dict()) == json.dumps(other.as_dict())


def test_a_plan_counts_the_same(tmp_path: Path) -> None:
    base, other = large(6, torch.float16)
    total = compare(tmp_path, base, other).total
    keys: dict[str, Any] = {"base_model": tmp_path / "base", "models": [{"model": tmp_path / "other"}]}
    plan = cpimerge.plan(write_recipe(tmp_path / "recipe.yml", **keys), tmp_path / "plan", threads=1)
    (task,) = plan.tasks
    assert (task.elements, task.changed, task.near, task.rounding) == (
        total.elements,
        total.changed,
        total.near,
        total.rounding,
    )


def test_of_layers_and_tensors_outside_them(tmp_path: Path) -> None:
    base = {name: torch.ones(2, 3) for name in ("model.layers.0.a", "model.layers.0.b", "model.layers.10.a", "norm")}
    other = base | {"model.layers.10.a": torch.full((2, 3), 1.5)}
    found = compare(tmp_path, base, other).as_dict()
    assert {key: some["changed"] for key, some in found["by_layer"].items()} == {
        "model.layers.0.": 0,
        "model.layers.10.": 6,
        "": 0,
    }
    assert {key: some["tensors"] for key, some in found["by_kind"].items()} == {
        "model.layers.*.a": 2,
        "model.layers.*.b": 1,
        "norm": 1,
    }
    assert found["by_kind"]["model.layers.*.a"]["largest"] == {"value": 0.5, "tensor": "model.layers.10.a", "index": 0}
    assert found["by_layer"]["model.layers.10."]["relative"] == 0.5
    assert found["by_layer"]["model.layers.10."]["cosine"] == pytest.approx(1, abs=1e-15)
    assert found["by_layer"]["model.layers.0."]["cosine"] == 1


@pytest.mark.parametrize(
    ("base", "other", "relative", "cosine"),
    [([0, 0], [0, 0], 0, None), ([0, 0], [3, 4], None, None), ([3, 4], [0, 0], 1, None), ([3, 4], [-3, -4], 2, -1)],
)
def test_angles_and_quotients_at_the_edge(
    base: list[float], other: list[float], relative: float | None, cosine: float | None, tmp_path: Path
) -> None:
    total = compare(tmp_path, {"x": torch.tensor(base) * 1.0}, {"x": torch.tensor(other) * 1.0}).total
    assert (total.relative, total.cosine) == (relative, cosine)


def test_signed_zeros_are_equal_and_not_identical(tmp_path: Path) -> None:
    total = compare(tmp_path, {"x": torch.zeros(3)}, {"x": -torch.zeros(3)}).total
    assert (total.changed, total.identical, total.largest) == (0, 0, None)


# --- what is not finite -----------------------------------------------------------------------------


def test_what_is_not_finite_is_named_and_left_out(tmp_path: Path) -> None:
    n = CHUNK + 100
    base, other = torch.ones(n), torch.full((n,), 2.0)
    base[[5, CHUNK + 3]] = math.nan
    other[[CHUNK + 7, CHUNK + 9]] = -math.inf
    base[50], other[50] = 3e38, -3e38
    found = compare(tmp_path, {"x": base, "y": torch.ones(2)}, {"x": other, "y": torch.ones(2)})
    assert [(f.where, f.tensor, f.count, f.first) for f in found.faults] == [
        ("base", "x", 2, 5),
        ("difference", "x", 1, 50),
        ("other", "x", 2, CHUNK + 7),
    ]
    total = found.by(str)["x"]
    assert (total.left_out, total.compared, total.changed) == (5, n - 5, n - 5)
    assert total.relative == 1
    assert total.largest
    assert (total.largest.value, total.largest.index) == (1, 0)


def test_the_same_nan_in_both_is_left_out_of_an_identical_tensor(tmp_path: Path) -> None:
    x = torch.tensor([1.0, math.nan])
    found = compare(tmp_path, {"x": x}, {"x": x.clone()})
    assert (found.total.identical, found.total.changed, found.total.left_out) == (1, 0, 1)
    assert [fault.where for fault in found.faults] == ["base", "other"]


# --- what does not fit ------------------------------------------------------------------------------


def test_what_cannot_be_compared_is_listed(tmp_path: Path) -> None:
    base = {
        "a": torch.ones(2),
        "b": torch.ones(2, 3),
        "c": torch.ones(4, 3),
        "d": torch.arange(4),
        "e": torch.ones(3),
        "f": torch.ones(2, 2),
    }
    other = {
        "b": torch.ones(3, 2),
        "c": torch.cat([torch.ones(4, 3) * 2, torch.full((2, 3), math.nan)]),
        "d": torch.arange(4).int(),
        "e": torch.arange(3),
        "f": torch.ones(4),
        "z": torch.ones(1),
    }
    found = compare(tmp_path, base, other)
    assert (found.only_base, found.only_other) == (("a",), ("z",))
    assert [(u.name, u.base, u.other, u.rows) for u in found.unlike] == [
        ("b", "F32 [2, 3]", "F32 [3, 2]", 0),
        ("c", "F32 [4, 3]", "F32 [6, 3]", 4),
        ("d", "I64 [4]", "I32 [4]", 0),
        ("e", "F32 [3]", "I64 [3]", 0),
        ("f", "F32 [2, 2]", "F32 [4]", 0),
    ]
    (tensor,) = found.tensors
    assert (tensor.name, tensor.shape) == ("c", (4, 3))
    assert (tensor.difference.changed, tensor.difference.identical, found.faults) == (12, 0, ())


def test_the_first_rows_of_several_chunks_are_compared_and_never_identical(tmp_path: Path) -> None:
    base = torch.randn(600, 1000)
    found = compare(tmp_path, {"x": base}, {"x": torch.cat([base, torch.ones(1, 1000)])})
    assert (found.total.elements, found.total.changed, found.total.identical) == (600_000, 0, 0)


def test_tensors_that_are_not_floating_point(tmp_path: Path) -> None:
    n = CHUNK + 10
    base = {"ids": torch.arange(n), "mask": torch.ones(3, dtype=torch.bool), "wide": torch.ones(4, dtype=torch.float64)}
    other = {name: tensor.clone() for name, tensor in base.items()}
    other["ids"][[CHUNK + 2, CHUNK + 5]] = -1
    other["wide"][3] = 2
    found = compare(tmp_path, base, other)
    assert [(u.name, u.dtype, u.elements, u.changed, u.first) for u in found.unequal] == [
        ("ids", "I64", n, 2, CHUNK + 2),
        ("mask", "BOOL", 3, 0, None),
        ("wide", "F64", 4, 1, 3),
    ]
    assert (found.tensors, found.faults, found.total.tensors) == ((), (), 0)


# --- running ----------------------------------------------------------------------------------------


def test_progress_never_falls_and_ends_with_all_bytes(tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    base, other = large(3)
    compare(tmp_path, base, other, progress=lambda *call: calls.append(call))
    assert {(phase, total) for phase, _, total in calls} == {("inspect", 2 * sum(x.nbytes for x in base.values()))}
    done = [done for _, done, _ in calls]
    assert done == sorted(done)
    assert (len(done) > 2, done[-1]) == (True, calls[-1][2])


def test_every_problem_of_both_is_listed(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        cpimerge.inspect(tmp_path / "here", tmp_path / "there")
    assert [problem.split(":")[0] for problem in caught.value.problems] == [
        str(tmp_path / "here"),
        str(tmp_path / "there"),
    ]


def test_a_file_that_ends_early_is_an_error(tmp_path: Path) -> None:
    base, other = large(4)
    save(tmp_path / "base", base)
    save(tmp_path / "other", other)

    def truncate(*_: object) -> None:
        with open(tmp_path / "other" / "model.safetensors", "r+b") as file:
            file.truncate(2_000_000)

    with pytest.raises(CheckpointError, match="the file ended"):
        cpimerge.inspect(tmp_path / "base", tmp_path / "other", threads=1, progress=truncate)


def test_memory_that_does_not_suffice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="is too little for 2 threads"):
        compare(tmp_path, {"x": torch.ones(2)}, {"x": torch.ones(2)}, threads=2, memory="100MB")


def test_a_checkpoint_with_itself(tmp_path: Path) -> None:
    base = checkpoint(np.random.default_rng(0), large(5)[0], [], False)
    save(tmp_path, base)
    found = cpimerge.inspect(tmp_path, tmp_path, threads=2)
    total = found.total
    assert (total.identical, total.changed, total.relative, total.cosine) == (len(base), 0, 0, 1)
    assert total.near == total.rounding == total.elements
