"""The files of a base's tokenizer and config with the tokens that `vocabulary: union` joined to them.

Which token is bos, eos or pad stays as in the base; so does all that tokenizer.json says beside its added tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from .checkpoint import CONFIG
from .plain_json import json_bytes
from .plan_file import JoinedToken, Vocabulary
from .tokenizer_files import ADDED_TOKENS, TOKENIZER, TOKENIZER_CONFIG

__all__ = ["Edit", "union_edits"]

SPACE = re.compile(r"[ \t\n\r]*")

Edit = Callable[[bytes], bytes]


def union_edits(vocabulary: Vocabulary | None) -> Mapping[str, Edit]:
    """What to do with the content of the base's files, by name; nothing to files that are not named."""
    if vocabulary is None:
        return {}
    edits: dict[str, Edit] = {}
    if vocabulary.joined:
        every = ((TOKENIZER, _tokenizer), (TOKENIZER_CONFIG, _decoder), (ADDED_TOKENS, _added))
        edits |= {name: partial(edit, vocabulary.joined) for name, edit in every}
    if vocabulary.rows != vocabulary.base_rows:
        edits[CONFIG] = partial(_config, vocabulary)
    return edits


def _tokenizer(joined: Sequence[JoinedToken], raw: bytes) -> bytes:
    """tokenizer.json with the tokens after its added tokens; the rest stays byte for byte."""
    text = raw.decode("utf-8")
    place = _member(text, "added_tokens")
    entries = [token.model_dump() for token in joined]
    if place is None or not isinstance(place[2], list):
        return json_bytes(json.loads(text) | {"added_tokens": entries})
    begin, end, present = place
    shown = json.dumps(entries, indent=2, ensure_ascii=False).replace("\n", "\n  ")
    before = text[: end - 1].rstrip() + "," if present else text[: begin + 1]
    return (before + shown.removeprefix("[") + text[end:]).encode("utf-8")


def _member(text: str, name: str) -> tuple[int, int, Any] | None:
    """Where the value of a key of a JSON object begins and ends, and the value; None where there is none."""
    decoder = json.JSONDecoder()
    found = None
    place = _skip(text, _skip(text, 0) + 1)
    while text[place] != "}":
        key, place = decoder.raw_decode(text, place)
        begin = _skip(text, _skip(text, place) + 1)
        value, end = decoder.raw_decode(text, begin)
        if key == name:
            found = begin, end, value
        place = _skip(text, end)
        place = _skip(text, place + (text[place] == ","))
    return found


def _skip(text: str, place: int) -> int:
    """The first place from this on that is no white space."""
    found = SPACE.match(text, place)
    return found.end() if found else place


def _decoder(joined: Sequence[JoinedToken], raw: bytes) -> bytes:
    """tokenizer_config.json with the tokens in its `added_tokens_decoder`, where it has one."""
    config = json.loads(raw)
    decoder = config.get("added_tokens_decoder")
    if not isinstance(decoder, dict):
        return raw
    for token in joined:
        decoder[str(token.id)] = token.model_dump(exclude={"id"})
    return json_bytes(config)


def _added(joined: Sequence[JoinedToken], raw: bytes) -> bytes:
    """added_tokens.json with the tokens."""
    return json_bytes(json.loads(raw) | {token.content: token.id for token in joined})


def _config(vocabulary: Vocabulary, raw: bytes) -> bytes:
    """config.json with every `vocab_size`, at any depth, that was the base's number of rows."""
    config = json.loads(raw)
    _set_vocab_size(config, vocabulary)
    return json_bytes(config)


def _set_vocab_size(config: Any, vocabulary: Vocabulary) -> None:
    if isinstance(config, dict):
        if config.get("vocab_size") == vocabulary.base_rows:
            config["vocab_size"] = vocabulary.rows
        for value in config.values():
            _set_vocab_size(value, vocabulary)
