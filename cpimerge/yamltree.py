"""YAML as plain data that remembers where everything was written, and a schema's verdict on it in words.

YAML 1.1 guesses: `no` becomes false, `1:30` ninety, `0x10` sixteen, and `1e-3` stays text. Nothing is guessed
here: a scalar is the text that was written, and whoever reads it says whether a name or a number is meant
(`as_text`, `as_number`). So a model directory may be called `on` or `123`, and 0.29 is exactly 29/100.

The tree is built from PyYAML's events rather than its nodes, because only events still show anchors and tags,
and because they arrive one by one, so that absurdly deep nesting is refused before it is built.

`check` holds a tree against a pydantic model whose fields are made of `Text`, `Whole`, `number`, `choice`,
`Some` and `written` below, and says what is wrong without pydantic's vocabulary.
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Annotated, Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, Discriminator, Field, PlainValidator, ValidationError

__all__ = [
    "Problem",
    "Scalar",
    "Some",
    "Text",
    "Tree",
    "Unreadable",
    "Where",
    "Whole",
    "as_number",
    "as_text",
    "check",
    "choice",
    "describe",
    "key_text",
    "nearest",
    "number",
    "read_tree",
    "written",
]

MAX_DEPTH = 20
TOO_DEEP = f"values are nested more than {MAX_DEPTH} deep"
MAX_NUMBER = 100  # characters
MAX_WHOLE = 2**64 - 1

# Exponents have at most three digits: 1e999999999 as an exact fraction would fill the memory.
_NUMBER = re.compile(r"[+-]?(?:(?:0|[1-9][0-9]*)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?")

Where = tuple[str | int, ...]
"""The way from the top of the recipe to one value: `("models", 1, "name")`."""


class Scalar(str):
    """A scalar's text as written. `quoted` tells `"0.1"` and block text from the bare word `0.1`."""

    quoted: bool

    def __new__(cls, text: str, quoted: bool = False) -> Scalar:
        scalar = super().__new__(cls, text)
        scalar.quoted = quoted
        return scalar


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: its line (from 1), its place (none: the whole file), and what to do."""

    line: int
    where: Where
    message: str

    def __str__(self) -> str:
        key = f"{key_text(self.where)}: " if self.where else ""
        return f"{self.line}: {key}{self.message}"


class Unreadable(Exception):
    """The text is not one YAML document, so nothing else about it can be checked."""

    def __init__(self, line: int, message: str) -> None:
        super().__init__(message)
        self.problem = Problem(line, (), message)


@dataclass
class Tree:
    """A document as dict, list and `Scalar`, with the line of every key and list entry.

    `data` holds None where a value is missing or refused; `problems` already says so.
    """

    data: Any = None
    lines: dict[Where, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def at(self, *where: str | int) -> Any:
        """The value at a place, or None where the document has no such place."""
        value = self.data
        for step in where:
            try:
                value = value[step]
            except (KeyError, IndexError, TypeError):
                return None
        return value

    def problem(self, where: Where, message: str) -> Problem:
        """A problem at a place; one that is not there has the line of what should contain it."""
        known = where
        while known not in self.lines:
            known = known[:-1]
        return Problem(self.lines[known], where, message)


def key_text(where: Where) -> str:
    """`("models", 1, "name")` as a person writes it: `models[1].name`."""
    text = ""
    for step in where:
        if isinstance(step, int):
            text += f"[{step}]"
        else:
            text += ("." if text else "") + (step if re.fullmatch(r"[\w-]{1,60}", step) else describe(step))
    return text


def describe(value: object) -> str:
    """What was found, for an error message: `'0x10'`, `a list`, `a mapping` or `nothing`."""
    if isinstance(value, str):
        return repr(str(value) if len(value) <= 60 else value[:60] + "…")
    if isinstance(value, list):
        return "a list"
    return "a mapping" if isinstance(value, dict) else "nothing"


def read_tree(text: str) -> Tree:
    """Parse one YAML document whose top is a mapping.

    Raises Unreadable where the text is not that. What is wrong in one place only (a duplicate key, a key
    without value, an anchor, alias, merge key or tag) is in the tree's `problems`.
    """
    try:
        return _Reader(text).document()
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise Unreadable(line, f"has the control character U+{error.character:04X}; remove it") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise Unreadable(mark.line + 1 if mark else 1, _syntax_message(error)) from None


def _syntax_message(error: yaml.MarkedYAMLError) -> str:
    problem, context = error.problem or "", error.context or ""
    if r"'\t'" in problem:
        return "has a tab where YAML allows only spaces; replace it by spaces"
    if context == "while scanning an alias":
        return 'a value that starts with * must be in quotes, such as "*.bias"'
    start = f" that starts in line {error.context_mark.line + 1}" if error.context_mark else ""
    return f"not valid YAML: {problem}" + (f" ({context}{start})" if context else "")


class _Reader:
    """Builds the tree from the parser's events, one method for each kind of value."""

    def __init__(self, text: str) -> None:
        self.events: Iterator[Any] = yaml.parse(text, Loader=yaml.SafeLoader)
        self.tree = Tree()

    def document(self) -> Tree:
        next(self.events)  # the start of the stream
        top = next(self.events) if isinstance(next(self.events), yaml.DocumentStartEvent) else None
        if top is None or (isinstance(top, yaml.ScalarEvent) and top.value == ""):
            raise Unreadable(1, "the recipe is empty")
        self.tree.lines[()] = _line(top)
        self.tree.data = self.value(top, ())
        if not isinstance(self.tree.data, dict):
            found = describe(self.tree.data)
            raise Unreadable(_line(top), f"expected keys and values such as 'merge_method: cpi', got {found}")
        next(self.events)  # the end of the document
        if not isinstance(end := next(self.events), yaml.StreamEndEvent):
            raise Unreadable(_line(end), "a second YAML document starts here; a recipe is one document")
        return self.tree

    def value(self, event: Any, where: Where) -> Any:
        if isinstance(event, yaml.AliasEvent):
            name = describe(f"*{event.anchor}")
            self.refuse(where, f"{name} is a YAML alias; put it in quotes, or write the value out", event)
            return None
        self.refuse_marks(event, where)
        if isinstance(event, yaml.ScalarEvent):
            return self.scalar(event, where)
        if len(where) >= MAX_DEPTH:
            raise Unreadable(_line(event), TOO_DEEP)
        return self.mapping(where) if isinstance(event, yaml.MappingStartEvent) else self.sequence(where)

    def refuse(self, where: Where, message: str, event: Any) -> None:
        self.tree.problems.append(Problem(_line(event), where, message))

    def refuse_marks(self, event: Any, where: Where) -> None:
        for kind, mark in (("anchors", event.anchor and f"&{event.anchor}"), ("tags", event.tag)):
            if mark is not None:
                self.refuse(where, f"YAML {kind} such as {describe(mark)} are not supported; remove it", event)

    def scalar(self, event: yaml.ScalarEvent, where: Where) -> Scalar | None:
        if event.value == "" and event.style is None:
            self.refuse(where, "has no value; give it one or remove it", event)
            return None
        return Scalar(event.value, quoted=event.style is not None)

    def sequence(self, where: Where) -> list[Any]:
        values: list[Any] = []
        while not isinstance(event := next(self.events), yaml.SequenceEndEvent):
            place = (*where, len(values))
            self.tree.lines[place] = _line(event)
            values.append(self.value(event, place))
        return values

    def mapping(self, where: Where) -> dict[str, Any]:
        values: dict[str, Any] = {}
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            key = self.key(event, where, values)
            if key is None:
                self.skip(next(self.events))
            else:
                self.tree.lines[(*where, key)] = _line(event)
                values[key] = self.value(next(self.events), (*where, key))
        return values

    def key(self, event: Any, where: Where, earlier: dict[str, Any]) -> str | None:
        """The key's text, or None where it is refused and its value is to be skipped."""
        place = where
        if not isinstance(event, yaml.ScalarEvent) or event.value == "":
            problem = "a key must be a word"
        elif event.anchor is not None or event.tag is not None:
            problem = "YAML anchors and tags are not supported; remove it"
        elif event.value == "<<" and event.style is None:
            problem = "YAML merge keys (<<) are not supported; write the keys out"
        elif event.value in earlier:
            place = (*where, event.value)
            problem = f"given twice, first in line {self.tree.lines[place]}; remove one"
        else:
            return str(event.value)
        self.refuse(place, problem, event)
        self.skip(event)
        return None

    def skip(self, event: Any) -> None:
        """Read past a value that is not kept."""
        depth = 0
        while True:
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH:
                raise Unreadable(_line(event), TOO_DEEP)
            if depth == 0:
                return
            event = next(self.events)


def _line(event: Any) -> int:
    """The line of an event, counted from 1."""
    return int(event.start_mark.line) + 1


# What a schema's fields are made of.
def nearest(word: str, valid: Iterable[str], what: str) -> str:
    """The end of a message about an unknown word: `did you mean 'density'?`, or else all that is valid."""
    by_lower = {name.lower(): name for name in valid}
    close = difflib.get_close_matches(word.lower(), by_lower, n=1)
    return f"did you mean {by_lower[close[0]]!r}?" if close else f"{what}: {', '.join(by_lower.values())}"


def as_text(value: object) -> str:
    """A name, path or filter: text as written. Raises ValueError if it is empty or has control characters."""
    if not isinstance(value, str):
        raise ValueError(f"expected text, got {describe(value)}")
    if not value:
        raise ValueError("must not be empty")
    if any(unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp") for char in value):
        raise ValueError(f"must not have control characters or line breaks, got {describe(value)}")
    return str(value)


def as_number(value: object) -> Fraction:
    """The exact value of a decimal number as written: 0.29 is 29/100, 1e-3 is 1/1000.

    Raises ValueError for anything else, also for what YAML or Python would
    take: 0x10, 1_000, 1:30, 010, .inf.
    """
    if getattr(value, "quoted", False):
        raise ValueError(f"expected a number, got the quoted text {describe(value)}; remove the quotes")
    if isinstance(value, str) and len(value) > MAX_NUMBER:
        raise ValueError(f"expected a number of at most {MAX_NUMBER} characters, got {describe(value)}")
    if not isinstance(value, str) or not _NUMBER.fullmatch(value):
        raise ValueError(f"expected a decimal number such as 0.01 or 1e-3, got {describe(value)}")
    return Fraction(value)


def as_whole(value: object) -> int:
    """A whole number from 0 to MAX_WHOLE. Raises ValueError for anything else."""
    number = as_number(value)
    if number.denominator != 1 or not 0 <= number <= MAX_WHOLE:
        raise ValueError(f"must be a whole number from 0 to {MAX_WHOLE}, got {value}")
    return int(number)


def number(low: int, high: int | None = None, hint: str = "") -> PlainValidator:
    """A field's number from low to high, both allowed."""

    def validate(value: object) -> Fraction:
        number = as_number(value)
        if number < low or (high is not None and number > high):
            limits = f"{low} or more" if high is None else f"from {low} to {high}{hint}"
            raise ValueError(f"must be {limits}, got {value}")
        return number

    return PlainValidator(validate)


def choice(allowed: Any, hints: Mapping[str, str] | None = None) -> BeforeValidator:
    """A field that is one of a Literal's words; `hints` answers wrong ones that people are known to try."""

    def validate(value: object) -> str:
        text = as_text(value)
        if text in get_args(allowed):
            return text
        hint = (hints or {}).get(text) or nearest(text, get_args(allowed), "valid values")
        raise ValueError(f"unknown value {describe(text)}; {hint}")

    return BeforeValidator(validate)


_KINDS = ("<scalar>", "<list>", "<mapping>", "<mappings>")


def _kind(value: object) -> str:
    if isinstance(value, list):
        return "<mappings>" if any(isinstance(entry, dict) for entry in value) else "<list>"
    return "<mapping>" if isinstance(value, dict) else "<scalar>"


def written(expected: str) -> Discriminator:
    """Tells a field's alternatives, tagged <scalar>, <list>, <mapping>, <mappings>, by how it is written."""
    return Discriminator(_kind, "written", f"expected {expected}")


N = TypeVar("N")
M = TypeVar("M", bound=BaseModel)
Text = Annotated[str, PlainValidator(as_text)]
Whole = Annotated[int, PlainValidator(as_whole)]
Some = Annotated[list[N], Field(min_length=1)]


def check(tree: Tree, schema: type[M], hint: Callable[[Where, bool], str]) -> tuple[M | None, list[Problem]]:
    """The tree as a `schema`, or None and what is wrong with it.

    `hint(where, missing)` words what to do about a key that is missing, or else not in the schema.
    """
    try:
        return schema.model_validate(tree.data), []
    except ValidationError as error:
        details = error.errors(include_url=False)
    problems = []
    for detail in details:
        if detail["input"] is None:
            continue  # the tree has a problem there already
        where = _place(tree, detail["loc"])
        is_key = detail["type"] in ("missing", "extra_forbidden")
        words = hint(where, detail["type"] == "missing") if is_key else _plain_words(detail)
        problems.append(tree.problem(where, words))
    return None, problems


def _place(tree: Tree, loc: Iterable[str | int]) -> Where:
    """Pydantic's place without the tags of alternatives, unless somebody has such a key."""
    where: Where = ()
    for step in loc:
        if step not in _KINDS or (*where, step) in tree.lines:
            where = (*where, step)
    return where


def _plain_words(detail: Mapping[str, Any]) -> str:
    match detail["type"]:
        case "too_short":
            return "is an empty list; give it an entry or remove it"
        case "value_error":
            return str(detail["ctx"]["error"])
        case "list_type":
            expected = "expected a list ([a, b], or lines that begin with '- ')"
        case "model_type":
            expected = "expected keys with values, such as 'key: value'"
        case _:
            expected = str(detail["msg"])
    return f"{expected}, got {describe(detail['input'])}"
