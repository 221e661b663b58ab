"""Tokenizers: what a union of vocabularies would read of them, and take over from them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import save, write_json

from attacks.attack import Spoil, both, check, done, fifo, link, removed, sparse, text
from attacks.conftest import model
from cpimerge.ordinary import LEADS_OUT

VOCAB = {"a": 0, "b": 1, "c": 2, "d": 3, "e": 4, "f": 5}
MEND = "Save the tokenizer again with transformers"
TOKENIZER = "math/tokenizer.json"
CONSTANTS = {"LEADS_OUT": LEADS_OUT, "MEND": MEND}


def token(content: str, number: Any = 6, **flags: Any) -> dict[str, Any]:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": number, "content": content} | plain | flags


def tokenizer(vocab: Mapping[str, Any], added: Any = ()) -> dict[str, Any]:
    return {"model": {"type": "BPE", "vocab": vocab, "merges": []}, "added_tokens": added}


def joined(*added: dict[str, Any], vocab: Mapping[str, Any] = VOCAB) -> Spoil:
    """A union with math, which has a row more than the others, and says that these are its tokens."""

    def spoil(home: Path) -> None:
        for name in ("base", "math", "code"):
            write_json(home / name / "tokenizer.json", tokenizer(VOCAB))
            write_json(home / name / "config.json", {"model_type": "test", "vocab_size": 6})
        tensors = model(0.5) | {"embed.weight": torch.ones(7, 2)}
        save(home / "math", tensors, config={"model_type": "test", "vocab_size": 7})
        (home / TOKENIZER).write_text(json.dumps(tokenizer(vocab, list(added))))
        with (home / "recipe.yml").open("a") as recipe:
            recipe.write("vocabulary: union\n")

    return spoil


def instead(content: str | bytes, name: str = TOKENIZER) -> Spoil:
    """A sound union, but for this file."""
    return both(joined(token("new")), text(name, content))


WRONG: dict[str, tuple[Spoil, list[str]]] = {
    "half a surrogate pair": (
        joined(token("\ud800")),
        ["math: token '\\ud800' is not Unicode, so no file can hold it. Remove it, or write vocabulary: base"],
    ),
    "half a surrogate pair in the vocabulary": (
        joined(vocab=VOCAB | {"\ud800": 6}),
        [
            (
                "math: its tokenizer is another: 1 token in its vocabulary, not added to it: '\\ud800' (id 6). "
                "vocabulary: union can only join added tokens; write vocabulary: base"
            ),
            "math: token '\\ud800' is not Unicode, so no file can hold it. Remove it, or write vocabulary: base",
        ],
    ),
    "an id beyond all rows": (
        joined(token("x", 1 << 22)),
        [f"math/tokenizer.json: token 'x': its id is 4194304, not a row's number. {MEND}"],
    ),
    "an id without end": (
        joined(token("x", 10**4000)),
        [
            "math/tokenizer.json: token 'x': its id is "
            f"10000000000000000000000000000000000000000000000000000000000…, not a row's number. {MEND}"
        ],
    ),
    "an id that is none": (
        joined(token("x", -1)),
        [f"math/tokenizer.json: token 'x': its id is -1, not a row's number. {MEND}"],
    ),
    "a flag that is none": (
        joined(token("x", special="yes\x1b[2J")),
        [f"math/tokenizer.json: added token 'x': a flag is not true or false. {MEND}"],
    ),
    "one id of two tokens that write on the terminal": (
        joined(token("\x1b[2J"), token("\u202e\n")),
        [f"math/tokenizer.json: id 6 is both '\\x1b[2J' and '\\u202e\\n'. {MEND}"],
    ),
    "an abyss": (instead('{"a":' + "[" * 100_000), [f"math/tokenizer.json: its JSON is nested too deeply. {MEND}"]),
    "some depth": (
        instead('{"a":' + "[" * 900 + "]" * 900 + "}"),
        [f"math/tokenizer.json: its JSON is nested too deeply. {MEND}"],
    ),
    "merges like an abyss": (
        instead(json.dumps(tokenizer(VOCAB)).replace("[]", "[" * 900 + "]" * 900, 1)),
        [f"math/tokenizer.json: its JSON is nested too deeply. {MEND}"],
    ),
    "a number without end": (
        instead('{"model":{"vocab":{"a":' + "9" * 5000 + "}}}"),
        [f"math/tokenizer.json: not valid JSON: a number of more than 4300 digits. {MEND}"],
    ),
    "another encoding": (
        instead(json.dumps(tokenizer(VOCAB)).encode("utf-16")),
        [f"math/tokenizer.json: is not UTF-8 text. {MEND}"],
    ),
    "a hole of a terabyte": (
        both(joined(token("new")), sparse(TOKENIZER)),
        [f"math/tokenizer.json: is larger than 64 MB, as no such file is. {MEND}"],
    ),
    "a link to a secret": (
        both(joined(token("new")), link(TOKENIZER, "OUTSIDE/secret.txt")),
        [f"math/tokenizer.json: {LEADS_OUT}"],
    ),
    "a vocabulary that is a list of passwords": (
        both(joined(token("new")), removed(TOKENIZER), link("math/vocab.txt", "/etc/passwd")),
        [f"math/vocab.txt: {LEADS_OUT}"],
    ),
    "added tokens from a secret": (
        both(joined(token("new")), link("math/added_tokens.json", "OUTSIDE/secret.txt")),
        [f"math/added_tokens.json: {LEADS_OUT}"],
    ),
    "a config from a secret": (
        both(joined(token("new")), link("math/tokenizer_config.json", "OUTSIDE/secret.txt")),
        [f"math/tokenizer_config.json: {LEADS_OUT}"],
    ),
    "a hole of added tokens": (
        both(joined(token("new")), sparse("math/added_tokens.json")),
        [f"math/added_tokens.json: is larger than 64 MB, as no such file is. {MEND}"],
    ),
    "added tokens that are none": (
        instead("[1]", "math/added_tokens.json"),
        [f"math/added_tokens.json: expected a JSON object, got list. {MEND}"],
    ),
    "a decoder of other digits": (
        instead('{"added_tokens_decoder":{"٣":{"content":"y"}}}', "math/tokenizer_config.json"),
        [f"math/tokenizer_config.json: token 'y': its id is '٣', not a row's number. {MEND}"],
    ),
    "a pipe": (
        both(joined(token("new")), fifo("base/tokenizer.json")),
        [
            ("base/tokenizer.json: cannot be read, and the output needs it too. Complete the download, or remove it"),
            (
                "math: rows of the vocabulary: 'embed.weight' 7, where the base has 6. Which tokens they are "
                "cannot be told: no tokenizer.json in base. Put it there (transformers: load the tokenizer and "
                "save it)"
            ),
        ],
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_tokenizers(home: Path, case: str) -> None:
    check(home, *WRONG[case], command="merge")


@pytest.mark.parametrize(
    "content", ["\x1b[2J\u202e\n```\n<img src=x>", "", "x" * 100_000, "</s>", '"}],"model":{', "\\ud800", "\0"]
)
def test_tokens_are_text(home: Path, content: str) -> None:
    """A token stays what it is, wherever it is written."""
    joined(token(content))(home)
    done(home)
    written = json.loads((home / "out/tokenizer.json").read_text())
    assert written["added_tokens"] == [token(content)]
    assert written["model"]["vocab"] == VOCAB


def test_a_base_with_half_a_surrogate_pair_keeps_it(home: Path) -> None:
    joined(token("new"))(home)
    content = {"x": "\ud800", "added_tokens_decoder": {}}
    (home / "base/tokenizer_config.json").write_text(json.dumps(content))
    done(home)
    assert json.loads((home / "out/tokenizer_config.json").read_text())["x"] == "\ud800"
