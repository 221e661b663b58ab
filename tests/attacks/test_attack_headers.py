"""Headers of safetensors, indexes, and what stands where such a file should be."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
from checkpoints import save, write_json
from files import write_raw

from attacks.attack import Spoil, both, check, done, fifo, folder, link, refused, removed, sparse, text
from attacks.conftest import model

WEIGHTS = "math/model.safetensors"
INDEX = "math/model.safetensors.index.json"
CONFIG = "math/config.json"
AGAIN = "Download or save it again"
NO_WEIGHTS = "Give the directory of a checkpoint in safetensors"
ODD = "is no ordinary file, nor a link to one. Download it again"
TOO_DEEP = "its JSON is nested too deeply"
CONSTANTS = {"AGAIN": AGAIN, "ODD": ODD, "TOO_DEEP": TOO_DEEP}


def entry(shape: str = "[2]", offsets: str = "[0,8]", name: str = '"w"') -> str:
    """A header of one tensor, as text."""
    return f'{{{name}:{{"dtype":"F32","shape":{shape},"data_offsets":{offsets}}}}}'


def header(content: str | bytes | dict[str, Any], size: int = 8) -> Spoil:
    """math with this header, and so many bytes of data."""
    return lambda home: write_raw(home / WEIGHTS, content, bytes(size))


def index(content: Any) -> Spoil:
    """math with this index instead of its file."""
    raw = content if isinstance(content, str) else json.dumps(content)
    return both(removed(WEIGHTS), text(INDEX, raw))


def a_socket(home: Path) -> None:
    (home / WEIGHTS).unlink()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(WEIGHTS)  # the working directory is the place: a path to a socket must be short


HEADERS: dict[str, tuple[Spoil, list[str]]] = {
    "a number without end": (
        header(entry(f"[{'9' * 100_000}]")),
        [f"math/model.safetensors: not valid JSON: a number of more than 4300 digits. {AGAIN}"],
    ),
    "a long number": (
        header(entry(f"[{'9' * 4000}]")),
        [
            (
                "math/model.safetensors: tensor 'w': shape [999999999999999999...9999999999999999999] is not a "
                f"list of sizes. {AGAIN}"
            )
        ],
    ),
    "a million dimensions": (
        header(entry(f"[{'1,' * 999_999}1]")),
        [
            (
                "math/model.safetensors: tensor 'w': F32 [1, 1, 1, 1, 1, 1, 1, 1, ...] needs 4 bytes, data_offsets "
                f"give 8. {AGAIN}"
            )
        ],
    ),
    "a million dimensions of 2": (
        header(entry(f"[{'2,' * 999_999}2]")),
        [(f"math/model.safetensors: tensor 'w': F32 [2, 2, 2, 2, 2, 2, 2, 2, ...] is larger than any file. {AGAIN}")],
    ),
    "not a number": (
        header(entry("[NaN]")),
        [f"math/model.safetensors: tensor 'w': shape [nan] is not a list of sizes. {AGAIN}"],
    ),
    "infinity": (
        header(entry("[Infinity]")),
        [f"math/model.safetensors: tensor 'w': shape [inf] is not a list of sizes. {AGAIN}"],
    ),
    "an exponent": (
        header(entry("[2e0]")),
        [f"math/model.safetensors: tensor 'w': shape [2.0] is not a list of sizes. {AGAIN}"],
    ),
    "a byte order mark": (
        header(b"\xef\xbb\xbf{}"),
        [
            (
                "math/model.safetensors: not valid JSON: Unexpected UTF-8 BOM (decode using utf-8-sig): line 1 "
                f"column 1 (char 0). {AGAIN}"
            )
        ],
    ),
    "another encoding": (
        header("{}".encode("utf-16")),
        [
            (
                "math/model.safetensors: not valid JSON: 'utf-8' codec can't decode byte 0xff in position 0: "
                f"invalid start byte. {AGAIN}"
            )
        ],
    ),
    "lists in lists": (
        header("[" * 50_000 + "]" * 50_000),
        [f"math/model.safetensors: {TOO_DEEP}. Download or save it again"],
    ),
    "objects in objects": (
        header('{"a":' * 50_000 + "1" + "}" * 50_000),
        [f"math/model.safetensors: {TOO_DEEP}. Download or save it again"],
    ),
    "an abyss of metadata": (
        header('{"__metadata__":' + '{"a":' * 50_000 + "1" + "}" * 50_001),
        [f"math/model.safetensors: {TOO_DEEP}. Download or save it again"],
    ),
    "a hole of a terabyte behind it": (
        sparse(WEIGHTS),
        [f"math/model.safetensors: 1099511627352 bytes after the last tensor. {AGAIN}"],
    ),
    "a length of 2^63": (
        text(WEIGHTS, b"\0" * 7 + b"\x80{}"),
        [f"math/model.safetensors: incomplete: 10 bytes, shorter than its own header. {AGAIN}"],
    ),
    "a name that writes on the terminal": (
        header(entry("[3]", name='"\\u001b[2J\\u202e\\n"')),
        [
            (
                "math/model.safetensors: tensor '\\x1b[2J\\u202e\\n': F32 [3] needs 12 bytes, data_offsets give 8. "
                f"{AGAIN}"
            )
        ],
    ),
    "a name twice, once in escapes": (
        header('{"w":' + entry()[5:-1] + "," + entry(name='"\\u0077"')[1:]),
        [f"math/model.safetensors: 'w' stands twice in one JSON object. {AGAIN}"],
    ),
}

INDEXES: dict[str, tuple[Spoil, list[str]]] = {
    "above": (
        index({"weight_map": {"ids": "../base/model.safetensors"}}),
        [
            (
                "math/model.safetensors.index.json: shard '../base/model.safetensors' is not the name of a file "
                f"beside it. {AGAIN}"
            )
        ],
    ),
    "absolute": (
        index({"weight_map": {"ids": "/etc/passwd"}}),
        [(f"math/model.safetensors.index.json: shard '/etc/passwd' is not the name of a file beside it. {AGAIN}")],
    ),
    "through a link": (
        both(link("math/other", "../base"), index({"weight_map": {"ids": "other/model.safetensors"}})),
        [
            (
                "math/model.safetensors.index.json: shard 'other/model.safetensors' is not the name of a file "
                f"beside it. {AGAIN}"
            )
        ],
    ),
    "control characters": (
        index({"weight_map": {"ids": "x\x1b[31m\0\u202e"}}),
        [("math/x\\x1b[31m\\x00\\u202e: missing, though model.safetensors.index.json names it. Complete the download")],
    ),
    "names of other systems": (
        index({"weight_map": {"ids": "..\\base\\model.safetensors"}}),
        [
            (
                "math/..\\base\\model.safetensors: missing, though model.safetensors.index.json names it. Complete "
                "the download"
            )
        ],
    ),
    "no names": (
        index({"weight_map": {"a": ["x"], "b": {}, "c": None, "d": 1}}),
        [
            f"math/model.safetensors.index.json: shard 1 is not the name of a file beside it. {AGAIN}",
            f"math/model.safetensors.index.json: shard None is not the name of a file beside it. {AGAIN}",
            f"math/model.safetensors.index.json: shard ['x'] is not the name of a file beside it. {AGAIN}",
            (
                "math/model.safetensors.index.json: shard {} is not the name of a file beside it. Download or save "
                "it again"
            ),
        ],
    ),
    "a name too long": (
        index({"weight_map": {"ids": "x" * 300}}),
        ["math/model.safetensors.index.json: cannot be read: File name too long"],
    ),
    "itself": (
        index({"weight_map": {"ids": "model.safetensors.index.json"}}),
        [f"math/model.safetensors.index.json: incomplete: 55 bytes, shorter than its own header. {AGAIN}"],
    ),
    "another file": (
        index({"weight_map": {"ids": "config.json"}}),
        [f"math/config.json: incomplete: 27 bytes, shorter than its own header. {AGAIN}"],
    ),
    "a pipe": (
        both(fifo("math/s"), index({"weight_map": {"ids": "s"}})),
        ["math/s: missing, though model.safetensors.index.json names it. Complete the download"],
    ),
    "twenty thousand shards": (
        index({"weight_map": {str(n): f"s{n}" for n in range(20_000)}}),
        [
            "math/s0: missing, though model.safetensors.index.json names it. Complete the download",
            "math/s1: missing, though model.safetensors.index.json names it. Complete the download",
            "...",
        ],
    ),
    "an abyss": (
        index('{"weight_map":' + "[" * 100_000),
        [f"math/model.safetensors.index.json: {TOO_DEEP}. Download or save it again"],
    ),
    "some depth": (
        index('{"weight_map":' + '{"a":' * 70 + "1" + "}" * 71),
        [f"math/model.safetensors.index.json: {TOO_DEEP}. Download or save it again"],
    ),
    "a number without end": (
        index(f'{{"weight_map":{{"a":{"9" * 5000}}}}}'),
        [f"math/model.safetensors.index.json: not valid JSON: a number of more than 4300 digits. {AGAIN}"],
    ),
    "a key twice": (
        index('{"weight_map":{"a":"s"},"weight_map":{"a":"t"}}'),
        [f"math/model.safetensors.index.json: 'weight_map' stands twice in one JSON object. {AGAIN}"],
    ),
    "a hole of a terabyte": (
        both(removed(WEIGHTS), sparse(INDEX)),
        ["math/model.safetensors.index.json: cannot be read: is larger than 64 MB, as no such file is"],
    ),
}

PLACES: dict[str, tuple[Spoil, list[str]]] = {
    "a pipe": (fifo(WEIGHTS), [f"math/model.safetensors: {ODD}"]),
    "a pipe for an index": (both(removed(WEIGHTS), fifo(INDEX)), [f"math/model.safetensors.index.json: {ODD}"]),
    "a socket": (a_socket, [f"math/model.safetensors: {ODD}"]),
    "a folder": (folder(WEIGHTS), [f"math/model.safetensors: {ODD}"]),
    "a device": (link(WEIGHTS, "/dev/zero"), [f"math/model.safetensors: {ODD}"]),
    "a link to itself": (link(WEIGHTS, "model.safetensors"), [f"math/model.safetensors: {ODD}"]),
    "another file of this machine": (
        link(WEIGHTS, "OUTSIDE/secret.txt"),
        [f"math/model.safetensors: incomplete: 8 bytes, shorter than its own header. {AGAIN}"],
    ),
    "a config that is another file": (
        link(CONFIG, "OUTSIDE/secret.txt"),
        [f"math/config.json: not valid JSON: Expecting value: line 1 column 1 (char 0). {AGAIN}"],
    ),
    "a config with a hole of a terabyte": (
        sparse(CONFIG),
        ["math/config.json: cannot be read: is larger than 64 MB, as no such file is"],
    ),
    "a config like an abyss": (
        text(CONFIG, '{"a":' * 5000 + "1" + "}" * 5000),
        [f"math/config.json: {TOO_DEEP}. Download or save it again"],
    ),
    "a config of some depth": (
        text(CONFIG, '{"a":' * 900 + "1" + "}" * 900),
        [f"math/config.json: {TOO_DEEP}. Download or save it again"],
    ),
    "a config with a key twice": (
        text(CONFIG, '{"dtype":"float32","dtype":"float16"}'),
        [f"math/config.json: 'dtype' stands twice in one JSON object. {AGAIN}"],
    ),
}


@pytest.mark.parametrize("case", HEADERS)
def test_headers(home: Path, case: str) -> None:
    check(home, *HEADERS[case])


@pytest.mark.parametrize("case", INDEXES)
def test_indexes(home: Path, case: str) -> None:
    check(home, *INDEXES[case])


@pytest.mark.parametrize("case", PLACES)
def test_what_stands_where_a_file_should_be(home: Path, case: str) -> None:
    check(home, *PLACES[case])


ZEROS = '{"w":{"dtype":"F32","shape":[%s],"data_offsets":[0,0]}}'


@pytest.mark.parametrize(
    "content",
    [
        ZEROS % ("0," * 999_999 + "0"),
        ZEROS % f"0,{2**62},{2**62}",
        json.dumps({"__metadata__": {str(n): "x" for n in range(10_000)}, "w": json.loads(entry())["w"]}),
        *(
            entry(name=json.dumps(name))
            for name in ("../../w", "/etc/passwd", "", "a\0b", "layers." + "9" * 900, "w\\")
        ),
    ],
    ids=[
        "a million zeros",
        "nothing, huge",
        "much metadata",
        "above",
        "absolute",
        "no name",
        "NUL",
        "digits",
        "backslash",
    ],
)
def test_odd_headers_that_are_sound(home: Path, content: str) -> None:
    """They are read, and of a tensor that the base lacks it is said that it is no fine-tune."""
    write_raw(home / WEIGHTS, content, bytes(8 if content.endswith("[0, 8]}}") or "[0,8]" in content else 0))
    assert "math: tensor 'embed.weight': missing, though base has it. It is no fine-tune of this base as it stands" in (
        refused(home)
    )


def test_names_like_paths_are_names(home: Path) -> None:
    """Nothing is written where a tensor's name leads."""
    names = {"layers.0.w": "../../outside/w", "layers.1.w": f"{home.parent}/outside/w"}
    for directory, shift in (("base", 0.0), ("math", 0.5), ("code", -0.25)):
        save(home / directory, {names.get(name, name): tensor for name, tensor in model(shift).items()})
    done(home)


CONFIGS: dict[str, Any] = {
    "wrong types": {
        **{"model_type": ["x"], "dtype": {"a": 1}, "torch_dtype": 7, "tie_word_embeddings": "yes", "vocab_size": "a"},
        **{"text_config": {"dtype": [1], "tie_word_embeddings": 1}, "architectures": {"a": 1}, "num_hidden_layers": -1},
        "quantization_config": [],
    },
    "code": {"auto_map": {"AutoModel": "planted_model.M"}, "custom_pipelines": {"x": {"impl": "planted.X"}}},
    "huge numbers": {"vocab_size": 10**4000, "text_config": {"vocab_size": float("nan")}},
    "control characters": {"model_type": "x\x1b[31m\n", "architectures": ["\x1b[2J\u202e"], "\x1b[31m\n": 1},
    "half a surrogate pair": {"a\ud800": "\ud800", "dtype": "float16"},
}


@pytest.mark.parametrize("case", CONFIGS)
@pytest.mark.parametrize("model", ["base", "math"])
def test_odd_configs_that_are_sound(home: Path, case: str, model: str) -> None:
    """What a config says that is not understood changes nothing, and nothing of it is run."""
    write_json(home / model / "config.json", CONFIGS[case])
    done(home)


def test_a_config_that_is_no_file_is_none(home: Path) -> None:
    fifo(CONFIG)(home)
    done(home)
