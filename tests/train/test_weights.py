"""From files to a model and back, for models that are not the plainest."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertLMHeadModel, GPT2Config, GPT2LMHeadModel, GPT2Model
from worlds import SMALL, WORDS, tokenizer, write_base, write_data

from cpimerge import CheckpointError, OutputError
from cpimerge.directory import open_checkpoint
from cpimerge.train import probe
from cpimerge.train.weights import load, load_tokenizer, restore, save, stored_values, write_weights


def gpt2(directory: Path, kind: type[Any]) -> Path:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(WORDS) + 3, n_positions=64, n_embd=16, n_layer=2, n_head=2)
    kind(config).save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return directory


@pytest.mark.parametrize("kind", [GPT2Model, GPT2LMHeadModel])
def test_names_with_and_without_the_models_prefix(tmp_path: Path, kind: type[Any]) -> None:
    base = gpt2(tmp_path / "base", kind)
    write_data(tmp_path / "data.jsonl", {"code": 10})
    probe(base, "code", tmp_path / "data.jsonl", tmp_path / "out", settings=SMALL)
    before, after = (load_file(path / "model.safetensors") for path in (base, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(before[name].shape == after[name].shape for name in before)
    assert all(not torch.equal(before[name], after[name]) for name in before)


def test_untrained_weights_come_out_with_their_bytes(tmp_path: Path) -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        start = open_checkpoint(write_base(tmp_path / str(dtype), dtype=dtype))
        (tmp_path / f"{dtype} out").mkdir()
        written = write_weights(start, stored_values(load(start), start), tmp_path / f"{dtype} out", 10**9)
        expected = load_file(tmp_path / str(dtype) / "model.safetensors")
        found = load_file(tmp_path / f"{dtype} out" / "model.safetensors")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name].view(torch.uint8), expected[name].view(torch.uint8)) for name in expected)
        assert list(written) == ["model.safetensors"]


def test_trained_weights_are_rounded_to_nearest_even(tmp_path: Path) -> None:
    start = open_checkpoint(write_base(tmp_path / "base"))
    name = "model.norm.weight"
    value = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, *[0.0] * 13])
    write_weights(start, {name: value}, tmp_path, 10**9)
    found = load_file(tmp_path / "model.safetensors")[name]
    assert found.dtype == torch.bfloat16
    assert found[:3].tolist() == [1.0, 1 + 2**-6, 1 + 2**-7]


def test_a_value_that_its_dtype_does_not_hold(tmp_path: Path) -> None:
    start = open_checkpoint(write_base(tmp_path / "base", dtype=torch.float16))
    with pytest.raises(OutputError, match=r"tensor 'model.norm.weight': trained to values that F16 does not hold"):
        write_weights(start, {"model.norm.weight": torch.full((16,), 1e5)}, tmp_path, 10**9)


def test_what_is_saved_is_restored(tmp_path: Path) -> None:
    start = open_checkpoint(write_base(tmp_path / "base", tied=True))
    model = load(start)
    values = {name: value.detach().clone() + 1 / 3 for name, value in model.state_dict().items()}
    model.load_state_dict(values)
    save(model, tmp_path / "saved")
    other = load(start)
    restore(other, tmp_path / "saved")
    assert all(torch.equal(value, values[name]) for name, value in other.state_dict().items())
    with pytest.raises(OutputError, match="Begin anew with --restart"):
        restore(load(open_checkpoint(write_base(tmp_path / "untied"))), tmp_path / "saved")


def test_a_model_that_looks_ahead(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    torch.manual_seed(0)
    for is_decoder in (True, False):
        config = BertConfig(vocab_size=20, is_decoder=is_decoder, **sizes)
        BertLMHeadModel(config).save_pretrained(tmp_path / str(is_decoder))
    load(open_checkpoint(tmp_path / "True"))
    with pytest.raises(CheckpointError, match="is no causal language model: what it says of a token depends on"):
        load(open_checkpoint(tmp_path / "False"))


def test_nan_in_the_files(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"tensor 'model.norm.weight': NaN in it"):
        load(open_checkpoint(base))


@pytest.mark.parametrize("value", [float("inf"), 3e38])
def test_a_model_that_says_no_numbers(tmp_path: Path, value: float) -> None:
    """Which is no sign that it looks ahead."""
    base = write_base(tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"][:] = value
    tensors["lm_head.weight"] *= 1e4
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="what it says of a few tokens is no number"):
        load(open_checkpoint(base))


def test_what_transformers_does_not_load(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    (base / "config.json").write_text('{"model_type": "unheard-of"}', encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"transformers cannot load it as a causal language model: .*unheard-of"):
        load(open_checkpoint(base))


@pytest.mark.parametrize("kind", ["llama", "unheard-of"])
def test_code_of_a_model_is_not_run(tmp_path: Path, kind: str) -> None:
    base = write_base(tmp_path / "base")
    config = json.loads((base / "config.json").read_bytes())
    names = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (base / "config.json").write_text(json.dumps(config | {"model_type": kind, "auto_map": names}), encoding="utf-8")
    settings = json.loads((base / "tokenizer_config.json").read_bytes())
    settings["auto_map"] = {"AutoTokenizer": ["evil.Tokenizer", None]}
    (base / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    marker = tmp_path / "it ran"
    (base / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nConfig = Model = Tokenizer = dict\n", encoding="utf-8")
    start = open_checkpoint(base)
    for opened in (load, load_tokenizer):
        with suppress(CheckpointError):
            opened(start)
    assert not marker.exists()
    if kind != "llama":
        with pytest.raises(CheckpointError, match="transformers cannot load"):
            load(start)
