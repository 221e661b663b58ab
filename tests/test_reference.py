"""The oracle itself, pinned by cases small enough to be computed by hand, and the helpers beside it."""

import json
import math
from fractions import Fraction as Q
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from checkpoints import Case, cases, decimal, save, settings, ulps, write_case, write_recipe
from huggingface_hub import split_torch_state_dict_into_shards
from hypothesis import given
from hypothesis import strategies as st
from reference import (
    Result,
    Settings,
    Step,
    blend32,
    cosine,
    f32,
    fold,
    groups,
    layer,
    level,
    magnitude,
    matches,
    natural,
    run,
    same_bytes,
    slerp,
    stats_of,
    total,
    ulp,
    unit_of,
)
from safetensors.torch import load_file

HALF = math.sqrt(0.5)
THIRD = Q(1, 3)


def tensor(*values: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


def run_one(base: list[float], experts: dict[str, list[float]], **keys: Any) -> Result:
    """One float32 tensor 'w'; `keys` are Settings, and `extra` a backbone's values."""
    extra = keys.pop("extra", None)
    tensors = {task: {"w": torch.tensor(values)} for task, values in experts.items()}
    for key, value in {"density": Q(0), "space": "weights", "conflict": "last"}.items():
        keys.setdefault(key, value)
    return run({"w": torch.tensor(base)}, tensors, Settings(**keys), None if extra is None else {"w": extra})


def fused(result: Result) -> list[float]:
    values: list[float] = result.fused["w"].tolist()
    return values


# --- names ------------------------------------------------------------------------------------------


def test_natural_sort_compares_digit_runs_as_integers() -> None:
    names = ["l.10.w", "l.2.w", "l.2.b", "a", "l.02.w", "l", "l.1", "2", "Z"]
    assert sorted(names, key=natural) == ["2", "Z", "a", "l", "l.1", "l.2.b", "l.02.w", "l.2.w", "l.10.w"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.3.mlp.0.weight", "model.layers.3."),
        ("model.layers.3", "model.layers.3."),
        ("h1.weight", ""),
        ("embed", ""),
        ("0.w", "0."),
    ],
)
def test_layer_ends_at_the_first_all_digit_component(name: str, expected: str) -> None:
    assert layer(name) == expected


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("bias", "a.bias.b", True),
        ("*.bias", "a.bias", True),
        ("*.bias", "a.bias.b", False),
        ("l.?.w", "l.3.w", True),
        ("l.[12].w", "l.3.w", False),
        ("Bias", "a.bias", False),
    ],
)
def test_filters_are_globs_or_substrings(pattern: str, name: str, expected: bool) -> None:
    assert matches(pattern, name) is expected


# --- numbers ----------------------------------------------------------------------------------------


def test_magnitude_is_a_float32_difference() -> None:
    # 1 + 2^-24 is not a float32: the difference rounds to 1.
    assert magnitude(tensor(1.0, -3.0), tensor(-(2.0**-24), 0.5)).tolist() == [1.0, 3.5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("x", [0.0, 1.0, 1.5, 2.0, -4.0, 0.1, 6e-8, 1e-6, 1e-38, 1e-40, 3e4])
def test_ulp_is_the_step_to_the_next_value(dtype: torch.dtype, x: float) -> None:
    stored = torch.tensor(x, dtype=dtype)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    following = (stored.abs().view(bits) + 1).view(dtype)
    assert ulp(stored.item(), dtype) == following.item() - abs(stored.item())


def test_ulp_at_the_largest_value_is_that_of_its_binade() -> None:
    assert ulp(65504.0, torch.float16) == 32.0


# --- cores ------------------------------------------------------------------------------------------


def test_core_size_is_exact_in_decimal() -> None:
    values = [float(i + 1) for i in range(100)]
    core = run_one([0.0] * 100, {"a": values}, density=Q("0.29")).cores["a"]["w"]
    assert core == list(range(71, 100))  # 29, where the binary 0.29 * 100 gives 28


def test_core_ties_go_to_the_lower_index() -> None:
    core = run_one([0.0] * 6, {"a": [1.0, -2.0, 2.0, 3.0, 2.0, 1.0]}, density=Q(1, 2)).cores["a"]["w"]
    assert core == [1, 2, 3]


def test_unchanged_elements_are_never_core() -> None:
    core = run_one([1.0] * 4, {"a": [1.0, 2.0, 1.0, 1.0]}, density=Q(3, 4)).cores["a"]["w"]
    assert core == [1]


def test_core_of_less_than_one_element_is_empty() -> None:
    assert run_one([0.0] * 3, {"a": [1.0, 2.0, 3.0]}, density=Q(33, 100)).cores["a"]["w"] == []


SCOPED = {
    # m of each; natural order is head, l.2.b, l.2.w, l.10.w
    "l.10.w": tensor(4.0, 9.0),
    "l.2.w": tensor(4.0, 1.0, 4.0),
    "head": tensor(2.0, 8.0),
    "l.2.b": tensor(3.0),
}


@pytest.mark.parametrize(
    ("scope", "expected"),
    [
        # floor of n/2 elements of each tensor
        ("tensor", {"l.10.w": [1], "l.2.w": [0], "head": [1], "l.2.b": []}),
        # l.2: two of {3, 4, 1, 4}
        ("layer", {"l.10.w": [1], "l.2.w": [0, 2], "head": [1], "l.2.b": []}),
        # four of eight: 9, 8, and of the three fours the two of l.2.w
        ("global", {"l.10.w": [1], "l.2.w": [0, 2], "head": [1], "l.2.b": []}),
    ],
)
def test_scopes(scope: str, expected: dict[str, list[int]]) -> None:
    base = {name: torch.zeros_like(x) for name, x in SCOPED.items()}
    assert run(base, {"a": SCOPED}, Settings(density=Q(1, 2), scope=scope)).cores["a"] == expected


def test_global_scope_pools_across_layers_and_breaks_ties_in_natural_order() -> None:
    base = {name: torch.zeros_like(x) for name, x in SCOPED.items()}
    cores = {p: run(base, {"a": SCOPED}, Settings(density=Q(p, 8), scope="global")).cores["a"] for p in (3, 5, 6)}
    assert cores[3] == {"l.10.w": [1], "l.2.w": [0], "head": [1], "l.2.b": []}
    assert cores[5] == {"l.10.w": [0, 1], "l.2.w": [0, 2], "head": [1], "l.2.b": []}
    assert cores[6] == {"l.10.w": [0, 1], "l.2.w": [0, 2], "head": [1], "l.2.b": [0]}


def test_excluded_tensors_have_no_core_and_no_share_in_the_budget() -> None:
    base = {name: torch.zeros_like(x) for name, x in SCOPED.items()}
    result = run(base, {"a": SCOPED}, Settings(density=Q(1, 2), scope="global", exclude=["l.2.w", "*.b"]))
    assert result.cores["a"] == {"l.10.w": [1], "l.2.w": [], "head": [1], "l.2.b": []}  # floor(4 / 2)
    assert result.disposition["l.2.w"] == "fused"


def test_density_may_depend_on_task_and_tensor() -> None:
    base = {"x": torch.zeros(4), "y": torch.zeros(4)}
    experts = {task: {"x": tensor(1, 2, 3, 4), "y": tensor(4, 3, 2, 1)} for task in "ab"}
    density = {("a", "x"): Q(1, 4), ("a", "y"): Q(1, 2), ("b", "x"): Q(0), ("b", "y"): Q(3, 4)}
    result = run(base, experts, Settings(density=lambda task, name: density[task, name]))
    assert result.cores == {"a": {"x": [3], "y": [0, 1]}, "b": {"x": [], "y": [0, 1, 2]}}
    assert result.jaccard["a", "b"] == Q(2, 4)
    # sum of n pa pb: 4 * (0 + 3/8); sum of n (pa + pb - pa pb): 4 * (1/4 + 7/8)
    assert result.chance["a", "b"] == THIRD
    assert result.lift["a", "b"] == Q(3, 2)


def test_density_may_not_vary_within_one_budget() -> None:
    base = {"x": torch.zeros(4), "y": torch.zeros(4)}
    density = {"x": Q(1, 4), "y": Q(1, 2)}
    with pytest.raises(ValueError, match="varies within one budget"):
        run(base, {"a": base}, Settings(density=lambda task, name: density[name], scope="global"))


# --- overlap, groups, stages ------------------------------------------------------------------------


def test_jaccard_lift_and_layers() -> None:
    base = {"l.0.w": torch.zeros(4), "l.1.w": torch.zeros(4)}
    a = {"l.0.w": tensor(1, 1, 0, 0), "l.1.w": tensor(1, 1, 0, 0)}
    b = {"l.0.w": tensor(1, 1, 0, 0), "l.1.w": tensor(0, 0, 1, 1)}
    c = {"l.0.w": torch.zeros(4), "l.1.w": torch.zeros(4)}
    result = run(base, {"a": a, "b": b, "c": c}, Settings(density=Q(1, 2)))
    assert result.jaccard["a", "b"] == result.jaccard["b", "a"] == Q(2, 6)
    assert result.jaccard["a", "a"] == 1
    assert result.jaccard["a", "c"] == result.jaccard["c", "c"] == 0
    assert result.chance["a", "b"] == THIRD  # p/(2-p) at 1/2
    assert result.lift["a", "b"] == 1
    assert {k: v["a", "b"] for k, v in result.layer_jaccard.items()} == {"l.0.": Q(1), "l.1.": Q(0)}


def test_lift_needs_a_chance() -> None:
    assert run_one([0.0], {"a": [1.0], "b": [1.0]}, density=Q(0)).lift["a", "b"] is None


def overlap(tasks: str, **pairs: Q) -> dict[tuple[str, str], Q]:
    table = {(a, b): Q(int(a == b)) for a in tasks for b in tasks}
    for pair, x in pairs.items():
        table[pair[0], pair[1]] = table[pair[1], pair[0]] = x
    return table


def test_groups_are_transitive_and_tau_is_inclusive() -> None:
    table = overlap("abcde", ad=Q(1, 10), cd=Q(1, 2), be=Q(99, 1000))
    assert groups(list("abcde"), table, Q(1, 10)) == [["a", "c", "d"], ["b"], ["e"]]


def test_groups_link_up_through_a_chain_in_any_order() -> None:
    table = overlap("abcde", ae=Q(1), ed=Q(1), dc=Q(1), cb=Q(1))
    assert groups(list("abcde"), table, Q(1, 10)) == [list("abcde")]


DISJOINT = {"a": [1.0, 0, 0], "b": [0, 1.0, 0], "c": [0, 0, 1.0]}


@pytest.mark.parametrize(
    ("keys", "stages", "fold_order"),
    [
        ({}, [["a"], ["b"], ["c"]], ["c", "a", "b"]),
        # random.Random(7): 0.32, 0.15, 0.65
        ({"order": 7}, [["b"], ["a"], ["c"]], ["c", "b", "a"]),
        # random.Random(0): 0.84, 0.76, 0.42
        ({"order": 0}, [["c"], ["b"], ["a"]], ["a", "c", "b"]),
        ({"stages": [["c"], ["b", "a"]]}, [["c"], ["b", "a"]], ["a", "c", "b"]),
        ({"backbone": "b"}, [["a"], ["b"], ["c"]], ["b", "a", "c"]),
        ({"backbone": "base"}, [["a"], ["b"], ["c"]], ["base", "a", "b", "c"]),
        ({"tau": Q(0)}, [["a", "b", "c"]], ["c", "a", "b"]),
    ],
)
def test_stages_and_fold_order(keys: dict[str, Any], stages: list[list[str]], fold_order: list[str]) -> None:
    result = run_one([0.0] * 3, DISJOINT, density=THIRD, **keys)
    assert (result.stages, result.fold) == (stages, fold_order)


# --- slerp ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("v0", "v1", "t", "expected"),
    [
        ([1, 0], [0, 1], 0.5, [HALF, HALF]),
        ([2, 0], [0, 1], 0.5, [2 * HALF, HALF]),  # un-normalised
        ([1, 0], [0, 1], 1 / 3, [math.sqrt(3) / 2, 0.5]),
        ([1, 0], [0.5, math.sqrt(3) / 2], 0.5, [math.sqrt(3) / 2, 0.5]),  # 60 degrees: both 1/sqrt(3)
        ([1, 1], [3, 3], 0.25, [1.5, 1.5]),  # parallel: lerp
        ([1, 0], [-1, 0], 0.25, [0.5, 0]),  # opposite: lerp
        ([0, 0], [2, 0], 0.25, [0.5, 0]),  # a norm of 0: lerp
        ([2, 0], [0, 0], 0.25, [1.5, 0]),
        ([], [], 0.5, []),
    ],
)
def test_slerp(v0: list[float], v1: list[float], t: float, expected: list[float]) -> None:
    got = slerp(np.array(v0, dtype=float), np.array(v1, dtype=float), t)
    np.testing.assert_allclose(got, expected, rtol=1e-15, atol=1e-15)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("cos", "proper"), [(0.99951, False), (0.99949, True)])
def test_slerp_becomes_lerp_near_parallel(sign: int, cos: float, proper: bool) -> None:
    v = [np.array([1.0, 0.0]), np.array([sign * cos, math.sqrt(1 - cos**2)])]
    _, coefficients, [step] = fold(v, ["a"], [0.5])
    assert step.slerp is proper
    half_angle = math.acos(sign * cos) / 2
    expected = 0.5 / math.cos(half_angle) if proper else 0.5  # sin(x/2) / sin x
    np.testing.assert_allclose(coefficients, [expected, expected], rtol=1e-12)


def test_cosine_is_clamped() -> None:
    v = np.array([0.1, 0.7, 1e-9])
    assert cosine(v, 3 * v) == 1.0
    assert cosine(v, 0 * v) is None


def test_fold_of_three_orthogonal_vectors() -> None:
    v, coefficients, steps = fold(list(np.eye(3)), ["b", "c"], [1 / 2, 1 / 3])
    # 90 degrees both times: (sin 45, sin 45), then (sin 60) times that and sin 30
    expected = [HALF * math.sqrt(3) / 2, HALF * math.sqrt(3) / 2, 0.5]
    np.testing.assert_allclose(v, expected, rtol=1e-15)
    np.testing.assert_allclose(coefficients, expected, rtol=1e-15)
    assert steps == [Step("b", 1 / 2, 0.0, True, False), Step("c", 1 / 3, 0.0, True, False)]


def test_fold_flags_what_hangs_on_rounding() -> None:
    x, y = np.array([1.0, 0.0]), np.array([0.5, 0.5])
    _, _, cancelled = fold([x, -x, y], ["b", "c"], [1 / 2, 1 / 3])
    assert [step.fragile for step in cancelled] == [False, True]
    edge = np.array([0.9995, math.sqrt(1 - 0.9995**2)])
    assert fold([x, edge], ["b"], [0.5])[2][0].fragile
    assert not any(step.fragile for step in fold([0 * x, x, 0 * x], ["b", "c"], [1 / 2, 1 / 3])[2])


# --- blending ---------------------------------------------------------------------------------------

UNITS = {"a": [1.0, 0, 0], "b": [0, 1.0, 0], "c": [0, 0, 1.0]}


def test_plain_averaging_is_density_0_with_parallel_weights() -> None:
    result = run_one([4.0, 8.0], {"a": [1.0, 2.0], "b": [2.0, 4.0], "c": [6.0, 12.0]})
    np.testing.assert_allclose(result.coefficients["w"], [[1 / 3, 1 / 3, 1 / 3]], rtol=1e-15)
    np.testing.assert_allclose(fused(result), [3.0, 6.0], rtol=1e-6)


@pytest.mark.parametrize(
    ("weights", "backbone", "expected"),
    [
        ({"a": 1, "b": 1, "c": 1}, "last", [1, 1, 1]),
        ({"a": 1, "b": 2, "c": 5}, "last", [5, 1, 2]),
        ({"a": 1, "b": 2, "c": 5}, "base", [1, 1, 2, 5]),
        ({"a": 1, "b": 2, "c": 5}, "path", [1, 1, 2, 5]),
        ({"a": 0, "b": 2, "c": 0}, "last", [0, 0, 1]),  # 0/0, then everything
        ({"a": 1, "b": 0, "c": 1}, "a", [1, 0, 1]),
    ],
)
def test_coefficients_go_with_the_weights(weights: dict[str, int], backbone: str, expected: list[float]) -> None:
    result = run_one(
        [0.0] * 3, UNITS, weight=lambda task, _: Q(weights[task]), backbone=backbone, extra=tensor(1, 1, 1)
    )
    [found] = result.coefficients["w"]
    np.testing.assert_allclose(found / found.sum(), np.array(expected) / sum(expected), rtol=1e-14, atol=1e-15)


def test_orthogonal_vectors_of_one_norm_keep_it() -> None:
    result = run_one([0.0] * 3, UNITS)
    np.testing.assert_allclose(result.coefficients["w"], [[3**-0.5] * 3], rtol=1e-14)


def test_constant_factor() -> None:
    result = run_one([0.0] * 3, UNITS, t=Q(1, 4))
    assert [step.omega for step in result.steps["w"][0]] == [0.25, 0.25]
    s, c = math.sin(math.pi / 8), math.cos(math.pi / 8)  # backbone c, then a, then b
    np.testing.assert_allclose(result.coefficients["w"], [[c * c, s * c, s]], rtol=1e-14)
    np.testing.assert_allclose(fused(result), [s * c, s, c * c], rtol=1e-6)


def test_t_of_one_task_leaves_equal_shares_to_the_others() -> None:
    result = run_one([0.0] * 3, UNITS, t=lambda task, _: Q(3, 4) if task == "a" else None)
    [c, a, b] = result.coefficients["w"][0]
    np.testing.assert_allclose([a, b], [c * math.tan(3 * math.pi / 8), (a + c) / 2], rtol=1e-14)


@pytest.mark.parametrize(
    ("backbone", "expected"),
    [
        # 90 degrees everywhere; the fold's order shows in the coefficients
        ("last", [HALF, HALF]),
        ("a", [HALF, HALF]),
        # the base's delta is zero: lerp to half of a, then in a right angle on, to half as much of b as of base and a
        ("base", [5**-0.5, 5**-0.5]),
        ("path", [3**-0.5, 3**-0.5]),
    ],
)
def test_delta_space_and_backbones(backbone: str, expected: list[float]) -> None:
    base = [10.0, 20.0, 30.0]
    experts = {"a": [11.0, 20.0, 30.0], "b": [10.0, 21.0, 30.0]}
    result = run_one(base, experts, space="delta", backbone=backbone, extra=tensor(10, 20, 31))
    third = 3**-0.5 if backbone == "path" else 0.0
    np.testing.assert_allclose(np.array(fused(result)) - base, [*expected, third], rtol=1e-5)
    np.testing.assert_allclose(result.ideal["w"] - base, [*expected, third], rtol=1e-12)


def test_rest_scales_the_deltas_only() -> None:
    result = run_one([10.0, 20.0], {"a": [12.0, 20.0], "b": [10.0, 24.0]}, space="delta", rest=Q(1, 4))
    np.testing.assert_allclose(fused(result), [10 + HALF / 2, 20 + HALF], rtol=1e-6)
    zero = run_one([10.0, 20.0], {"a": [12.0, 20.0], "b": [10.0, 24.0]}, space="delta", rest=Q(0))
    assert fused(zero) == [10.0, 20.0]


def test_only_the_non_core_enters_the_vectors() -> None:
    # Cores: index 0 (a, b). What is left is parallel, so it is averaged.
    result = run_one([0.0] * 3, {"a": [9.0, 1, 2], "b": [-9.0, 3, 6]}, density=THIRD)
    assert result.cores == {"a": {"w": [0]}, "b": {"w": [0]}}
    assert not result.steps["w"][0][0].slerp
    np.testing.assert_allclose(fused(result), [-9.0, 2.0, 4.0], rtol=1e-7)


def test_rows_are_vectors_of_their_own() -> None:
    base = {"w": torch.zeros(2, 2), "v": torch.zeros(2), "x": torch.zeros(1, 2, 0), "y": torch.zeros(0, 3)}
    a = base | {"w": torch.tensor([[1.0, 0], [1, 1]]), "v": tensor(1, 0)}
    b = base | {"w": torch.tensor([[0, 1.0], [3, 3]]), "v": tensor(0, 1)}
    result = run(base, {"a": a, "b": b}, Settings(density=Q(0), granularity="row"), {})
    np.testing.assert_allclose(result.coefficients["w"], [[HALF, HALF], [0.5, 0.5]], rtol=1e-15)
    np.testing.assert_allclose(result.coefficients["v"], [[HALF, HALF]], rtol=1e-15)
    np.testing.assert_allclose(result.fused["w"].numpy(), np.array([[HALF, HALF], [2.0, 2.0]]), rtol=1e-6)
    assert result.disposition == {"w": "fused", "v": "fused", "x": "identical", "y": "identical"}


def test_rows_of_empty_tensors_and_scalars() -> None:
    base = {"x": torch.zeros(1, 2, 0), "y": torch.zeros(0, 3), "z": torch.zeros(())}
    other = base | {"x": base["x"].half(), "z": torch.ones(())}
    result = run(base, {"a": other, "b": other}, Settings(granularity="row", dtype=torch.bfloat16))
    assert result.disposition == {"x": "identical", "y": "identical", "z": "fused"}
    assert {name: c.shape for name, c in result.coefficients.items()} == {"z": (1, 2)}


def test_blend_rounds_every_step_to_float32() -> None:
    third, tenth = np.float32(1 / 3), np.float32(0.1)
    v = [np.array([tenth]), np.array([np.float32(7)])]
    expected = np.float32(np.float32(third * tenth) + np.float32(np.float32(2 / 3) * np.float32(7)))
    assert blend32(v, np.array([1 / 3, 2 / 3]), None, Q(1)).tolist() == [expected]
    # In delta space the coefficient is multiplied by rest in float64 first, and the base comes last.
    scaled = np.float32(np.float32(1 / 3 * 0.1) * tenth)
    base = np.array([np.float32(0.7)])
    assert blend32(v[:1], np.array([1 / 3]), base, Q("0.1")).tolist() == [np.float32(scaled + base[0])]


def test_given_coefficients_replace_the_folds() -> None:
    base = {"w": torch.zeros(2)}
    experts = {"a": {"w": tensor(1, 0)}, "b": {"w": tensor(0, 1)}}
    result = run(base, experts, Settings(density=Q(0)), coefficients={"w": np.array([[2.0, 3.0]])})
    assert fused(result) == [3.0, 2.0]  # b is the backbone, so it comes first
    np.testing.assert_allclose(result.ideal["w"], [HALF, HALF])


# --- transplant -------------------------------------------------------------------------------------

BASE = [10.0, 10.0, 10.0, 10.0, 10.0]
CLAIMS = {
    # per element: three claims with a majority of one sign; a tie of sizes; a sum of 0; one claim; no claim
    "a": [11.0, 8.0, 13.0, 10.0, 10.0],
    "b": [14.0, 12.0, 10.0, 17.0, 10.0],
    "c": [9.0, 10.0, 7.0, 10.0, 10.0],
}


@pytest.mark.parametrize(
    ("conflict", "stages", "expected"),
    [
        ("last", "abc", [9.0, 12.0, 7.0, 17.0, 10.0]),
        ("last", "cba", [11.0, 8.0, 13.0, 17.0, 10.0]),
        ("first", "abc", [11.0, 8.0, 13.0, 17.0, 10.0]),
        ("largest", "abc", [14.0, 12.0, 7.0, 17.0, 10.0]),
        ("largest", "cba", [14.0, 8.0, 13.0, 17.0, 10.0]),
        ("mean", "abc", [34 / 3, 10.0, 10.0, 17.0, 10.0]),
        ("elect", "abc", [12.5, 10.0, 10.0, 17.0, 10.0]),  # sum +4: mean of +1 and +4; sums of 0: the base
    ],
)
def test_conflicts(conflict: str, stages: str, expected: list[float]) -> None:
    result = run_one(BASE, CLAIMS, density=Q(1), conflict=conflict, stages=[[task] for task in stages], space="delta")
    assert result.cores["a"]["w"] == [0, 1, 2]
    assert fused(result) == [np.float32(x) for x in expected]


def test_largest_compares_updates_not_values() -> None:
    assert fused(run_one([10.0], {"a": [7.0], "b": [12.0]}, density=Q(1), conflict="largest")) == [7.0]


def test_mean_and_elect_sum_in_float32_in_stage_order() -> None:
    big, one = 2.0**24, 1.0
    experts = {"a": [big], "b": [one], "c": [one]}
    for conflict in ("mean", "elect"):
        forward = run_one([0.0], experts, density=Q(1), conflict=conflict, stages=[["a", "b", "c"]])
        backward = run_one([0.0], experts, density=Q(1), conflict=conflict, stages=[["c", "b", "a"]])
        assert fused(forward) == [np.float32(big / 3)]  # 2^24 + 1 + 1 is 2^24 in float32
        assert fused(backward) == [np.float32((big + 2) / 3)]
        assert fused(forward) != fused(backward)


def test_elect_takes_the_sign_of_the_float32_sum() -> None:
    # 1 - 2^24 + 2^24 is 0 in this order, though the exact sum is 1.
    experts = {"a": [1.0], "b": [-(2.0**24)], "c": [2.0**24]}
    result = run_one([0.0], experts, density=Q(1), conflict="elect", stages=[["a", "c", "b"]])
    assert fused(result) == [0.0]
    result = run_one([0.0], experts, density=Q(1), conflict="elect", stages=[["b", "c", "a"]])
    assert fused(result) == [np.float32((2.0**24 + 1) / 2)]


def test_transplanted_values_keep_their_bits() -> None:
    base = {"w": tensor(1.0, 1.0, 1.0, 1.0, dtype=torch.bfloat16)}
    values = tensor(-0.0, 3.14, 1e-40, 65504, dtype=torch.bfloat16)
    result = run(base, {"a": {"w": values}}, Settings(density=Q(1)))
    assert same_bytes(result.fused["w"], values)


def test_output_is_rounded_once_to_the_nearest_even() -> None:
    # bfloat16 has steps of 2^-7 at 1: 1 + 2^-8 ties to 1, 1 + 3 * 2^-8 to 1 + 2^-6
    values = tensor(1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20)
    result = run({"w": torch.zeros(3)}, {"a": {"w": values}}, Settings(density=Q(1), dtype=torch.bfloat16))
    assert result.fused["w"].dtype == torch.bfloat16
    assert fused(result) == [1.0, 1 + 2**-6, 1 + 2**-7]


def test_output_dtype_defaults_to_the_bases() -> None:
    base = {"w": tensor(1.0, dtype=torch.float16)}
    result = run(base, {"a": {"w": tensor(1 + 2**-11 + 2**-20)}}, Settings(density=Q(1)))
    assert result.fused["w"].dtype == torch.float16
    assert fused(result) == [1 + 2**-10]


# --- tensors that are only copied -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expert", "extra", "dtype", "expected"),
    [
        (tensor(0.0, 1.0), tensor(0.0, 1.0), None, "identical"),
        (tensor(0.0, 1.0), tensor(0.0, 1.0), torch.float32, "identical"),
        (tensor(0.0, 1.0), tensor(0.0, 1.0), torch.float16, "identical"),
        (tensor(0.0, 1.0, dtype=torch.float16), tensor(0.0, 1.0), None, "fused"),
        (tensor(-0.0, 1.0), tensor(0.0, 1.0), None, "fused"),
        (tensor(0.0, 1.0), tensor(0.0, 2.0), None, "fused"),
    ],
)
def test_identical_tensors(expert: torch.Tensor, extra: torch.Tensor, dtype: torch.dtype | None, expected: str) -> None:
    settings_ = Settings(backbone="path", dtype=dtype)
    result = run({"w": tensor(0.0, 1.0)}, {"a": {"w": expert}}, settings_, {"w": extra})
    assert result.disposition["w"] == expected


def test_equal_bits_of_another_dtype_are_not_identical() -> None:
    zero = torch.zeros(2, dtype=torch.float16)
    result = run({"w": zero}, {"a": {"w": zero.to(torch.bfloat16)}}, Settings())
    assert result.disposition["w"] == "fused"


def test_an_extra_checkpoint_that_is_no_backbone_does_not_count() -> None:
    w = {"w": tensor(0.0, 1.0)}
    assert run(w, {"a": w}, Settings(), {"w": tensor(0.0, 2.0)}).disposition["w"] == "identical"


def test_non_float_tensors_are_copied_and_must_be_equal() -> None:
    base = {"ids": torch.tensor([2**62, -1]), "mask": torch.tensor(True)}
    result = run(base, {"a": dict(base)}, Settings(dtype=torch.float16))
    assert result.disposition == {"ids": "copied", "mask": "copied"}
    assert all(same_bytes(result.fused[name], base[name]) for name in base)
    with pytest.raises(ValueError, match="a: ids is not float"):
        run(base, {"a": base | {"ids": torch.tensor([0, -1])}}, Settings())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_values_are_named(bad: float) -> None:
    with pytest.raises(ValueError, match="b: w: flat index 1"):
        run_one([0.0, 0.0], {"a": [0.0, 0.0], "b": [0.0, bad]})


# --- update sparsity --------------------------------------------------------------------------------


def test_stats() -> None:
    # Half an ulp of bfloat16 is 2^-8 at 1 and 2^-7 at 2; the smallest subnormal's half at 0.
    base = tensor(1.0, 1.0, 2.0, 0.0, 0.0, 1.0, 0.0, dtype=torch.bfloat16)
    expert = tensor(1.0, 1 + 2**-8, 2 + 1.5 * 2**-7, 1e-5, -(2.0**-134), 3.0, 1.01e-5)
    stats = stats_of(expert, base, [2, 5])
    counts = (stats.elements, stats.changed, stats.tiny, stats.half_ulp, stats.core)
    assert counts == (7, 6, 3, 3, 2)
    assert stats.mean_in == (1.5 * 2**-7 + 2) / 2
    assert stats.mean_out == pytest.approx((2**-8 + 2.01e-5) / 5, rel=1e-6)
    assert total([stats, stats]).changed == 12
    assert total([stats, stats]).mean_in == stats.mean_in
    assert stats_of(expert, base, []).mean_in is None
    assert stats_of(expert, base, range(7)).mean_out is None


# --- singular values --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        # squares sum up to 10000.31, values to 103.1: max(8 sqrt(10000.31 / 32), 2 * 10000.31 / 103.1) is 194
        ([100.0] + [0.1] * 31, [2 * 10000.31 / 103.1] + [1.2] * 31),
        # 324 + 31, and 49: max(8 sqrt(355 / 32), 2 * 355 / 49) is 26.65
        ([18.0] + [1.0] * 31, [8 * math.sqrt(355 / 32)] + [12.0] * 31),
        ([2.0] * 32, [16.0] * 32),
        ([2.0] + [0.0] * 31, [4.0] + [0.0] * 31),  # one direction: its mean is itself
        ([0.0] * 32, [0.0] * 32),
    ],
)
def test_level(values: list[float], expected: list[float]) -> None:
    np.testing.assert_allclose(level(np.diag(values)), np.diag(expected), atol=1e-12)
    wide = np.hstack([np.diag(values), np.zeros((32, 5))])
    np.testing.assert_allclose(level(wide.T).T[:, :32], np.diag(expected), atol=1e-12)
    np.testing.assert_allclose(level(np.diag(values), 1e-3), np.diag(expected) * shrunk(expected), atol=1e-12)


def shrunk(values: list[float]) -> float:
    norm = math.sqrt(math.fsum(x * x for x in values))
    return 1e-3 / norm if norm else 1.0


@pytest.mark.parametrize(
    ("name", "shape", "keys", "expected"),
    [
        ("l.0.w", (32, 40), {}, True),
        ("l.0.w", (40, 32), {"singular_values": "level", "rest": Q("0.3")}, True),
        ("l.0.w", (31, 40), {}, False),
        ("l.0.w", (40, 31), {}, False),
        ("l.0.w", (32, 32, 1), {}, False),
        ("l.w", (32, 40), {}, False),
        ("l.0.w", (32, 40), {"rest": Q(0)}, False),
        ("l.0.w", (32, 40), {"space": "weights"}, False),
        ("l.0.w", (32, 40), {"singular_values": "keep"}, False),
    ],
)
def test_what_is_levelled(name: str, shape: tuple[int, ...], keys: dict[str, Any], expected: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    start, *updates = (torch.randn(shape, generator=generator) for _ in range(3))
    base, a, b = {name: start}, {name: start + updates[0]}, {name: start + updates[1]}
    result = run(base, {"a": a, "b": b}, Settings(density=Q(1, 10), **keys))
    assert (name in result.tolerance) is expected
    assert not run(base, {"a": a, "b": base}, Settings(density=Q(1, 10), **keys)).tolerance
    if expected:
        cores = sorted({i for core in result.cores.values() for i in core[name]})
        assert np.flatnonzero(result.tolerance[name] == 0).tolist() == cores
        moved = np.delete(result.ideal[name] - f32(base[name]), cores)
        share = result.levelled[name]
        assert 0.99 < share < 1
        limit = share * 0.05 + (1 - share) * 1.1  # as far as the fold moves, which is as large as the base
        assert np.linalg.norm(moved) <= limit * float(keys.get("rest", 1)) * np.linalg.norm(f32(base[name]))
        error = np.abs(result.fused32[name] - result.ideal[name])
        assert (error <= 2 * result.tolerance[name]).all()


# --- properties -------------------------------------------------------------------------------------


@st.composite
def settled(draw: st.DrawFn) -> tuple[Case, Settings]:
    case = draw(cases())
    return case, draw(settings(case))


@given(settled())
def test_the_float32_blend_stays_near_the_ideal_fold(drawn: tuple[Case, Settings]) -> None:
    case, s = drawn
    result = run(case.base, case.experts, s, case.extra)
    for name, scale in result.scale.items():
        if name not in result.tolerance:
            error = np.abs(result.fused32[name] - result.ideal[name])
            assert (error <= (len(result.fold) + 3) * 2.0**-24 * scale + 1e-44).all()


@given(settled())
def test_its_own_coefficients_give_the_same_bytes(drawn: tuple[Case, Settings]) -> None:
    case, s = drawn
    result = run(case.base, case.experts, s, case.extra)
    again = run(case.base, case.experts, s, case.extra, result.coefficients)
    assert all(same_bytes(result.fused[name], again.fused[name]) for name in case.base)


@given(settled())
def test_coefficients_reproduce_the_running_fold(drawn: tuple[Case, Settings]) -> None:
    case, s = drawn
    plain = Settings(density=Q(0), space="weights", granularity=s.granularity, t=s.t, weight=s.weight)
    result = run(case.base, case.experts, plain)
    for name, coefficients in result.coefficients.items():
        _, unit = unit_of(case.base[name], s.granularity)
        stored = np.array([f32(case.experts[task][name]) for task in result.fold], dtype=np.float64)
        expected = (coefficients[unit].T * stored).sum(axis=0)
        assert (np.abs(result.ideal[name] - expected) <= 1e-13 * result.scale[name]).all()


@given(settled())
def test_cores_have_k_elements_unless_fewer_changed(drawn: tuple[Case, Settings]) -> None:
    case, s = drawn
    assert isinstance(s.density, Q)
    cores = run(case.base, case.experts, Settings(density=s.density)).cores
    for task, expert in case.experts.items():
        for name, core in cores[task].items():
            m = magnitude(expert[name], case.base[name])
            assert len(core) == min(math.floor(s.density * len(m)), np.count_nonzero(m))
            others = np.delete(m, core)
            assert not len(core) or not len(others) or m[core].min() >= others.max()


# --- the helpers ------------------------------------------------------------------------------------


def test_saved_checkpoints_read_back(tmp_path: Path) -> None:
    tensors = {"b": torch.zeros(2, 3, dtype=torch.bfloat16), "a": torch.tensor(7), "c": torch.zeros(0, 3)}
    save(tmp_path, tensors, config={"x": 1})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert json.loads((tmp_path / "config.json").read_text()) == {"x": 1}
    loaded = load_file(tmp_path / "model.safetensors")
    assert loaded.keys() == tensors.keys()
    assert all(same_bytes(loaded[name], tensors[name]) for name in tensors)


def test_shards_are_named_as_by_hugging_face(tmp_path: Path) -> None:
    tensors = {name: torch.ones(4) for name in "abc"}
    save(tmp_path, tensors, shards=3)
    expected = split_torch_state_dict_into_shards(tensors, max_shard_size=16)
    written = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert written["weight_map"] == expected.tensor_to_filename
    assert written["metadata"] == {"total_parameters": 12, "total_size": 48}
    assert sorted(p.name for p in tmp_path.glob("*.safetensors")) == sorted(expected.filename_to_tensors)
    assert [*load_file(tmp_path / "model-00002-of-00003.safetensors")] == ["b"]


def test_written_recipes_are_relative_and_exact(tmp_path: Path) -> None:
    path = write_recipe(
        tmp_path / "r.yml",
        base_model=tmp_path / "base",
        parameters={"density": Q("0.29"), "exclude": ("*.b",)},
    )
    assert yaml.safe_load(path.read_text()) == {
        "merge_method": "cpi",
        "base_model": "base",
        "parameters": {"density": 0.29, "exclude": ["*.b"]},
    }
    with pytest.raises(ValueError, match="no short decimal"):
        decimal(THIRD)


def test_a_case_becomes_directories_and_a_recipe(tmp_path: Path) -> None:
    w = {"w": torch.zeros(1)}
    s = Settings(order=7, backbone="path", space="delta", rest=Q("0.3"), dtype=torch.bfloat16)
    recipe = yaml.safe_load(write_case(tmp_path, Case(w, {"a": w, "b": w}, w), s).read_text())
    assert {p.name for p in tmp_path.iterdir()} == {"base", "a", "b", "extra", "recipe.yml"}
    assert recipe["models"] == [{"model": "a", "name": "a"}, {"model": "b", "name": "b"}]
    assert recipe["dtype"] == "bfloat16"
    assert recipe["parameters"] == {
        "density": 0.01, "weight": 1, "scope": "tensor", "tau": "auto", "order": {"seed": 7},
        "backbone": "./extra", "conflict": "mean", "space": "delta", "rest": 0.3, "granularity": "tensor",
    }  # fmt: skip


def test_ulps() -> None:
    a = tensor(1.0, -0.0, -1.0, dtype=torch.bfloat16)
    b = tensor(1 + 2**-7, 0.0, -1 - 2**-6, dtype=torch.bfloat16)
    assert (ulps(a, b), ulps(a, a), ulps(a[:2], b[:2])) == (2, 0, 1)
    tiny = 2.0**-149
    assert ulps(tensor(tiny), tensor(-tiny)) == 2
