"""Makes the benchmark's inputs: a Llama-shaped base and fine-tunes of it, from a seed, tensor by tensor."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch

from cpimerge.writer import OutputTensor, ShardLayout, ShardWriter, shard_layouts

HIDDEN, LAYERS, INTERMEDIATE = 1024, 16, 4096
STEP = 1e-3  # the size of an update; the weights' is 0.03


def make_inputs(directory: Path, vocabulary: int, experts: int, seed: int = 0) -> None:
    """Write `base` and `expert1`… below `directory` unless they are there.

    bfloat16, 0.22 billion parameters and 1024 for each word of the vocabulary.
    """
    paths = [directory / name for name in ("base", *(f"expert{n}" for n in range(1, experts + 1)))]
    for number, path in enumerate(paths):
        if not (path / "config.json").is_file():
            path.mkdir(parents=True, exist_ok=True)
            (layout,) = shard_layouts(_tensors(vocabulary))
            _write(path / layout.filename, layout, seed, number)
            (path / "config.json").write_text(json.dumps(_config(vocabulary)))


def _tensors(vocabulary: int) -> Iterator[OutputTensor]:
    for name, shape in _shapes(vocabulary).items():
        yield OutputTensor(name, "BF16", shape)


def _shapes(vocabulary: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, HIDDEN)}
    for layer in range(LAYERS):
        block = f"model.layers.{layer}."
        shapes |= {block + f"self_attn.{part}_proj.weight": (HIDDEN, HIDDEN) for part in "qo"}
        shapes |= {block + f"self_attn.{part}_proj.weight": (HIDDEN // 4, HIDDEN) for part in "kv"}
        shapes |= {block + f"mlp.{part}_proj.weight": (INTERMEDIATE, HIDDEN) for part in ("gate", "up")}
        shapes[block + "mlp.down_proj.weight"] = (HIDDEN, INTERMEDIATE)
        shapes |= {block + f"{part}_layernorm.weight": (HIDDEN,) for part in ("input", "post_attention")}
    return shapes | {"model.norm.weight": (HIDDEN,)}


def _write(file: Path, layout: ShardLayout, seed: int, number: int) -> None:
    writer = ShardWriter(file, layout.header())
    for index, tensor in enumerate(layout.tensors):
        values = 0.03 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed + index))
        if number:  # a fine-tune starts from what the base has stored
            generator = torch.Generator().manual_seed(seed + 10_000 * number + index)
            values = values.bfloat16().float() + STEP * torch.randn(tensor.shape, generator=generator)
        writer.append(memoryview(values.bfloat16().view(torch.uint8).flatten().numpy()))
    writer.finish()


def _config(vocabulary: int) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "intermediate_size": INTERMEDIATE,
        "vocab_size": vocabulary,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--vocabulary", type=int, default=32_000, help="words; 1024 parameters each, and 0.22 B beside")
    parser.add_argument("--experts", type=int, default=4)
    make_inputs(**vars(parser.parse_args()))
