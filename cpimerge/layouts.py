"""One model saved in two layouts: other names for the same tensors, or several tensors in one.

Recognised by names and shapes, with no list of architectures, and named, so that a person can save both alike. Nothing
is renamed or taken apart for a merge: what looks alike need not be.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher

from .checkpoint import Checkpoint, Tensor, natural_key

__all__ = ["Layouts", "compare_layouts"]

SAMPLES = 32  # names whose counterpart is sought; more would find the same renamings
TRIED = 32  # renamings, the most frequent
ROUNDS = 8  # renamings of one model at most
DEPTH = 12  # parts of a name under which pieces are sought
MAX_PARTS = 30  # of a name that is compared with others: no real name comes near it, and the search takes long
LISTED = 4  # names of one side that a line shows
ONE_MODEL = "It is one model in two layouts: save both from the same class, with one version of transformers"

Names = tuple[str, ...]  # parts of a name, between its dots; "*" is any number
Change = tuple[Names, Names]  # these parts in the base, those in the other


@dataclass
class Layouts:
    """`problems`: a line for each way in which the layouts differ; and the names that none of them explains."""

    problems: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)


def compare_layouts(base: Checkpoint, other: Checkpoint, missing: Sequence[str], extra: Sequence[str]) -> Layouts:
    """What of `missing` (the base's alone) and `extra` (the other's alone) are the same tensors in another layout."""
    result = Layouts(missing=list(missing), extra=list(extra))
    renamings: list[tuple[Change, ...]] = []
    for _ in range(ROUNDS):
        found = _renaming(base.tensors, other.tensors, result.missing, result.extra)
        if found is None:
            break
        changes, pairs = found
        renamings.append(changes)
        result.problems.append(_renamed(base, other, changes, pairs))
        taken = set(pairs.values())
        result.missing = [name for name in result.missing if name not in pairs]
        result.extra = [name for name in result.extra if name not in taken]
    pieces = _Pieces(base, other, renamings, result.missing, result.extra)
    result.problems.extend(pieces.problems())
    result.missing = [name for name in result.missing if name not in pieces.explained]
    result.extra = [name for name in result.extra if name not in pieces.explained]
    return result


# --- other names ------------------------------------------------------------------------------------


def _renaming(
    ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], missing: Sequence[str], extra: Sequence[str]
) -> tuple[tuple[Change, ...], dict[str, str]] | None:
    """The changes of names that make the most missing tensors extra ones of the same shape, at least two; the pairs."""
    missing, extra = ([name for name in names if name.count(".") < MAX_PARTS] for names in (missing, extra))
    alike: dict[object, list[str]] = defaultdict(list)
    for name in extra:
        alike[_numbers(name), theirs[name].shape].append(name)
    tried: Counter[tuple[Change, ...]] = Counter()
    for name in missing[:: max(1, len(missing) // SAMPLES)]:
        tried.update({_changes(name, found) for found in alike[_numbers(name), ours[name].shape][:SAMPLES]})
    best: dict[str, str] = {}
    chosen: tuple[Change, ...] = ()
    for changes, _ in sorted(tried.most_common(TRIED), key=lambda found: sum(map(_size, found[0]))):
        pairs = _pairs(changes, ours, theirs, missing, set(extra))
        if len(pairs) > max(1, len(best)):
            best, chosen = pairs, changes
    if not best:
        return None
    rest = {name: target for name in missing if (target := _applied(chosen, name)) in extra and name not in best}
    taken = set(best.values())
    return chosen, best | {name: target for name, target in rest.items() if target and target not in taken}


def _numbers(name: str) -> Names:
    return tuple(re.findall(r"(?<![^.])[0-9]+(?![^.])", name))


def _size(change: Change) -> int:
    return len(change[0]) + len(change[1])


def _changes(ours: str, theirs: str) -> tuple[Change, ...]:
    """What must be replaced in one name to get the other; an insertion with the part before it, unless at the start."""
    a, b = ours.split("."), theirs.split(".")
    changes: list[Change] = []
    for kind, i, j, k, m in SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        if kind != "equal":
            back = 1 if i and k and (i == j or k == m) else 0
            changes.append(_for_all_numbers(a[i - back : j], b[k - back : m]))
    return tuple(changes)


def _for_all_numbers(before: Sequence[str], after: Sequence[str]) -> Change:
    """The change in every layer, if it leaves the numbers as they are."""
    if list(filter(_is_number, before)) != list(filter(_is_number, after)):
        return tuple(before), tuple(after)
    starred = [["*" if _is_number(part) else part for part in parts] for parts in (before, after)]
    return tuple(starred[0]), tuple(starred[1])


def _is_number(part: str) -> bool:
    return re.fullmatch("[0-9]+", part) is not None


def _pairs(
    changes: tuple[Change, ...],
    ours: Mapping[str, Tensor],
    theirs: Mapping[str, Tensor],
    missing: Iterable[str],
    extra: set[str],
) -> dict[str, str]:
    """Missing name -> the extra one that the changes make of it."""
    pairs = {}
    for name in missing:
        target = _applied(changes, name)
        if target in extra and theirs[target].shape == ours[name].shape:
            pairs[name] = target
    return pairs if len(set(pairs.values())) == len(pairs) else {}


def _applied(changes: Iterable[Change], name: str) -> str | None:
    """The name with every change made once, in order from the left; None where one does not occur."""
    parts, done = name.split("."), 0
    for before, after in changes:
        count = len(before)
        places = [0] if not count else [i for i in range(done, len(parts) - count + 1) if _at(parts, i, before)]
        if not places or (not count and done):
            return None
        numbers = filter(_is_number, parts[places[0] : places[0] + count])
        parts[places[0] : places[0] + count] = [next(numbers, part) if part == "*" else part for part in after]
        done = places[0] + len(after)
    return ".".join(parts)


def _at(parts: Sequence[str], place: int, wanted: Names) -> bool:
    found = parts[place : place + len(wanted)]
    return len(found) == len(wanted) and all(
        part == want or (want == "*" and _is_number(part)) for part, want in zip(found, wanted, strict=True)
    )


def _renamed(base: Checkpoint, other: Checkpoint, changes: tuple[Change, ...], pairs: Mapping[str, str]) -> str:
    theirs, ours = next((target, name) for name, target in pairs.items())
    said = f"are called {theirs!r} where {base.path} has {ours!r}"
    if len(changes) == 1:
        before, after = changes[0]
        if all(_at(name.split("."), 0, before) for name in pairs):
            shared = _shared(name.split(".")[len(before) :] for name in pairs)
            said = f"are called {_called(after, shared)} where {base.path} has {_called(before, shared)}"
        else:
            there, here = ".".join(after), ".".join(before)
            said = f"have {there!r} in their names where {base.path} has {here!r}, such as {theirs!r}"
    return f"{other.where}: {len(pairs)} tensors {said}. {ONE_MODEL}"


def _shared(names: Iterable[list[str]]) -> Names:
    """The parts that all names begin with."""
    ordered = sorted(names)
    together = zip(ordered[0], ordered[-1], strict=False)  # what first and last have in common, all have
    return tuple(a for a, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], together))


def _called(prefix: Names, shared: Iterable[str]) -> str:
    return repr(".".join((*prefix, *shared, "X")))


# --- other pieces -----------------------------------------------------------------------------------


class _Pieces:
    """Tensors that hold as many elements in other pieces, such as the experts of a layer in one."""

    def __init__(
        self,
        base: Checkpoint,
        other: Checkpoint,
        renamings: Sequence[tuple[Change, ...]],
        missing: Sequence[str],
        extra: Sequence[str],
    ) -> None:
        self.explained: set[str] = set()
        self._base, self._other = base, other
        self._places: dict[str, tuple[list[str], list[str]]] = defaultdict(lambda: ([], []))
        for name in missing:  # under the place that it has in the other's names
            renamed = next(filter(None, (_applied(changes, name) for changes in renamings)), name)
            for place in _above(renamed):
                self._places[place][0].append(name)
        for name in extra:
            for place in _above(name):
                self._places[place][1].append(name)

    def problems(self) -> Iterator[str]:
        """A line for each kind of place, the deepest first; `explained` gets the names."""
        kinds: dict[str, list[tuple[list[str], list[str]]]] = defaultdict(list)
        for place in sorted(self._places, key=lambda place: (-place.count("."), natural_key(place))):
            ours, theirs = ([name for name in names if name not in self.explained] for names in self._places[place])
            if self._same_elements(ours, theirs):
                kinds[_pattern(place)].append((ours, theirs))
                self.explained.update(ours, theirs)
        for found in kinds.values():
            yield self._line([name for ours, _ in found for name in ours], [n for _, theirs in found for n in theirs])

    def _same_elements(self, ours: Sequence[str], theirs: Sequence[str]) -> bool:
        if not ours or not theirs or len(ours) == len(theirs):
            return False
        sizes = [sum(math.prod(self._base.tensors[name].shape) for name in ours)]
        sizes.append(sum(math.prod(self._other.tensors[name].shape) for name in theirs))
        return sizes[0] == sizes[1]

    def _line(self, ours: Sequence[str], theirs: Sequence[str]) -> str:
        how = "fused" if len(theirs) < len(ours) else "split"
        return (
            f"{self._other.where}: {len(theirs)} tensors ({_kinds(theirs)}) hold {how} what {self._base.path} has in "
            f"{len(ours)} ({_kinds(ours)}). {ONE_MODEL}"
        )


def _above(name: str) -> Iterator[str]:
    """Every place that a name lies under, such as `a.` and `a.b.`, and the whole model."""
    parts = name.split(".")
    return (".".join((*parts[:count], "")) for count in range(min(len(parts), DEPTH)))


def _pattern(name: str) -> str:
    return re.sub(r"(?<![^.])[0-9]+(?![^.])", "*", name)


def _kinds(names: Iterable[str]) -> str:
    """The names, with every number as a star."""
    kinds = [*dict.fromkeys(_pattern(name) for name in names)]
    more = f" and {len(kinds) - LISTED} more" if len(kinds) > LISTED else ""
    return ", ".join(map(repr, kinds[:LISTED])) + more
