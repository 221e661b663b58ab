"""Quantised checkpoints are refused once, by the name of their scheme; plain ones are not, whatever configs say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import save, write_recipe
from files import write_raw

import cpimerge
from cpimerge import CheckpointError
from cpimerge.directory import open_checkpoint
from cpimerge.quantized import quantization, refused, stale_config

Tensors = dict[str, torch.Tensor]
ORIGINAL = "Take the checkpoint in bfloat16 or float32 that it was made from"
LAYER = "model.layers.0.mlp.up_proj"
F8 = torch.float8_e4m3fn


def ints(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=dtype)


def method(name: str, **more: Any) -> dict[str, Any]:
    return {"quantization_config": {"quant_method": name, **more}}


# Tensors of one layer as the schemes store them, the config, and what the error says.
SCHEMES: dict[str, tuple[Tensors, dict[str, Any], str]] = {
    "deepseek": (
        {f"{LAYER}.weight": torch.ones(4, 4).to(F8), f"{LAYER}.weight_scale_inv": torch.ones(1, 1)},
        method("fp8", weight_block_size=[128, 128]),
        f"FP8 with scales for blocks (as DeepSeek-V3) (tensor '{LAYER}.weight' in F8_E4M3). {ORIGINAL}, or load it "
        "with transformers and FineGrainedFP8Config(dequantize=True), and save that",
    ),
    "deepseek without a config": (
        {f"{LAYER}.weight": torch.ones(4, 4).to(F8), f"{LAYER}.weight_scale_inv": torch.ones(1, 1)},
        {},
        f"FP8 with scales for blocks (as DeepSeek-V3) (tensor '{LAYER}.weight' in F8_E4M3). {ORIGINAL}, or load it "
        "with transformers and FineGrainedFP8Config(dequantize=True), and save that",
    ),
    "fp8 of vllm": (
        {f"{LAYER}.weight": torch.ones(4, 4).to(F8), f"{LAYER}.weight_scale": torch.ones(())},
        {},
        f"scales beside tensor '{LAYER}.weight' in F8_E4M3. {ORIGINAL}",
    ),
    "gpt-oss": (
        {f"{LAYER}_blocks": ints(torch.uint8, 2, 4, 2, 16), f"{LAYER}_scales": ints(torch.uint8, 2, 4, 2)},
        method("mxfp4"),
        f"MXFP4 (as gpt-oss) (tensor '{LAYER}_blocks' and 1 more in U8). {ORIGINAL}, or load it with transformers "
        "and Mxfp4Config(dequantize=True), and save that",
    ),
    "gptq": (
        {
            f"{LAYER}.qweight": ints(torch.int32, 4, 4),
            f"{LAYER}.qzeros": ints(torch.int32, 2, 4),
            f"{LAYER}.scales": torch.ones(2, 4).half(),
            f"{LAYER}.g_idx": ints(torch.int32, 8),
        },
        {},
        f"GPTQ (tensor '{LAYER}.qweight' and 1 more in I32). {ORIGINAL}",
    ),
    "awq": (
        {f"{LAYER}.qweight": ints(torch.int32, 4, 4), f"{LAYER}.scales": torch.ones(2, 4).half()},
        {},
        f"AWQ (tensor '{LAYER}.qweight' in I32). {ORIGINAL}",
    ),
    "a gptq that its config calls otherwise": (
        {f"{LAYER}.qweight": ints(torch.int32, 4, 4), f"{LAYER}.g_idx": ints(torch.int32, 8)},
        method("auto-round"),
        f"AutoRound (tensor '{LAYER}.qweight' in I32). {ORIGINAL}",
    ),
    "bitsandbytes in 4 bits": (
        {
            f"{LAYER}.weight": ints(torch.uint8, 8, 1),
            f"{LAYER}.weight.absmax": ints(torch.uint8, 4),
            f"{LAYER}.weight.quant_map": torch.ones(16),
            f"{LAYER}.weight.quant_state.bitsandbytes__nf4": ints(torch.uint8, 70),
        },
        method("bitsandbytes", load_in_4bit=True),
        f"bitsandbytes (tensor '{LAYER}.weight' and 2 more in U8). {ORIGINAL}, or load it with transformers, call "
        "model.dequantize(), and save that",
    ),
    "bitsandbytes in 8 bits": (
        {f"{LAYER}.weight": ints(torch.int8, 4, 4), f"{LAYER}.SCB": torch.ones(4)},
        {"quantization_config": {"load_in_8bit": True}},
        f"bitsandbytes (tensor '{LAYER}.weight' in I8). {ORIGINAL}, or load it with transformers, call "
        "model.dequantize(), and save that",
    ),
    "compressed-tensors": (
        {f"{LAYER}.weight_packed": ints(torch.int32, 4, 4), f"{LAYER}.weight_scale": torch.ones(4, 1)},
        {"text_config": {"compression_config": {"quant_method": "compressed-tensors", "format": "pack-quantized"}}},
        f"compressed-tensors (tensor '{LAYER}.weight_packed' in I32). {ORIGINAL}, or load it with transformers and "
        "CompressedTensorsConfig(dequantize=True), and save that",
    ),
    "mlx": (
        {
            f"{LAYER}.weight": ints(torch.uint32, 4, 4),
            f"{LAYER}.scales": torch.ones(4, 1),
            f"{LAYER}.biases": torch.ones(4, 1),
        },
        {"quantization": {"group_size": 64, "bits": 4}, "quantization_config": {"group_size": 64, "bits": 4}},
        f"MLX (tensor '{LAYER}.weight' in U32). {ORIGINAL}",
    ),
    "mlx without a config": (
        {
            f"{LAYER}.weight": ints(torch.uint32, 4, 4),
            f"{LAYER}.scales": torch.ones(4, 1),
            f"{LAYER}.biases": torch.ones(4, 1),
        },
        {},
        f"MLX (tensor '{LAYER}.weight' in U32). {ORIGINAL}",
    ),
    "hqq": (
        {f"{LAYER}.W_q": ints(torch.uint8, 4, 4), f"{LAYER}.scale": torch.ones(4)},
        {},
        f"HQQ (tensor '{LAYER}.W_q' in U8). {ORIGINAL}",
    ),
    "quanto": (
        {f"{LAYER}.weight._data": ints(torch.int8, 4, 4), f"{LAYER}.weight._scale": torch.ones(4)},
        {},
        f"quanto (tensor '{LAYER}.weight._data' in I8). {ORIGINAL}",
    ),
    "torchao": (
        {f"{LAYER}._weight_qdata": ints(torch.int8, 4, 4), f"{LAYER}._weight_scale": torch.ones(4)},
        method("torchao"),
        f"torchao (tensor '{LAYER}._weight_qdata' in I8). {ORIGINAL}",
    ),
    "one that only its config tells": (
        {f"{LAYER}.codes": ints(torch.int16, 4, 4), f"{LAYER}.codebooks": torch.ones(2, 4)},
        method("aqlm"),
        f"AQLM (tensor '{LAYER}.codes' in I16). {ORIGINAL}",
    ),
    "one that nobody knows": (
        {f"{LAYER}.weight": ints(torch.int8, 4, 4)},
        method("tomorrow\n"),
        f"tomorrow\\n (tensor '{LAYER}.weight' in I8). {ORIGINAL}",
    ),
    "one without a name": (
        {f"{LAYER}.weight": ints(torch.int8, 4, 4)},
        {"quantization_config": {"bits": 8}},
        f"of a kind it does not name (tensor '{LAYER}.weight' in I8). {ORIGINAL}",
    ),
}


@pytest.mark.parametrize("case", SCHEMES)
def test_schemes(tmp_path: Path, case: str) -> None:
    tensors, config, text = SCHEMES[case]
    found = open_checkpoint(save(tmp_path / "m", tensors | {"norm": torch.ones(4)}, config=config))
    assert list(refused(found)) == [f"{tmp_path}/m: is quantised: {text}"]
    assert list(stale_config(found)) == []


def test_dtypes_of_less_than_a_byte(tmp_path: Path) -> None:
    """NumPy and PyTorch do not know them all: the file is written by hand."""
    header = {
        "a.weight": {"dtype": "F4", "shape": [2, 4], "data_offsets": [0, 4]},
        "a.weight_scale": {"dtype": "F8_E8M0", "shape": [2, 1], "data_offsets": [4, 6]},
        "b.weight": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [6, 9]},
        "c.weight": {"dtype": "F6_E3M2", "shape": [4], "data_offsets": [9, 12]},
    }
    write_raw(tmp_path / "m" / "model.safetensors", header, bytes(12))
    assert list(refused(open_checkpoint(tmp_path / "m"))) == [
        f"{tmp_path}/m: is quantised: scales beside tensor 'a.weight' and 3 more in F4 and F6_E2M3 and F6_E3M2 and "
        f"F8_E8M0. {ORIGINAL}"
    ]


def test_small_floats_alone(tmp_path: Path) -> None:
    """Without scales they may be plain numbers, in a dtype that cannot be merged."""
    found = open_checkpoint(save(tmp_path / "m", {"a": torch.ones(2).to(F8), "b": torch.ones(2).to(F8)}))
    assert quantization(found) is None
    assert list(refused(found)) == [
        f"{tmp_path}/m: tensor 'a' and 1 more: F8_E4M3 cannot be merged. Convert the checkpoint to bfloat16 or float32"
    ]


PLAIN: dict[str, Tensors] = {
    "floats": {f"{LAYER}.weight": torch.ones(4, 4), f"{LAYER}.weight_scale": torch.ones(4)},
    "positions": {f"{LAYER}.weight": torch.ones(4, 4), "position_ids": torch.arange(8, dtype=torch.int32)[None]},
    "masks": {f"{LAYER}.weight": torch.ones(4, 4), f"{LAYER}.mask": torch.ones(4, 4, dtype=torch.bool)},
    "wide integers": {f"{LAYER}.weight": torch.ones(4, 4), "relative_position_index": torch.ones(4, 4).long()},
    "a U-Net": {"down_blocks.0.weight": torch.ones(4, 4), "time_blocks": torch.ones(4, 4)},
}


@pytest.mark.parametrize("config", [{}, method("bitsandbytes")])
@pytest.mark.parametrize("case", PLAIN)
def test_plain_numbers(tmp_path: Path, case: str, config: dict[str, Any]) -> None:
    found = open_checkpoint(save(tmp_path / "m", PLAIN[case], config=config))
    assert list(refused(found)) == []
    assert list(stale_config(found)) == [
        f"{tmp_path}/m: config.json speaks of a quantisation (bitsandbytes), but the tensors are plain numbers; "
        "they are merged as such. Where this is the base, remove it from the output's"
        for _ in config
    ]


def test_a_merge_lists_one_problem_for_each(tmp_path: Path) -> None:
    plain = {f"{LAYER}.weight": torch.ones(4, 4)}
    save(tmp_path / "base", plain)
    quantised, config, text = SCHEMES["gptq"]
    other = {name.replace("0", "1"): tensor for name, tensor in quantised.items()}
    save(tmp_path / "expert", quantised | other, config=config)
    recipe = write_recipe(
        tmp_path / "recipe.yml", base_model=tmp_path / "base", models=[{"model": tmp_path / "expert"}]
    )
    with pytest.raises(CheckpointError) as error:
        cpimerge.plan(recipe, tmp_path / "plan")
    assert error.value.problems == (f"{tmp_path}/expert: is quantised: {text.replace('1 more', '3 more')}",)
