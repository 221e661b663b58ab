"""How the vocabulary of another model relates to the base's: which of its rows belongs to which token of the base.

A token is its text; an id that belongs to no token is padding, and the same row in every model. A token whose id is
beyond a model's rows is not in that model. Which tensors have a row a token follows from config.json's vocab_size
and from shapes, not from an architecture; where the config does not say, from what embeddings are called.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from .checkpoint import Checkpoint, Tensor, layer_of
from .errors import IncompatibleError
from .tokenizer_files import MAX_ID, Flags, TokenizerFiles, Tokens, find_tokenizer, read_tokens
from .vocabulary_text import Difference, unexplained

__all__ = ["NOWHERE", "Base", "Relation", "is_resized", "relate", "split_rows", "vocab_sizes"]

NOWHERE = -1  # of a row: the model has none
EMBEDDINGS = ("embed", "wte", "lm_head")  # in the names of tensors that are taken for tokens' wherever they are
MAX_DEPTH = 8  # of nested configs


class Base:
    """The base, and what is to be known of its vocabulary, found out when it is needed."""

    def __init__(self, checkpoint: Checkpoint, others: Sequence[Checkpoint]) -> None:
        self.checkpoint = checkpoint
        self._others = others

    @cached_property
    def files(self) -> TokenizerFiles | None:
        """The tokenizer that the output takes. Raises as `find_tokenizer` does."""
        return find_tokenizer([self.checkpoint.path])

    @cached_property
    def tokens(self) -> Tokens:
        """Of `files`, which there must be. Raises as `read_tokens` does."""
        assert self.files is not None
        return read_tokens(self.files)

    @cached_property
    def rows(self) -> int | None:
        """Rows of the vocabulary's tensors; None where it cannot be told."""
        every = {name: _row_count(info) for name, info in self._floats.items() if len(info.shape) > 1}
        held = {name: count for name, count in every.items() if count <= MAX_ID}
        sizes = [size for size in vocab_sizes(self.checkpoint.config, 0) if size in held.values()]
        if sizes or self.files is None:
            return sizes[0] if sizes else None  # the outermost speaks of the model as a whole
        named = {count for name, count in held.items() if _is_named(name) and count > max(self.tokens.names, default=0)}
        return named.pop() if len(named) == 1 else None

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the tensors that have a row a token, in order."""
        return self._told_apart[0]

    @property
    def unclear(self) -> tuple[str, ...]:
        """Names of tensors outside the layers that may be such: the layers have some of as many rows that are not."""
        return self._told_apart[1]

    @cached_property
    def _told_apart(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        alike = [name for name, info in self._floats.items() if _row_count(info) == self.rows]
        sure = tuple(name for name in alike if _is_named(name) or self._is_resized(name))
        if all(name in sure or not layer_of(name) for name in alike):
            return tuple(alike), ()
        return sure, tuple(name for name in alike if name not in sure and not layer_of(name))

    @cached_property
    def _floats(self) -> Mapping[str, Tensor]:
        return {name: info for name, info in self.checkpoint.tensors.items() if info.is_float}

    def _is_resized(self, name: str) -> bool:
        return any(is_resized(self.checkpoint, other, name) for other in self._others)


def _places(checkpoint: Checkpoint) -> tuple[Path, ...]:
    """Where its tokenizer may be: an adapter that added tokens brings one."""
    return tuple(filter(None, (checkpoint.adapter, checkpoint.path)))


def vocab_sizes(config: Any, depth: int) -> Iterator[int]:
    """Every `vocab_size` of a config, a config's own before those within it."""
    if isinstance(config, dict) and depth < MAX_DEPTH:
        if type(config.get("vocab_size")) is int:
            yield config["vocab_size"]
        for value in config.values():
            yield from vocab_sizes(value, depth + 1)


def _is_named(name: str) -> bool:
    return any(word in name for word in EMBEDDINGS) and "position" not in name


def split_rows(shape: tuple[int, ...]) -> tuple[tuple[int, ...], int, tuple[int, ...]]:
    """The dimensions before that of the rows, its size, and those after: it is the first that is not 1."""
    place = next((place for place, size in enumerate(shape) if size != 1), len(shape))
    return shape[:place], (*shape, 1)[place], shape[place + 1 :]


def _row_count(info: Tensor) -> int:
    return split_rows(info.shape)[1]


def is_resized(base: Checkpoint, other: Checkpoint, name: str) -> bool:
    """Whether a tensor differs in the number of rows, and only there."""
    ours, theirs = base.tensors[name].shape, other.tensors[name].shape if name in other.tensors else None
    if theirs is None or theirs == ours:
        return False
    before, _, after = split_rows(ours)
    return (before, after) == split_rows(theirs)[::2]


@dataclass(frozen=True)
class Relation:
    """Another model's rows as seen from the base.

    `places`: for each row of the base, the row of the same token, or NOWHERE. `extra`: token -> row, in the order of
    the rows, of tokens that have no row in the base; `flags`: those of them that are added tokens. `core` and
    `tokens_xxh3` identify its tokenizer, without its added tokens and as a whole.
    """

    places: Sequence[int]
    extra: Mapping[str, int]
    flags: Mapping[str, Flags]
    core: str
    tokens_xxh3: str
    difference: Difference


def relate(base: Base, other: Checkpoint) -> Relation | None:
    """None where nothing differs, or nothing can be told and rows are as many.

    Raises IncompatibleError where rows differ in number and their tokens cannot be told, CheckpointError or OSError
    as `read_tokens` does.
    """
    ours, theirs = base.files, find_tokenizer(_places(other))
    changed = any(is_resized(base.checkpoint, other, name) for name in base.checkpoint.tensors)
    if not changed and (ours is None or theirs is None or ours.same(theirs)):
        return None
    rows = {name: _row_count(other.tensors[name]) for name in base.tensors if name in other.tensors}
    resized = any(count != base.rows for count in rows.values())
    if resized and (ours is None or theirs is None or len(set(rows.values())) > 1):
        lacking = [it.where for files, it in ((ours, base.checkpoint), (theirs, other)) if files is None]
        raise IncompatibleError(unexplained(other.where, base.rows or 0, rows, lacking))
    if ours is None or theirs is None or (not resized and ours.same(theirs)):
        return None
    relation = _compare(base, other, read_tokens(theirs), next(iter(rows.values()), None))
    return relation if relation.difference.is_any else None


def _compare(base: Base, other: Checkpoint, theirs: Tokens, rows: int | None) -> Relation:
    """`rows` of the other's vocabulary; None: unknown, so every token is taken to have one."""
    ours = base.tokens
    counts = (_known(base.rows, ours), _known(rows, theirs))
    places = array("i", (_place(row, ours, theirs, counts[1]) for row in range(counts[0])))
    extra = {
        token: number
        for number, token in sorted(theirs.names.items())
        if number < counts[1] and ours.ids.get(token, counts[0]) >= counts[0]
    }
    named = [(row, place) for row, place in enumerate(places) if row in ours.names]
    missing = {ours.names[row]: row for row, place in named if place == NOWHERE}
    moved = {ours.names[row]: (row, place) for row, place in named if place not in (row, NOWHERE)}
    return Relation(
        places=places,
        extra=extra,
        flags={token: theirs.added[token] for token in extra if token in theirs.added},
        core=theirs.core,
        tokens_xxh3=theirs.xxh3,
        difference=Difference(other.where, base.checkpoint.where, counts, extra, missing, moved),
    )


def _known(rows: int | None, tokens: Tokens) -> int:
    return max(tokens.names, default=-1) + 1 if rows is None else rows


def _place(row: int, ours: Tokens, theirs: Tokens, rows: int) -> int:
    """The other's row for what the base has in `row`."""
    token = ours.names.get(row)
    place = row if token is None else theirs.ids.get(token, NOWHERE)
    if place >= rows or (token is None and place in theirs.names):
        return NOWHERE
    return place
