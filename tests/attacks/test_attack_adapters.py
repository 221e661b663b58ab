"""Adapters: configs that ask for more than there is, patterns that never end, tensors of absurd shapes.

What patterns mean, and that none takes forever, is tested in tests/test_adapter_config.py.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import save
from safetensors.torch import save_file

from attacks.attack import Spoil, both, check, done, fifo, link, refused, sparse, text
from attacks.conftest import model

A, B = (f"base_model.model.layers.0.w.lora_{part}.weight" for part in "AB")
SOUND = {A: torch.ones(2, 3), B: torch.ones(2, 2)}
CONFIG = "math/adapter_config.json"
WEIGHTS = "math/adapter_model.safetensors"
OTHER = "Was the adapter trained on another model?"
AGAIN = "Download or save it again"
CONSTANTS = {"OTHER": OTHER, "AGAIN": AGAIN, "A": A}
BOUND = "not a regular expression that can be matched in bounded time"


def adapter(tensors: Mapping[str, torch.Tensor] = SOUND, **config: Any) -> Spoil:
    """math as an adapter on layers.0.w.weight [2, 3]."""

    def spoil(home: Path) -> None:
        for name, shift in (("base", 0.0), ("code", -0.25)):
            every = model(shift)
            save(home / name, {("layers.0.w.weight" if it == "layers.0.w" else it): every[it] for it in every})
        shutil.rmtree(home / "math")
        (home / "math").mkdir()
        written = {"peft_type": "LORA", "r": 2, "lora_alpha": 4} | config
        (home / CONFIG).write_text(json.dumps(written))
        save_file(dict(tensors), home / WEIGHTS)

    return spoil


def config(content: str) -> Spoil:
    """The same with this text for a config."""
    return both(adapter(), text(CONFIG, content))


def hollow(rank: int, dtype: str = "F32", size: int = 4) -> Spoil:
    """Factors of a rank as large as one likes, in a file that takes no disk."""

    def spoil(home: Path) -> None:
        adapter(r=rank)(home)
        entries, end = {}, 0
        for name, shape in ((A, [rank, 3]), (B, [2, rank])):
            begin, end = end, end + shape[0] * shape[1] * size
            entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
        header = json.dumps(entries).encode()
        (home / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header)
        os.truncate(home / WEIGHTS, 8 + len(header) + end)

    return spoil


WRONG: dict[str, tuple[Spoil, list[str]]] = {
    "a rank of a billion": (
        hollow(10**9),
        [f"math: tensor '{A}': is of rank 1000000000, and updates only [2, 3]. Take another adapter"],
    ),
    "a rank of ten million": (
        hollow(10**7),
        [f"math: tensor '{A}': is of rank 10000000, and updates only [2, 3]. Take another adapter"],
    ),
    "a rank that the tensors do not have": (
        adapter(r=10**9),
        [f"math: tensor '{A}': is of rank 2, adapter_config.json says 1000000000. Save the adapter again"],
    ),
    "a rank beyond numbers": (
        adapter(r=2**31),
        ["math/adapter_config.json: r must be a whole number from 1 on, got 2147483648"],
    ),
    "no rank": (
        adapter({A: torch.ones(0, 3), B: torch.ones(2, 0)}, r=0),
        ["math/adapter_config.json: r must be a whole number from 1 on, got 0"],
    ),
    "a rank of nothing": (
        adapter({A: torch.ones(0, 3), B: torch.ones(2, 0)}, r=1),
        [f"math: tensor '{A}': is of rank 0, adapter_config.json says 1. Save the adapter again"],
    ),
    "an alpha beyond float32": (
        adapter(lora_alpha=1e308),
        ["math/adapter_config.json: lora_alpha must be a number, got 1e+308"],
    ),
    "an alpha that is none": (
        config('{"peft_type":"LORA","r":2,"lora_alpha":NaN}'),
        ["math/adapter_config.json: lora_alpha must be a number, got nan"],
    ),
    "an infinite alpha": (
        config('{"peft_type":"LORA","r":2,"lora_alpha":-Infinity}'),
        ["math/adapter_config.json: lora_alpha must be a number, got -inf"],
    ),
    "an alpha without end": (
        config('{"peft_type":"LORA","r":2,"lora_alpha":1' + "0" * 4000 + "}"),
        [
            "math/adapter_config.json: lora_alpha must be a number, got "
            "100000000000000000000000000000000000000000000000000000000000…"
        ],
    ),
    "an infinite factor": (
        adapter(SOUND | {B: torch.full((2, 2), float("inf"))}),
        [
            "math/adapter_model.safetensors: tensor 'base_model.model.layers.0.w.lora_B.weight': flat index 0 "
            "is NaN or Inf. Repair the adapter or take another"
        ],
    ),
    "factors whose product is infinite": (
        adapter({A: torch.full((2, 3), 3e38), B: torch.full((2, 2), 3e38)}),
        [
            "math: tensor 'layers.0.w.weight': flat index 0 is NaN or Inf. Repair the checkpoint or take "
            "another; nothing can be merged with it"
        ],
    ),
    "counts in counts": (
        adapter(rank_pattern={"(((a{99}){99}){99}){99}": 3}),
        [
            "math/adapter_config.json: rank_pattern: '(((a{99}){99}){99}){99}': not a regular expression that "
            "can be matched in bounded time"
        ],
    ),
    "a count of classes": (
        adapter(rank_pattern={"\\p{L}{200}": 3}),
        [
            "math/adapter_config.json: rank_pattern: '\\\\p{L}{200}': not a regular expression that can be "
            "matched in bounded time"
        ],
    ),
    "looking back": (
        adapter(alpha_pattern={"(a)\\1": 3}),
        [
            "math/adapter_config.json: alpha_pattern: '(a)\\\\1': not a regular expression that can be matched "
            "in bounded time"
        ],
    ),
    "too many expressions": (
        adapter(rank_pattern={f"(a|b){n}": 3 for n in range(1000)}),
        [
            "math/adapter_config.json: rank_pattern: 1000 regular expressions; at most 32 are matched. Name "
            "modules instead"
        ],
    ),
    "too many patterns": (
        adapter(rank_pattern={f"m{n}": 3 for n in range(10_001)}),
        [
            "math/adapter_config.json: rank_pattern must map at most 10000 names of modules to numbers, got "
            "{'m0': 3, 'm1': 3, 'm2': 3, 'm3': 3, 'm4': 3, 'm5': 3, 'm6':…"
        ],
    ),
    "a kind that writes on the terminal": (
        adapter(peft_type="\x1b[31m\u202eLORA\n"),
        [
            "math/adapter_config.json: peft_type is '\\x1b[31m\\u202eLORA\\n'; only LORA can be merged. Merge "
            "it into its base first (PEFT)"
        ],
    ),
    "a key that writes on the terminal": (
        adapter(SOUND, **{"\x1b[31m\n": 1}),
        [
            "math/adapter_config.json: '\\x1b[31m\\n': not known, and it may change what the weights mean. "
            "Merge the adapter into its base"
        ],
    ),
    "a start that writes on the terminal": (
        adapter(init_lora_weights={"a": "\x1b[31m"}),
        [
            "math/adapter_config.json: init_lora_weights: {'a': '\\x1b[31m'} is not known. Merge the adapter "
            "into its base"
        ],
    ),
    "wrong types": (
        adapter(bias=["none"], fan_in_fan_out="yes", use_dora=1, rank_pattern=[]),
        [
            "math/adapter_config.json: use_dora must be true or false, got 1",
            "math/adapter_config.json: fan_in_fan_out must be true or false, got 'yes'",
            "math/adapter_config.json: bias must be none, all or lora_only, got ['none']",
        ],
    ),
    "one dimension": (
        adapter({A: torch.ones(6), B: torch.ones(2, 2)}),
        [
            f"math: tensor '{A}': [6] and its B [2, 2] are not [rank, in, …] and [out, rank, …]. If it was "
            "trained in parallel, gather its shards and save it again"
        ],
    ),
    "no dimensions": (
        adapter({A: torch.ones(()), B: torch.ones(())}),
        [
            f"math: tensor '{A}': [] and its B [] are not [rank, in, …] and [out, rank, …]. If it was trained "
            "in parallel, gather its shards and save it again"
        ],
    ),
    "half of it": (
        adapter({A: torch.ones(2, 3)}),
        [f"math: tensor '{A}': has no lora_B.weight beside it. Complete the adapter"],
    ),
    "nothing": (adapter({}), ["math: the adapter holds no tensors. Complete the download"]),
    "names that write on the terminal": (
        adapter({f"\x1b[2J\u202e.lora_{part}.weight": torch.ones(2, 2) for part in "AB"}),
        [
            "math: tensor '\\x1b[2J\\u202e.lora_A.weight': updates '\\x1b[2J\\u202e.weight', which base does "
            f"not have. {OTHER}"
        ],
    ),
    "another shape": (
        adapter(SOUND | {"embed.weight": torch.ones(1024, 2)}),
        [
            "math: tensor 'embed.weight': expected float32 [6, 2] (as in base), got float32 [1024, 2]. If rows "
            "are tokens: tokenizer.json, and vocab_size in config.json, tell which. Put them into both, or "
            "give it 6 rows again (transformers: resize_token_embeddings)"
        ],
    ),
    "integers": (
        hollow(2, "I32"),
        [
            f"math: tensor '{A}': I32 cannot be merged. Save the adapter as float32 or bfloat16",
            (
                "math: tensor 'base_model.model.layers.0.w.lora_B.weight': I32 cannot be merged. Save the adapter "
                "as float32 or bfloat16"
            ),
        ],
    ),
    "bytes": (
        hollow(2, "F8_E4M3", 1),
        [
            f"math: tensor '{A}': F8_E4M3 cannot be merged. Save the adapter as float32 or bfloat16",
            (
                "math: tensor 'base_model.model.layers.0.w.lora_B.weight': F8_E4M3 cannot be merged. Save the "
                "adapter as float32 or bfloat16"
            ),
        ],
    ),
    "an abyss": (
        config('{"a":' * 5000 + "1" + "}" * 5000),
        [f"math/adapter_config.json: its JSON is nested too deeply. {AGAIN}"],
    ),
    "some depth": (
        config('{"a":' * 900 + "1" + "}" * 900),
        [f"math/adapter_config.json: its JSON is nested too deeply. {AGAIN}"],
    ),
    "a key twice": (
        config('{"peft_type":"LORA","r":2,"r":3,"lora_alpha":4}'),
        [f"math/adapter_config.json: 'r' stands twice in one JSON object. {AGAIN}"],
    ),
    "a hole of a terabyte": (
        both(adapter(), sparse(CONFIG)),
        ["math/adapter_config.json: larger than 10000000 bytes. Take a config as PEFT saves it"],
    ),
    "a pipe": (
        both(adapter(), fifo(CONFIG)),
        ["math: holds an adapter, not a full model. Give the model that it was trained on, or `model+adapter`"],
    ),
    "a pipe of weights": (
        both(adapter(), fifo(WEIGHTS)),
        ["math: no adapter_model.safetensors in it. Complete the download"],
    ),
    "a secret": (
        both(adapter(), link(CONFIG, "OUTSIDE/secret.txt")),
        [f"math/adapter_config.json: not valid JSON: Expecting value: line 1 column 1 (char 0). {AGAIN}"],
    ),
    "a base that is an adapter": (
        both(adapter(), text("recipe.yml", "merge_method: cpi\nbase_model: ./math\nmodels:\n  - model: ./code\n")),
        [
            "math: holds an adapter, and the recipe's base is no model that it could lie on. Say on which "
            "model it was trained: model+adapter"
        ],
    ),
    "an adapter on itself": (
        both(
            adapter(), text("recipe.yml", "merge_method: cpi\nbase_model: ./base\nmodels:\n  - model: ./math+./math\n")
        ),
        ["math: holds an adapter, not a full model. Give the model that it was trained on, or `model+adapter`"],
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_adapters(home: Path, case: str) -> None:
    check(home, *WRONG[case], command="merge")


@pytest.mark.parametrize(
    "config",
    [
        {"rank_pattern": {"(a+)+b": 3, "(.*a){20}b": 4}, "alpha_pattern": {"(x+x+)+y": 2}},
        {
            "target_modules": "(a+)+$" * 1000,
            "exclude_modules": "(.*)*x",
            "layers_pattern": {"a": 1},
            "modules_to_save": 7,
        },
        {"base_model_name_or_path": "../../etc\x1b[2J", "revision": "$(touch mark)"},
        {"auto_mapping": {"parent_library": "planted", "base_model_class": "X"}},
        {"lora_alpha": 3e38},
        {"lora_alpha": 10**38, "use_rslora": True},
    ],
    ids=["patterns that backtrack", "keys that are not read", "places", "code", "a large alpha", "a large whole alpha"],
)
def test_odd_configs_that_are_sound(home: Path, config: dict[str, Any]) -> None:
    adapter({A: torch.ones(2, 3) * 1e-30, B: torch.ones(2, 2) * 1e-30}, **config)(home)
    done(home)


def test_memory_is_bounded_before_it_is_taken(home: Path) -> None:
    """A rank that a weight of this size may have still counts against the budget."""
    hollow(1024)(home)
    refused_with = refused(home, "merge", "--memory", "300MB", "--threads", "9")
    assert "memory: 300.0 MB is too little for 9 threads" in refused_with[0]
