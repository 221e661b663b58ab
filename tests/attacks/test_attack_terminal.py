"""What comes from files writes neither on the terminal nor into the model card: it is shown, escaped, as text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoints import save
from markdown_it import MarkdownIt
from markdown_it.token import Token

from attacks.attack import done, refused, run
from attacks.conftest import model
from cpimerge.plain_text import printable

# Clears the screen, renames the window, runs backwards, hides a part, begins a new line.
EVIL = "\x1b[2J\x1b]0;x\x07\u202eevil\u202c\u200b\n\r\u2028"
MARKUP = "<img src=x onerror=alert(1)>[a](javascript:x)`|*_~www.evil.com\u202e"


def renamed(home: Path, name: Callable[[str], str]) -> None:
    """All models with other names of tensors."""
    for directory, shift in (("base", 0.0), ("math", 0.5), ("code", -0.25)):
        save(home / directory, {name(it): tensor for it, tensor in model(shift).items()})


def recipe(home: Path, *names: str, base: str = "./base") -> None:
    models = [{"model": path, "name": name} for path, name in zip(("./math", "./code"), names, strict=True)]
    text = json.dumps({"merge_method": "cpi", "base_model": base, "models": models}, ensure_ascii=True)
    (home / "recipe.yml").write_text(text)


@pytest.mark.parametrize("options", [(), ("--json",), ("--debug",), ("-q",)], ids=lambda options: " ".join(options))
@pytest.mark.parametrize("place", ["a tensor", "a layer", "a stack of layers"])
def test_names_of_tensors(home: Path, place: str, options: tuple[str, ...]) -> None:
    def name(plain: str) -> str:
        return {
            "a tensor": f"{EVIL}.{plain}",
            "a layer": plain.replace("layers.0", f"layers.0.{EVIL}"),
            "a stack of layers": plain.replace("layers", EVIL),
        }[place]

    renamed(home, name)
    done(home, "plan", *options)
    done(home, "fuse", *options)
    done(home, "inspect", *options)
    run(home, "inspect", "{home}/base", "{home}/math", *options)
    assert set(json.loads((home / "out/cpimerge_manifest.json").read_text())["tensors"]) == set(map(name, model()))


@pytest.mark.parametrize("options", [(), ("--json",), ("--debug",)], ids=lambda options: " ".join(options))
def test_names_in_errors(home: Path, options: tuple[str, ...]) -> None:
    """Tracebacks are no exception."""
    tensors = {f"{EVIL}.{name}": it for name, it in model(0.5).items()}
    save(home / "math", tensors)
    problems = refused(home, "plan", *options)
    escaped = printable(EVIL)
    assert f"math: 4 tensors are called '{escaped}.X' where base has 'X'. " in problems[0].replace("\\\\", "\\")


def test_an_error_without_end_is_cut(home: Path) -> None:
    save(home / "math", {"x" * 900: model()["ids"]} | {f"{n}" * 900: model()["ids"] for n in range(9)})
    assert all(len(problem) < 7000 for problem in refused(home))


@pytest.mark.parametrize("key", ["config.json", "tokenizer_config.json"])
def test_configs_in_notes(home: Path, key: str) -> None:
    (home / "math" / key).write_text(json.dumps({EVIL: EVIL, "model_type": EVIL, "architectures": [EVIL]}))
    done(home, "plan")
    done(home, "inspect")


# --- the model card ---------------------------------------------------------------------------------


def card(home: Path) -> tuple[str, list[Token]]:
    """The card's metadata, and the rest as a reader of Markdown sees it."""
    _, metadata, text = (home / "out/README.md").read_text().split("---\n", 2)
    return metadata, MarkdownIt("commonmark", {"html": True}).parse(text)


def kinds(tokens: list[Token]) -> set[str]:
    return {token.type for token in tokens} | {inner.type for token in tokens for inner in token.children or ()}


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """What the card of a merge with plain names is made of."""
    from attacks.conftest import furnish
    from cpimerge import merge

    home = furnish(tmp_path_factory.mktemp("usual"))
    merge(home / "recipe.yml", home / "out", threads=1)
    return kinds(card(home)[1])


@pytest.mark.parametrize(
    "name",
    [
        MARKUP.replace("/", ""),
        "---",
        "```",
        "`",
        "# x",
        "- x",
        "1. x",
        "<!--",
        "**",
        "a\u202eb\u200b",
        "![x](y)",
        "x|y",
    ],
)
def test_tasks_are_text_in_the_card(home: Path, usual: set[str], name: str) -> None:
    recipe(home, name, "plain")
    done(home)
    metadata, tokens = card(home)
    assert metadata == "library_name: transformers\ntags:\n- merge\n- cpimerge\n"
    assert kinds(tokens) <= usual
    assert sum(token.type == "heading_open" for token in tokens) == 4
    said = [
        inner.content for token in tokens for inner in token.children or () if inner.type in ("text", "code_inline")
    ]
    assert printable(name) in said or any(printable(name) in part for part in said)


def test_directories_are_text_in_the_card(home: Path, usual: set[str]) -> None:
    name = MARKUP.replace("/", "")
    (home / "base").rename(home / name)
    recipe(home, "math", "plain", base=f"./{name}")
    done(home)
    assert kinds(card(home)[1]) <= usual


@pytest.mark.parametrize(
    "comment",
    [
        "`",
        "```",
        "~~~\n# x",
        "`````````\n# <script>alert(1)",
        "---\n# evil: true",
        "\u202e\u2066evil",
        "<img src=x>",
    ],
)
def test_a_recipe_stays_in_its_fence(home: Path, usual: set[str], comment: str) -> None:
    with (home / "recipe.yml").open("a") as file:
        file.write(f"# {comment}\n")
    done(home)
    metadata, tokens = card(home)
    assert metadata == "library_name: transformers\ntags:\n- merge\n- cpimerge\n"
    assert kinds(tokens) <= usual
    (fence,) = [token for token in tokens if token.type == "fence"]
    assert tokens[-1] is fence
    shown = comment.replace("\u202e", "\\u202e").replace("\u2066", "\\u2066")
    assert fence.content.endswith(f"# {shown}\n")


@pytest.mark.parametrize("key", ["model_type", "architectures", "library_name", "license"])
def test_a_config_writes_nothing_into_the_metadata(home: Path, key: str) -> None:
    config = {"model_type": "x", key: "x\n---\nevil: true\n# <script>"}
    (home / "base/config.json").write_text(json.dumps(config))
    done(home)
    assert card(home)[0] == "library_name: transformers\ntags:\n- merge\n- cpimerge\n"
