"""The output's chat template, as transformers reads it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import save, write_recipe

import cpimerge
from cpimerge.chat_template import read_template, settle_template
from cpimerge.directory import open_checkpoint
from cpimerge.errors import CheckpointError
from cpimerge.plan_file import Plan

A, B, C = ("{{ 'a' }}", "{{ 'b' }}", "{{ 'c' }}\né")


def tokenizer(directory: Path, template: str | dict[str, str] | None, *, jinja: bool = True) -> None:
    """Save a tokenizer with a chat template, as transformers does now, or in tokenizer_config.json as it did once."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"<unk>": 0, "x": 1}, unk_token="<unk>"))
    fast = PreTrainedTokenizerFast(tokenizer_object=words)  # type: ignore[no-untyped-call]
    fast.chat_template = template
    fast.save_pretrained(directory, save_jinja_files=jinja)


def read_by_transformers(directory: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory).chat_template


def home(tmp_path: Path, templates: Mapping[str, str | dict[str, str] | None], **kind: Any) -> dict[str, Path]:
    """A checkpoint for each of these templates, the base first."""
    torch.manual_seed(0)
    for name, template in templates.items():
        save(tmp_path / name, {"layers.0.w": torch.randn(4, 4)}, config={"model_type": "llama"})
        tokenizer(tmp_path / name, template, **kind)
    return {name: tmp_path / name for name in templates}


def merge(tmp_path: Path, chat_template: str | None) -> Path:
    """The output of a merge of `a` and `b` onto `base`."""
    models = [{"model": tmp_path / name} for name in ("a", "b")]
    extra = {} if chat_template is None else {"chat_template": chat_template}
    recipe = write_recipe(tmp_path / "recipe.yml", base_model=tmp_path / "base", models=models, **extra)
    cpimerge.plan(recipe, tmp_path / "plan")
    cpimerge.fuse(tmp_path / "plan", tmp_path / "out")
    return tmp_path / "out"


def settle(directories: Mapping[str, Path], wanted: str | None = "auto") -> tuple[str | None, list[str]]:
    problems: list[str] = []
    notes: list[str] = []
    found = settle_template(
        wanted, {name: open_checkpoint(path) for name, path in directories.items()}, problems, notes
    )
    assert problems == []
    return found, notes


NAMED: dict[str, str] = {"default": A, "tool_use": B}


@pytest.mark.parametrize("jinja", [True, False])
@pytest.mark.parametrize("template", [A, C, NAMED, None])
def test_a_template_is_read_as_transformers_reads_it(
    tmp_path: Path, template: str | dict[str, str] | None, jinja: bool
) -> None:
    directory = home(tmp_path, {"base": template}, jinja=jinja)["base"]
    loaded = read_by_transformers(directory)
    assert read_template(directory) == (loaded["default"] if isinstance(loaded, dict) else loaded)
    assert loaded == template


@pytest.mark.parametrize("jinja", [True, False])
@pytest.mark.parametrize("of_base", [A, NAMED, None])
def test_a_template_of_the_recipe_is_the_outputs(
    tmp_path: Path, of_base: str | dict[str, str] | None, jinja: bool
) -> None:
    home(tmp_path, {"base": of_base, "a": A, "b": A}, jinja=jinja)
    processor = tmp_path / "base" / "chat_template.json"
    processor.write_text(json.dumps({"chat_template": "old"}), encoding="utf-8")
    out = merge(tmp_path, C)
    assert read_by_transformers(out) == C
    assert (out / "chat_template.jinja").read_text(encoding="utf-8") == C
    assert json.loads((out / "chat_template.json").read_text(encoding="utf-8")) == {"chat_template": C}
    assert not (out / "additional_chat_templates").exists()
    config, before = (
        json.loads((path / "tokenizer_config.json").read_text(encoding="utf-8")) for path in (out, tmp_path / "base")
    )
    assert config == before | ({"chat_template": C} if "chat_template" in before else {})
    assert Plan.load(tmp_path / "plan").chat_template == C


def test_without_the_key_all_files_are_the_bases(tmp_path: Path) -> None:
    home(tmp_path, {"base": NAMED, "a": B, "b": B})
    out = merge(tmp_path, None)
    assert read_by_transformers(out) == NAMED
    for name in ("tokenizer_config.json", "chat_template.jinja", "additional_chat_templates/tool_use.jinja"):
        assert (out / name).read_bytes() == (tmp_path / "base" / name).read_bytes()
    assert Plan.load(tmp_path / "plan").chat_template is None


def test_auto_gives_a_base_without_template_that_of_its_fine_tunes(tmp_path: Path) -> None:
    home(tmp_path, {"base": None, "a": C, "b": f"\n{C} "})
    assert read_by_transformers(merge(tmp_path, "auto")) == C
    note = "chat_template: auto: takes that of a, b (2 of the 2 models that have one)"
    assert note in Plan.load(tmp_path / "plan").notes


@pytest.mark.parametrize(
    ("templates", "taken", "note"),
    [
        ({"base": A, "a": B, "b": B}, B, "takes that of a, b (2 of the 3 models that have one)"),
        ({"base": None, "a": A, "b": B, "c": B}, B, "takes that of b, c (2 of the 3 models that have one)"),
        ({"base": None, "a": B, "b": A}, B, "takes that of a (1 of the 2 models that have one)"),
        ({"base": NAMED, "a": B, "b": C}, None, "takes that of base (1 of the 3 models that have one)"),
        ({"base": None, "a": None}, None, "none of the models has one"),
    ],
)
def test_auto(tmp_path: Path, templates: dict[str, str | None], taken: str | None, note: str) -> None:
    """The commonest; of equally common ones the first, which is left alone where it is the base's."""
    assert settle(home(tmp_path, templates)) == (taken, [f"chat_template: auto: {note}"])


def test_a_model_under_two_names_counts_once(tmp_path: Path) -> None:
    directories = home(tmp_path, {"base": None, "a": A, "b": B, "c": B})
    twice = {"base": directories["base"], "a": directories["a"], "again": directories["a"], "more": directories["a"]}
    assert settle(twice | {"b": directories["b"], "c": directories["c"]})[0] == B


@pytest.mark.parametrize(
    ("wanted", "file", "content", "fault"),
    [
        (C, "tokenizer_config.json", b"{", "not valid JSON"),
        ("auto", "tokenizer_config.json", b"[]", "expected a JSON object"),
        (C, "chat_template.json", b"7", "expected a JSON object"),
        ("auto", "chat_template.jinja", b"\xff", "is not UTF-8 text"),
    ],
)
def test_a_base_whose_template_cannot_be_read(
    tmp_path: Path, wanted: str, file: str, content: bytes, fault: str
) -> None:
    """Found before any tensor is read, as the output's files are made of the base's."""
    home(tmp_path, {"base": None, "a": A, "b": A})
    (tmp_path / "base" / file).write_bytes(content)
    with pytest.raises(CheckpointError) as error:
        merge(tmp_path, wanted)
    (problem,) = error.value.problems
    assert problem.startswith(f"{tmp_path / 'base' / file}: {fault}")
    assert not (tmp_path / "plan").exists()


def test_a_base_whose_files_broke_since_the_plan(tmp_path: Path) -> None:
    """Found before the tensors are written."""
    home(tmp_path, {"base": None, "a": A, "b": A})
    merge(tmp_path, C)
    (tmp_path / "base" / "tokenizer_config.json").write_bytes(b"{")
    with pytest.raises(CheckpointError, match=r"tokenizer_config.json: not valid JSON"):
        cpimerge.fuse(tmp_path / "plan", tmp_path / "again", progress=refuse)
    assert not (tmp_path / "again").exists()


def refuse(*_: object) -> None:
    raise AssertionError("tensors are read")


def test_odd_templates_are_none(tmp_path: Path) -> None:
    for number, written in enumerate((7, [1], [{"name": "default"}], {"rag": A}, None)):
        directory = tmp_path / str(number)
        directory.mkdir()
        (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": written}), encoding="utf-8")
        assert read_template(directory) is None


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "chat_template.jinja").open("wb") as file:
        file.truncate(50_000_001)
    with pytest.raises(OSError, match=r"is larger than 50 MB"):  # which its callers collect
        read_template(tmp_path)
