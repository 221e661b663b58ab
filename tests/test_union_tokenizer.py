"""What an output with joined tokens consists of, as files and as transformers loads it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import vocabularies
from checkpoints import write_recipe
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from trees import files as tree
from vocabularies import CORE, added, model

import cpimerge
from cpimerge.plan_file import JoinedToken, Vocabulary
from cpimerge.union_tokenizer import union_edits

ADAPTER = "adapter_model.safetensors"
PLAIN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


def vocabulary(*tokens: str, base_rows: int = 5, rows: int = 7) -> Vocabulary:
    return Vocabulary(
        mode="union",
        base_rows=base_rows,
        rows=rows,
        tensors=["embed"],
        joined=[JoinedToken(id=5 + n, content=token, **PLAIN) for n, token in enumerate(tokens)],
        tokens_xxh3={},
    )


def entries(*tokens: str) -> list[dict[str, Any]]:
    return [{"id": 5 + n, "content": token, **PLAIN} for n, token in enumerate(tokens)]


# --- files ------------------------------------------------------------------------------------------


def test_nothing_is_edited_without_need() -> None:
    assert union_edits(None) == {}
    assert union_edits(vocabulary(rows=5)) == {}
    assert union_edits(vocabulary("<x>", rows=5)).keys() == {
        "tokenizer.json",
        "tokenizer_config.json",
        "added_tokens.json",
    }
    assert union_edits(vocabulary(rows=6)).keys() == {"config.json"}


@pytest.mark.parametrize("indent", [None, 2, "\t"])
@pytest.mark.parametrize("present", [[], ["<s>"]])
def test_the_rest_of_tokenizer_json_stays_byte_for_byte(indent: Any, present: list[str]) -> None:
    """Also what a JSON writer would write otherwise."""
    tokenizer = {"version": "1.0", "added_tokens": entries(*present), "model": {"vocab": {"ü]}": 0}}}
    raw = json.dumps(tokenizer, indent=indent).replace('"1.0"', '"1.\\u0030"  ').encode()
    edited = union_edits(vocabulary("<x>", "日\n"))["tokenizer.json"](raw)
    assert json.loads(edited) == {**tokenizer, "added_tokens": entries(*present) + entries("<x>", "日\n")}
    before, after = raw.split(b'"added_tokens"')
    assert edited.startswith(before)
    assert edited.endswith(after[after.index(b'"model"') :])


def test_a_tokenizer_json_as_tokenizers_writes_it(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.save(str(tmp_path / "base.json"))
    tokenizer.add_tokens([AddedToken("<x>", lstrip=True, normalized=False), AddedToken("ü", rstrip=True)])
    tokenizer.save(str(tmp_path / "union.json"))
    joined = [
        JoinedToken(id=3, content="<x>", **{**PLAIN, "lstrip": True, "special": False}),
        JoinedToken(id=4, content="ü", **{**PLAIN, "rstrip": True, "normalized": True, "special": False}),
    ]
    edit = union_edits(vocabulary().model_copy(update={"joined": joined}))["tokenizer.json"]
    assert edit((tmp_path / "base.json").read_bytes()) == (tmp_path / "union.json").read_bytes()


@pytest.mark.parametrize("lists", [{}, {"added_tokens": None}])
def test_a_tokenizer_json_without_added_tokens(lists: dict[str, Any]) -> None:
    raw = json.dumps({"model": {}} | lists).encode()
    edited = union_edits(vocabulary("<x>"))["tokenizer.json"](raw)
    assert json.loads(edited) == {"model": {}, "added_tokens": entries("<x>")}


def test_the_other_files() -> None:
    edits = union_edits(vocabulary("<x>"))
    config = {"eos_token": "ü", "added_tokens_decoder": {"0": {"content": "ü"}}}
    edited = json.loads(edits["tokenizer_config.json"](json.dumps(config).encode()))
    assert edited == {**config, "added_tokens_decoder": {"0": {"content": "ü"}, "5": {"content": "<x>", **PLAIN}}}
    assert edits["tokenizer_config.json"](b'{ "eos_token": 1}') == b'{ "eos_token": 1}'
    assert edits["added_tokens.json"](b'{"\\u00fc": 4}') == '{\n  "ü": 4,\n  "<x>": 5\n}\n'.encode()


def test_every_size_of_the_vocabulary_in_the_config() -> None:
    sizes = {
        "vocab_size": 5,
        "text_config": {"vocab_size": 5},
        "audio": [{"vocab_size": 5}],
        "vision": {"vocab_size": 4},
    }
    edited = union_edits(vocabulary("<x>", rows=6))["config.json"](json.dumps(sizes).encode())
    assert json.loads(edited) == {
        "vocab_size": 6,
        "text_config": {"vocab_size": 6},
        "audio": [{"vocab_size": 5}],
        "vision": {"vocab_size": 4},
    }


def test_an_output(tmp_path: Path) -> None:
    """Files of the base that say nothing of tokens are copied; dtype and vocab_size change together."""
    experts = {"one": model(added("<x>", "<y>"), 7, 1), "two": model(added("<y>"), 6, 2)}
    for name, it in {"base": model(added(), 5, 0), **experts}.items():
        vocabularies.write(tmp_path / name, it, {"dtype": "float32", "text_config": {"vocab_size": it.rows}})
    (tmp_path / "base" / "special_tokens_map.json").write_text('{"eos_token":"a"}', encoding="utf-8")
    file = write_recipe(
        tmp_path / "recipe.yml",
        base_model=tmp_path / "base",
        models=[{"model": tmp_path / name} for name in experts],
        dtype="bfloat16",
        vocabulary="union",
    )
    cpimerge.merge(file, tmp_path / "out", threads=1)
    written = tree(tmp_path / "out")
    base = tree(tmp_path / "base")
    assert json.loads(written["config.json"]) == {"dtype": "bfloat16", "text_config": {"vocab_size": 7}}
    assert written["special_tokens_map.json"] == base["special_tokens_map.json"]
    tokenizer = json.loads(written["tokenizer.json"])
    assert tokenizer == json.loads(base["tokenizer.json"]) | {"added_tokens": entries("<x>", "<y>")}
    assert load_file(tmp_path / "out" / "model.safetensors")[vocabularies.EMBEDDING].shape == (7, 3)


# --- transformers -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=290, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["hello world, this is what it says"] * 5, trainer)
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(file))
    return file


ADDED: Mapping[str, list[str | AddedToken]] = {
    "base": [],
    "one": ["<think>", AddedToken("<tool>", special=True, normalized=False)],
    "two": [AddedToken("<tool>", special=True, normalized=False), "日本"],
    "three": [],
}
TEXT = "hello <think>world</s> <tool>this is 日本<think>"


def save_models(directory: Path, trained: Path, tie: bool) -> None:
    """A small Llama and three fine-tunes, of which two have more tokens, and one has padding."""
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    fast: Any = PreTrainedTokenizerFast
    for seed, (name, more) in enumerate(ADDED.items()):
        tokenizer = fast(tokenizer_file=str(trained), bos_token="<s>", eos_token="</s>")
        base_rows = len(tokenizer)
        tokenizer.add_tokens(more)
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=base_rows,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            tie_word_embeddings=tie,
        )
        llama: Any = LlamaForCausalLM(config)
        llama.to(torch.bfloat16)
        llama.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=8 if name == "three" else None)
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in llama.parameters() if seed else ():
                parameter.add_(torch.randn(parameter.shape).to(parameter.dtype) * 0.02)
        llama.save_pretrained(directory / name)
        tokenizer.save_pretrained(directory / name)


def load(directory: Path, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, **options)


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("shard_size", ["5GB", "8KB"])
def test_transformers_takes_the_union(tmp_path: Path, trained: Path, tie: bool, shard_size: str) -> None:
    from transformers import AutoTokenizer

    save_models(tmp_path, trained, tie)
    file = write_recipe(
        tmp_path / "recipe.yml",
        base_model=tmp_path / "base",
        models=[{"model": tmp_path / name} for name in ADDED if name != "base"],
        parameters={"density": 0.1, "space": "delta"},
        vocabulary="union",
    )
    cpimerge.merge(file, tmp_path / "out", threads=1, shard_size=shard_size)
    before, tokenizer = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("base", "out"))
    n = len(before)
    assert [tokenizer.convert_tokens_to_ids(token) for token in ("<think>", "<tool>", "日本")] == [n, n + 1, n + 2]
    assert len(tokenizer) == n + 3
    ids = tokenizer.encode(TEXT)
    assert [number for number in ids if number >= n] == [n, n + 1, n + 2, n]
    assert tokenizer.decode(ids) == TEXT
    assert tokenizer.decode(ids, skip_special_tokens=True) == "hello <think>world this is 日本<think>"
    assert tokenizer.encode("hello world") == before.encode("hello world")
    fused, info = load(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    assert fused.config.vocab_size == n + 3 == fused.get_input_embeddings().weight.shape[0]
    assert fused.get_output_embeddings().weight.shape == (n + 3, 16)
    generated = fused.generate(torch.tensor([ids]), max_new_tokens=3, do_sample=False, pad_token_id=1)
    assert generated.shape == (1, len(ids) + 3)


def test_the_rows_of_an_experts_own_tokens(tmp_path: Path, trained: Path) -> None:
    """With one expert, everything is that expert's; so are the rows of its tokens, under their new ids."""
    from transformers import AutoTokenizer

    save_models(tmp_path, trained, tie=False)
    file = write_recipe(
        tmp_path / "recipe.yml",
        base_model=tmp_path / "base",
        models=[{"model": tmp_path / "one"}],
        vocabulary="union",
    )
    cpimerge.merge(file, tmp_path / "out", threads=1)
    out, one = (load(tmp_path / name) for name in ("out", "one"))
    tokenizers = [AutoTokenizer.from_pretrained(tmp_path / name) for name in ("out", "one")]
    ours, theirs = (torch.tensor([tokenizer.encode(TEXT)]) for tokenizer in tokenizers)
    assert torch.equal(out(ours).logits, one(theirs).logits)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_adapter_that_brings_tokens(tmp_path: Path, trained: Path) -> None:
    """PEFT saves the embeddings with it where their number changed, and so the trainer does its tokenizer."""
    peft = pytest.importorskip("peft")
    from transformers import AutoTokenizer

    save_models(tmp_path, trained, tie=False)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "one")
    llama = load(tmp_path / "base")
    llama.resize_token_embeddings(len(tokenizer))
    adapted = peft.get_peft_model(llama, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "lora", save_embedding_layers=True)
    tokenizer.save_pretrained(tmp_path / "lora")
    file = write_recipe(
        tmp_path / "recipe.yml",
        base_model=tmp_path / "base",
        models=[{"model": tmp_path / "lora"}, {"model": tmp_path / "two"}],
        parameters={"density": 0, "space": "delta"},
        vocabulary="union",
    )
    cpimerge.merge(file, tmp_path / "out", threads=1)
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    n = len(AutoTokenizer.from_pretrained(tmp_path / "base"))
    assert [again.convert_tokens_to_ids(token) for token in ("<think>", "<tool>", "日本")] == [n, n + 1, n + 2]
    fused, saved = load_file(tmp_path / "out" / "model.safetensors"), load_file(tmp_path / "lora" / ADAPTER)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        # Only the adapter has the token: the base has its row, too, and every other model the base's.
        assert torch.equal(fused[name][n], saved[f"base_model.model.{name}"][n])


def test_the_core_of_the_tests_is_a_vocabulary() -> None:
    """tokenizers takes the tokenizers that the tests write."""
    loaded = Tokenizer.from_str(json.dumps(vocabularies.tokenizer(model(added("<x>"), 6, 0))))
    assert loaded.get_vocab() == {**{token: n for n, token in enumerate(CORE)}, "<x>": 5}
