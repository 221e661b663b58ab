"""Damaged and incompatible inputs: each is refused with its exact message, and nothing is touched or left behind.

A message is written without the directory that all paths begin with.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import struct
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from checkpoints import save, write_json, write_recipe
from files import tree, write_raw
from safetensors.torch import load_file, save_file

import cpimerge
from cpimerge import (
    CheckpointError,
    CpimergeError,
    IncompatibleError,
    OutputError,
    PlanError,
    RecipeError,
    ResourceError,
    budget,
    needs,
    preflight,
)
from cpimerge.checkpoint import read_header
from cpimerge.plan_file import Plan

Tensors = dict[str, torch.Tensor]
Spoil = Callable[[Path], object]

AGAIN = "Download or save it again"
ALL_AGAIN = "Download or save all of them again"
REPAIR = "Repair the checkpoint or take another; nothing can be merged with it"
PLAN_AGAIN = "The inputs are not those that were planned: run `cpimerge plan` again"
ONE_MODEL = "It is one model in two layouts: save both from the same class, with one version of transformers"
NO_FINE_TUNE = "It is no fine-tune of this base as it stands"
BUFFER = "It is a buffer that newer transformers do not save: load the base with transformers and save it"


# --- the setting ------------------------------------------------------------------------------------


def model(shift: float = 0.0) -> Tensors:
    """A small model; `shift` moves every floating-point element."""
    floats = {
        "embed.weight": torch.arange(12.0).reshape(6, 2),
        "layers.0.w": torch.arange(6.0).reshape(2, 3),
        "layers.1.w": torch.arange(6.0).reshape(2, 3) / 4,
        "lm_head.weight": torch.arange(12.0).reshape(6, 2),
    }
    return {name: tensor + shift for name, tensor in floats.items()} | {"ids": torch.arange(3)}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A directory with a base, two experts and their recipe; all sound."""
    save(tmp_path / "base", model())
    save(tmp_path / "math", model(0.5))
    save(tmp_path / "code", model(-0.25))
    recipe(tmp_path)
    return tmp_path


def recipe(home: Path, parameters: Mapping[str, Any] | None = None, **more: Any) -> None:
    """(Re)write the recipe; line 1 is merge_method, 2 base_model, 3 models, 4 and 5 the models, 6 parameters."""
    keys: dict[str, Any] = {
        "base_model": home / "base",
        "models": [{"model": home / "math"}, {"model": home / "code"}],
    }
    if parameters:
        keys["parameters"] = parameters
    write_recipe(home / "recipe.yml", **keys | more)


def refused(home: Path, run: Callable[[], object]) -> tuple[type[CpimergeError], list[str]]:
    """What kind of error `run` raises and its problems without `home`; asserts that no byte below `home` changes."""
    before = tree(home)
    with pytest.raises(CpimergeError) as error:
        run()
    assert tree(home) == before
    assert str(error.value) == "\n".join(error.value.problems)
    return type(error.value), [problem.replace(f"{home}/", "") for problem in error.value.problems]


def plan(home: Path, out: str = "plan", **options: Any) -> Plan:
    return cpimerge.plan(home / "recipe.yml", home / out, threads=1, **options)


def fuse(home: Path, out: str = "out", **options: Any) -> dict[str, Any]:
    return cpimerge.fuse(home / "plan", home / out, threads=1, **options)


def test_the_setting_is_sound(home: Path) -> None:
    before = tree(home)
    plan(home)
    fuse(home)
    after = tree(home)
    assert {path: after[path] for path in before} == before
    assert {path.split("/")[0] for path in after.keys() - before.keys()} == {"plan", "out"}


# --- headers ----------------------------------------------------------------------------------------

WEIGHTS = "math/model.safetensors"
ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
NEXT = {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}

# The header (as JSON or text) of a file; the size of its data; what is wrong.
HEADERS: dict[str, tuple[dict[str, Any] | str | bytes, int, list[str]]] = {
    "invalid utf-8": (
        b'{"w\xff": 1}',
        0,
        [f": not valid JSON: 'utf-8' codec can't decode byte 0xff in position 3: invalid start byte. {AGAIN}"],
    ),
    "not json": (
        "{'w': 1}",
        0,
        [f": not valid JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1). {AGAIN}"],
    ),
    "deep json": ('{"w":' + "[" * 100_000, 0, [f": its JSON is nested too deeply. {AGAIN}"]),
    "no object": ("[1]", 0, [f": expected a JSON object, got list. {AGAIN}"]),
    "duplicate tensor": (
        f'{{"w": {json.dumps(ENTRY)}, "w": {json.dumps(ENTRY)}}}',
        8,
        [f": 'w' stands twice in one JSON object. {AGAIN}"],
    ),
    "duplicate key": (
        '{"w": {"dtype": "F32", "dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}',
        8,
        [f": 'dtype' stands twice in one JSON object. {AGAIN}"],
    ),
    "metadata": (
        {"__metadata__": {"step": 1}, "w": ENTRY},
        8,
        [f": '__metadata__' must map text to text. {AGAIN}"],
    ),
    "half a surrogate": (
        {"w\ud800": ENTRY},
        8,
        [
            ": tensor 'w\\ud800': its name is not Unicode of at most 1000 characters. "
            "Save the checkpoint with another name for it"
        ],
    ),
    "endless name": (
        {"w" * 1001: ENTRY},
        8,
        [
            f": tensor '{'w' * 97}...{'w' * 98}': its name is not Unicode of at most 1000 characters. "
            "Save the checkpoint with another name for it"
        ],
    ),
    "no entry": (
        {"w": 8},
        0,
        [": tensor 'w': its header entry must have exactly dtype, shape and data_offsets. " + AGAIN],
    ),
    "incomplete entry": (
        {"w": {"dtype": "F32", "shape": [2]}},
        8,
        [": tensor 'w': its header entry must have exactly dtype, shape and data_offsets. " + AGAIN],
    ),
    "surplus key": (
        {"w": ENTRY | {"scale": 2}},
        8,
        [": tensor 'w': its header entry must have exactly dtype, shape and data_offsets. " + AGAIN],
    ),
    "unknown dtype": (
        {"w": ENTRY | {"dtype": "F3"}},
        8,
        [": tensor 'w': unsupported dtype 'F3'. Convert the checkpoint to bfloat16 or float32"],
    ),
    "dtype is no text": (
        {"w": ENTRY | {"dtype": 32}},
        8,
        [": tensor 'w': unsupported dtype 32. Convert the checkpoint to bfloat16 or float32"],
    ),
    "negative size": ({"w": ENTRY | {"shape": [-2]}}, 8, [f": tensor 'w': shape [-2] is not a list of sizes. {AGAIN}"]),
    "size is a boolean": (
        {"w": ENTRY | {"shape": [2, True]}},
        8,
        [f": tensor 'w': shape [2, True] is not a list of sizes. {AGAIN}"],
    ),
    "size is a float": (
        {"w": ENTRY | {"shape": [2.0]}},
        8,
        [f": tensor 'w': shape [2.0] is not a list of sizes. {AGAIN}"],
    ),
    "shape is a number": ({"w": ENTRY | {"shape": 2}}, 8, [f": tensor 'w': shape 2 is not a list of sizes. {AGAIN}"]),
    "2^63 elements": (
        {"w": ENTRY | {"shape": [2**63]}},
        8,
        [f": tensor 'w': shape [9223372036854775808] is not a list of sizes. {AGAIN}"],
    ),
    "shape that overflows": (
        {"w": ENTRY | {"shape": [2**40, 2**40, 0]}},
        8,
        [f": tensor 'w': F32 [1099511627776, 1099511627776, 0] is larger than any file. {AGAIN}"],
    ),
    "hostile shape": (
        {"w": ENTRY | {"shape": [2**62] * 50_000}},
        8,
        [f": tensor 'w': F32 [{f'{2**62}, ' * 8}...] is larger than any file. {AGAIN}"],
    ),
    "shape against size": (
        {"w": ENTRY | {"shape": [3]}},
        8,
        [f": tensor 'w': F32 [3] needs 12 bytes, data_offsets give 8. {AGAIN}"],
    ),
    "negative offset": (
        {"w": ENTRY | {"data_offsets": [-8, 0]}},
        8,
        [f": tensor 'w': data_offsets [-8, 0] are not a begin and an end. {AGAIN}"],
    ),
    "offset of 2^63": (
        {"w": ENTRY | {"data_offsets": [2**63, 2**63 + 8]}},
        8,
        [f": tensor 'w': data_offsets [9223372036854775808, 9223372036854775816] are not a begin and an end. {AGAIN}"],
    ),
    "offset is a boolean": (
        {"w": ENTRY | {"data_offsets": [False, 8]}},
        8,
        [f": tensor 'w': data_offsets [False, 8] are not a begin and an end. {AGAIN}"],
    ),
    "offset is a float": (
        {"w": ENTRY | {"data_offsets": [0.0, 8]}},
        8,
        [f": tensor 'w': data_offsets [0.0, 8] are not a begin and an end. {AGAIN}"],
    ),
    "three offsets": (
        {"w": ENTRY | {"data_offsets": [0, 4, 8]}},
        8,
        [f": tensor 'w': data_offsets [0, 4, 8] are not a begin and an end. {AGAIN}"],
    ),
    "end before begin": (
        {"w": ENTRY | {"data_offsets": [8, 0]}},
        8,
        [f": tensor 'w': data_offsets [8, 0] are not a begin and an end. {AGAIN}"],
    ),
    "hole": (
        {"v": ENTRY, "w": NEXT | {"data_offsets": [12, 20]}},
        20,
        [f": tensor 'w': 4 unused bytes before it. {AGAIN}"],
    ),
    "overlap": (
        {"v": ENTRY, "w": NEXT | {"data_offsets": [4, 12]}},
        12,
        [f": tensor 'w': overlaps the tensor before it. {AGAIN}"],
    ),
    "overlap inside": (
        {
            "u": {"dtype": "U8", "shape": [16], "data_offsets": [0, 16]},
            "v": {"dtype": "U8", "shape": [4], "data_offsets": [4, 8]},
            "w": {"dtype": "U8", "shape": [8], "data_offsets": [16, 24]},
        },
        24,
        [f": tensor 'v': overlaps the tensor before it. {AGAIN}"],
    ),
    "truncated data": ({"v": ENTRY, "w": NEXT}, 15, [f": incomplete: 146 bytes, its header promises 147. {AGAIN}"]),
    "trailing bytes": ({"v": ENTRY, "w": NEXT}, 19, [f": 3 bytes after the last tensor. {AGAIN}"]),
    "several at once": (
        {"a": ENTRY | {"dtype": "X"}, "b": ENTRY | {"shape": None}, "c": 0},
        8,
        [
            ": tensor 'a': unsupported dtype 'X'. Convert the checkpoint to bfloat16 or float32",
            f": tensor 'b': shape None is not a list of sizes. {AGAIN}",
            f": tensor 'c': its header entry must have exactly dtype, shape and data_offsets. {AGAIN}",
        ],
    ),
}


@pytest.mark.parametrize("case", HEADERS)
def test_damaged_headers(home: Path, case: str) -> None:
    header, size, problems = HEADERS[case]
    write_raw(home / WEIGHTS, header, bytes(size))
    assert refused(home, lambda: plan(home)) == (CheckpointError, [WEIGHTS + problem for problem in problems])


# --- files and directories --------------------------------------------------------------------------


def empty(directory: Path) -> None:
    shutil.rmtree(directory)
    directory.mkdir()


def only(directory: Path, *names: str) -> None:
    """Files of these names and a config, and nothing else."""
    empty(directory)
    for name in names:
        (directory / name).write_bytes(b"{}")


def a_file(directory: Path) -> None:
    shutil.rmtree(directory)
    directory.write_bytes(b"")


def sharded(home: Path, change: Callable[[dict[str, Any]], object] = lambda index: None) -> Path:
    """math in two shards (embed, layers.0 | layers.1, lm_head, ids), its index changed."""
    empty(home / "math")
    save(home / "math", model(0.5), shards=2)
    index = json.loads((home / INDEX).read_bytes())
    change(index)
    write_json(home / INDEX, index)
    return home / "math"


def oversized(home: Path) -> None:
    """A header longer than the format allows, in a sparse file."""
    with open(home / WEIGHTS, "wb") as file:
        file.write(struct.pack("<Q", 100_000_001))
        file.truncate(100_000_009)


def two_damaged_shards(home: Path) -> None:
    math = sharded(home)
    (math / "model-00001-of-00002.safetensors").unlink()
    (math / "model-00002-of-00002.safetensors").write_bytes(b"")
    (math / "config.json").write_bytes(b"")


INDEX = "math/model.safetensors.index.json"
ONE, TWO = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2))

FILES: dict[str, tuple[Spoil, list[str]]] = {
    "missing": (
        lambda home: shutil.rmtree(home / "math"),
        ["math: no such directory. Correct the path; a model on the Hugging Face Hub is written org/name"],
    ),
    "empty": (
        lambda home: empty(home / "math"),
        [
            "math: neither model.safetensors nor model.safetensors.index.json in it. "
            "Give the directory of a checkpoint in safetensors"
        ],
    ),
    "a file": (
        lambda home: a_file(home / "math"),
        ["math: not a directory. Give the directory that holds model.safetensors"],
    ),
    "adapter": (
        lambda home: only(home / "math", "adapter_config.json", "adapter_model.safetensors"),
        [
            "math/adapter_config.json: peft_type is None; only LORA can be merged. Merge it into its base first (PEFT)",
            f"math/adapter_model.safetensors: incomplete: 2 bytes, shorter than its own header. {AGAIN}",
        ],
    ),
    "bin": (
        lambda home: only(home / "math", "pytorch_model.bin", "config.json"),
        [
            f"math/pytorch_model.bin: is not an archive as torch.save writes it. {AGAIN}, "
            "or load it with transformers and save it as safetensors"
        ],
    ),
    "one shard of several in pickles": (
        lambda home: only(home / "math", "pytorch_model-00001-of-00002.bin"),
        [
            "math: neither pytorch_model.bin nor pytorch_model.bin.index.json in it, "
            "only 'pytorch_model-00001-of-00002.bin'. Complete the download"
        ],
    ),
    "another pickle": (
        lambda home: only(home / "math", "consolidated.00.pth"),
        [
            "math: holds 'consolidated.00.pth', not safetensors. "
            "Load it in PyTorch and save its tensors as model.safetensors"
        ],
    ),
    "a diffusers pipeline": (
        lambda home: only(home / "math", "model_index.json"),
        ["math: is a pipeline of several models (diffusers). Merge its folders, such as unet, one by one"],
    ),
    "a diffusers model": (
        lambda home: only(home / "math", "config.json", "diffusion_pytorch_model.safetensors"),
        [
            "math: has its weights in diffusion_pytorch_model.safetensors, as diffusers calls them. "
            "Link or rename it to model.safetensors, and the merged one back"
        ],
    ),
    "gguf": (
        lambda home: only(home / "math", "model-q4.gguf"),
        ["math: holds GGUF, which is quantised. Give the safetensors checkpoint that it was made from"],
    ),
    "shards without an index": (
        lambda home: only(home / "math", TWO, "config.json"),
        [
            f"math: neither model.safetensors nor model.safetensors.index.json in it, only '{TWO}'. "
            "Complete the download, or call it model.safetensors if it is the whole model"
        ],
    ),
    "no tensors": (
        lambda home: save_file({}, home / WEIGHTS),
        ["math: holds no tensors. Give the directory of a whole checkpoint"],
    ),
    "name too long": (
        lambda home: recipe(home, base_model=home / ("x" * 300)),
        ["x" * 300 + ": cannot be read: File name too long"],
    ),
    "empty file": (
        lambda home: (home / WEIGHTS).write_bytes(b""),
        [f"{WEIGHTS}: incomplete: 0 bytes, shorter than its own header. {AGAIN}"],
    ),
    "cut in the header": (
        lambda home: (home / WEIGHTS).write_bytes((home / WEIGHTS).read_bytes()[:50]),
        [f"{WEIGHTS}: incomplete: 50 bytes, shorter than its own header. {AGAIN}"],
    ),
    "header beyond the file": (
        lambda home: (home / WEIGHTS).write_bytes(b"\xff" * 8 + b"{}"),
        [f"{WEIGHTS}: incomplete: 10 bytes, shorter than its own header. {AGAIN}"],
    ),
    "oversized header": (
        oversized,
        [f"{WEIGHTS}: header of 100000001 bytes; the format allows 100000000. {AGAIN}"],
    ),
    "git lfs pointer": (
        lambda home: (home / WEIGHTS).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n"),
        [f"{WEIGHTS}: is a Git LFS pointer, not the weights. Fetch them with `git lfs pull`"],
    ),
    "damaged config": (
        lambda home: (home / "math/config.json").write_text('{"a": 1'),
        [f"math/config.json: not valid JSON: Expecting ',' delimiter: line 1 column 8 (char 7). {AGAIN}"],
    ),
    "config is a list": (
        lambda home: (home / "math/config.json").write_text("[]"),
        [f"math/config.json: expected a JSON object, got list. {AGAIN}"],
    ),
    "unreadable companion": (
        lambda home: (home / "base/tokenizer.json").symlink_to("../blobs/gone"),
        ["base/tokenizer.json: cannot be read, and the output needs it too. Complete the download, or remove it"],
    ),
    "index without weight_map": (
        lambda home: sharded(home, lambda index: index.pop("weight_map")),
        [f"{INDEX}: has no 'weight_map' of tensor names to shards. {AGAIN}"],
    ),
    "damaged index": (
        lambda home: (sharded(home) / "model.safetensors.index.json").write_bytes(b"\0"),
        [f"{INDEX}: not valid JSON: Expecting value: line 1 column 1 (char 0). {AGAIN}"],
    ),
    "missing shard": (
        lambda home: (sharded(home) / TWO).unlink(),
        [f"math/{TWO}: missing, though model.safetensors.index.json names it. Complete the download"],
    ),
    "shards elsewhere": (
        lambda home: sharded(
            home,
            lambda index: index["weight_map"].update(
                dict(zip(model(), ["..", "../ids", 7, "\ud800", "x"], strict=True))
            ),
        ),
        [
            f"{INDEX}: shard '..' is not the name of a file beside it. {AGAIN}",
            f"{INDEX}: shard '../ids' is not the name of a file beside it. {AGAIN}",
            f"{INDEX}: shard '\\ud800' is not the name of a file beside it. {AGAIN}",
            f"{INDEX}: shard 7 is not the name of a file beside it. {AGAIN}",
            "math/x: missing, though model.safetensors.index.json names it. Complete the download",
        ],
    ),
    "names that no tensor has": (
        lambda home: sharded(home, lambda index: index["weight_map"].update({"9" * 5000: ONE, "\ud800": ONE})),
        [
            f"{INDEX}: tensor '{'9' * 97}...{'9' * 98}': its name is not Unicode of at most 1000 characters. "
            "Save the checkpoint with another name for it",
            f"{INDEX}: tensor '\\ud800': its name is not Unicode of at most 1000 characters. "
            "Save the checkpoint with another name for it",
        ],
    ),
    "tensor in another shard": (
        lambda home: sharded(home, lambda index: index["weight_map"].update({"ids": ONE})),
        [f"{INDEX}: tensor 'ids': listed in '{ONE}', found in '{TWO}'. {ALL_AGAIN}"],
    ),
    "tensor in no shard": (
        lambda home: sharded(home, lambda index: index["weight_map"].update({"bias": ONE})),
        [f"{INDEX}: tensor 'bias': listed in '{ONE}', found in no shard. {ALL_AGAIN}"],
    ),
    "tensors not listed": (
        lambda home: sharded(home, lambda index: [index["weight_map"].pop(name) for name in ("ids", "layers.1.w")]),
        [
            f"{INDEX}: tensor 'ids': not listed, found in '{TWO}'. {ALL_AGAIN}",
            f"{INDEX}: tensor 'layers.1.w': not listed, found in '{TWO}'. {ALL_AGAIN}",
        ],
    ),
    "tensor in two shards": (
        lambda home: save_file(model(0.5), sharded(home) / ONE),
        [
            f"{INDEX}: tensor 'ids': listed in '{TWO}', found in '{ONE}' and '{TWO}'. {ALL_AGAIN}",
            f"{INDEX}: tensor 'layers.1.w': listed in '{TWO}', found in '{ONE}' and '{TWO}'. {ALL_AGAIN}",
            f"{INDEX}: tensor 'lm_head.weight': listed in '{TWO}', found in '{ONE}' and '{TWO}'. {ALL_AGAIN}",
        ],
    ),
    "several at once": (
        two_damaged_shards,
        [
            f"math/{ONE}: missing, though model.safetensors.index.json names it. Complete the download",
            f"math/{TWO}: incomplete: 0 bytes, shorter than its own header. {AGAIN}",
            f"math/config.json: not valid JSON: Expecting value: line 1 column 1 (char 0). {AGAIN}",
        ],
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_damaged_directories(home: Path, case: str) -> None:
    spoil, problems = FILES[case]
    spoil(home)
    assert refused(home, lambda: plan(home)) == (CheckpointError, problems)


# --- checkpoints that do not go together ------------------------------------------------------------

TIED = {"tie_word_embeddings": True}
BASE_ROWS = (
    "If rows are tokens: tokenizer.json, and vocab_size in config.json, tell which. Put them into both, or give it 6 "
    "rows again (transformers: resize_token_embeddings)"
)


def math_has(home: Path, **tensors: torch.Tensor | None) -> Path:
    """Rewrite math with other tensors; `__` in a name stands for a dot, None for a tensor that is not there."""
    return rewrite(home / "math", model(0.5), tensors)


def base_has(home: Path, **tensors: torch.Tensor | None) -> Path:
    return rewrite(home / "base", model(), tensors)


def rewrite(directory: Path, content: Tensors, tensors: Mapping[str, torch.Tensor | None]) -> Path:
    changed = content | {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    return save(directory, {name: tensor for name, tensor in changed.items() if tensor is not None})


def headless(home: Path) -> Path:
    """All have embeddings that serve as their heads, too."""
    for name, shift in (("base", 0), ("math", 0.5), ("code", -0.25)):
        tensors = model(shift)
        del tensors["lm_head.weight"]
        save(home / name, tensors, config=TIED)
    return home


def prefixed(prefix: str, tensors: Tensors) -> Tensors:
    return {prefix + name: tensor for name, tensor in tensors.items()}


INCOMPATIBLE: dict[str, tuple[Spoil, list[str]]] = {
    "missing tensors": (
        lambda home: math_has(home, embed__weight=None, layers__1__w=None, ids=None),
        [
            f"math: tensor 'embed.weight': missing, though base has it. {NO_FINE_TUNE}",
            f"math: tensor 'ids': missing, though base has it. {BUFFER}",
            f"math: tensor 'layers.1.w': missing, though base has it. {NO_FINE_TUNE}",
        ],
    ),
    "extra tensors": (
        lambda home: math_has(
            home, score__weight=torch.ones(2), layers__10__w=torch.ones(1), layers__2__w=torch.ones(1)
        ),
        [
            f"math: tensor {name!r}: not in base. Remove it from the checkpoint, or merge onto a base that has it"
            for name in ("layers.2.w", "layers.10.w", "score.weight")
        ],
    ),
    "tensor renamed": (
        lambda home: math_has(home, layers__1__w=None, layers__1__w_=torch.ones(2, 3)),
        [
            "math: tensor 'layers.1.w': missing, though base has it. It has 'layers.1.w_' instead",
            "math: tensor 'layers.1.w_': not in base. Remove it from the checkpoint, or merge onto a base that has it",
        ],
    ),
    "names with a prefix": (
        lambda home: save(home / "math", prefixed("model.", model(0.5)) | {"score": torch.ones(1)}),
        [
            "math: 5 tensors are called 'model.X' where base has 'X'. " + ONE_MODEL,
            "math: tensor 'score': not in base. Remove it from the checkpoint, or merge onto a base that has it",
        ],
    ),
    "names without the prefix": (
        lambda home: [
            save(home / "base", prefixed("model.", model()) | {"score": torch.ones(1)}),
            save(home / "code", prefixed("model.", model()) | {"score": torch.ones(1)}),
        ],
        [
            "math: 5 tensors are called 'X' where base has 'model.X'. " + ONE_MODEL,
            f"math: tensor 'score': missing, though base has it. {NO_FINE_TUNE}",
        ],
    ),
    "tied configs excuse nothing else": (
        lambda home: [
            headless(home),
            save(home / "math", {"embed.weight": torch.ones(6, 2), "v": torch.ones(1)}, config=TIED),
        ],
        [
            f"math: tensor 'ids': missing, though base has it. {BUFFER}",
            f"math: tensor 'layers.0.w': missing, though base has it. {NO_FINE_TUNE}",
            f"math: tensor 'layers.1.w': missing, though base has it. {NO_FINE_TUNE}",
            "math: tensor 'v': not in base. Remove it from the checkpoint, or merge onto a base that has it",
        ],
    ),
    "shape": (
        lambda home: math_has(home, layers__0__w=torch.ones(3, 2), layers__1__w=torch.ones(6, dtype=torch.bfloat16)),
        [
            f"math: tensor 'layers.0.w': expected float32 [2, 3] (as in base), got float32 [3, 2]. {NO_FINE_TUNE}",
            f"math: tensor 'layers.1.w': expected float32 [2, 3] (as in base), got bfloat16 [6]. {NO_FINE_TUNE}",
        ],
    ),
    "vocabulary": (
        lambda home: math_has(home, embed__weight=torch.ones(8, 2), lm_head__weight=torch.ones(8, 2)),
        [
            f"math: tensor {name!r}: expected float32 [6, 2] (as in base), got float32 [8, 2]. {BASE_ROWS}"
            for name in ("embed.weight", "lm_head.weight")
        ],
    ),
    "int against float": (
        lambda home: math_has(home, ids=torch.ones(3), layers__0__w=torch.ones(2, 3, dtype=torch.int8)),
        [
            "math: tensor 'ids': expected I64 [3] (as in base), got float32 [3]. Save it with the base's dtype",
            "math: tensor 'layers.0.w': expected float32 [2, 3] (as in base), got I8 [2, 3]. "
            "Save it with the base's dtype",
        ],
    ),
    "int dtype": (
        lambda home: math_has(home, ids=torch.arange(3, dtype=torch.int32)),
        ["math: tensor 'ids': expected I64 [3] (as in base), got I32 [3]. Save it with the base's dtype"],
    ),
}


@pytest.mark.parametrize("case", INCOMPATIBLE)
def test_incompatible_checkpoints(home: Path, case: str) -> None:
    spoil, problems = INCOMPATIBLE[case]
    spoil(home)
    assert refused(home, lambda: plan(home)) == (IncompatibleError, problems)


CONVERT = "cannot be merged. Convert the checkpoint to bfloat16 or float32"


def test_a_directory_that_no_text_can_name(home: Path) -> None:
    """Names of files are bytes; these are no UTF-8."""
    odd = home / "\udcff"
    odd.mkdir()
    for name in ("base", "math", "code", "recipe.yml"):
        (home / name).rename(odd / name)
    problems = [
        f"'{home}/\\udcff/{name}': is not Unicode, so the plan cannot name it. Rename the directory"
        for name in ("base", "math", "code")
    ]
    kind, found = refused(home, lambda: cpimerge.plan(odd / "recipe.yml", home / "plan"))
    assert (kind, found) == (CheckpointError, [problem.replace(f"{home}/", "") for problem in problems])


def test_refused_dtypes(home: Path) -> None:
    math_has(home, layers__0__w=torch.ones(2, 3, dtype=torch.float64), layers__1__w=torch.ones(2, 3).double())
    save(home / "code", model() | {"embed.weight": torch.ones(6, 2).to(torch.float8_e4m3fn)})
    problems = [
        f"math: tensor 'layers.0.w' and 1 more: F64 {CONVERT}",
        f"code: tensor 'embed.weight': F8_E4M3 {CONVERT}",
    ]
    assert refused(home, lambda: plan(home)) == (CheckpointError, problems)


def test_a_refused_base_is_reported_once(home: Path) -> None:
    base_has(home, layers__0__w=torch.ones(2, 3, dtype=torch.complex64))
    problems = [f"base: tensor 'layers.0.w': C64 {CONVERT}"]
    assert refused(home, lambda: plan(home)) == (CheckpointError, problems)


def test_other_float_dtypes_are_a_note(home: Path) -> None:
    """A float dtype that differs from the base's is no error."""
    math_has(home, layers__0__w=torch.ones(2, 3).half(), layers__1__w=torch.ones(2, 3).half())
    assert plan(home).notes == [f"{home}/math: 2 tensors are float16 where the base has float32"]


def test_configs_and_tokenizers_are_notes(home: Path) -> None:
    for name, config in (("base", {"rope_theta": 1, "a": 2, "dtype": "float32"}), ("math", {"a": 3, "b": 0})):
        write_json(home / name / "config.json", config)
        (home / name / "tokenizer.json").write_text('{"model": {"type": "BPE", "vocab": {}}}' + " " * len(config))
    (home / "code/config.json").unlink()
    assert plan(home).notes == [
        f"{home}/math: config.json differs from the base's in a, b, rope_theta; the output takes the base's",
        f"{home}/math: tokenizer.json differs from the base's; the output takes the base's",
    ]


# --- recipes that do not fit the checkpoints --------------------------------------------------------

RECIPES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "density filter": (
        {"density": [{"filter": "layer.0", "value": 0.5}, {"value": 0.1}]},
        ["8: parameters.density: filter 'layer.0' matches no tensor of the base; did you mean 'layers.0.w'?"],
    ),
    "weight filter": (
        {"weight": [{"filter": "embd*", "value": 2}]},
        ["8: parameters.weight: filter 'embd*' matches no tensor of the base; did you mean 'embed'?"],
    ),
    "t filter": (
        {"t": [{"filter": "layers.?.W", "value": 0.5}]},
        ["8: parameters.t: filter 'layers.?.W' matches no tensor of the base; did you mean 'layers.1.w'?"],
    ),
    "excludes": (
        {"exclude": ["*.bias", "lm_head", "zzz"]},
        [
            "8: parameters.exclude: filter '*.bias' matches no tensor of the base; the first is 'embed.weight'",
            "10: parameters.exclude: filter 'zzz' matches no tensor of the base; the first is 'embed.weight'",
        ],
    ),
    "filters are listed by line": (
        {"weight": [{"filter": "xx", "value": 2}], "density": [{"filter": "yy", "value": 0.5}]},
        [
            "8: parameters.weight: filter 'xx' matches no tensor of the base; the first is 'embed.weight'",
            "11: parameters.density: filter 'yy' matches no tensor of the base; the first is 'embed.weight'",
        ],
    ),
    "densities within a layer": (
        {"scope": "layer", "density": [{"filter": "*.0.w", "value": 0.5}, {"filter": "embed", "value": 0.1}]},
        [
            "9: parameters.density: differs within the tensors outside the layers, where scope: layer has one budget. "
            "Write scope: tensor, or one density there"
        ],
    ),
    "densities within the model": (
        {"density": [0, 1], "scope": "global"},
        [
            "7: parameters.density: differs within the model, where scope: global has one budget. "
            "Write scope: tensor, or one density there"
        ],
    ),
    "weights of 0": (
        {"weight": 0},
        [
            "7: parameters.weight: every task's weight is 0 for tensor 'embed.weight' and 3 more. "
            "Give one of the tasks a weight there"
        ],
    ),
    "weight of 0": (
        {"weight": [{"filter": "embed", "value": 0}, {"value": 1}], "backbone": "math"},
        [
            "8: parameters.weight: every task's weight is 0 for tensor 'embed.weight'. "
            "Give one of the tasks a weight there"
        ],
    ),
}


@pytest.mark.parametrize("case", RECIPES)
def test_recipes_that_do_not_fit(home: Path, case: str) -> None:
    parameters, problems = RECIPES[case]
    recipe(home, parameters)
    assert refused(home, lambda: plan(home)) == (RecipeError, [f"recipe.yml:{problem}" for problem in problems])


def test_a_models_own_densities_and_weights(home: Path) -> None:
    """What is wrong in a model's own parameters is shown there."""
    own = {"density": [{"filter": "layers", "value": 0.5}], "weight": [{"filter": "embed", "value": 0}]}
    models: list[dict[str, Any]] = [{"model": home / "math"}, {"model": home / "code", "parameters": own}]
    recipe(home, {"scope": "global", "weight": [{"filter": "embed", "value": 0}, {"value": 1}]}, models=models)
    problems = [
        "recipe.yml:8: models[1].parameters.density: differs within the model, where scope: global has one budget. "
        "Write scope: tensor, or one density there",
        "recipe.yml:16: parameters.weight: every task's weight is 0 for tensor 'embed.weight'. "
        "Give one of the tasks a weight there",
    ]
    assert refused(home, lambda: plan(home)) == (RecipeError, problems)


# --- what only the data show ------------------------------------------------------------------------

LARGE = (1 << 18) + 7  # elements: more than one chunk


def poked(tensor: torch.Tensor, place: int, value: float) -> torch.Tensor:
    """A copy with one element changed, by its flat index."""
    result = tensor.clone()
    result.reshape(-1)[place] = value
    return result


def nan_beyond_the_first_chunk(home: Path) -> None:
    for name in ("base", "math", "code"):
        save(home / name, model() | {"large": torch.zeros(LARGE, dtype=torch.bfloat16)})
    math_has(home, large=poked(torch.zeros(LARGE, dtype=torch.bfloat16), LARGE - 2, torch.nan))


def nan_in_an_external_backbone(home: Path) -> None:
    save(home / "other", model() | {"embed.weight": poked(model()["embed.weight"], 11, torch.nan)})
    recipe(home, {"backbone": "./other"})


def several_unfit_tensors(home: Path) -> None:
    base_has(home, embed__weight=poked(model()["embed.weight"], 1, torch.inf), ids=torch.tensor([0, 1, 3]))
    math_has(home, layers__0__w=poked(poked(model()["layers.0.w"], 5, torch.nan), 2, torch.nan))


def unequal_integers(home: Path) -> None:
    large = torch.arange(LARGE)
    for name in ("base", "math", "code"):
        save(home / name, model() | {"ids": large, "flag": torch.tensor(True)})
    math_has(home, ids=poked(large, LARGE - 1, 0), flag=torch.tensor(False))


EQUAL = "Tensors that are not floating-point must be equal"

DATA: dict[str, tuple[Spoil, list[str]]] = {
    "nan": (
        lambda home: math_has(home, layers__0__w=poked(model()["layers.0.w"], 4, torch.nan)),
        [f"math: tensor 'layers.0.w': flat index 4 is NaN or Inf. {REPAIR}"],
    ),
    "inf": (
        lambda home: math_has(home, layers__0__w=poked(model()["layers.0.w"].half(), 0, -torch.inf)),
        [f"math: tensor 'layers.0.w': flat index 0 is NaN or Inf. {REPAIR}"],
    ),
    "nan in the base": (
        lambda home: base_has(home, layers__0__w=poked(model()["layers.0.w"], 3, torch.nan)),
        [f"base: tensor 'layers.0.w': flat index 3 is NaN or Inf. {REPAIR}"],
    ),
    "nan beyond the first chunk": (
        nan_beyond_the_first_chunk,
        [f"math: tensor 'large': flat index {LARGE - 2} is NaN or Inf. {REPAIR}"],
    ),
    "nan in an external backbone": (
        nan_in_an_external_backbone,
        [f"other: tensor 'embed.weight': flat index 11 is NaN or Inf. {REPAIR}"],
    ),
    "update beyond float32": (
        lambda home: [
            base_has(home, layers__0__w=poked(model()["layers.0.w"], 3, -3e38)),
            math_has(home, layers__0__w=poked(model()["layers.0.w"], 3, 3e38)),
        ],
        [
            "math: tensor 'layers.0.w': flat index 3 is so far from the base's value that their difference "
            "does not fit float32. Take another checkpoint"
        ],
    ),
    "integers": (
        unequal_integers,
        [
            f"math: tensor 'flag': flat index 0 differs from the base's (BOOL). {EQUAL}",
            f"math: tensor 'ids': flat index {LARGE - 1} differs from the base's (I64). {EQUAL}",
        ],
    ),
    "several at once": (
        several_unfit_tensors,
        [
            f"base: tensor 'embed.weight': flat index 1 is NaN or Inf. {REPAIR}",
            f"math: tensor 'ids': flat index 2 differs from the base's (I64). {EQUAL}",
            f"code: tensor 'ids': flat index 2 differs from the base's (I64). {EQUAL}",
            f"math: tensor 'layers.0.w': flat index 2 is NaN or Inf. {REPAIR}",
        ],
    ),
}


@pytest.mark.parametrize("case", DATA)
def test_unfit_data(home: Path, case: str) -> None:
    spoil, problems = DATA[case]
    spoil(home)
    assert refused(home, lambda: plan(home)) == (IncompatibleError, problems)


def test_everything_at_once(home: Path) -> None:
    """All problems of all checkpoints and of the recipe come out in one error, in a fixed order."""
    save(home / "other", {"embed.weight": torch.ones(7, 2), "layers.0.w": torch.ones(2, 3).double()})
    math_has(home, ids=None, layers__1__w=torch.ones(3, 2), norm=torch.ones(2))
    (home / "code/model.safetensors").write_bytes(b"")
    recipe(home, {"backbone": "./other", "exclude": ["bias"]})
    assert refused(home, lambda: plan(home)) == (
        RecipeError,
        [
            "recipe.yml:9: parameters.exclude: filter 'bias' matches no tensor of the base; "
            "the first is 'embed.weight'",
            f"code/model.safetensors: incomplete: 0 bytes, shorter than its own header. {AGAIN}",
            f"other: tensor 'layers.0.w': F64 {CONVERT}",
            f"math: tensor 'ids': missing, though base has it. {BUFFER}",
            "math: tensor 'norm': not in base. Remove it from the checkpoint, or merge onto a base that has it",
            f"math: tensor 'layers.1.w': expected float32 [2, 3] (as in base), got float32 [3, 2]. {NO_FINE_TUNE}",
            f"other: tensor 'ids': missing, though base has it. {BUFFER}",
            f"other: tensor 'layers.1.w': missing, though base has it. {NO_FINE_TUNE}",
            *(
                f"other: tensor '{name}.weight': expected float32 [6, 2] (as in base), got float32 [7, 2]. {BASE_ROWS}"
                for name in ("embed", "lm_head")  # which is a copy of it in the base
            ),
        ],
    )


# --- outputs and resources --------------------------------------------------------------------------

NOT_EMPTY = "not empty. Give another output directory, or --force to replace all of it"
NO_DIRECTORY = "cannot be made, as out is no directory. Give another output directory"
LOST = "which would be lost. Give another output directory"


def occupied(home: Path) -> None:
    (home / "out").mkdir()
    (home / "out/notes.txt").write_text("mine")


def taken(home: Path) -> None:
    (home / "out").write_text("mine")


# What is there already; the output directory; what is wrong, for `plan` and for `fuse`.
OUTPUTS: dict[str, tuple[Spoil, str, dict[str, bool], str]] = {
    "not empty": (occupied, "out", {}, f"out: {NOT_EMPTY}"),
    "a file": (taken, "out", {}, f"out: {NO_DIRECTORY}"),
    "a file, with force": (
        taken,
        "out",
        {"force": True},
        f"out: {NO_DIRECTORY}",
    ),
    "an input": (lambda home: None, "base", {"force": True}, f"base: holds base, {LOST}"),
    "a link to an input": (
        lambda home: (home / "out").symlink_to("math"),
        "out",
        {"force": True},
        f"out: holds math, {LOST}",
    ),
    "in an input": (
        lambda home: None,
        "base/out",
        {},
        "base/out: lies in base, which is an input. Give a directory outside of it",
    ),
    "under a file": (taken, "out/plan", {}, f"out/plan: {NO_DIRECTORY}"),
}


@pytest.mark.parametrize("case", OUTPUTS)
@pytest.mark.parametrize("command", ["plan", "fuse"])
def test_outputs_that_cannot_be(home: Path, case: str, command: str) -> None:
    spoil, out, options, problem = OUTPUTS[case]
    if command == "fuse":
        plan(home)
    spoil(home)
    run = plan if command == "plan" else fuse
    assert refused(home, lambda: run(home, out, **options)) == (OutputError, [problem])


@pytest.mark.parametrize("command", ["plan", "fuse"])
def test_output_that_contains_an_input(home: Path, command: str) -> None:
    (home / "all").mkdir()
    for name in ("base", "math", "code"):
        (home / name).rename(home / "all" / name)
    recipe(home / "all")
    (home / "all/recipe.yml").rename(home / "recipe.yml")
    recipe(home, base_model=home / "all/base", models=[{"model": home / "all/math"}, {"model": home / "all/code"}])
    if command == "fuse":
        plan(home)
    run = plan if command == "plan" else fuse
    problem = f"all: holds all/base, {LOST}"
    assert refused(home, lambda: run(home, "all", force=True)) == (OutputError, [problem])


def test_output_that_contains_the_plan(home: Path) -> None:
    plan(home)
    assert refused(home, lambda: fuse(home, "plan", force=True)) == (OutputError, [f"plan: holds plan, {LOST}"])


@pytest.mark.parametrize("command", ["plan", "fuse"])
def test_output_that_contains_the_working_directory(home: Path, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if command == "fuse":
        plan(home)
    (home / "out/deep").mkdir(parents=True)
    monkeypatch.chdir(home / "out/deep")
    run = plan if command == "plan" else fuse
    assert refused(home, lambda: run(home, "out", force=True)) == (OutputError, [f"out: holds out/deep, {LOST}"])


@pytest.mark.parametrize("command", ["plan", "fuse"])
def test_unwritable_parent(home: Path, command: str) -> None:
    if command == "fuse":
        plan(home)
    (home / "closed").mkdir()
    os_open = os.open

    def refuse(path: Any, *arguments: Any, **options: Any) -> int:
        if str(path).startswith(f"{home}/closed/"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return os_open(path, *arguments, **options)

    run = plan if command == "plan" else fuse
    with mock.patch("os.open", refuse):
        problem = "closed/out: cannot be written: closed/.out.lock: Permission denied"
        assert refused(home, lambda: run(home, "closed/out")) == (OutputError, [problem])


@pytest.mark.parametrize("command", ["plan", "fuse"])
def test_disk_that_fills_up(home: Path, command: str) -> None:
    """The disk has room at first, and none when all is flushed to it."""
    if command == "fuse":
        plan(home)
    run = plan if command == "plan" else fuse
    with mock.patch("os.fsync", side_effect=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))):
        problem = "out: cannot be written: No space left on device"
        assert refused(home, lambda: run(home, "out")) == (OutputError, [problem])


def test_no_disk_space(home: Path) -> None:
    plan(home)
    with mock.patch("shutil.disk_usage", return_value=mock.Mock(free=123)):
        problem = "out: needs 13.0 kB, the disk has 123 B free. Free some space or write to another disk"
        assert refused(home, lambda: fuse(home)) == (ResourceError, [problem])


@pytest.mark.parametrize("threads", [1, 2])
def test_too_little_memory(home: Path, threads: int) -> None:
    chunk_bytes = needs.worker_bytes(preflight.check(cpimerge.load_recipe(home / "recipe.yml")))
    least, one = (f"{math.ceil((budget.RUNTIME_BYTES + count * chunk_bytes) / 1e6)} MB" for count in (threads, 1))
    way_out = "Raise the budget" if threads == 1 else f"Raise it, or use one thread ({one})"
    counted = "1 thread" if threads == 1 else f"{threads} threads"
    too_little = f"memory: 1.0 MB is too little for {counted} and this many models"
    problem = f"{too_little}: at least {least} is needed. {way_out}"
    run = partial(cpimerge.plan, home / "recipe.yml", home / "plan", threads=threads, memory="1MB")
    assert refused(home, run) == (ResourceError, [problem])
    # What the message names is enough, for both steps.
    cpimerge.merge(home / "recipe.yml", home / "out", threads=threads, memory=least)


def test_memory_that_is_no_size(home: Path) -> None:
    problem = "memory: 'a lot' is not a size: write it like 512MB or 2GiB"
    assert refused(home, lambda: plan(home, memory="a lot")) == (ResourceError, [problem])


# --- between plan and fuse --------------------------------------------------------------------------


def flip(file: Path, place: int) -> None:
    """Change one byte."""
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


def _place_of(file: Path, tensor: str) -> int:
    """Where a tensor's bytes begin."""
    return next(info.offset for info in read_header(file).tensors if info.name == tensor)


def renamed_tensor(home: Path) -> Path:
    """Another header of the same size."""
    tensors = load_file(home / WEIGHTS)
    tensors["layers.1.v"] = tensors.pop("layers.1.w")
    save_file(tensors, home / WEIGHTS, metadata={"format": "pt"})
    return home


CHANGED: dict[str, tuple[Spoil, list[str]]] = {
    "size": (
        lambda home: save(home / "math", model(0.5) | {"embed.weight": torch.ones(5, 2)}),
        ["math/model.safetensors: 536 bytes, was 544 when planned"],
    ),
    "header": (renamed_tensor, ["math/model.safetensors: its header changed since it was planned"]),
    "content": (lambda home: flip(home / WEIGHTS, -1), ["math: tensor 'lm_head.weight': changed since planned"]),
    "content of the base": (
        lambda home: flip(home / "base/model.safetensors", -1),
        ["base: tensor 'lm_head.weight': changed since planned"],
    ),
    "content that has no effect": (
        lambda home: flip(home / WEIGHTS, _place_of(home / WEIGHTS, "ids")),
        ["math: tensor 'ids': changed since planned"],
    ),
    "sharded": (
        lambda home: sharded(home),
        [
            f"math/{ONE}: not there when planned",
            f"math/{TWO}: not there when planned",
            "math/model.safetensors: gone since it was planned",
        ],
    ),
    "several at once": (
        lambda home: [renamed_tensor(home), (home / "code/model.safetensors").write_bytes(b"")],
        [
            "math/model.safetensors: its header changed since it was planned",
            f"code/model.safetensors: incomplete: 0 bytes, shorter than its own header. {AGAIN}",
        ],
    ),
}


@pytest.mark.parametrize("case", CHANGED)
def test_changed_inputs(home: Path, case: str) -> None:
    spoil, problems = CHANGED[case]
    plan(home)
    spoil(home)
    assert refused(home, lambda: fuse(home)) == (PlanError, [*problems, PLAN_AGAIN])


UNREAD: dict[str, tuple[Spoil, list[str]]] = {
    "checkpoint gone": (
        lambda home: shutil.rmtree(home / "math"),
        ["math: no such directory. Correct the path; a model on the Hugging Face Hub is written org/name"],
    ),
    "damaged": (
        lambda home: (home / WEIGHTS).write_bytes(b""),
        [f"{WEIGHTS}: incomplete: 0 bytes, shorter than its own header. {AGAIN}"],
    ),
    "both": (
        lambda home: [(home / WEIGHTS).write_bytes(b""), shutil.rmtree(home / "base")],
        [
            "base: no such directory. Correct the path; a model on the Hugging Face Hub is written org/name",
            f"{WEIGHTS}: incomplete: 0 bytes, shorter than its own header. {AGAIN}",
        ],
    ),
}


@pytest.mark.parametrize("case", UNREAD)
def test_inputs_that_cannot_be_read_any_more(home: Path, case: str) -> None:
    """They may be back in a moment, on a disk that was unplugged: that they changed is not said."""
    spoil, problems = UNREAD[case]
    plan(home)
    spoil(home)
    assert refused(home, lambda: fuse(home)) == (CheckpointError, problems)


def edited(home: Path, **entries: object) -> None:
    """Change entries at the top level of plan.json."""
    content = json.loads((home / "plan/plan.json").read_bytes())
    write_json(home / "plan/plan.json", content | entries)


def edited_tensor(home: Path, **entries: object) -> None:
    """Change entries of a tensor that is smaller than the first."""
    content = json.loads((home / "plan/plan.json").read_bytes())
    (tensor,) = (entry for entry in content["tensors"] if entry["name"] == "layers.1.w")
    tensor.update(entries)
    write_json(home / "plan/plan.json", content)


SEALED = "plan/plan.json: entries were edited that must not be (see docs/plan.md). Run `cpimerge plan` again"

PLANS: dict[str, tuple[Spoil, list[str]]] = {
    "none": (
        lambda home: shutil.rmtree(home / "plan"),
        ["plan/plan.json: not found. Make a plan with `cpimerge plan RECIPE -o plan`"],
    ),
    "truncated": (
        lambda home: (home / "plan/plan.json").write_text('{"format": "cpimerge pl'),
        [
            "plan/plan.json: not valid JSON: Unterminated string starting at: line 1 column 12 (char 11). "
            "Run `cpimerge plan` again"
        ],
    ),
    "something else": (
        lambda home: (home / "plan/plan.json").write_text("[]"),
        ["plan/plan.json: expected a JSON object, got list. Run `cpimerge plan` again"],
    ),
    "version": (
        lambda home: edited(home, version=2),
        ["plan/plan.json: plan version 2, this cpimerge reads version 1. Run `cpimerge plan` again"],
    ),
    "unknown key": (
        lambda home: edited(home, taks=[], backbone=7),
        [
            "plan/plan.json: backbone: Input should be a valid string",
            "plan/plan.json: taks: Extra inputs are not permitted",
        ],
    ),
    "chunk": (
        lambda home: edited_tensor(home, first_chunk=99),
        [SEALED],
    ),
    "tasks of a tensor": (lambda home: edited_tensor(home, tasks={}), [SEALED]),
    "action": (lambda home: edited_tensor(home, action="copy", blend=None), [SEALED]),
    "dtypes": (lambda home: edited_tensor(home, base_dtype="BF16"), [SEALED]),
    "unknown dtypes": (
        lambda home: edited_tensor(home, dtype="XX", base_dtype="XX"),
        ["plan/plan.json: tensors.3: 'XX' is no dtype of an output"],
    ),
    "chunk of another tensor": (
        lambda home: edited_tensor(home, first_chunk=0),
        [SEALED],
    ),
    "core": (
        lambda home: flip(home / "plan/cores/01.roaring", 5),
        [
            "plan/cores/01.roaring: is not the core that the plan was saved with. Run `cpimerge plan` again",
        ],
    ),
}


def test_rows_that_the_plan_does_not_have(home: Path) -> None:
    recipe(home, {"density": 0, "granularity": "row"})
    plan(home)
    edited_tensor(home, first_row=99)
    assert refused(home, lambda: fuse(home)) == (PlanError, [SEALED])


def test_a_mean_beyond_float32(home: Path) -> None:
    for name in ("math", "code"):
        save(home / name, model() | {"layers.0.w": torch.full((2, 3), 3e38)})
    recipe(home, {"density": 1, "conflict": "mean"})
    plan(home)
    problem = "tensor 'layers.0.w': flat index 0: the result does not fit float32. The inputs are too large to merge"
    assert refused(home, lambda: fuse(home)) == (IncompatibleError, [problem])


@pytest.mark.parametrize("case", PLANS)
def test_damaged_plans(home: Path, case: str) -> None:
    spoil, problems = PLANS[case]
    recipe(home, {"density": 1})
    plan(home)
    spoil(home)
    assert refused(home, lambda: fuse(home)) == (PlanError, problems)


@pytest.mark.parametrize(
    ("place", "expert", "density"),
    [
        (4, 1e6, 0),  # in the blend
        (2, 70_000.0, 0.5),  # in a core
        (0, None, 0),  # in a tensor that is the same everywhere
    ],
)
def test_results_beyond_float16(home: Path, place: int, expert: float | None, density: float) -> None:
    large = poked(model()["layers.0.w"], place, 1e6)
    for name in ("base", "math", "code"):
        save(home / name, model() | ({"layers.0.w": large} if expert is None else {}))
    if expert is not None:
        math_has(home, layers__0__w=poked(model()["layers.0.w"], place, expert))
    recipe(home, {"density": density}, dtype="float16")
    plan(home)
    problem = (
        f"tensor 'layers.0.w': flat index {place}: the result does not fit float16. "
        "Set dtype: bfloat16 or float32 in the recipe"
    )
    assert refused(home, lambda: fuse(home)) == (IncompatibleError, [problem])
