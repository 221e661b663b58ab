"""A tiny language model with a tokenizer, experts made from it, their plan and fusion, and data for their tasks."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from checkpoints import write_recipe
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from cpimerge import api
from cpimerge.train import Settings

WORDS = ("<pad>", "<s>", "</s>", "<unk>", *(f"w{number}" for number in range(44)))
TASKS = ("math", "code", "chat")
TEMPLATE = "{% for m in messages %}<{{ m.role }}> {{ m.content }} </s> {% endfor %}"
PROMPTED = TEMPLATE + "{% if add_generation_prompt %}<assistant> {% endif %}"
SMALL = Settings(samples=6, holdout=2, batch_size=2, learning_rate=1e-2, max_length=32, save_steps=2)


def tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    """A word is a token; every text begins with <s>."""
    roles = ("<user>", "<assistant>", "<system>")
    inner = Tokenizer(WordLevel({word: number for number, word in enumerate((*WORDS, *roles))}, unk_token="<unk>"))
    inner.pre_tokenizer = WhitespaceSplit()
    inner.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=inner,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        chat_template=template,
    )


def write_base(
    directory: Path, *, dtype: torch.dtype = torch.bfloat16, tied: bool = False, dropout: float = 0.0
) -> Path:
    """A Llama of some six thousand random parameters, saved by transformers with its tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS) + 3,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        attention_dropout=dropout,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    torch.nn.Module.to(model, dtype)
    model.save_pretrained(directory)
    tokenizer(PROMPTED).save_pretrained(directory)
    return directory


def write_expert(base: Path, directory: Path, seed: int) -> Path:
    """The base, every tensor moved a little at random."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: (value.float() + 0.05 * torch.randn(value.shape, generator=generator)).to(value.dtype)
        for name, value in load_file(base / "model.safetensors").items()
    }
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_bytes((base / "config.json").read_bytes())
    return directory


def write_world(
    root: Path,
    *,
    stages: Sequence[Sequence[str]] = (("math",), ("code", "chat")),
    granularity: str = "tensor",
    **base: Any,
) -> Path:
    """`base`, an expert for each of TASKS, `plan`, `fused` and `data.jsonl`, all below `root`."""
    write_base(root / "base", **base)
    for number, task in enumerate(TASKS, 1):
        write_expert(root / "base", root / task, number)
    recipe = write_recipe(
        root / "recipe.yml",
        base_model=root / "base",
        models=[{"model": root / task, "name": task} for task in TASKS],
        parameters={"density": 0.1, "granularity": granularity, "stages": [list(stage) for stage in stages]},
    )
    api.plan(recipe, root / "plan")
    api.fuse(root / "plan", root / "fused")
    write_data(root / "data.jsonl", {task: 10 for task in TASKS})
    return root


def sentence(generator: random.Random, words: int) -> str:
    return " ".join(generator.choice(WORDS[4:]) for _ in range(words))


def lines(task: str, count: int) -> list[dict[str, Any]]:
    """`count` different examples of a task; of chat, conversations."""
    generator = random.Random(task)
    found: list[dict[str, Any]] = []
    for _ in range(count):
        prompt, answer = sentence(generator, generator.randrange(2, 6)), sentence(generator, generator.randrange(1, 4))
        if task == "chat":
            messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
            found.append({"task": task, "messages": messages})
        else:
            found.append({"task": task, "prompt": f"{prompt} ", "completion": answer})
    return found


def write_data(file: Path, counts: Mapping[str, int]) -> Path:
    return write_lines(file, [line for task, count in counts.items() for line in lines(task, count)])


def write_lines(file: Path, found: Sequence[Mapping[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(line) + "\n" for line in found), encoding="utf-8")
    return file
