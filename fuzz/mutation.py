"""Changes at random that keep an input's structure, so that more than the first line of a parser is reached."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import Any

from .bundles import join, split
from .target import Havoc, Mutate

__all__ = ["bundle", "header", "json_text", "lines", "simple_havoc"]

STRUCTURED = 0.8  # the share of changes that keep the structure


class _Raw(str):
    """A number, or more, that goes into the JSON as it is."""


class _Pairs(list[Any]):
    """A JSON object as [key, value] lists: keys may stand twice."""


DEEP = 600
NUMBERS = (
    *("0", "-0", "-1", "1", "2", "7", "1.5", "1e400", "-1e308", "1e-400", "NaN", "Infinity", "true", "false", "null"),
    *("255", "65536", "2147483647", "2147483648", "4294967296", "1099511627776"),
    *("9223372036854775807", "9223372036854775808", "18446744073709551615", "18446744073709551616", "9" * 50),
)
TEXTS = (
    *("", ".", "..", "/", "../x", "/etc/passwd", "a/b", "\0", "\n", "\x1b[31m", "\u202e", "\ud800", "é", "\U0001f600"),
    *("x" * 300, "9" * 5000, "-----", "`|<b>", "true", "base", "model.layers.0.w", "model.layers.10.w"),
)
BOMBS = ("[" * DEEP + "]" * DEEP, '{"":' * DEEP + "0" + "}" * DEEP)


def json_text(words: Sequence[str]) -> Mutate:
    """Changes a JSON text: values, keys, order, doubles; what is no JSON is changed as bytes."""

    def mutate(data: bytes, random: Random, havoc: Havoc) -> bytes:
        if random.random() > STRUCTURED:
            return havoc(data)
        try:
            top = [json.loads(data, object_pairs_hook=_pairs, parse_int=_Raw, parse_float=_Raw, parse_constant=_Raw)]
            for _ in range(random.choice((1, 1, 1, 2, 4))):
                _change(top, random, words)
            return _text(top[0]).encode("utf-8", "surrogatepass")
        except (ValueError, RecursionError):  # no JSON, or too deep
            return havoc(data)

    return mutate


def _pairs(pairs: list[tuple[str, Any]]) -> _Pairs:
    return _Pairs([key, value] for key, value in pairs)


def _text(value: Any) -> str:
    if isinstance(value, _Raw):
        return str(value)
    if isinstance(value, _Pairs):
        return "{" + ",".join(f"{json.dumps(key)}:{_text(entry)}" for key, entry in value) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_text, value)) + "]"
    return json.dumps(value)


def _places(top: list[Any]) -> Iterator[tuple[list[Any], int]]:
    """Where values stand: (list, place in it)."""
    waiting: list[tuple[list[Any], int]] = [(top, 0)]
    while waiting:
        holder, place = waiting.pop()
        yield holder, place
        value = holder[place]
        if isinstance(value, _Pairs):
            waiting.extend((pair, 1) for pair in value)
        elif isinstance(value, list):
            waiting.extend((value, index) for index in range(len(value)))


def _change(top: list[Any], random: Random, words: Sequence[str]) -> None:
    places = list(_places(top))
    holder, place = random.choice(places)
    value = holder[place]
    if isinstance(value, list) and random.random() < 0.6:
        random.choice(OF_LISTS)(value, random)
        if isinstance(value, _Pairs) and value and random.random() < 0.3:
            random.choice(value)[0] = _word(random, words)
        return
    what = random.random()
    if what < 0.3:
        other, there = random.choice(places)
        holder[place] = _copied(other[there])
    elif what < 0.6:
        holder[place] = _Raw(random.choice(NUMBERS))
    elif what < 0.65:
        holder[place] = _Raw(random.choice(BOMBS))
    elif what < 0.7:
        holder[place] = random.choice(([], _Pairs()))
    elif isinstance(value, _Raw) and value.lstrip("-").isdigit() and len(value) < 20:
        holder[place] = _Raw(int(value) + random.choice((-8, -1, 1, 8, int(value))))
    else:
        holder[place] = _word(random, words)


def _word(random: Random, words: Sequence[str]) -> str:
    return random.choice(words) if words and random.random() < 0.6 else random.choice(TEXTS)


def _copied(value: Any) -> Any:
    if isinstance(value, list):
        return type(value)(map(_copied, value))
    return value


def _drop(values: list[Any], random: Random) -> None:
    if values:
        values.pop(random.randrange(len(values)))


def _double(values: list[Any], random: Random) -> None:
    if values:
        values.insert(random.randrange(len(values) + 1), _copied(random.choice(values)))


def _swap(values: list[Any], random: Random) -> None:
    if values:
        a, b = random.randrange(len(values)), random.randrange(len(values))
        values[a], values[b] = values[b], values[a]


def _append(values: list[Any], random: Random) -> None:
    new = _Raw(random.choice(NUMBERS))
    values.append(["new", new] if isinstance(values, _Pairs) else new)


OF_LISTS: Sequence[Callable[[list[Any], Random], None]] = (_drop, _double, _swap, _append)


def header(words: Sequence[str]) -> Mutate:
    """Changes a safetensors file: mostly its JSON, whose length then is right again."""
    change = json_text(words)

    def mutate(data: bytes, random: Random, havoc: Havoc) -> bytes:
        length = int.from_bytes(data[:8], "little")
        if random.random() < 0.15 or not 0 < length <= len(data) - 8:
            return havoc(data)
        raw, rest = data[8 : 8 + length], data[8 + length :]
        what = random.random()
        if what < 0.15:
            rest = random.choice((rest[:-1], rest + b"\0", rest + rest, havoc(rest)))
        elif what < 0.5:
            raw = _sound_header(raw, random, words)
        else:
            raw = change(raw, random, havoc)
        return len(raw).to_bytes(8, "little") + raw + rest

    return mutate


def _sound_header(raw: bytes, random: Random, words: Sequence[str]) -> bytes:
    """A header that is right if this one was: tensors renamed, reordered, seen as others, or joined by an empty one."""
    try:
        entries = [*json.loads(raw).items()]
        place = random.randrange(len(entries))
        name, entry = entries[place]
        begin, end = entry["data_offsets"]
        match random.randrange(5):
            case 0:
                entries[place] = (_word(random, words), entry)
            case 1:
                random.shuffle(entries)
            case 2:
                where = random.choice((begin, end))
                entries.append((_word(random, words), {**entry, "shape": [3, 0], "data_offsets": [where, where]}))
            case 3:
                dtype, nbytes = random.choice((("F32", 4), ("BF16", 2), ("U8", 1), ("I64", 8), ("F8_E4M3", 1)))
                entries[place] = (name, {**entry, "dtype": dtype, "shape": [1, (end - begin) // nbytes, 1]})
            case _:
                entries.append(("__metadata__", {_word(random, words): _word(random, words)}))
        text = json.dumps(dict(entries), ensure_ascii=random.random() < 0.5, indent=random.choice((None, 1)))
        return text.encode("utf-8", "surrogatepass")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):  # it was not right
        return raw + b" "


def lines(words: Sequence[str]) -> Mutate:
    """Changes a text: lines doubled, dropped, moved, indented; words put in."""

    def mutate(data: bytes, random: Random, havoc: Havoc) -> bytes:
        if random.random() > STRUCTURED:
            return havoc(data)
        rows = data.split(b"\n")
        place = random.randrange(len(rows))
        match random.randrange(6):
            case 0:
                rows.insert(random.randrange(len(rows) + 1), rows[place])
            case 1:
                rows.pop(place)
            case 2:
                rows.insert(random.randrange(len(rows)), rows.pop(place))
            case 3:
                row = rows[place]
                rows[place] = b"  " + row if random.random() < 0.5 else row.removeprefix(b"  ")
            case _:
                rows[place] = _with_word(rows[place], random, words)
        return b"\n".join(rows)

    return mutate


def _with_word(row: bytes, random: Random, words: Sequence[str]) -> bytes:
    """A word in the place of another, or beside it."""
    parts = row.split(b" ")
    place = random.randrange(len(parts))
    word = _word(random, words).encode("utf-8", "surrogatepass")
    parts[place : place + random.randrange(2)] = [word]
    return b" ".join(parts)


def bundle(first: str, kinds: dict[str, Mutate]) -> Mutate:
    """Changes one file of several, in its own way; drops one, doubles one under another name now and then."""

    def mutate(data: bytes, random: Random, havoc: Havoc) -> bytes:
        files = split(data, first)
        name = random.choice([*files, *kinds]) if random.random() < 0.1 else random.choice([*(files or kinds)])
        what = random.random()
        if what < 0.03:
            files.pop(name, None)
        elif what < 0.08:
            files[random.choice([*kinds])] = files.get(name, b"{}")
        else:
            change = kinds.get(name)
            content = files.get(name, b"{}")
            files[name] = havoc(content) if change is None else change(content, random, havoc)
        return join(files)

    return mutate


def simple_havoc(random: Random) -> Havoc:
    """A few bytes changed, dropped, doubled or put in: where there is no engine that does it better."""

    def havoc(data: bytes) -> bytes:
        raw = bytearray(data)
        for _ in range(random.randrange(1, 4)):
            place = random.randrange(len(raw) + 1)
            match random.randrange(4):
                case 0:
                    raw[place : place + 1] = bytes([random.randrange(256)])
                case 1:
                    del raw[place : place + random.randrange(1, 9)]
                case 2:
                    raw[place:place] = raw[place : place + random.randrange(1, 17)]
                case _:
                    raw[place:place] = random.randbytes(random.randrange(1, 9))
        return bytes(raw)

    return havoc
