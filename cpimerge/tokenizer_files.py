"""Which token belongs to which row of a checkpoint's embeddings, as the files of its tokenizer say.

The files are parsed as data; nothing of theirs is run and no tokenizer is built. What is read, the first that is there:

    tokenizer.json     all of it: the vocabulary (BPE, WordPiece, WordLevel, Unigram) and the added tokens
    vocab.json         with merges.txt: BPE
    vocab.txt          a token a line: WordPiece

each with what added_tokens.json and `added_tokens_decoder` of tokenizer_config.json add to it. The ids in a
tokenizer.model depend on the tokenizer's class, so it tells nothing here.
"""

from __future__ import annotations

import errno
import filecmp
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter
from pathlib import Path
from typing import Any

import xxhash

from .errors import CheckpointError
from .ordinary import check_inside, read_ordinary
from .plain_json import is_deep, not_json

__all__ = [
    "MAX_ID",
    "Flags",
    "TokenizerFiles",
    "Tokens",
    "added_entries",
    "find_tokenizer",
    "read_json",
    "read_tokens",
    "shown",
]

TOKENIZER = "tokenizer.json"
VOCAB_JSON = "vocab.json"
MERGES = "merges.txt"
VOCAB_TXT = "vocab.txt"
TOKENIZER_CONFIG = "tokenizer_config.json"
ADDED_TOKENS = "added_tokens.json"
MAX_BYTES = 64_000_000  # twice the largest tokenizer.json that is about
MAX_ID = 1 << 22  # of tokens and of rows: what is larger is no vocabulary, and listing it would take forever
MAX_SCORE = 1e300
DIGESTED = 1 << 14  # tokens that are written as JSON at a time
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")  # of an added token, as tokenizers names them
MEND = "Save the tokenizer again with transformers"

Flags = Mapping[str, bool]


@dataclass(frozen=True)
class TokenizerFiles:
    """The files of a tokenizer: `core` holds its vocabulary; `extras`, what small files add: token -> id and flags."""

    core: tuple[Path, ...]
    extras: Mapping[str, tuple[int, Flags]]

    def same(self, other: TokenizerFiles) -> bool:
        """Whether both say the same, byte for byte. Raises OSError where a file cannot be read."""
        if [file.name for file in self.core] != [file.name for file in other.core] or self.extras != other.extras:
            return False
        return all(filecmp.cmp(ours, theirs, shallow=False) for ours, theirs in zip(self.core, other.core, strict=True))


@dataclass(frozen=True)
class Tokens:
    """The tokens of a tokenizer.

    `names`: id -> token; an id without one belongs to no token. `added`: the added tokens with their flags. `core`
    identifies the vocabulary and merges without them, and `free` is the id that tokenizers gives to the next added
    token of this very `file`.
    """

    file: Path
    names: Mapping[int, str]
    added: Mapping[str, Flags]
    core: str
    free: int

    @cached_property
    def ids(self) -> Mapping[str, int]:
        """token -> id."""
        return {token: number for number, token in self.names.items()}

    @cached_property
    def xxh3(self) -> str:
        """Identifies which id belongs to which token: xxh3-128."""
        return _digest(sorted(self.names.items()))


def find_tokenizer(places: Iterable[Path]) -> TokenizerFiles | None:
    """The tokenizer in the first of `places` that has one whose tokens can be told; None where none has.

    Raises CheckpointError where its small files are damaged, OSError where they cannot be read.
    """
    for place in places:
        for core in ([TOKENIZER], [VOCAB_JSON, MERGES], [VOCAB_TXT]):
            files = tuple(place / name for name in core)
            if all(file.is_file() for file in files):
                for file in files:
                    check_inside(file)
                return TokenizerFiles(files, _extras(place))
    return None


def _extras(place: Path) -> dict[str, tuple[int, Flags]]:
    """What added_tokens.json and tokenizer_config.json say of added tokens."""
    extras: dict[str, tuple[int, Flags]] = {}
    added = place / ADDED_TOKENS
    for token, number in (_read_inside(added) if added.is_file() else {}).items():
        extras[token] = _id(added, token, number), _flags(added, token, {})
    config = place / TOKENIZER_CONFIG
    decoder = _read_inside(config).get("added_tokens_decoder") if config.is_file() else None
    for number, entry in (decoder if isinstance(decoder, dict) else {}).items():
        token, flags = _added(config, entry)
        extras[token] = (
            _id(config, token, int(number) if len(number) < 11 and number.isascii() and number.isdecimal() else number),
            flags,
        )
    return extras


def _read_inside(file: Path) -> dict[str, Any]:
    check_inside(file)
    return read_json(file)


def read_tokens(files: TokenizerFiles) -> Tokens:
    """Parse the files. Raises CheckpointError where they are damaged or contradict themselves, or OSError."""
    file = files.core[0]
    added: dict[str, tuple[int, Flags]] = {}
    if file.name == TOKENIZER:
        raw = read_json(file)
        vocab, core = _model(file, raw.get("model"))
        added = {token: (number, flags) for number, token, flags in added_entries(file, raw.get("added_tokens"))}
    elif file.name == VOCAB_JSON:
        vocab = _checked(file, read_json(file))
        merges = [line for line in _lines(files.core[1]) if line and not line.startswith("#version")]
        core = _core("BPE", vocab, merges)
    else:
        vocab = {token: number for number, token in enumerate(_lines(file))}
        core = _core("WordPiece", vocab, [])
    free = max([len(vocab), *(number + 1 for number, _ in added.values())])
    known = vocab.keys() | added.keys()
    every = added | {token: entry for token, entry in files.extras.items() if token not in known}
    names = _names(file, vocab, every)
    return Tokens(file, names, {token: flags for token, (_, flags) in every.items()}, core, free)


def _model(file: Path, model: Any) -> tuple[dict[str, int], str]:
    """token -> id of tokenizer.json's own vocabulary, and what identifies it with its merges or scores."""
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocab, dict):
        merges = model.get("merges")
        return _checked(file, vocab), _core(model.get("type"), vocab, merges if isinstance(merges, list) else [])
    if isinstance(vocab, list) and all(_is_scored(entry) for entry in vocab):
        ids = {token: number for number, (token, _) in enumerate(vocab)}
        return ids, _core(model.get("type"), ids, [float(score) for _, score in vocab])
    raise CheckpointError(f"{file}: has no vocabulary where tokenizers puts it (model.vocab). {MEND}")


def _is_scored(entry: Any) -> bool:
    """A token of a Unigram vocabulary."""
    if not (isinstance(entry, list) and len(entry) == 2):
        return False
    token, score = entry
    return isinstance(token, str) and isinstance(score, int | float) and abs(score) < MAX_SCORE


def _checked(file: Path, vocab: dict[str, Any]) -> dict[str, int]:
    """token -> id, as it stands there. Raises CheckpointError where an id is none."""
    for token, number in vocab.items():
        if type(number) is not int or not 0 <= number < MAX_ID:
            _id(file, token, number)
    return vocab


def added_entries(file: Path, entries: Any) -> Iterator[tuple[int, str, Flags]]:
    """(id, token, flags) of each of tokenizer.json's `added_tokens`. Raises CheckpointError where one is no such."""
    if not isinstance(entries, list | None):
        raise CheckpointError(f"{file}: 'added_tokens' is not a list. {MEND}")
    for entry in entries or ():
        token, flags = _added(file, entry)
        yield _id(file, token, entry.get("id")), token, flags


def _added(file: Path, entry: Any) -> tuple[str, Flags]:
    token = entry.get("content") if isinstance(entry, dict) else None
    if not isinstance(token, str):
        raise CheckpointError(f"{file}: an added token has no 'content'. {MEND}")
    return token, _flags(file, token, entry)


def _flags(file: Path, token: str, entry: Mapping[str, Any]) -> Flags:
    """All flags, in order; as in tokenizers, what is not special is normalised unless it says otherwise."""
    special = entry.get("special", False)
    flags = {flag: entry.get(flag, not special if flag == "normalized" else False) for flag in FLAGS}
    if not all(isinstance(value, bool) for value in flags.values()):
        raise CheckpointError(f"{file}: added token {shown(token)}: a flag is not true or false. {MEND}")
    return flags


def _id(file: Path, token: str, number: Any) -> int:
    if type(number) is not int or not 0 <= number < MAX_ID:
        raise CheckpointError(f"{file}: token {shown(token)}: its id is {shown(number)}, not a row's number. {MEND}")
    return number


def _names(file: Path, vocab: Mapping[str, int], added: Mapping[str, tuple[int, Flags]]) -> dict[int, str]:
    """id -> token. Raises CheckpointError where two tokens have one id, or a token two."""
    names = {number: token for token, number in vocab.items()}
    ids = [(token, number) for token, (number, _) in added.items()]
    if len(names) < len(vocab):
        names, ids = {}, [*vocab.items(), *ids]  # to find out which
    for token, number in ids:
        if names.setdefault(number, token) != token:
            raise CheckpointError(f"{file}: id {number} is both {shown(names[number])} and {shown(token)}. {MEND}")
        if vocab.get(token, number) != number:
            raise CheckpointError(f"{file}: token {shown(token)} has the ids {vocab[token]} and {number}. {MEND}")
    return names


def _core(kind: Any, vocab: Mapping[str, int], rest: list[Any]) -> str:
    """Identifies a vocabulary with its merges or scores: xxh3-128. Of a merge, files have `a b` or a list of both."""
    merges = rest if all(isinstance(merge, list) for merge in rest) else [_merge(merge) for merge in rest]
    return _digest([kind], sorted(vocab.items(), key=itemgetter(1, 0)), merges)


def _merge(entry: Any) -> Any:
    return entry.split(" ", 1) if isinstance(entry, str) else entry


def _digest(*lists: list[Any]) -> str:
    digest = xxhash.xxh3_128()
    for values in lists:
        for begin in range(0, len(values), DIGESTED) or [0]:
            digest.update(json.dumps(values[begin : begin + DIGESTED]).encode())
    return digest.hexdigest()


def shown(value: Any) -> str:
    """A token as messages show it: quoted, escaped, cut short."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:59]}…"


def _lines(file: Path) -> list[str]:
    """As Python reads a text file: other separators than line ends may be part of a token."""
    lines = _text(file).replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return lines if lines[-1] else lines[:-1]


def _text(file: Path) -> str:
    try:
        return _bytes(file).decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{file}: is not UTF-8 text. {MEND}") from error


def _bytes(file: Path) -> bytes:
    try:
        return read_ordinary(file, MAX_BYTES)
    except OSError as error:
        if error.errno != errno.EFBIG:
            raise
        raise CheckpointError(f"{file}: {error.strerror}. {MEND}") from error


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError where the file holds none, OSError where it cannot be read."""
    try:
        value = json.loads(_text(file))
    except RecursionError as error:
        raise CheckpointError(f"{file}: its JSON is nested too deeply. {MEND}") from error
    except ValueError as error:
        raise CheckpointError(f"{file}: {not_json(error)}. {MEND}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: expected a JSON object, got {type(value).__name__}. {MEND}")
    if is_deep(value):
        raise CheckpointError(f"{file}: its JSON is nested too deeply. {MEND}")
    return value
