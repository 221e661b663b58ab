"""Adapters' weights against PEFT's merge_and_unload, and against their definition in float64.

The bound is one unit in the last place of the stored dtype, of numbers as large as what is added up: |W| + scale ·
|B|·|A|. A result that is much smaller than its terms is not known better by anybody: PEFT rounds the update of an
embedding to the weights' dtype, and its float32 sums round in an order that depends on the machine.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapters import Convolutions, Trained, bert, exact, gpt2, llama, train, unit, value, values, write_adapter
from checkpoints import save
from torch import nn

from cpimerge.adapted import BLOCK, AdaptedTensor
from cpimerge.adapter import open_adapter
from cpimerge.checkpoint import Handles, StoredTensor
from cpimerge.directory import open_checkpoint
from cpimerge.errors import CheckpointError

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
LINEAR = ["q_proj", "k_proj", "o_proj", "down_proj"]

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),  # PEFT on tied weights and on embeddings that it saves, too
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # of transformers, to PEFT
    pytest.mark.filterwarnings("ignore::peft.utils.warning.PeftWarning"),
]

CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "lora": (llama, {"r": 8, "lora_alpha": 16, "target_modules": LINEAR}),
    "rslora": (llama, {"r": 5, "lora_alpha": 7, "use_rslora": True, "target_modules": LINEAR}),
    "patterns": (
        llama,
        {
            "r": 4,
            "target_modules": LINEAR,
            "rank_pattern": {"q_proj": 3, "layers.1.mlp.down_proj": 9},
            "alpha_pattern": {"k_proj": 3, "layers.1.mlp.down_proj": 2.5},
        },
    ),
    "dora": (llama, {"r": 8, "use_dora": True, "target_modules": LINEAR}),
    "dora-rslora": (llama, {"r": 3, "use_dora": True, "use_rslora": True, "target_modules": LINEAR}),
    "embeddings": (llama, {"r": 8, "target_modules": ["embed_tokens", "lm_head", "v_proj"]}),
    "dora-embeddings": (llama, {"r": 8, "use_dora": True, "target_modules": ["embed_tokens", "q_proj"]}),
    "conv1d": (gpt2, {"r": 4, "target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "conv1d-dora": (gpt2, {"r": 4, "use_dora": True, "target_modules": ["c_attn", "c_proj"]}),
    "biased": (bert, {"r": 4, "target_modules": ["query", "value", "dense"]}),
    "convolutions": (Convolutions, {"r": 4, "target_modules": ["wide", "narrow", "line"]}),
    "convolutions-dora": (Convolutions, {"r": 4, "use_dora": True, "target_modules": ["wide", "narrow", "line"]}),
    "orthogonal": (llama, {"r": 4, "target_modules": LINEAR, "init_lora_weights": "orthogonal"}),
    "mica": (llama, {"r": 4, "target_modules": LINEAR, "init_lora_weights": "mica"}),
}


def opened(trained: Trained) -> dict[str, torch.Tensor]:
    return values(open_adapter(open_checkpoint(trained.base), trained.adapter))


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_as_peft_merges(tmp_path: Path, case: str, dtype: torch.dtype) -> None:
    make, settings = CASES[case]
    trained = train(tmp_path, make, dtype, **settings)
    ours = opened(trained)
    right, terms = exact(trained, **settings)
    before = dict(trained.model.state_dict())
    assert set(right) == {name for name in ours if not torch.equal(ours[name], before[name])}
    for name, tensor in ours.items():
        theirs = trained.merged[name]
        assert tensor.dtype == theirs.dtype == dtype
        if name not in right:
            assert torch.equal(tensor, theirs)
            continue
        lengths = "dora" in case and dtype == F32  # of which PEFT's are sums in float32, ours are not
        error = (tensor.double() - theirs.double()).abs()
        assert (error <= unit(terms[name], dtype) * (8 if lengths else 1)).all()
        # It is rounded once: as near as can be, but for float32's errors in the terms.
        slack = 3 * unit(terms[name], F32)
        assert ((tensor.double() - right[name]).abs() <= unit(right[name], dtype) / 2 + slack).all()


@pytest.mark.parametrize("case", ["lora", "dora", "embeddings", "conv1d"])
@pytest.mark.parametrize("adapter_dtype", [BF16, F16], ids=str)
def test_factors_of_less_precision(tmp_path: Path, case: str, adapter_dtype: torch.dtype) -> None:
    make, settings = CASES[case]
    trained = train(tmp_path, make, BF16, adapter_dtype, **settings)
    _, terms = exact(trained, **settings)
    ours = opened(trained)
    for name, size in terms.items():
        assert ((ours[name].double() - trained.merged[name].double()).abs() <= unit(size, BF16)).all()


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (bert, {"target_modules": ["query"], "modules_to_save": ["classifier"], "bias": "lora_only"}),
        (bert, {"target_modules": ["query"], "modules_to_save": ["classifier"], "bias": "all", "lora_bias": True}),
        (gpt2, {"target_modules": ["c_attn"], "bias": "all"}),
        (gpt2, {"target_modules": ["c_attn", "c_proj"], "bias": "lora_only", "lora_bias": True}),
        (llama, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}),
    ],
    ids=["lora_only", "all-lora_bias", "conv1d-all", "conv1d-lora_bias", "modules_to_save"],
)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_biases_and_whole_modules(
    tmp_path: Path, make: Callable[[], nn.Module], settings: dict[str, Any], dtype: torch.dtype
) -> None:
    trained = train(tmp_path, make, dtype, r=4, **settings)
    _, terms = exact(trained, **settings)
    ours = opened(trained)
    before = trained.model.state_dict()
    assert sum(not torch.equal(ours[name], before[name]) for name in ours) > len(terms)
    for name, tensor in ours.items():
        theirs = trained.merged[name].double()
        size = terms.get(name, theirs.abs() + before[name].double().abs())
        exactly = name not in terms and not (settings.get("lora_bias") and name.endswith("bias"))
        error = (tensor.double() - theirs).abs()
        assert (error == 0).all() if exactly else (error <= unit(size, dtype)).all()


def test_a_head_trained_with_conv1d(tmp_path: Path) -> None:
    """PEFT saves fan_in_fan_out as the last module had it, here the head; square layers are [in, out] all the same."""
    settings: dict[str, Any] = {"r": 4, "target_modules": ["c_proj", "lm_head"]}
    trained = train(tmp_path, lambda: untied(gpt2()), **settings)
    assert '"fan_in_fan_out": false' in (trained.adapter / "adapter_config.json").read_text()
    right, terms = exact(trained, **settings)
    ours = opened(trained)
    for name in right:
        assert ((ours[name].double() - right[name]).abs() <= 3 * unit(terms[name], F32)).all()


def untied(model: Any) -> nn.Module:
    model.config.tie_word_embeddings = False
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() + 0.5)
    return model  # type: ignore[no-any-return]


def test_untouched_tensors_are_the_models_own(tmp_path: Path) -> None:
    trained = train(tmp_path, llama, r=2, target_modules=["q_proj"])
    model = open_checkpoint(trained.base)
    tensors = open_adapter(model, trained.adapter).tensors
    kinds = {name: type(tensor) for name, tensor in tensors.items()}
    assert {kind for name, kind in kinds.items() if "q_proj" in name} == {AdaptedTensor}
    assert all(tensors[name] is model.tensors[name] for name, kind in kinds.items() if kind is StoredTensor)
    assert list(tensors) == list(model.tensors)


# --- shapes, divisions, memory ----------------------------------------------------------------------


def random_adapter(root: Path, shape: tuple[int, int], rank: int, transposed: bool, dora: bool) -> AdaptedTensor:
    """A single layer, whose weight is [out, in] or [in, out]."""
    outputs, inputs = shape[::-1] if transposed else shape
    generator = torch.Generator().manual_seed(7)
    tensors = {
        "base_model.model.x.lora_A.weight": torch.randn(rank, inputs, generator=generator),
        "base_model.model.x.lora_B.weight": torch.randn(outputs, rank, generator=generator),
    }
    if dora:
        tensors["base_model.model.x.lora_magnitude_vector"] = torch.rand(outputs, generator=generator)
    base = save(root / "base", {"x.weight": torch.randn(shape, generator=generator).to(BF16)})
    adapter = write_adapter(root / "adapter", tensors, fan_in_fan_out=transposed, use_dora=dora)
    tensor = open_adapter(open_checkpoint(base), adapter).tensors["x.weight"]
    assert isinstance(tensor, AdaptedTensor)
    return tensor


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("transposed", [False, True], ids=["out-in", "in-out"])
@pytest.mark.parametrize(
    "shape", [(1, 1), (7, 13), (300, 5), (3, 2 * BLOCK + 100), (1100, 1031)], ids=lambda shape: f"{shape[0]}x{shape[1]}"
)
def test_same_bytes_however_reads_are_divided(
    tmp_path: Path, shape: tuple[int, int], transposed: bool, dora: bool
) -> None:
    tensor = random_adapter(tmp_path, shape, 3, transposed, dora)
    whole = value(tensor).view(torch.int16)
    for step in (1 if tensor.elements < 2000 else 4_999, 512 if tensor.elements < 30_000 else 40_000, BLOCK + 17):
        assert torch.equal(value(tensor, step).view(torch.int16), whole)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize(("shape", "transposed"), [((900, 1100), False), ((900, 1100), True), ((40_000, 9), False)])
@pytest.mark.parametrize("rank", [1, 70, 301])
def test_a_thread_holds_no_more_than_it_says(
    tmp_path: Path, shape: tuple[int, int], transposed: bool, rank: int, dora: bool
) -> None:
    tensor = random_adapter(tmp_path, shape, rank, transposed, dora)
    value(tensor, 1000)  # compiled, and the modules loaded
    tensor = random_adapter(tmp_path / "again", shape, rank, transposed, dora)
    count = min(tensor.elements, 1 << 18)
    buffer = memoryview(np.empty(count * 2, np.uint8))
    tracemalloc.start()
    tensor.read_into(buffer, (tensor.elements - count) * 2, Handles(8))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak <= tensor.scratch_bytes + 20_000  # some objects of Python's


@pytest.mark.parametrize("part", ["lora_A.weight", "lora_B.weight", "lora_magnitude_vector"])
def test_a_factor_that_is_not_finite_is_named(tmp_path: Path, part: str) -> None:
    tensors = {
        "lora_A.weight": torch.ones(2, 4),
        "lora_B.weight": torch.ones(3, 2),
        "lora_magnitude_vector": torch.ones(3),
    }
    tensors[part].view(-1)[2] = float("nan")
    base = save(tmp_path / "base", {"x.weight": torch.ones(3, 4)})
    named = {f"base_model.model.x.{key}": tensor for key, tensor in tensors.items()}
    adapter = write_adapter(tmp_path / "adapter", named, use_dora=True)
    tensor = open_adapter(open_checkpoint(base), adapter).tensors["x.weight"]
    with pytest.raises(CheckpointError) as caught:
        value(tensor)
    file = adapter / "adapter_model.safetensors"
    name = f"base_model.model.x.{part}"
    assert caught.value.problems == (
        f"{file}: tensor {name!r}: flat index 2 is NaN or Inf. Repair the adapter or take another",
    )


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_what_is_not_finite_stays_so(tmp_path: Path, dtype: torch.dtype) -> None:
    """A NaN in the model, an update too large for the dtype, a row of length 0: not one of them becomes a number."""
    weight = torch.zeros(4, 2, dtype=dtype)
    weight[0, 0], weight[1, 0] = float("nan"), float("-inf")
    weight[0, 0] = torch.tensor(-1, dtype=torch.int32).view(F32) if dtype == F32 else float("nan")
    b = torch.tensor([[0.0], [3e38], [3e38], [0.0]])
    named = {"base_model.model.x.lora_A.weight": torch.tensor([[8.0, 0.0]]), "base_model.model.x.lora_B.weight": b}
    base = save(tmp_path / "base", {"x.weight": weight})
    plain = open_adapter(open_checkpoint(base), write_adapter(tmp_path / "plain", named))
    bad = [[True, False], [True, False], [True, False], [False, False]]
    assert (~torch.isfinite(value(plain.tensors["x.weight"]))).tolist() == bad
    named["base_model.model.x.lora_magnitude_vector"] = torch.ones(4)
    dora = open_adapter(open_checkpoint(base), write_adapter(tmp_path / "dora", named, use_dora=True))
    assert not torch.isfinite(value(dora.tensors["x.weight"])[3]).any()
