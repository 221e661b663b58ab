"""The files of a tokenizer. Oracle: an id has one token and a token one id, and no id is larger than a vocabulary."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cpimerge.errors import CheckpointError
from cpimerge.tokenizer_files import FLAGS, MAX_ID, find_tokenizer, read_tokens

from ..bundles import join, split, write
from ..mutation import bundle, json_text, lines
from ..target import Run, Target
from .files import as_bytes

FILES = ("tokenizer.json", "vocab.json", "merges.txt", "vocab.txt", "added_tokens.json", "tokenizer_config.json")
WORDS = (
    *("model", "vocab", "merges", "type", "BPE", "WordLevel", "Unigram", "added_tokens", "id", "content", *FLAGS),
    *("added_tokens_decoder", "a", "b", "<pad>", "<s>", "unk_token", "version", "4194303", "4194304"),
)


def _prepare(scratch: Path) -> Run:
    def run(data: bytes) -> None:
        write(split(data, FILES[0]), scratch, FILES)
        found = find_tokenizer([scratch])
        if found is None:
            return
        assert found.same(found)
        tokens = read_tokens(found)
        assert all(0 <= number < MAX_ID for number in tokens.names)
        assert {number: token for token, number in tokens.ids.items()} == tokens.names or _stands_twice(tokens)
        assert len(tokens.xxh3) == len(tokens.core)

    return run


def _stands_twice(tokens: Any) -> bool:
    """A vocab.txt may have a line twice: the token then has the later id."""
    return str(tokens.file).endswith("vocab.txt") and len(tokens.ids) < len(tokens.names)


def added(number: int, content: str) -> dict[str, Any]:
    """An added token as tokenizer.json has it."""
    return {"id": number, "content": content, **dict.fromkeys(FLAGS, False), "special": True}


def tokenizer(*more: str) -> dict[str, Any]:
    """What a tokenizer.json of five words holds, and of those that are added to it."""
    return {
        "version": "1.0",
        "added_tokens": [added(5 + number, token) for number, token in enumerate(more)],
        "model": {
            "type": "WordLevel",
            "vocab": {word: number for number, word in enumerate("abcde")},
            "unk_token": "a",
        },
    }


def _seeds() -> Mapping[str, bytes]:
    bpe = {"added_tokens": None, "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}}
    unigram = {"model": {"type": "Unigram", "vocab": [["a", -1.5], ["b", 0]], "unk_id": 0}}
    config = {"added_tokens_decoder": {"5": {"content": "<pad>", "special": True}}}
    return {
        "word-level": join({FILES[0]: as_bytes(tokenizer("<pad>", "<s>")), FILES[5]: as_bytes(config)}),
        "bpe": join({FILES[0]: as_bytes(bpe), FILES[4]: b'{"<s>": 3}'}),
        "unigram": join({FILES[0]: as_bytes(unigram)}),
        "old-bpe": join({FILES[1]: b'{"a": 0, "b": 1, "ab": 2}', FILES[2]: b"#version: 0.2\na b\n"}),
        "word-piece": join({FILES[3]: b"[PAD]\n[UNK]\na\n##b\n", FILES[4]: b'{"<s>": 4}'}),
    }


_JSON, _LINES = json_text(WORDS), lines(WORDS)
TARGET = Target(
    _prepare,
    _seeds,
    CheckpointError,
    bundle(FILES[0], {name: _JSON if name.endswith(".json") else _LINES for name in FILES}),
    WORDS,
    memory=8_000_000,
)
