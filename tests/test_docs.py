"""What the documents promise: commands, options and keys that exist, links that lead somewhere, a walk that works."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import click
import pytest
from click.testing import CliRunner
from pydantic import BaseModel
from safetensors.torch import load_file

from cpimerge import cli
from cpimerge.demo import Effort, run_demo
from cpimerge.recipe_schema import (
    Conflict,
    Document,
    Dtype,
    FilteredValue,
    Granularity,
    OwnSettings,
    Scope,
    Seeded,
    Slice,
    SliceSettings,
    Source,
    Space,
    Tokenizer,
    Vocabulary,
    _DensityRule,
    _Model,
    _Shared,
)
from cpimerge.tinylm import Schedule, Shape

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
MERGEKIT = (ROOT / "docs" / "mergekit.md").read_text(encoding="utf-8")
KEYS_OF_MERGEKIT = {"slices", "out_dtype", "tokenizer_source", "tokenizer", "chat_template", "normalize", "int8_mask"}
WALK = "Three minutes with a recipe"
DEMO = "cpimerge demo --output demo"
BY_HAND = Path("demo/by-hand.yml")
CHOICES = {
    "scope": Scope,
    "conflict": Conflict,
    "space": Space,
    "granularity": Granularity,
    "dtype": Dtype,
    "vocabulary": Vocabulary,
}
SHORT = Effort(
    shape=Shape(hidden=16, layers=2, heads=2, intermediate=24),
    base=Schedule(steps=3, rate=3e-3, warmup=1, tokens=400),
    expert=Schedule(steps=2, rate=3e-3, warmup=1, tokens=400),
    test_rows=8,
)


def section(title: str) -> str:
    """A section of the README, up to the next."""
    _, text = README.split(f"\n## {title}\n")
    return text.split("\n## ")[0]


def code(text: str) -> set[str]:
    """What is marked as code in it, blocks included, as words."""
    return {word for part in re.findall(r"```.*?```|`[^`]+`", text, re.DOTALL) for word in re.findall(r"[\w-]+", part)}


# --- commands and options ---------------------------------------------------------------------------


def options() -> Iterator[tuple[str, str]]:
    """Each command with each of its options; `cpimerge` itself has some too."""
    every: dict[str, click.Command] = {"cpimerge": cli.main}
    every |= {f"cpimerge {name}": command for name, command in cli.main.commands.items()}
    for name, command in every.items():
        yield from ((name, option) for param in command.params for option in param.opts if option.startswith("-"))


@pytest.mark.parametrize("command", cli.main.commands)
def test_every_command_is_in_the_readme(command: str) -> None:
    assert f"`cpimerge {command}" in section("Commands")


@pytest.mark.parametrize(("command", "option"), list(options()))
def test_every_option_is_in_the_readme(command: str, option: str) -> None:
    assert re.search(rf"`{option}[ `]", section("Commands"))


def test_every_option_in_the_readme_exists() -> None:
    mentioned = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", README))
    assert "--memory" in mentioned
    assert mentioned <= {option for _, option in options()} | {"--help"}


# --- the recipe -------------------------------------------------------------------------------------


def rows() -> dict[str, str]:
    """The recipe reference's tables: the rest of the row by the key."""
    return dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", section("Recipe reference"), re.MULTILINE))


def test_the_tables_have_every_key_and_no_other() -> None:
    own = (Document.model_fields.keys() | _Shared.model_fields.keys()) - {"parameters"} - KEYS_OF_MERGEKIT
    assert rows().keys() - KEYS_OF_MERGEKIT == own


@pytest.mark.parametrize("schema", [Document, _Model, OwnSettings, _Shared, Seeded, FilteredValue, _DensityRule])
def test_every_key_is_in_the_recipe_reference(schema: type[BaseModel]) -> None:
    assert schema.model_fields.keys() - KEYS_OF_MERGEKIT <= code(section("Recipe reference"))


@pytest.mark.parametrize("schema", [Document, Slice, SliceSettings, Source, Tokenizer, _Shared])
def test_every_key_of_mergekit_is_in_its_document(schema: type[BaseModel]) -> None:
    own = KEYS_OF_MERGEKIT | Source.model_fields.keys() | Tokenizer.model_fields.keys()
    read = MERGEKIT.split("\n## What is read\n")[1].split("\n## ")[0]
    assert schema.model_fields.keys() & own <= code(read)


@pytest.mark.parametrize("key", CHOICES)
def test_every_choice_is_in_the_recipe_reference(key: str) -> None:
    assert set(get_args(CHOICES[key])) <= code(rows()[key])


@pytest.mark.parametrize("key", OwnSettings.model_fields)
def test_what_a_model_may_set_itself_is_marked(key: str) -> None:
    assert "per model" in rows()[key]


# --- the walk ---------------------------------------------------------------------------------------


def test_the_walk_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", section(WALK), re.DOTALL | re.MULTILINE)
    assert [kind for kind, _ in blocks if kind in ("sh", "yaml", "python")] == [
        "sh",
        "yaml",
        "sh",
        "sh",
        "python",
        "python",
    ]
    assert f"`{BY_HAND}`" in section(WALK)
    for kind, text in blocks:
        follow(kind, text)
    by_hand, again = (load_file(f"demo/{name}/model.safetensors") for name in ("by-hand", "again"))
    assert by_hand.keys() == load_file("demo/base/model.safetensors").keys()
    assert all((again[name] == value).all() for name, value in by_hand.items())


def follow(kind: str, text: str) -> None:
    """Do what a block says, in this directory."""
    match kind:
        case "sh":
            for line in text.splitlines():
                shell(line)
        case "yaml":
            BY_HAND.write_text(text, encoding="utf-8")
        case "python":
            exec(compile(text, "README.md", "exec"), {})
        case _:
            assert kind in ("", "text"), f"what is a {kind} block to do?"


def shell(line: str) -> None:
    program, *arguments = shlex.split(line, comments=True)
    if program == "make":
        return  # sets up an environment of its own
    assert program == "cpimerge"
    if line == DEMO:
        run_demo(Path("demo"), effort=SHORT)
        return
    result = CliRunner().invoke(cli.main, arguments)
    assert result.exit_code == 0, result.output


def test_the_walk_starts_with_the_demo() -> None:
    assert f"```sh\n{DEMO}\n```" in section(WALK)


# --- the map ----------------------------------------------------------------------------------------


def test_the_map_has_every_module_once() -> None:
    text = (ROOT / "docs" / "development.md").read_text(encoding="utf-8")
    listed = [name for row in re.findall(r"^\|.*\|$", text, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)]
    modules = {path.stem for path in (ROOT / "cpimerge").glob("*.py")} - {"__init__", "__main__"}
    assert modules <= set(listed)
    assert {name for name in listed if listed.count(name) > 1} <= {"plan", "fuse"}


# --- links ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "document",
    ["README.md", "benchmarks/README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))],
)
def test_links_lead_somewhere(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"[a-z]+:|#", target):
            assert (ROOT / document).parent.joinpath(target.split("#")[0]).exists(), target


def test_every_promise_is_held_by_tests_that_exist() -> None:
    text = (ROOT / "docs" / "guarantees.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| promise")]
    assert rows
    for row in rows:
        named = re.findall(r"`([\w/]+\.py)::(\w+)`", row)
        assert named, row
        for file, test in named:
            assert f"\ndef {test}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), f"{file}::{test}"
