"""What is in a checkpoint."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import save, write_json
from files import write_raw
from hub_server import Hub
from safetensors.torch import save_file

import cpimerge
from cpimerge import remote
from cpimerge.errors import CheckpointError
from cpimerge.inspection import Contents, TensorInfo, Total, kind_of, stack_of

LLAMA = {
    "model.embed_tokens.weight": torch.zeros(20, 4).bfloat16(),
    **{
        f"model.layers.{layer}.{name}": torch.zeros(shape).bfloat16()
        for layer in range(11)
        for name, shape in (("mlp.up_proj.weight", (8, 4)), ("norm.weight", (4,)))
    },
    "model.norm.weight": torch.zeros(4),
    "model.position_ids": torch.arange(7),
}
CONFIG: dict[str, Any] = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 20}


def inspect(directory: Path, tensors: dict[str, torch.Tensor] = LLAMA, **changes: Any) -> Contents:
    save(directory, tensors, config=CONFIG | changes)
    return cpimerge.inspect(directory)


def test_the_whole_of_a_small_llama(tmp_path: Path) -> None:
    found = inspect(tmp_path, tie_word_embeddings=True)
    assert (found.name, found.path, found.adapter, found.format) == (str(tmp_path), str(tmp_path), None, "safetensors")
    assert [(file.name, file.bytes, file.tensors) for file in found.files] == [
        ("model.safetensors", (tmp_path / "model.safetensors").stat().st_size, 25)
    ]
    assert found.total == Total(25, 80 + 11 * 36 + 4 + 7, 2 * (80 + 11 * 36) + 16 + 56)
    assert found.dtypes == {
        "BF16": Total(23, 80 + 11 * 36, 2 * (80 + 11 * 36)),
        "F32": Total(1, 4, 16),
        "I64": Total(1, 7, 56),
    }
    (stack,) = found.stacks
    assert (stack.pattern, stack.numbers) == ("model.layers.*", tuple(range(11)))
    assert stack.total == Total(22, 11 * 36, 22 * 36)
    assert found.outside == Total(3, 91, 160 + 16 + 56)
    assert [(kind.name, kind.stack, kind.shapes, kind.dtypes, kind.total.tensors) for kind in found.kinds] == [
        ("model.embed_tokens.weight", "", ((20, 4),), ("BF16",), 1),
        ("model.layers.*.mlp.up_proj.weight", "model.layers.*", ((8, 4),), ("BF16",), 11),
        ("model.layers.*.norm.weight", "model.layers.*", ((4,),), ("BF16",), 11),
        ("model.norm.weight", "", ((4,),), ("F32",), 1),
        ("model.position_ids", "", ((7,),), ("I64",), 1),
    ]
    assert found.tensors[3] == TensorInfo("model.layers.1.mlp.up_proj.weight", "BF16", (8, 4))
    assert (found.model_type, found.architectures, found.quantization) == ("llama", ("LlamaForCausalLM",), None)
    assert (found.tied, found.heads, found.vocab_size) == (True, (), 20)
    assert (found.vocabulary, found.tokenizer, found.notes) == ({"model.embed_tokens.weight": 20}, None, ())
    assert json.loads(json.dumps(found.as_dict(), allow_nan=False))["total"]["tensors"] == 25


def test_shards(tmp_path: Path) -> None:
    save(tmp_path, LLAMA, shards=3)
    found = cpimerge.inspect(str(tmp_path))
    assert [(file.name, file.tensors) for file in found.files] == [
        ("model-00001-of-00003.safetensors", 8),
        ("model-00002-of-00003.safetensors", 8),
        ("model-00003-of-00003.safetensors", 9),
    ]
    assert found.total.tensors == 25


@pytest.mark.parametrize(
    ("name", "stack", "kind"),
    [
        ("model.layers.3.mlp.experts.12.up.weight", "model.layers.*", "model.layers.*.mlp.experts.*.up.weight"),
        ("h.0.w", "h.*", "h.*.w"),
        ("0.weight", "*", "*.weight"),
        ("conv1.weight", "", "conv1.weight"),
        ("blocks.7", "blocks.*", "blocks.*"),
        ("layer.٣.w", "", "layer.٣.w"),  # digits, though not of the kind that numbers layers
    ],
)
def test_patterns(name: str, stack: str, kind: str) -> None:
    assert (stack_of(name), kind_of(name)) == (stack, kind)


def test_stacks_of_a_multimodal_model_and_one_with_layers_missing(tmp_path: Path) -> None:
    names = [f"vision.blocks.{i}.w" for i in range(3)] + [f"text.layers.{i}.{j}.w" for i in (0, 2, 7) for j in (0, 1)]
    found = inspect(tmp_path, {name: torch.zeros(i + 1) for i, name in enumerate(names)})
    assert [(stack.pattern, stack.numbers) for stack in found.stacks] == [
        ("text.layers.*", (0, 2, 7)),
        ("vision.blocks.*", (0, 1, 2)),
    ]
    assert [(kind.name, len(kind.shapes)) for kind in found.kinds] == [
        ("text.layers.*.*.w", 6),
        ("vision.blocks.*.w", 3),
    ]


# --- config -----------------------------------------------------------------------------------------


def test_settings_of_a_part_count_where_the_top_says_nothing(tmp_path: Path) -> None:
    save(tmp_path, LLAMA, config={"text_config": {"vocab_size": 20, "tie_word_embeddings": False, "model_type": "x"}})
    found = cpimerge.inspect(tmp_path)
    assert (found.vocab_size, found.tied, found.model_type) == (20, False, "x")


def test_nonsense_in_a_config_is_as_nothing(tmp_path: Path) -> None:
    config = {"model_type": [], "architectures": [1, "A"], "vocab_size": True, "tie_word_embeddings": "no"}
    save(tmp_path, LLAMA, config=config | {"quantization_config": 3})
    found = cpimerge.inspect(tmp_path)
    assert (found.model_type, found.architectures, found.vocab_size, found.tied) == (None, ("A",), None, None)
    assert found.quantization is None


def test_without_a_config(tmp_path: Path) -> None:
    save(tmp_path, LLAMA)
    (tmp_path / "config.json").unlink()
    assert cpimerge.inspect(tmp_path).model_type is None


def test_a_head_that_is_stored_though_tied_is_noted(tmp_path: Path) -> None:
    tensors = LLAMA | {"lm_head.weight": torch.zeros(20, 4)}
    assert inspect(tmp_path / "untied", tensors, tie_word_embeddings=False).notes == ()
    found = inspect(tmp_path / "tied", tensors, tie_word_embeddings=True)
    assert found.heads == ("lm_head.weight",)
    assert found.vocabulary == {"lm_head.weight": 20, "model.embed_tokens.weight": 20}
    assert found.notes == ("the config ties the output head to the embeddings, but lm_head.weight is stored too",)


def test_rows_that_contradict_the_config_are_noted(tmp_path: Path) -> None:
    found = inspect(tmp_path, vocab_size=24)
    assert found.notes == ("model.embed_tokens.weight has 20 rows, the config's vocab_size is 24",)


def test_quantised_and_other_dtypes_that_cannot_be_merged(tmp_path: Path) -> None:
    header = {
        "a": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]},
        "b": {"dtype": "F64", "shape": [1], "data_offsets": [4, 12]},
    }
    write_raw(tmp_path / "model.safetensors", header, bytes(12))
    write_json(tmp_path / "config.json", {"quantization_config": {"quant_method": "fp8"}})
    found = cpimerge.inspect(tmp_path)
    assert found.quantization == "fp8"
    (note,) = found.notes
    assert note.startswith(f"{tmp_path}: is quantised: FP8")


def test_dtypes_that_cannot_be_merged_are_noted(tmp_path: Path) -> None:
    save(tmp_path, {"a": torch.ones(2, dtype=torch.float64), "b": torch.ones(1, dtype=torch.float64)})
    found = cpimerge.inspect(tmp_path)
    assert found.dtypes == {"F64": Total(2, 3, 24)}
    (note,) = found.notes
    assert note.startswith(f"{tmp_path}: tensor 'a' and 1 more: F64 cannot be merged")


def test_a_config_that_wrongly_speaks_of_quantisation_is_noted(tmp_path: Path) -> None:
    save(tmp_path, LLAMA, config={"quantization_config": {"quant_method": "gptq"}})
    found = cpimerge.inspect(tmp_path)
    assert found.quantization is None
    (note,) = found.notes
    assert "speaks of a quantisation (gptq)" in note


# --- tokenizers -------------------------------------------------------------------------------------

ADDED = [{"id": 3, "content": "<s>", "special": True}, {"id": 1, "content": "b", "special": False}]


@pytest.mark.parametrize(
    ("model", "kind", "tokens"),
    [
        ({"type": "BPE", "vocab": {"a": 0, "b": 1, "c": 2}, "merges": []}, "BPE", 4),
        ({"type": "Unigram", "vocab": [["a", 0.0], ["b", -1.5]]}, "Unigram", 3),
        ({"vocab": {"a": 0}}, None, 3),
    ],
)
def test_tokens_are_counted_once(model: dict[str, Any], kind: str | None, tokens: int, tmp_path: Path) -> None:
    save(tmp_path, LLAMA, config=CONFIG)
    write_json(tmp_path / "tokenizer.json", {"model": model, "added_tokens": ADDED})
    write_json(tmp_path / "tokenizer_config.json", {"added_tokens_decoder": {"3": ADDED[0]}})
    tokenizer = cpimerge.inspect(tmp_path).tokenizer
    assert tokenizer is not None
    assert (tokenizer.kind, tokenizer.tokens) == (kind, tokens)
    assert tokenizer.files == ("tokenizer.json", "tokenizer_config.json")


def test_as_transformers_counts_them(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "<unk>": 2}, unk_token="<unk>"))
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=model, unk_token="<unk>", pad_token="<pad>")
    fast.add_tokens(["<x>", "b"])
    fast.save_pretrained(tmp_path)
    save(tmp_path, LLAMA, config=CONFIG)
    tokenizer = cpimerge.inspect(tmp_path).tokenizer
    assert tokenizer is not None
    assert (tokenizer.kind, tokenizer.tokens) == ("WordLevel", len(fast))


def test_a_word_list(tmp_path: Path) -> None:
    save(tmp_path, LLAMA, config=CONFIG)
    (tmp_path / "vocab.txt").write_text("[PAD]\na\nb\n")
    tokenizer = cpimerge.inspect(tmp_path).tokenizer
    assert tokenizer is not None
    assert (tokenizer.kind, tokenizer.tokens, tokenizer.files) == ("WordPiece", 3, ("vocab.txt",))


def test_a_sentencepiece_model_is_not_opened(tmp_path: Path) -> None:
    save(tmp_path, LLAMA, config=CONFIG)
    (tmp_path / "tokenizer.model").write_bytes(b"?")
    tokenizer = cpimerge.inspect(tmp_path).tokenizer
    assert tokenizer is not None
    assert (tokenizer.kind, tokenizer.tokens) == ("SentencePiece", None)


@pytest.mark.parametrize("text", ["{", "[]", '{"model": {}}', '{"model": {"vocab": {}}, "added_tokens": 3}'])
def test_a_damaged_tokenizer_is_noted(text: str, tmp_path: Path) -> None:
    save(tmp_path, LLAMA, config=CONFIG)
    (tmp_path / "tokenizer.json").write_text(text)
    found = cpimerge.inspect(tmp_path)
    assert found.tokenizer is not None
    assert (found.tokenizer.kind, found.tokenizer.tokens) == (None, None)
    (note,) = found.notes
    assert note.startswith(f"{tmp_path / 'tokenizer.json'}: ")


def test_more_tokens_than_rows_are_noted(tmp_path: Path) -> None:
    save(tmp_path, LLAMA, config=CONFIG)
    (tmp_path / "vocab.txt").write_text("".join(f"{i}\n" for i in range(21)))
    assert cpimerge.inspect(tmp_path).notes == ("the tokenizer has 21 tokens, more than the 20 rows of the vocabulary",)


# --- other forms of checkpoints ---------------------------------------------------------------------


def test_weights_that_torch_saved(tmp_path: Path) -> None:
    torch.save(LLAMA, tmp_path / "pytorch_model.bin")
    write_json(tmp_path / "config.json", CONFIG)
    found = cpimerge.inspect(tmp_path)
    assert (found.format, found.files[0].name) == ("pytorch", "pytorch_model.bin")
    assert found.total == Total(25, 80 + 11 * 36 + 4 + 7, 2 * (80 + 11 * 36) + 16 + 56)


def test_an_adapter_on_its_model(tmp_path: Path) -> None:
    save(tmp_path / "base", LLAMA, config=CONFIG)
    write_adapter(tmp_path / "lora")
    found = cpimerge.inspect(f"{tmp_path / 'base'}+{tmp_path / 'lora'}")
    assert (found.path, found.adapter) == (str(tmp_path / "base"), str(tmp_path / "lora"))
    assert found.total.tensors == 25
    with pytest.raises(CheckpointError, match="holds an adapter"):
        cpimerge.inspect(tmp_path / "lora")


def write_adapter(directory: Path) -> None:
    """Adds 0.5 · 3 to every element of an up_proj, which is 0 in the base."""
    name = "base_model.model.model.layers.3.mlp.up_proj"
    directory.mkdir()
    factors = {f"{name}.lora_A.weight": torch.ones(1, 4), f"{name}.lora_B.weight": torch.full((8, 1), 0.5)}
    save_file(factors, directory / "adapter_model.safetensors")
    write_json(directory / "adapter_config.json", {"peft_type": "LORA", "r": 1, "lora_alpha": 3, "target_modules": []})


@pytest.mark.parametrize("prefix", ["", "base+"])
def test_how_an_adapter_changes_its_model(prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "base", LLAMA, config=CONFIG)
    write_adapter(tmp_path / "lora")
    found = cpimerge.inspect("base", f"{prefix}lora", threads=2)
    assert (found.total.changed, found.total.tensors, found.total.identical) == (32, 24, 23)
    change = found.by(str)["model.layers.3.mlp.up_proj.weight"].as_dict()
    assert (change["largest"]["value"], change["change_norm"]) == (1.5, pytest.approx(1.5 * 32**0.5))
    assert (found.other.adapter, found.unlike, found.only_base) == (str(tmp_path / "lora"), (), ())


def test_a_head_that_only_one_has_is_said_to_be_so(tmp_path: Path) -> None:
    save(tmp_path / "base", LLAMA, config=CONFIG | {"tie_word_embeddings": True})
    save(tmp_path / "other", LLAMA | {"lm_head.weight": torch.zeros(20, 4).bfloat16()}, config=CONFIG)
    assert cpimerge.inspect(tmp_path / "base", tmp_path / "other").only_other == ("lm_head.weight",)
    assert cpimerge.inspect(tmp_path / "other", tmp_path / "base").only_base == ("lm_head.weight",)


def test_the_same_model_in_another_layout_is_noted(tmp_path: Path) -> None:
    save(tmp_path / "base", LLAMA)
    save(tmp_path / "other", {f"backbone.{name}": tensor for name, tensor in LLAMA.items()})
    found = cpimerge.inspect(tmp_path / "base", tmp_path / "other")
    assert (len(found.only_base), len(found.only_other), found.tensors) == (25, 25, ())
    (note,) = found.notes
    assert "25 tensors" in note
    assert "backbone." in note


# --- what cannot be inspected -----------------------------------------------------------------------


def test_a_damaged_checkpoint_is_an_error(tmp_path: Path) -> None:
    save(tmp_path, LLAMA, config=CONFIG)
    with open(tmp_path / "model.safetensors", "ab") as file:
        file.write(b"x")
    with pytest.raises(CheckpointError, match="1 bytes after the last tensor"):
        cpimerge.inspect(tmp_path)


def test_headers_alone_are_read(tmp_path: Path) -> None:
    with open(tmp_path / "model.safetensors", "wb") as file:
        header = json.dumps({"x": {"dtype": "F32", "shape": [1 << 30], "data_offsets": [0, 1 << 32]}}).encode()
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + (1 << 32))
    assert cpimerge.inspect(tmp_path).total == Total(1, 1 << 30, 1 << 32)


# --- the Hub ----------------------------------------------------------------------------------------


def said(found: Contents) -> dict[str, Any]:
    """All but where it is, and what other files lie there."""
    return {key: value for key, value in found.as_dict().items() if key not in ("name", "path", "notes")}


@pytest.mark.parametrize("way", ["cache", "stream"])
def test_models_on_the_hub(published: Path, hub: Hub, tmp_path: Path, way: Any) -> None:
    local = tmp_path / "hub"
    one = cpimerge.inspect("org/base", download=way)
    assert (one.name, said(one)) == ("org/base", said(cpimerge.inspect(local / "base")))
    two = cpimerge.inspect("org/base", "org/math", threads=2, download=way)
    assert two.tensors == cpimerge.inspect(local / "base", local / "math", threads=1).tensors
    assert two.total.changed > 0


def test_of_a_streamed_model_headers_alone_are_fetched(
    published: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "FIRST_BYTES", 64)  # the files are shorter than what is fetched of one at first
    before = sorted(Path(tempfile.gettempdir()).glob(".cpimerge-*"))
    found = cpimerge.inspect("org/base", download="stream")
    assert found.total.tensors == 6
    assert hub.sent(".safetensors") < found.total.bytes / 10
    assert sorted(Path(tempfile.gettempdir()).glob(".cpimerge-*")) == before
