"""Known data-free merges are points of the family that METHOD.md describes; here they meet mergekit's.

The bound is one unit in the last place (ulp) of the output dtype.

- bfloat16, float16: both sides compute in float32 and round once. Their float32 results differ by a few times
  2^-24 of the largest term, far below an ulp of the output, so they round alike or to neighbours. (A result
  that cancels to less than 2^-13 of its terms could do worse; the data have none.)
- float32: there the arithmetic itself rounds, so two right results can lie further apart. mergekit is told to
  compute in float64 and round once; then only cpimerge's rounding is measured, and each test allows what its
  arithmetic must allow beyond the one ulp, with the reason (`blend_error`, `ulp_of_largest`).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mergekit_oracle
import pytest
import torch
import yaml
from mergekit_oracle import load

import cpimerge

Tensors = Mapping[str, torch.Tensor]

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
COMPUTE = {"bfloat16": "float32", "float16": "float32", "float32": "float64"}
BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}

# A quarter, as every tensor of the model has a multiple of 4 elements: so ⌊p·n⌋ is the same number in exact
# arithmetic (cpimerge) and in float64 (mergekit), and at least 1, the least that mergekit keeps.
DENSITY = 0.25


@dataclass(frozen=True)
class Family:
    """Checkpoints of one architecture: a base, three fine-tunes of it, and a model of other descent."""

    dtype: str
    base: Path
    experts: tuple[Path, ...]
    stranger: Path


@pytest.fixture(scope="module", params=DTYPES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    dtype: str = request.param
    root = tmp_path_factory.mktemp(dtype)
    base = random_weights(seed=0, dtype=DTYPES[dtype])
    experts = {f"expert{seed}": fine_tune(base, seed) for seed in (1, 2, 3)}
    stranger = random_weights(seed=9, dtype=DTYPES[dtype])
    for name, weights in {"base": base, **experts, "stranger": stranger}.items():
        save_llama(weights, root / name)
    return Family(dtype, root / "base", tuple(root / name for name in experts), root / "stranger")


def llama() -> Any:
    """A LlamaForCausalLM of two layers and 47,264 parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=448,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


def save_llama(weights: Tensors, directory: Path) -> None:
    model = llama().to(next(iter(weights.values())).dtype)
    model.load_state_dict(weights)
    model.save_pretrained(directory)


def random_weights(seed: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, tensor in llama().state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator)
        weights[name] = (1 + 0.2 * noise if "norm" in name else 0.02 * noise).to(dtype)
    return weights


def fine_tune(base: Tensors, seed: int) -> dict[str, torch.Tensor]:
    """`base` with an update of about 1.5 % of its size, without ties in magnitude at the edge of the core."""
    generator = torch.Generator().manual_seed(seed)
    updated = {}
    for name, tensor in base.items():
        scale = 0.015 * tensor.float().std()
        moved = tensor.float() + scale * torch.randn(tensor.shape, generator=generator)
        updated[name] = untie(tensor, moved.to(tensor.dtype))
    return updated


def untie(base: torch.Tensor, expert: torch.Tensor) -> torch.Tensor:
    """`expert` with those elements put back to the base that tie with the last one in the core.

    mergekit's argsort is not stable: which of them it would keep is chance, where cpimerge takes the first.
    """
    magnitude = (expert.float() - base.float()).abs().flatten()
    order = magnitude.argsort(descending=True, stable=True)
    core, rest = order.tensor_split([int(DENSITY * order.numel())])
    surplus = rest[magnitude[rest] == magnitude[core[-1]]]
    result = expert.flatten().clone()
    result[surplus] = base.flatten()[surplus]
    return result.reshape(base.shape)


def fused(out: Path, base: Path, models: Mapping[Path, Mapping[str, float]], **parameters: Any) -> Tensors:
    """Tensors of what cpimerge makes of `models` (path: its own parameters)."""
    recipe = {
        "merge_method": "cpi",
        "base_model": str(base),
        "models": [{"model": str(path), "parameters": dict(own)} for path, own in models.items()],
        "parameters": {"space": "weights"} | parameters,
    }
    file = out / "recipe.yml"
    file.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    cpimerge.merge(file, out / "fused")
    return load(out / "fused")


def mergekit(out: Path, family: Family, method: str, **config: Any) -> Tensors:
    dtypes = {"dtype": COMPUTE[family.dtype], "out_dtype": family.dtype}
    return mergekit_oracle.merge({"merge_method": method, **dtypes, **config}, out / "mergekit")


def ulps_apart(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """How many steps of their dtype lie between `a` and `b`: int64, of their shape; 0 between -0 and +0."""
    assert a.dtype == b.dtype

    def rank(values: torch.Tensor) -> torch.Tensor:
        bits = values.view(BITS[values.dtype])
        magnitude = (bits & torch.iinfo(bits.dtype).max).long()
        return torch.where(bits < 0, -magnitude, magnitude)

    return (rank(a) - rank(b)).abs()


def stacked(inputs: Sequence[Tensors], name: str) -> torch.Tensor:
    return torch.stack([tensors[name].double() for tensors in inputs])


def blend_error(inputs: Sequence[Tensors]) -> Tensors:
    """How far a float32 blend Σ cᵢ·xᵢ of N inputs may lie from the exact one: (N + 2)·2^-24·|x|.

    At most 2^-24 of Σ|cᵢ·xᵢ| is lost by rounding the coefficients, as much by rounding the products, by each
    of the N − 1 sums, and by mergekit's one rounding. And Σ|cᵢ·xᵢ| is at most |x| = √Σxᵢ², as Σcᵢ² ≤ 1 for a
    lerp, and for a slerp of vectors no more than a right angle apart (here at most 94°: 4 % in Σ|cᵢ·xᵢ|).
    """
    return {name: (len(inputs) + 2) * 2**-24 * stacked(inputs, name).norm(dim=0) for name in inputs[0]}


def ulp_of_largest(inputs: Sequence[Tensors]) -> Tensors:
    """An ulp of the largest input: θ⁰ + Δ cannot be more exact than its terms, even where they cancel."""
    largest = {name: stacked(inputs, name).abs().amax(dim=0).float() for name in inputs[0]}
    return {name: torch.nextafter(x, torch.tensor(torch.inf)).double() - x for name, x in largest.items()}


def assert_one_ulp(ours: Tensors, theirs: Tensors, float32_error: Tensors) -> None:
    """Every element within one ulp, or for float32 within `float32_error` (float64, absolute)."""
    assert ours.keys() == theirs.keys()
    for name, result in ours.items():
        far = ulps_apart(result, theirs[name]) > 1
        if result.dtype == torch.float32:
            far &= (result.double() - theirs[name].double()).abs() > float32_error[name]
        count = f"{int(far.sum())} of {far.numel()} elements"
        assert not far.any(), f"{name}: {count}: {result[far][:5]} against {theirs[name][far][:5]}"


def cosines(a: Tensors, b: Tensors) -> dict[str, float]:
    pairs = {name: (tensor.double().flatten(), b[name].double().flatten()) for name, tensor in a.items()}
    return {name: float(x @ y / (x.norm() * y.norm())) for name, (x, y) in pairs.items()}


def test_the_ulp_distance_counts_steps() -> None:
    one = torch.ones(1, dtype=torch.bfloat16)
    up = torch.nextafter(one, torch.tensor([2.0], dtype=torch.bfloat16))
    tiny = torch.tensor([1e-45])  # the smallest float32
    assert ulps_apart(one, one).item() == 0
    assert ulps_apart(one, up).item() == 1
    assert ulps_apart(-one, -up).item() == 1
    assert ulps_apart(torch.tensor([0.0]), torch.tensor([-0.0])).item() == 0
    assert ulps_apart(tiny, -tiny).item() == 2
    assert ulps_apart(torch.tensor([1.0]), torch.tensor([1 - 2**-24])).item() == 1


@pytest.mark.parametrize("t", [0.3, 0.75])
@pytest.mark.parametrize("other", ["expert", "stranger"])
def test_one_task_on_the_base_is_slerp(family: Family, other: str, t: float, tmp_path: Path) -> None:
    task = family.experts[0] if other == "expert" else family.stranger
    base, target = load(family.base), load(task)
    # Both sides fall back to lerp above 0.9995. No tensor is so near that line that rounding could decide.
    angles = cosines(base, target).values()
    assert min(angles) > 0.9997 if other == "expert" else max(map(abs, angles)) < 0.99

    ours = fused(tmp_path, family.base, {task: {}}, density=0, backbone="base", t=t)

    models = [{"model": str(family.base)}, {"model": str(task)}]
    config = {"base_model": str(family.base), "models": models, "parameters": {"t": t}}
    assert_one_ulp(ours, mergekit(tmp_path, family, "slerp", **config), blend_error([base, target]))


@pytest.mark.parametrize("t", [0.3, 0.75])
def test_two_tasks_are_slerp_from_the_backbone(family: Family, t: float, tmp_path: Path) -> None:
    """The backbone is a task, so it is the fold's start and not folded again; the base has no part in it."""
    start, end = family.stranger, family.experts[1]
    ours = fused(tmp_path, family.base, {end: {}, start: {}}, density=0, backbone="stranger", t=t)

    models = [{"model": str(start)}, {"model": str(end)}]
    config = {"base_model": str(start), "models": models, "parameters": {"t": t}}
    inputs = [load(start), load(end)]
    assert_one_ulp(ours, mergekit(tmp_path, family, "slerp", **config), blend_error(inputs))


@pytest.mark.parametrize("weights", [(1, 1, 1), (2, 1, 0.5), (0.1, 0.7, 3)])
def test_density_zero_is_averaging(family: Family, weights: tuple[float, ...], tmp_path: Path) -> None:
    """Shares of the running fold make a weighted mean, as long as every step of it is a lerp."""
    experts = [load(path) for path in family.experts]
    for a, b in itertools.combinations(experts, 2):
        assert min(cosines(a, b).values()) > 0.9997

    weighted = {path: {"weight": weight} for path, weight in zip(family.experts, weights, strict=True)}
    ours = fused(tmp_path, family.base, weighted, density=0, backbone="last")

    models = [{"model": str(path), "parameters": own} for path, own in weighted.items()]
    assert_one_ulp(ours, mergekit(tmp_path, family, "linear", models=models), blend_error(experts))


def test_elect_without_rest_is_ties(family: Family, tmp_path: Path) -> None:
    """ties at λ = 1 with equal weights; but where the updates cancel exactly, METHOD.md keeps the base."""
    base, experts = load(family.base), [load(path) for path in family.experts]
    own = {"density": DENSITY, "space": "delta", "rest": 0, "conflict": "elect"}
    ours = fused(tmp_path, family.base, {path: {} for path in family.experts}, **own)

    each = {"weight": 1, "density": DENSITY}
    models = [{"model": str(path), "parameters": each} for path in family.experts]
    config = {
        "base_model": str(family.base),
        "models": models,
        "parameters": {"normalize": True, "lambda": 1},
    }
    theirs = dict(mergekit(tmp_path, family, "ties", **config))

    cancelled = {name: sums_to_zero(x, [expert[name] for expert in experts]) for name, x in base.items()}
    # In 16 bits updates take few values, so such sums are there to be tested; in float32 they do not happen.
    assert any(bool(where.any()) for where in cancelled.values()) == (family.dtype != "float32")
    for name, where in cancelled.items():
        assert torch.equal(ours[name][where], base[name][where])
        theirs[name] = torch.where(where, base[name], theirs[name])  # mergekit takes the positive updates
    assert_one_ulp(ours, theirs, ulp_of_largest([base, *experts]))


def sums_to_zero(base: torch.Tensor, experts: list[torch.Tensor]) -> torch.Tensor:
    """Where core elements of several experts cancel exactly: bool, of the shape of `base`."""
    updates = torch.stack([(expert.double() - base.double()).flatten() for expert in experts])
    order = updates.float().abs().argsort(dim=1, descending=True)
    core = torch.zeros_like(updates, dtype=torch.bool)
    core.scatter_(1, order[:, : int(DENSITY * base.numel())], True)
    claims = updates.where(core, 0)
    return ((claims != 0).any(dim=0) & (claims.sum(dim=0) == 0)).reshape(base.shape)
