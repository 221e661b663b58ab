"""One vocabulary for all models of a merge: every model's embeddings and heads in the same rows, token by token.

vocabulary: base     the base's tokens. A model that lacks one has the base's row for it
vocabulary: union    the base's tokens in their ids, then those that the others add, in their order. A model that
                     lacks one has the base's row; the base's own is the mean of the models that have it
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from .checkpoint import Checkpoint, Tensor, collect, is_unicode
from .errors import IncompatibleError
from .plan_file import JoinedToken, Mode, Vocabulary
from .token_relations import NOWHERE, Base, Relation, is_resized, relate, vocab_sizes
from .tokenizer_files import TOKENIZER, Flags
from .vocabulary_text import told

if TYPE_CHECKING:
    from .token_rows import Runs

__all__ = ["Settled", "settle"]

WRITE_BASE = "write vocabulary: base"


@dataclass
class Settled:
    """What `settle` found. `checkpoints` are in the rows of one vocabulary where there are no problems.

    `vocabulary` is None where nothing had to be done. `damaged` are problems of a checkpoint's own, `problems` those of
    several together; `explained`: by name of a checkpoint, tensors whose shapes `problems` speak of already.
    """

    checkpoints: dict[str, Checkpoint]
    vocabulary: Vocabulary | None = None
    damaged: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    explained: dict[str, frozenset[str]] = field(default_factory=dict)


def settle(checkpoints: Mapping[str, Checkpoint], mode: Mode | None) -> Settled:
    """Compare every vocabulary with that of "base", and bring them together as `mode` says.

    Reads the files of tokenizers, and no tensor. Without a mode, vocabularies that differ are problems.
    """
    settled = Settled(dict(checkpoints))
    others = {name: other for name, other in checkpoints.items() if name != "base"}
    base = Base(checkpoints["base"], tuple(others.values()))
    related = ((name, _relation(base, name, mode, settled)) for name in others)
    relations = {name: relation for name, relation in related if relation is not None}
    if mode is None:
        for relation in relations.values():
            settled.problems.extend(relation.difference.problem())
            settled.notes.extend(relation.difference.note())
    elif relations and not settled.problems and not settled.damaged:
        _align(base, relations, mode, settled)
    for lines in (settled.damaged, settled.problems, settled.notes):
        lines[:] = dict.fromkeys(lines)  # two tasks may be one model, and all have one base
    return settled


def _relation(base: Base, name: str, mode: Mode | None, settled: Settled) -> Relation | None:
    """How a checkpoint relates to the base, None where it does not differ; what stands in the way is in `settled`."""
    other, relation = settled.checkpoints[name], None
    unreadable: list[str] = []
    with collect(other.where, unreadable):
        try:
            relation = relate(base, other)
        except IncompatibleError as error:
            settled.problems.extend(error.problems)
    resized = frozenset(tensor for tensor in base.checkpoint.tensors if is_resized(base.checkpoint, other, tensor))
    if unreadable and mode is None and not resized:  # a merge row by row does not need them
        settled.notes.extend(f"tokens are not compared: {problem}" for problem in unreadable)
        return relation
    settled.damaged.extend(unreadable)
    with collect(base.checkpoint.where, settled.damaged):  # without the base's tokens, its tensors may be unknown
        if resized:
            settled.explained[name] = resized & {*base.tensors}
    return relation


def _align(base: Base, relations: Mapping[str, Relation], mode: Mode, settled: Settled) -> None:
    """Replace the tensors of `settled.checkpoints`; where there are problems, nothing."""
    union = _Union(base, relations)
    settled.problems.extend(_unclear(base))
    if mode == "union":
        settled.problems.extend(union.join())
    if settled.problems:
        return
    for relation in relations.values():
        settled.notes.extend(relation.difference.outcome(union.new))
    tensors = {name: dict(checkpoint.tensors) for name, checkpoint in settled.checkpoints.items()}
    from .token_rows import Runs  # with numpy, which most merges need only later

    runs = {name: Runs(union.rows_of(name)) for name in tensors}
    for name in base.tensors:
        _move(name, tensors, union, runs)
    settled.checkpoints = {
        name: replace(checkpoint, tensors=tensors[name]) for name, checkpoint in settled.checkpoints.items()
    }
    settled.explained.clear()
    settled.vocabulary = Vocabulary(
        mode=mode,
        base_rows=union.base_rows,
        rows=union.rows,
        joined=union.joined,
        tensors=list(base.tensors),
        tokens_xxh3={"base": base.tokens.xxh3} | {name: it.tokens_xxh3 for name, it in relations.items()},
    )


def _unclear(base: Base) -> Iterator[str]:
    where = base.checkpoint.where
    if base.rows is None:
        yield (
            f"{where}: which tensors have a row a token cannot be told: no vocab_size in config.json is the number of "
            "rows of one. Put it there"
        )
    elif base.unclear:
        yield (
            f"{where}: tensor {base.unclear[0]!r}: has {base.rows} rows, as many as the vocabulary, and so have "
            "tensors in the layers: whether its rows are tokens cannot be told. Give all models one vocabulary before"
        )


class _Union:
    """The tokens that get rows beside the base's: none, until they are joined."""

    def __init__(self, base: Base, relations: Mapping[str, Relation]) -> None:
        self.base = base
        self.relations = relations
        self.base_rows = base.rows or 0
        self.new: dict[str, int] = {}  # token -> row
        self.joined: list[JoinedToken] = []  # those among them that are new to the base's tokenizer, too

    @property
    def rows(self) -> int:
        """Of the output."""
        return max([self.base_rows, *(row + 1 for row in self.new.values())])

    def join(self) -> Iterator[str]:
        """Give a row to every token that the base has none for, in the order of the models. Yields problems."""
        ours = self.base.tokens
        free = ours.free
        flags: dict[str, Flags] = {}  # of the first model that has the token
        for relation in self.relations.values():
            yield from self._unfit(relation)
            flags = {**relation.flags, **flags}
            for token in relation.extra:
                if token not in self.new:
                    self.new[token] = ours.ids.get(token, free)
                    free += token not in ours.ids
        if not self.new:
            return
        yield from self._not_to_be_joined()
        yield from self._rowless()
        yield from self._unwritable()
        self.joined = [
            JoinedToken(id=row, content=token, **flags[token])
            for token, row in self.new.items()
            if token not in ours.ids and token in flags and is_unicode(token)
        ]

    def _unfit(self, relation: Relation) -> Iterator[str]:
        """Tokens that cannot be added to the base's tokenizer."""
        where = relation.difference.where
        own = {token: row for token, row in relation.extra.items() if token not in relation.flags}
        only = f"vocabulary: union can only join added tokens; {WRITE_BASE}"
        if own:
            yield f"{where}: its tokenizer is another: {told(own, 'in its vocabulary, not added to it')}. {only}"
        elif relation.extra and relation.core != self.base.tokens.core:
            yield f"{where}: its tokenizer is another: vocabulary, merges or scores are not the base's. {only}"
        for token in relation.extra:
            if not is_unicode(token):
                yield f"{where}: token {token!r} is not Unicode, so no file can hold it. Remove it, or {WRITE_BASE}"

    def _not_to_be_joined(self) -> Iterator[str]:
        """Where the base's tokenizer takes no more tokens, or not with the ids that follow."""
        ours, last = self.base.tokens, max(self.base.tokens.names, default=-1)
        if ours.file.name != TOKENIZER:
            yield (
                f"{self.base.checkpoint.where}: has no {TOKENIZER}, to which vocabulary: union adds tokens. Load the "
                f"tokenizer with transformers and save it, or {WRITE_BASE}"
            )
        elif ours.free != last + 1:
            yield (
                f"{ours.file}: has an id {last}, and the next token added to it would get {ours.free}, so vocabulary: "
                f"union cannot add any. {WRITE_BASE.capitalize()}"
            )

    def _rowless(self) -> Iterator[str]:
        """Tokens of the base without a row that would get one, and no model has any."""
        names, given = self.base.tokens.names, {*self.new.values()}
        rowless = {names.get(row, ""): row for row in range(self.base_rows, self.rows) if row not in given}
        if rowless:
            yield (
                f"{self.base.checkpoint.where}: {told(rowless, 'without a row, and no model has one')}. Give it rows "
                f"for all its tokens (transformers: resize_token_embeddings), or {WRITE_BASE}"
            )

    def _unwritable(self) -> Iterator[str]:
        """Rows that config.json would have to count, and where is not known."""
        checkpoint = self.base.checkpoint
        if self.rows > self.base_rows and self.base_rows not in vocab_sizes(checkpoint.config, 0):
            yield (
                f"{checkpoint.where}: config.json has no vocab_size of {self.base_rows}, which vocabulary: union would "
                f"make {self.rows}. Write it there, or {WRITE_BASE}"
            )

    def rows_of(self, name: str) -> Sequence[int]:
        """For each row of the output, the own row of a model, or NOWHERE."""
        relation = self.relations.get(name)
        rows = [*range(self.base_rows)] if relation is None else [*relation.places]
        rows += [NOWHERE] * (self.rows - self.base_rows)
        for token, row in self.new.items():
            rows[row] = NOWHERE if relation is None else relation.extra.get(token, NOWHERE)
        return rows


def _move(tensor: str, tensors: Mapping[str, dict[str, Tensor]], union: _Union, runs: Mapping[str, Runs]) -> None:
    """Replace one tensor in every model that has it, by one in the rows of the output."""
    from .token_rows import MeanRows, MovedRows

    having = {name: own[tensor] for name, own in tensors.items() if tensor in own}
    base = having.pop("base")
    fallback = base
    if union.new:
        extras = {name: union.relations[name].extra for name in having if name in union.relations}
        parts = [
            (having[name], {union.new[token]: row for token, row in extra.items()})
            for name, extra in extras.items()
            if extra
        ]
        if not parts:
            return  # the models with more tokens lack the tensor, which is a problem of its own
        means = MeanRows.like(base, union.rows, parts)
        fallback = tensors["base"][tensor] = MovedRows.of(base, runs["base"], means)
    for name, info in having.items():
        if not (runs[name].is_identity and info.shape == fallback.shape):
            tensors[name][tensor] = MovedRows.of(info, runs[name], fallback)
