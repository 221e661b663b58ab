"""What lies beside the weights of a base and would be in the output: links, folders, files that lead to others."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from attacks.attack import Spoil, both, check, done, fifo, folder, link, refused, sparse, text
from cpimerge.ordinary import LEADS_OUT

TAKEN = "is a folder, and the output has a file of this name. Rename or remove it"
UNREAD = "cannot be read, and the output needs it too. Complete the download, or remove it"
CONSTANTS = {"LEADS_OUT": LEADS_OUT, "TAKEN": TAKEN, "UNREAD": UNREAD}


def full_folder(name: str) -> Spoil:
    return both(folder(name), text(f"{name}/x", "x"))


def modules(content: Any) -> Spoil:
    return text("base/modules.json", content if isinstance(content, str) else json.dumps(content))


LINKS: dict[str, tuple[Spoil, list[str]]] = {
    "to a secret": (link("base/notes.txt", "OUTSIDE/secret.txt"), [f"base/notes.txt: {LEADS_OUT}"]),
    "to a secret, by a relative way": (
        link("base/notes.txt", "../../outside/secret.txt"),
        [f"base/notes.txt: {LEADS_OUT}"],
    ),
    "to a secret, as the config": (
        link("base/generation_config.json", "OUTSIDE/secret.txt"),
        [f"base/generation_config.json: {LEADS_OUT}"],
    ),
    "to the passwords": (link("base/vocab.txt", "/etc/passwd"), [f"base/vocab.txt: {LEADS_OUT}"]),
    "to this process": (link("base/notes.txt", "/proc/self/environ"), [f"base/notes.txt: {LEADS_OUT}"]),
    "to another model's config": (link("base/notes.json", "../code/config.json"), [f"base/notes.json: {LEADS_OUT}"]),
    "a folder to the outside": (link("base/more", "OUTSIDE"), [f"base/more: {LEADS_OUT}"]),
    "a folder to everything": (link("base/more", "/"), [f"base/more: {LEADS_OUT}"]),
    "a link to a link": (
        both(link("base/one", "two"), link("base/two", "OUTSIDE/secret.txt")),
        [f"base/one: {LEADS_OUT}", f"base/two: {LEADS_OUT}"],
    ),
    "weights of a module": (
        both(
            modules([{"path": "2_Dense"}]),
            folder("base/2_Dense"),
            link("base/2_Dense/model.safetensors", "OUTSIDE/secret.txt"),
        ),
        [f"base/2_Dense/model.safetensors: {LEADS_OUT}"],
    ),
    "into itself": (link("base/notes.txt", "notes.txt"), [f"base/notes.txt: {UNREAD}"]),
    "to a device": (link("base/notes.txt", "/dev/zero"), [f"base/notes.txt: {LEADS_OUT}"]),
    "a pipe": (fifo("base/notes.txt"), [f"base/notes.txt: {UNREAD}"]),
}

FOLDERS: dict[str, tuple[Spoil, list[str]]] = {
    name: (full_folder(f"base/{name}"), [f"base/{name}: {TAKEN}"])
    for name in (
        *("README.md", "readme.MD", "cpimerge_manifest.json", "chat_template.jinja", "Config.json"),
        *("model.safetensors.index.json", "model-00001-of-00002.safetensors", "MODEL-00001-of-00009.safetensors"),
    )
}

SMALL: dict[str, tuple[Spoil, list[str]]] = {
    "a pipe of modules": (fifo("base/modules.json"), ["base/modules.json: cannot be read: is no ordinary file"]),
    "a hole of modules": (
        sparse("base/modules.json"),
        ["base/modules.json: cannot be read: is larger than 1 MB, as no such file is"],
    ),
    "a template that is a secret": (
        both(
            *(link(f"{name}/chat_template.jinja", "OUTSIDE/secret.txt") for name in ("math", "code")),
            lambda home: (home / "recipe.yml").write_text((home / "recipe.yml").read_text() + "chat_template: auto\n"),
        ),
        [f"math/chat_template.jinja: {LEADS_OUT}", f"code/chat_template.jinja: {LEADS_OUT}"],
    ),
    "templates that write on the terminal": (
        both(
            *(text(f"{name}/chat_template.jinja", "{{x}}\x1b[2J") for name in ("math", "code")),
            lambda home: (home / "recipe.yml").write_text((home / "recipe.yml").read_text() + "chat_template: auto\n"),
        ),
        [
            "math/chat_template.jinja: its chat template has control characters. Download it again",
            "code/chat_template.jinja: its chat template has control characters. Download it again",
        ],
    ),
    "templates that no file can hold": (
        both(
            *(text(f"{name}/tokenizer_config.json", '{"chat_template": "{{\\ud800}}"}') for name in ("math", "code")),
            lambda home: (home / "recipe.yml").write_text((home / "recipe.yml").read_text() + "chat_template: auto\n"),
        ),
        [
            "math/tokenizer_config.json: its chat template has control characters. Download it again",
            "code/tokenizer_config.json: its chat template has control characters. Download it again",
        ],
    ),
}


@pytest.mark.parametrize("case", LINKS)
def test_links(home: Path, case: str) -> None:
    check(home, *LINKS[case], command="merge")


@pytest.mark.parametrize("case", FOLDERS)
def test_folders_in_the_place_of_files(home: Path, case: str) -> None:
    check(home, *FOLDERS[case], command="merge")


@pytest.mark.parametrize("case", SMALL)
def test_small_files(home: Path, case: str) -> None:
    check(home, *SMALL[case], command="merge")


def test_a_file_larger_than_the_disk(home: Path) -> None:
    sparse("base/notes.txt", 1 << 43)(home)
    (problem,) = refused(home, "merge")
    assert re.fullmatch(r"out: needs 8\.8 TB, the disk has .* free\. Free some space or write to another disk", problem)


def test_links_within_the_model_and_into_the_hub_cache_are_followed(home: Path) -> None:
    """All files of a snapshot in the Hub's cache are links: to blobs beside it, called by their hash."""
    blob = home / "hub/models--org--name/blobs" / ("0" * 40)
    blob.parent.mkdir(parents=True)
    blob.write_text("of the cache")
    (home / "base/.kept").mkdir()
    (home / "base/.kept/notes.txt").write_text("kept")
    link("base/notes.txt", ".kept/notes.txt")(home)
    link("base/license.txt", os.path.relpath(blob, home / "base"))(home)
    done(home)
    for name, content in (("notes.txt", "kept"), ("license.txt", "of the cache")):
        assert (home / "out" / name).read_text() == content
        assert not (home / "out" / name).is_symlink()


@pytest.mark.parametrize(
    "name",
    [
        "MODEL.safetensors",
        "Model.safetensors.index.json",
        "readme.MD",
        "CPIMERGE_MANIFEST.json",
        "ADAPTER_config.json.bin",
    ],
)
def test_other_cases_of_what_is_not_copied(home: Path, name: str) -> None:
    """Where a file system knows no case, they would be in the place of what the merge writes."""
    text(f"base/{name}", "evil")(home)
    done(home)
    assert not (home / "out" / name).exists()
    assert "evil" not in (home / "out/README.md").read_text()


PATHS: dict[str, Any] = {
    "above": [{"path": "../../outside"}, {"path": ".."}, {"path": "2_Dense/../../../outside"}],
    "absolute": [{"path": "/"}, {"path": "/etc"}],
    "NUL": [{"path": "a\0b"}],
    "half a surrogate pair": [{"path": "\ud800"}],
    "wrong types": [{"path": ["x"]}, {"path": {}}, {"path": None}, 7, [], {}],
    "an object": {"path": 1},
    "an abyss": "[" * 100_000,
    "a number without end": "[" + "9" * 5000 + "]",
    "code": [{"path": "1_Pooling", "type": "planted.X"}],
}


@pytest.mark.parametrize("case", PATHS)
def test_modules_that_lead_elsewhere(home: Path, case: str) -> None:
    """Nothing but the model's own folders is entered, and nothing is imported."""
    modules(PATHS[case])(home)
    done(home)
    assert not any("secret" in path.name for path in (home / "out").rglob("*"))


@pytest.mark.parametrize("name", ["x\x1b[31m\n\u202e.txt", "x" * 250, "-rf", "$(touch mark)", "..."])
def test_odd_names_are_names(home: Path, name: str) -> None:
    (home / "base" / name).write_text("x")
    done(home)
    assert (home / "out" / name).is_file() != name.startswith(".")


@pytest.mark.parametrize(
    "content",
    [
        '{"dtype":"float16","a":"\\ud800"}',
        '{"dtype":"float16","a":NaN,"b":1e999}',
        '{"dtype":"float16","a":' + "[" * 60 + "]" * 60 + "}",
    ],
    ids=["half a surrogate pair", "not a number", "some depth"],
)
def test_configs_that_are_written_again(home: Path, content: str) -> None:
    """The dtype is changed, and nothing else that the config says."""
    text("base/config.json", content)(home)
    done(home)
    written = (home / "out/config.json").read_bytes().decode()
    assert repr(json.loads(written)) == repr(json.loads(content) | {"dtype": "float32"})


def test_folders_in_folders(home: Path) -> None:
    (home / "base").joinpath(*["d"] * 500).mkdir(parents=True)
    done(home)
