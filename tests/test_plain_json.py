"""JSON is taken strictly, and in words where it is not."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpimerge.plain_json import MAX_DEPTH, is_deep, is_writable, json_bytes, most_keys, parse_object, shown

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=4),
    max_leaves=20,
)
OBJECTS = st.dictionaries(st.text(max_size=3), VALUES, max_size=4)


@given(OBJECTS, st.booleans())
def test_objects_come_back(value: dict[str, Any], ascii: bool) -> None:
    assert parse_object(json.dumps(value, ensure_ascii=ascii).encode()) == value
    assert parse_object(json_bytes(value)) == value


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        (b"[]", "expected a JSON object, got list"),
        (b"7", "expected a JSON object, got int"),
        (b"", "not valid JSON: Expecting value: line 1 column 1 (char 0)"),
        (b"\xff", "not valid JSON: 'utf-8' codec can't decode byte 0xff in position 0: invalid start byte"),
        (b'{"a":1,"a":2}', "'a' stands twice in one JSON object"),
        (b'{"a":{"b":{"c":1,"c":1}}}', "'c' stands twice in one JSON object"),
        (b'{"a\\u0062":1,"ab":2}', "'ab' stands twice in one JSON object"),
        (b'{"a":' + b"9" * 5000 + b"}", "not valid JSON: a number of more than 4300 digits"),
        (b'{"a":' + b"[" * 100_000, "its JSON is nested too deeply"),
    ],
)
def test_what_is_no_object(raw: bytes, problem: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the whole text is compared
        parse_object(raw)
    assert str(error.value) == problem


def nested(depth: int) -> Any:
    value: Any = 0
    for level in range(depth):
        value = [value] if level % 2 else {"a": value, "b": 0}
    return value


def test_depth() -> None:
    assert not is_deep(nested(MAX_DEPTH))
    assert is_deep(nested(MAX_DEPTH + 1))


@given(OBJECTS)
def test_most_keys_is_that_of_the_largest_object(value: dict[str, Any]) -> None:
    def most(node: Any) -> int:
        if isinstance(node, dict):
            return max([len(node), *map(most, node.values())])
        return max(map(most, node), default=0) if isinstance(node, list) else 0

    assert most_keys(value) == most(value)


@pytest.mark.parametrize(
    ("raw", "writable"),
    [
        (b'{"a": "\\ud83d\\ude00"}', True),
        (b'{"a": "\\uD83D\\uDE00"}', True),
        (b'{"a": "\\ud800"}', False),
        (b'{"\\udfff": 1}', False),
        (b'{"a": "\\\\ud800"}', True),
    ],
)
def test_half_a_surrogate_pair(raw: bytes, writable: bool) -> None:
    value = parse_object(raw)
    assert is_writable(raw, value) is writable
    assert parse_object(json_bytes(value)) == value


def test_what_is_shown_is_short() -> None:
    for value in ("x" * 10**6, [0] * 10**6, 10**4000, nested(500), {"a": "x" * 10**6}):
        assert len(shown(value)) < 1000
