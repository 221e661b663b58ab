"""An adapter's config and weights, on a model: opened, and every tensor that comes out is computed.

Oracle: what is read does not depend on how it is divided into reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cpimerge.adapter import open_adapter
from cpimerge.checkpoint import Handles, Tensor
from cpimerge.directory import open_checkpoint
from cpimerge.errors import CheckpointError

from ..bundles import join, split, write
from ..mutation import bundle, header, json_text
from ..target import Run, Target
from . import files

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
KEYS = (
    *("peft_type", "LORA", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_bias"),
    *("fan_in_fan_out", "bias", "all", "init_lora_weights", "pissa", "gaussian", "target_modules", "modules_to_save"),
    *("layers.0.w", "^model.layers.[01].w", r"(a+)+$", r"(\w|\w\w)*x", "w", ".*", "(?=x)", r"\1", "a{9,9999}"),
)
LORA = "base_model.model.model.layers.{}.w.{}"
NAMES = (
    *(LORA.format(0, part) for part in ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector", "lora_B.bias")),
    *("base_model.model.model.embed_tokens.lora_embedding_A", "base_model.model.model.embed_tokens.lora_embedding_B"),
    *("base_model.model.lm_head.weight", "base_model.model.lm_head.modules_to_save.weight", "model.layers.0.w.bias"),
)
PLAIN = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}


def _prepare(scratch: Path) -> Run:
    model = open_checkpoint(files.save_model(scratch / "model", files.model(), {"tie_word_embeddings": False}))
    directory = scratch / "adapter"
    directory.mkdir()

    def run(data: bytes) -> None:
        write(split(data, CONFIG), directory, (CONFIG, WEIGHTS))
        with closing(Handles(4)) as handles:
            opened = open_adapter(model, directory)
            for tensor in opened.tensors.values():
                _read(tensor, handles)

    return run


def _read(tensor: Tensor, handles: Handles) -> None:
    """All at once, and in two parts."""
    assert tensor.scratch_bytes < 1 << 28
    whole, parts = bytearray(tensor.nbytes), bytearray(tensor.nbytes)
    tensor.read_into(memoryview(whole), 0, handles)
    half = tensor.elements // 2 * tensor.item_bytes
    tensor.read_into(memoryview(parts)[:half], 0, handles)
    tensor.read_into(memoryview(parts)[half:], half, handles)
    assert whole == parts


def _seeds() -> Mapping[str, bytes]:
    def ones(*shape: int) -> npt.NDArray[np.float32]:
        return np.ones(shape, np.float32)

    lora = {LORA.format(0, "lora_A.weight"): ones(2, 3), LORA.format(0, "lora_B.weight"): ones(2, 2)}
    dora = lora | {LORA.format(0, "lora_magnitude_vector"): ones(2)}
    embedding: files.Arrays = {
        "base_model.model.model.embed_tokens.lora_embedding_A": ones(2, 6),
        "base_model.model.model.embed_tokens.lora_embedding_B": ones(2, 2),
        "base_model.model.lm_head.weight": ones(6, 2).astype(np.float16),
    }
    patterns = PLAIN | {"r": 8, "rank_pattern": {"layers.0.w": 2}, "alpha_pattern": {r"^model.layers.\d+.w": 3.5}}
    return {
        "lora": join({CONFIG: files.as_bytes(PLAIN), WEIGHTS: files.weights(lora)}),
        "dora": join({CONFIG: files.as_bytes(PLAIN | {"use_dora": True}), WEIGHTS: files.weights(dora)}),
        "patterns": join({CONFIG: files.as_bytes(patterns), WEIGHTS: files.weights(lora)}),
        "embedding": join({CONFIG: files.as_bytes(PLAIN), WEIGHTS: files.weights(embedding)}),
    }


TARGET = Target(
    _prepare,
    _seeds,
    CheckpointError,
    bundle(CONFIG, {CONFIG: json_text(KEYS), WEIGHTS: header((*files.WORDS, *NAMES))}),
    (*KEYS, *NAMES),
    memory=30_000_000,
)
