"""JSON of strangers, read strictly: UTF-8, one object, no key twice, no more levels or digits than Python takes."""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Iterator
from typing import Any

__all__ = ["is_deep", "is_writable", "json_bytes", "most_keys", "not_json", "parse_object", "says_minus_zero", "shown"]

HALF_A_PAIR = re.compile(r"\\u[dD][89a-fA-F]")  # or one of both halves
MAX_DEPTH = 64  # of small files; what is deeper cannot be walked through, or written again, for sure
LONG_NUMBER = "Exceeds the limit"  # how Python begins to refuse one, and goes on with what to call in Python


def parse_object(raw: bytes) -> dict[str, Any]:
    """`raw`, all of a file or its header, as a JSON object. Raises ValueError: what is wrong, in words."""
    try:
        text = raw.decode("utf-8")
        if "\\" in text or not _keeps_every_key(value := json.loads(text), text):
            value = json.loads(text, object_pairs_hook=_unique)
    except RecursionError as error:
        raise ValueError("its JSON is nested too deeply") from error
    except _Twice as error:
        raise ValueError(f"{shown(error.args[0])} stands twice in one JSON object") from error
    except ValueError as error:
        raise ValueError(not_json(error)) from error
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, got {type(value).__name__}")
    return value


def not_json(error: ValueError) -> str:
    """What is wrong with a text that Python refuses as JSON."""
    what = "a number of more than 4300 digits" if str(error).startswith(LONG_NUMBER) else str(error)
    return f"not valid JSON: {what}"


def is_writable(raw: bytes, value: Any) -> bool:
    """Whether `value`, parsed from `raw`, has no half of a surrogate pair, which JSON can say and no file can hold."""
    if not HALF_A_PAIR.search(raw.decode("utf-8")):
        return True
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def is_deep(value: Any) -> bool:
    """Whether a value of JSON has more than MAX_DEPTH levels."""
    level = [value]
    for _ in range(MAX_DEPTH):
        inner = (node.values() if isinstance(node, dict) else node for node in level if isinstance(node, dict | list))
        level = [child for children in inner for child in children if isinstance(child, dict | list)]
        if not level:
            return False
    return True


def most_keys(value: Any) -> int:
    """How many keys the largest object in a value of JSON has."""
    return max(map(len, _objects(value)), default=0)


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    """Every object in a value of JSON."""
    waiting = [value]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            yield node
        children = node.values() if isinstance(node, dict) else node
        waiting += [child for child in children if type(child) is dict or type(child) is list]


def json_bytes(value: Any) -> bytes:
    """JSON as transformers writes it; all of it in ASCII where it has half a surrogate pair, which no file can hold."""
    try:
        return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:
        return (json.dumps(value, indent=2) + "\n").encode()


def says_minus_zero(raw: bytes) -> bool:
    """Whether `raw`, which parses, has the number -0 somewhere: 0 to Python, a fraction to other readers."""
    found: set[bool] = set()
    if b"-0" in raw:
        json.loads(raw, parse_int=lambda text: found.add(text == "-0"))
    return True in found


def shown(value: Any) -> str:
    """What a file holds, as an error shows it: quoted, cut short where it is long or deep."""
    brief = reprlib.Repr()
    brief.maxstring, brief.maxlist, brief.maxlong = 200, 8, 40
    return brief.repr(value)


class _Twice(Exception):
    """A key that stands twice in one object."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        seen: set[str] = set()
        raise _Twice(next(key for key, _ in pairs if key in seen or seen.add(key)))  # type: ignore[func-returns-value]
    return result


def _keeps_every_key(value: Any, text: str) -> bool:
    """Whether an object as parsed has all the keys of its text, so that none of them stands twice; False if unsure.

    The text has no backslashes, so that a quote stands only where a string begins or ends, and a colon after it makes
    that a key. This is faster by far than to look at every object as it is parsed: a header may have 100,000.
    """
    if not isinstance(value, dict):
        return False
    written = len(re.findall(r'"[ \t\n\r]*:', text))
    keys = len(value) + sum(len(entry) for entry in value.values() if isinstance(entry, dict))
    return keys == written or sum(map(len, _objects(value))) == written
