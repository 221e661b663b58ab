"""Makes the benchmark's inputs: a base and fine-tunes of it, from a seed, block by block; bfloat16 throughout.

    python benchmarks/inputs.py DIRECTORY usual --experts 4

`bench.py` runs it as a process of its own, as a child's peak memory begins with that of its parent.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from cpimerge.writer import OutputTensor, ShardLayout, ShardWriter, index_json, shard_layouts

STEP = 1e-3  # the size of an update; the weights' is 0.03
BLOCK = 1 << 22  # elements that are drawn at once

Shapes = dict[str, tuple[int, ...]]


def llama(hidden: int, layers: int, intermediate: int, vocabulary: int) -> Shapes:
    """A Llama with a quarter of the attention heads for keys and values."""
    shapes: Shapes = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(layers):
        block = f"model.layers.{layer}."
        shapes |= {block + f"self_attn.{part}_proj.weight": (hidden, hidden) for part in "qo"}
        shapes |= {block + f"self_attn.{part}_proj.weight": (hidden // 4, hidden) for part in "kv"}
        shapes |= {block + f"mlp.{part}_proj.weight": (intermediate, hidden) for part in ("gate", "up")}
        shapes[block + "mlp.down_proj.weight"] = (hidden, intermediate)
        shapes |= {block + f"{part}_layernorm.weight": (hidden,) for part in ("input", "post_attention")}
    return shapes | {"model.norm.weight": (hidden,)}


def mixture(layers: int, experts: int, rows: int, columns: int) -> Shapes:
    """The matrices of a mixture-of-experts model: three for each expert of a layer."""
    return {
        f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight": (rows, columns)
        for layer in range(layers)
        for expert in range(experts)
        for part in ("gate", "up", "down")
    }


MODELS: dict[str, Shapes] = {
    "point": {"model.norm.weight": (1024,)},  # nothing to do: what is left is start-up
    "little": llama(1024, 2, 4096, 20_000),  # 0.1 GB
    "usual": llama(1024, 16, 4096, 32_000),  # 0.55 GB
    "half": llama(896, 24, 4864, 151_936),  # 0.5 B parameters, 1 GB
    "large": llama(4096, 16, 14_336, 128_000),  # 8 GB
    "few": mixture(25, 4, 67 * 32, 432),  # 0.55 GB in 300 tensors
    "many": mixture(25, 4 * 67, 32, 432),  # the same bytes in 20,100
    "blocks": mixture(2, 1, 48_000, 2048),  # 1.2 GB in 6 tensors
    "matrices": mixture(25, 5, 768, 2048),  # the same bytes in 375, each as large as those of Qwen3-30B-A3B's experts
    "giant": {"model.embed_tokens.weight": (1 << 19, 1024)},  # one tensor of 1 GiB
}


def make_inputs(directory: Path, model: str, experts: int, scale: float = 1, seed: int = 0) -> None:
    """Write `base` and `expert1`… below `directory` unless they are there, whole. `scale` shortens every tensor."""
    shapes = {name: (max(1, round(scale * rows)), *rest) for name, (rows, *rest) in MODELS[model].items()}
    for number, name in enumerate(("base", *(f"expert{n}" for n in range(1, experts + 1)))):
        path = directory / name
        if not (path / "config.json").is_file():  # it is written last
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir(parents=True)
            _write(path, shapes, seed, number)


def _write(path: Path, shapes: Shapes, seed: int, number: int) -> None:
    """One checkpoint; number 0 is the base."""
    layouts = shard_layouts(OutputTensor(name, "BF16", shape) for name, shape in shapes.items())
    base, own = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed + number)
    for layout in layouts:
        _write_shard(path / layout.filename, layout, base, own if number else None)
    if len(layouts) > 1:
        (path / "model.safetensors.index.json").write_text(index_json(layouts))
    (path / "config.json").write_text(json.dumps(_config(shapes)))


def _write_shard(file: Path, layout: ShardLayout, base: torch.Generator, own: torch.Generator | None) -> None:
    writer = ShardWriter(file, layout.header())
    for tensor in layout.tensors:
        for values in _values(math.prod(tensor.shape), base, own):
            writer.append(memoryview(values.view(torch.uint8).numpy()))
    writer.finish()


def _values(elements: int, base: torch.Generator, own: torch.Generator | None) -> Iterator[torch.Tensor]:
    """The base's values, which every checkpoint draws alike; a fine-tune adds updates of its own to them."""
    for start in range(0, elements, BLOCK):
        size = min(BLOCK, elements - start)
        values = (0.03 * torch.randn(size, generator=base)).bfloat16()
        if own is not None:  # a fine-tune starts from what the base has stored
            values = (values.float() + STEP * torch.randn(size, generator=own)).bfloat16()
        yield values


def _config(shapes: Shapes) -> dict[str, object]:
    """What mergekit asks for."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": len({name.split(".")[2] for name in shapes if name.startswith("model.layers.")}),
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--scale", type=float, default=1, help="shortens every tensor")
    make_inputs(**vars(parser.parse_args()))
