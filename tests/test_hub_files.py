"""Which files of a model on the Hub are needed: the same as those of a directory with these files."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpimerge.companions import companion_files
from cpimerge.compatibility import TOKENIZER_FILES
from cpimerge.hub_files import adapter_files, companions, is_below, is_small, weights
from cpimerge.tokenizer_files import ADDED_TOKENS, MERGES, TOKENIZER, TOKENIZER_CONFIG, VOCAB_JSON, VOCAB_TXT

FOLDERS = ("", "a", "a/b", "2_Dense", "2_Dense/deep", "onnx", "checkpoint-10", ".cache", "logs", "original/x", "a/runs")
FILES = (
    *("config.json", "model.safetensors", "model.safetensors.index.json", "adapter_config.json", "README.md"),
    *("tokenizer.json", "pytorch_model.bin", "x.gguf", "optimizer.pt", "LICENSE", ".gitattributes", "notes.txt"),
)


@given(
    names=st.sets(st.tuples(st.sampled_from(FOLDERS), st.sampled_from(FILES)), max_size=25),
    modules=st.lists(st.sampled_from(["a", "2_Dense", "onnx", "a/b", "2_Dense/deep"]), max_size=2),
)
def test_companions_are_those_of_a_directory(
    tmp_path_factory: pytest.TempPathFactory, names: set[tuple[str, str]], modules: list[str]
) -> None:
    base = tmp_path_factory.mktemp("base")
    listed = {f"{folder}/{file}".lstrip("/") for folder, file in names} | ({"modules.json"} if modules else set())
    for name in listed:
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).touch()
    if modules:
        (base / "modules.json").write_text(json.dumps([{"path": ""}, *({"path": path} for path in modules)]))
    expected = {file.relative_to(base).as_posix() for file in companion_files(base)}
    assert set(companions(listed, modules)) == expected


@pytest.mark.parametrize(
    ("names", "shards", "expected"),
    [
        (["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"], [], ["model.safetensors"]),
        (
            ["model.safetensors.index.json", "s1", "s2", "s3", "pytorch_model.bin"],
            ["s2", "s1", "s2", "absent"],
            ["model.safetensors.index.json", "s1", "s2"],
        ),
        (["pytorch_model.bin", "x/model.safetensors"], [], ["pytorch_model.bin"]),
        (["pytorch_model.bin.index.json", "b1"], ["b1"], ["pytorch_model.bin.index.json", "b1"]),
        (["diffusion_pytorch_model.safetensors", "model.gguf"], [], []),
    ],
)
def test_weights_are_taken_in_one_form(names: list[str], shards: list[str], expected: list[str]) -> None:
    assert weights(names, shards) == expected


def test_an_adapter_is_its_config_and_one_file() -> None:
    both = ["adapter_config.json", "adapter_model.bin", "adapter_model.safetensors", "tokenizer.json"]
    assert adapter_files(both) == ["adapter_config.json", "adapter_model.safetensors"]
    assert adapter_files(both[:2]) == ["adapter_config.json", "adapter_model.bin"]
    assert adapter_files(["adapter_model.safetensors"]) == []


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.txt", "vocab.json",
             "merges.txt", "added_tokens.json", "special_tokens_map.json", "spiece.model", "chat_template.jinja"]
)  # fmt: skip
def test_what_describes_an_expert_is_small(name: str) -> None:
    assert is_small(name)
    assert not is_small(f"folder/{name}")


def test_other_files_do_not_describe_it() -> None:
    assert not any(map(is_small, ["README.md", "model.safetensors", "training_args.bin", "generation_config.json"]))


def test_what_vocabularies_are_read_from_is_fetched_for_experts_too() -> None:
    read = (TOKENIZER, VOCAB_JSON, MERGES, VOCAB_TXT, TOKENIZER_CONFIG, ADDED_TOKENS, *TOKENIZER_FILES)
    assert all(map(is_small, read))


@pytest.mark.parametrize("name", ["x", "a/b.json", ".gitattributes", "Icon\r", "..x", "a/..."])
def test_what_a_repository_may_hold_lies_below_it(name: str) -> None:
    assert is_below(name)


@pytest.mark.parametrize("name", ["", "/x", "..", "../x", "a/../x", "a//b", "a/", "./a", "x\0"])
def test_what_leads_out_of_a_repository_does_not(name: str) -> None:
    assert not is_below(name)
