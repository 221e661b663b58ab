"""A base and a fine-tune whose headers and configs are a stranger's, compared as before every merge.

Oracle: what passes has the same tensors in both, of the same shapes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from cpimerge.errors import CpimergeError
from cpimerge.preflight import check
from cpimerge.recipe import parse_recipe

from ..bundles import join, split, write
from ..mutation import bundle, header, json_text
from ..target import Run, Target
from . import files

FILES = tuple(f"{place}/{name}" for place in ("base", "math") for name in ("model.safetensors", "config.json"))
WORDS = (
    *("model_type", "dtype", "torch_dtype", "bfloat16", "tie_word_embeddings", "text_config", "vision_config"),
    *("quantization_config", "quant_method", "gptq", "load_in_4bit", "vocab_size", "num_hidden_layers", "layers"),
    *("hidden_size", "num_attention_heads", "num_key_value_heads", "architectures", "rope_theta", "llama"),
)
NAMES = (
    *("model.embed_tokens.weight", "lm_head.weight", "model.layers.0.w.weight", "model.layers.0.w.qweight"),
    *(
        "model.layers.0.w.weight_scale",
        "model.layers.1.mlp.gate_up_proj.weight",
        "model.layers.00.w",
        "transformer.h.0.w",
    ),
    *("rotary_emb.inv_freq", "model.layers.0.rotary_emb.inv_freq", "embeddings.position_ids", "model.layers.0.w.SCB"),
)
RECIPE = """merge_method: cpi
base_model: ./base
models: [{model: ./math}]
chat_template: auto
vocabulary: base
parameters:
  density: [0.1, 0.5]
  exclude: [embed, "*.bias"]
"""


def _prepare(scratch: Path) -> Run:
    for place in ("base", "math"):
        (scratch / place).mkdir()
    recipe = parse_recipe(RECIPE.replace('embed, "*.bias"', '"*embed*"'), None, scratch)

    def run(data: bytes) -> None:
        write(split(data, FILES[0]), scratch, FILES)
        inputs = check(recipe)
        for spec in inputs.tensors:
            assert {info.shape for info in spec.sources} == {spec.shape}
            assert len(spec.sources) == len(inputs.checkpoints)

    return run


def _seeds() -> Mapping[str, bytes]:
    config = {"model_type": "llama", "dtype": "float32", "vocab_size": 6, "tie_word_embeddings": True}
    plain = files.as_bytes({"model_type": "llama", "torch_dtype": "float32"})
    tied = {name: array for name, array in files.model().items() if name != "lm_head.weight"}
    both = tied | {"lm_head.weight": tied["model.embed_tokens.weight"]}
    kinds = {
        "plain": (files.model(), files.model(1.0), plain),
        "tied": (tied, both, files.as_bytes(config)),
        "untied": (both, tied, files.as_bytes(config)),
        "quantised": (tied, tied, files.as_bytes({"quantization_config": {"quant_method": "gptq"}})),
    }
    return {
        name: join(dict(zip(FILES, (files.weights(base), text, files.weights(other), text), strict=True)))
        for name, (base, other, text) in kinds.items()
    }


_HEADER, _JSON = header((*files.WORDS, *NAMES)), json_text(WORDS)
TARGET = Target(
    _prepare,
    _seeds,
    CpimergeError,
    bundle(FILES[0], {name: _JSON if name.endswith("json") else _HEADER for name in FILES}),
    (*WORDS, *NAMES),
    max_bytes=8192,
    memory=8_000_000,
)
