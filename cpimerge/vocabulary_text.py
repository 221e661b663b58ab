"""How two vocabularies differ, in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .tokenizer_files import shown

__all__ = ["Difference", "told", "unexplained"]

SHOWN = 5  # of each kind that a message names


@dataclass(frozen=True)
class Difference:
    """A model's vocabulary beside the base's. Rows are those of the model, for `missing` those of the base.

    `rows`: how many the base has, and the model. `extra`: tokens that have no row in the base. `missing`: tokens of the
    base that have none in the model. `moved`: tokens in another row: the base's and the model's.
    """

    where: Path
    base: Path
    rows: tuple[int, int]
    extra: Mapping[str, int]
    missing: Mapping[str, int]
    moved: Mapping[str, tuple[int, int]]

    @property
    def is_any(self) -> bool:
        return bool(self.extra or self.missing or self.moved or self.rows[0] != self.rows[1])

    def problem(self) -> Iterator[str]:
        """What makes a merge row by row wrong. Tokens that only the base has do not: their rows are padding here."""
        ours, theirs = self.rows
        if not (self.extra or self.moved or ours != theirs):
            return
        kinds = [*self._kinds()]
        if not kinds:
            yield (
                f"{self.where}: {theirs} rows for the same tokens, where {self.base} has {ours}: the rest is padding. "
                "Write vocabulary: base to have the base's rows"
            )
            return
        rows = [] if ours == theirs else [f"{theirs} rows, the base has {ours}"]
        yield (
            f"{self.where}: its tokens are not those of {self.base}: {'; '.join([*kinds, *rows])}. "
            "Write vocabulary: base to keep the base's tokens, or vocabulary: union to have all"
        )

    def _kinds(self) -> Iterator[str]:
        """Each way in which tokens differ."""
        by_row = {row: token for token, row in self.missing.items()}
        renamed = {token: by_row[row] for token, row in self.extra.items() if row in by_row}
        gone = {*renamed.values()}
        if extra := {token: row for token, row in self.extra.items() if token not in renamed}:
            yield told(extra, "not in the base")
        if missing := {token: row for token, row in self.missing.items() if token not in gone}:
            yield told(missing, "of the base not in it")
        if renamed:
            pairs = [f"id {self.extra[new]} is {shown(new)}, in the base {shown(old)}" for new, old in renamed.items()]
            yield _listed(pairs)
        if self.moved:
            pairs = [f"{shown(token)} has id {at}, in the base {row}" for token, (row, at) in self.moved.items()]
            yield _listed(pairs)

    def note(self) -> Iterator[str]:
        """What is not wrong in a merge row by row."""
        if self.missing and not any(self.problem()):
            missing = told(self.missing, "of the base not in its tokenizer, whose rows are merged as they are")
            yield f"{self.where}: {missing}"

    def outcome(self, joined: Mapping[str, int]) -> Iterator[str]:
        """What becomes of it in a vocabulary where `joined` got rows: notes."""
        added = {token: joined[token] for token in self.extra if token in joined}
        dropped = {token: row for token, row in self.extra.items() if token not in joined}
        if added:
            yield f"{self.where}: {told(added, 'joined to the base')}"
        if dropped:
            yield f"{self.where}: {told(dropped, 'left out, which the base lacks')}"
        if self.missing:
            yield f"{self.where}: {told(self.missing, 'of the base not in it, for which it has the rows of the base')}"


def unexplained(where: Path, base_rows: int, rows: Mapping[str, int], lacking: Sequence[Path]) -> str:
    """The problem with other rows whose tokens cannot be told. `rows`: by tensor; `lacking`: directories."""
    counts = ", ".join(f"{name!r} {count}" for name, count in rows.items())
    start = f"{where}: rows of the vocabulary: {counts}, where the base has {base_rows}. "
    if not lacking:
        return start + "Tensors of one vocabulary must have the same number of rows: save the model again"
    files = " and ".join(map(str, lacking))
    return start + (
        f"Which tokens they are cannot be told: no tokenizer.json in {files}. Put it there (transformers: load the "
        "tokenizer and save it)"
    )


def told(tokens: Mapping[str, int], what: str) -> str:
    """How many tokens, and the first by name: `2 tokens not in the base: 'a' (id 7), 'b' (id 8)`."""
    names = [f"{shown(token)} (id {row})" for token, row in tokens.items()]
    return f"{len(tokens)} {'token' if len(tokens) == 1 else 'tokens'} {what}: {_listed(names)}"


def _listed(entries: Sequence[str]) -> str:
    more = f" and {len(entries) - SHOWN} more" if len(entries) > SHOWN else ""
    return ", ".join(entries[:SHOWN]) + more
