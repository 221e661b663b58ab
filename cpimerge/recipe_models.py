"""Where a recipe lists its models: once under `models`, or in every slice under `sources`.

Everything here reads the tree, so as to work also where the schema found problems.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from .dialect import one_range
from .references import Reference, parse_reference
from .yamltree import Problem, Tree, Where, as_text

__all__ = ["base_entries", "check_models", "groups", "owners", "reference_at", "task_name", "tasks", "text_at"]

_ELSE = "use mergekit for a merge of parts"


def text_at(tree: Tree, *where: str | int) -> str:
    """The text at a place; "" where there is none or the schema refuses it."""
    try:
        return as_text(tree.at(*where))
    except ValueError:
        return ""


def reference_at(tree: Tree, directory: Path, *where: str | int) -> Reference | None:
    """The model that the text at a place names, if any."""
    text = text_at(tree, *where)
    return parse_reference(text, directory) if text else None


def groups(tree: Tree) -> list[Where]:
    """The lists of models: that under `models`, or the sources of each slice."""
    slices = tree.at("slices")
    return (
        [("slices", number, "sources") for number in range(len(slices))] if isinstance(slices, list) else [("models",)]
    )


def _entries(tree: Tree, group: Where) -> list[Where]:
    entries = tree.at(*group)
    return [(*group, number) for number in range(len(entries))] if isinstance(entries, list) else []


def tasks(tree: Tree, group: Where, directory: Path) -> list[Where]:
    """The entries of a group that are tasks: all but the base."""
    base = reference_at(tree, directory, "base_model")
    return [where for where in _entries(tree, group) if not _is_base(tree, where, directory, base)]


def base_entries(tree: Tree, directory: Path) -> Iterator[Where]:
    """Entries that are the base: mergekit's recipes list it among the models. With a `name` it is a task as well."""
    base = reference_at(tree, directory, "base_model")
    for group in groups(tree):
        yield from (where for where in _entries(tree, group) if _is_base(tree, where, directory, base))


def _is_base(tree: Tree, where: Where, directory: Path, base: Reference | None) -> bool:
    if base is None or (*where, "name") in tree.lines:
        return False
    return reference_at(tree, directory, *where, "model") == base


def task_name(tree: Tree, where: Where, directory: Path) -> str:
    """The name of the task at `where` as given, else its model's; "" where neither is known."""
    if (*where, "name") in tree.lines:
        return text_at(tree, *where, "name")
    model = reference_at(tree, directory, *where, "model")
    return model.name if model else ""


def owners(tree: Tree) -> list[Where]:
    """Where `parameters` may be: in every entry, slice and the recipe itself."""
    lists = groups(tree)
    entries = [where for group in lists for where in _entries(tree, group)]
    return [*entries, *(group[:2] for group in lists if group != ("models",)), ()]


def check_models(tree: Tree, directory: Path) -> Iterator[Problem]:
    """What is wrong with the lists of models as such."""
    if ("models",) not in tree.lines and ("slices",) not in tree.lines:
        yield tree.problem(("models",), "is missing; list the fine-tuned checkpoints, each as '- model: DIRECTORY'")
        return
    if ("models",) in tree.lines and ("slices",) in tree.lines:
        line = tree.lines["models",]
        yield tree.problem(("slices",), f"the checkpoints are listed under models already, line {line}; remove one")
        return
    for where in base_entries(tree, directory):
        if (place := (*where, "parameters")) in tree.lines:
            yield tree.problem(place, "the base is no task; remove them, or give the base a name: to make it one too")
    lists = groups(tree)
    if lists and _entries(tree, lists[0]) and not tasks(tree, lists[0], directory):
        yield tree.problem(lists[0], "has only the base; list its fine-tunes")
    if lists and lists[0] != ("models",):
        yield from _check_slices(tree, lists, directory)


def _check_slices(tree: Tree, lists: list[Where], directory: Path) -> Iterator[Problem]:
    """All slices together are whole models."""
    base = reference_at(tree, directory, "base_model")
    expected = _named(tree, lists[0], directory)
    stop = 0
    for group in lists:
        own_base = reference_at(tree, directory, *group[:2], "base_model")
        if own_base and base and own_base != base:
            yield tree.problem((*group[:2], "base_model"), f"is not the recipe's base_model; {_ELSE}")
        ranges = {where: span for where in _entries(tree, group) if (span := _range_at(tree, where))}
        if ranges:
            yield from _check_ranges(tree, ranges, stop)
            stop = next(iter(ranges.values()))[1]
        if not _are_the_same(expected, _named(tree, group, directory)):
            line = tree.problem(lists[0], "").line
            text = f"must be the models of slices[0], line {line}, in their order and with their names"
            yield tree.problem(group, f"{text}; {_ELSE}")


def _range_at(tree: Tree, where: Where) -> tuple[int, int] | None:
    try:
        return one_range(tree.at(*where, "layer_range"))
    except ValueError:
        return None


def _check_ranges(tree: Tree, ranges: dict[Where, tuple[int, int]], stop: int) -> Iterator[Problem]:
    """The sources of a slice have one range, which begins where the slice before stops."""
    (first_place, first), *others = ranges.items()
    for where, span in others:
        if span != first:
            what = f"differs from that of sources[{first_place[-1]}], {list(first)}: layers would change places"
            yield tree.problem((*where, "layer_range"), f"{what}, which is not supported; {_ELSE}")
    if first[0] != stop:
        fault = "repeats layers" if first[0] < stop else "leaves out layers"
        what = f"begins at layer {first[0]}, where {stop} is next: that {fault}"
        yield tree.problem((*first_place, "layer_range"), f"{what}, which is not supported; {_ELSE}")


Named = list[tuple[Reference | None, str]]


def _named(tree: Tree, group: Where, directory: Path) -> Named:
    """The tasks of a group, each with the name that it is given; "" where it is given none."""
    entries = tasks(tree, group, directory)
    return [(reference_at(tree, directory, *where, "model"), text_at(tree, *where, "name")) for where in entries]


def _are_the_same(first: Named, later: Named) -> bool:
    """Whether a later slice has the models of the first one, in its order, which counts.

    One of no models, or with one that is not known, is another problem.
    """
    if not first or not later or any(model is None for model, _ in later):
        return True
    pairs = zip(first, later, strict=False)
    return len(first) == len(later) and all(
        model in (None, other) and name in ("", known) for (model, known), (other, name) in pairs
    )
