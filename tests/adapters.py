"""Adapters for the tests: trained by nobody, saved by PEFT or by hand, and what PEFT makes of them."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from cpimerge.checkpoint import Checkpoint, Handles, Tensor

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I64": torch.int64}
Tensors = dict[str, torch.Tensor]


def llama(**settings: Any) -> nn.Module:
    """Linear layers without biases, square ones among them."""
    config = LlamaConfig(
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
        tie_word_embeddings=False,
        **settings,
    )
    return LlamaForCausalLM(config)


def gpt2() -> nn.Module:
    """Conv1D layers, whose weights are [in, out]; a tied head."""
    sizes: dict[str, Any] = {"n_embd": 48, "n_layer": 2, "n_head": 4, "vocab_size": 96, "n_positions": 32}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))


def bert() -> nn.Module:
    """Linear layers with biases, and a head that the task trains whole."""
    sizes: dict[str, Any] = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2}
    return BertForSequenceClassification(BertConfig(**sizes, num_attention_heads=4, vocab_size=96))


class Convolutions(nn.Module):
    """A model that is no transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(6, 10, 3)
        self.narrow = nn.Conv2d(10, 4, 1)
        self.line = nn.Conv1d(6, 5, 3)


@dataclass(frozen=True)
class Trained:
    """A model and an adapter on disk, and the model as PEFT merges it."""

    base: Path
    adapter: Path
    merged: Tensors
    model: nn.Module  # as it was before


def train(
    directory: Path,
    make: Callable[[], nn.Module],
    dtype: torch.dtype = torch.float32,
    adapter_dtype: torch.dtype = torch.float32,
    **settings: Any,
) -> Trained:
    """Save a model in `dtype` and an adapter of random values on it; `settings` are LoraConfig's."""
    torch.manual_seed(0)
    model = make().to(dtype)
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_model(model, directory / "base")
    wrapped = get_peft_model(model, LoraConfig(**settings))
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad:
            change = 0.02 * torch.randn(parameter.shape)
            value = parameter * (1 + change) if "magnitude" in name else change
            parameter.data = value.to(adapter_dtype if "lora_" in name else parameter.dtype)
    wrapped.save_pretrained(str(directory / "adapter"))
    again = make().to(dtype)
    again.load_state_dict(base)
    loaded = PeftModel.from_pretrained(again, directory / "adapter")
    merged = loaded.merge_and_unload()
    plain = make().to(dtype)
    plain.load_state_dict(base)
    return Trained(directory / "base", directory / "adapter", dict(merged.state_dict()), plain)


def save_model(model: nn.Module, directory: Path) -> None:
    if isinstance(model, PreTrainedModel):
        model.save_pretrained(directory)
        return
    directory.mkdir(parents=True)
    save_file(model.state_dict(), directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text("{}")


def exact(trained: Trained, **settings: Any) -> tuple[Tensors, Tensors]:
    """The merged weights of all adapted modules in float64, by definition; and the size of the terms of each sum.

    `settings` as for `train`, of which the patterns count only where they name a module by the end of its name.
    """
    state = load_file(trained.adapter / "adapter_model.safetensors")
    factors = {name.removeprefix("base_model.model."): tensor.double() for name, tensor in state.items()}
    weights, terms = {}, {}
    for name, module in trained.model.named_modules():
        kind = "embedding_" if isinstance(module, nn.Embedding) else ""
        a, b = (factors.get(f"{name}.lora_{kind}{part}" + ("" if kind else ".weight")) for part in "AB")
        if a is None or b is None:
            continue
        alpha = next((x for end, x in settings.get("alpha_pattern", {}).items() if name.endswith(end)), None)
        alpha = settings.get("lora_alpha", 8) if alpha is None else alpha
        scale = alpha / (math.sqrt(len(a)) if settings.get("use_rslora") else len(a))
        shape = (b.shape[0], *a.shape[1:])
        delta, size = (scale * (y.flatten(1) @ x.flatten(1)).reshape(shape) for x, y in ((a, b), (a.abs(), b.abs())))
        flipped = isinstance(module, Conv1D | nn.Embedding)
        weight = module.weight.detach().double()
        weight = weight.T if flipped else weight
        factor = torch.ones(shape[0], dtype=torch.float64)
        if settings.get("use_dora"):
            factor = factors[f"{name}.lora_magnitude_vector"].flatten() / (weight + delta).flatten(1).norm(dim=1)
        factor = factor.reshape(-1, *(1 for _ in shape[1:]))
        result, total = factor * (weight + delta), factor.abs() * (weight.abs() + size)
        weights[f"{name}.weight"], terms[f"{name}.weight"] = (result.T, total.T) if flipped else (result, total)
    return weights, terms


def value(tensor: Tensor, step: int | None = None) -> torch.Tensor:
    """What a checkpoint's tensor holds, read at once or `step` elements at a time."""
    raw = np.zeros(tensor.nbytes, np.uint8)
    size = tensor.nbytes if step is None else step * tensor.item_bytes
    handles = Handles(8)
    for start in range(0, tensor.nbytes, max(size, 1)):
        tensor.read_into(memoryview(raw)[start : start + size], start, handles)
    handles.close()
    return torch.from_numpy(raw).view(DTYPES[tensor.dtype]).reshape(tensor.shape)


def values(checkpoint: Checkpoint) -> Tensors:
    return {name: value(tensor) for name, tensor in checkpoint.tensors.items()}


def unit(size: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A unit in the last place of numbers of this size."""
    info = torch.finfo(dtype)
    return torch.exp2(torch.floor(torch.log2(size.double().abs().clamp(min=info.tiny)))) * info.eps


def write_adapter(directory: Path, tensors: Mapping[str, torch.Tensor], **config: Any) -> Path:
    """An adapter by hand; `config` beside what every one must have (r: that of the tensors)."""
    directory.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), directory / "adapter_model.safetensors", metadata={"format": "pt"})
    ranks = [len(tensor) for name, tensor in tensors.items() if "lora_A" in name or "embedding_A" in name]
    full = {"peft_type": "LORA", "r": (ranks or [1])[0], "lora_alpha": 8} | config
    (directory / "adapter_config.json").write_text(json.dumps(full))
    return directory
