"""Checks of several values of a recipe together.

They read the tree rather than the schema's result, so as to run also where the schema found problems.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from .recipe_models import check_models, groups, owners, reference_at, task_name, tasks, text_at
from .recipe_schema import BACKBONE_WORDS, KEYS_OF_A_MODEL, RESERVED_NAMES
from .references import parse_reference
from .yamltree import Problem, Tree, Where, as_number, describe, nearest

__all__ = ["check_together", "name_fault"]

# Where the output's tokens are said: cpimerge's key, and mergekit's two.
VOCABULARY: tuple[Where, ...] = (("vocabulary",), ("tokenizer_source",), ("tokenizer", "source"))


def check_together(tree: Tree, directory: Path) -> Iterator[Problem]:
    """All that is wrong with values that are each valid."""
    yield from check_models(tree, directory)
    lists = groups(tree)
    entries = tasks(tree, lists[0], directory) if lists else []
    names = [task_name(tree, where, directory) for where in entries]
    yield from _check_names(tree, dict(zip(entries, names, strict=True)))
    if names and "" not in names:
        yield from _check_stages(tree, names)
        paths = {name: text_at(tree, *where, "model") for name, where in zip(names, entries, strict=True)}
        yield from _check_backbone(tree, paths, directory)
    yield from _check_vocabulary(tree, directory)
    yield from _check_pairs(tree)
    for where in _settings(tree, KEYS_OF_A_MODEL):
        yield from _check_reach(tree, where)


def _check_names(tree: Tree, names: dict[Where, str]) -> Iterator[Problem]:
    """Each is usable as a file name, and no two are the same."""
    lines: dict[str, int] = {}
    for entry, name in names.items():
        given = (*entry, "name") in tree.lines
        where = (*entry, "name" if given else "model")
        if not text_at(tree, *where):
            continue
        remedy = "give another name" if given else "set name: for this model"
        if fault := name_fault(name):
            yield tree.problem(where, f"{describe(name)} cannot be a task's name, as {fault}; {remedy}")
        elif name in lines:
            yield tree.problem(where, f"a task is named {name!r} already, line {lines[name]}; {remedy}")
        lines.setdefault(name, tree.lines[where])


def name_fault(name: str) -> str | None:
    """Why a task may not be called so."""
    if name in RESERVED_NAMES:
        return "it is reserved for the backbone"
    if name in ("", ".", "..") or "/" in name:
        return "it is not usable as a file name"
    if len(name) > 100 or len(name.encode()) > 200:
        return "it is longer than 100 characters or 200 bytes"
    return None


def _check_stages(tree: Tree, names: list[str]) -> Iterator[Problem]:
    """Every task is in them exactly once, and nothing else is."""
    stages = tree.at("parameters", "stages")
    if not isinstance(stages, list) or not all(isinstance(stage, list) for stage in stages):
        return
    lines: dict[str, int] = {}
    for row, stage in enumerate(stages):
        for column in range(len(stage)):
            where = ("parameters", "stages", row, column)
            name = text_at(tree, *where)
            if name in lines:
                yield tree.problem(where, f"{name!r} is in a stage already, line {lines[name]}; remove one")
            elif name in names:
                lines[name] = tree.lines[where]
            elif name:
                yield tree.problem(where, f"no task is named {name!r}; {nearest(name, names, 'tasks')}")
    if left := [name for name in names if name not in lines]:
        yield tree.problem(("parameters", "stages"), f"must have every task; missing: {', '.join(left)}")


def _check_backbone(tree: Tree, paths: dict[str, str], directory: Path) -> Iterator[Problem]:
    """It is a word, a task's name, or the path of yet another checkpoint; `paths` has those of the tasks."""
    where = ("parameters", "backbone")
    text = text_at(tree, *where)
    if not text or text in (*BACKBONE_WORDS, *paths):
        return
    if not ("/" in text or text.startswith((".", "~"))):
        hint = nearest(text, (*BACKBONE_WORDS, *paths), "valid names")
        yield tree.problem(where, f"no task is named {text!r}; {hint} (a path needs a '/', such as ./{text})")
        return
    for name, path in ({"base": text_at(tree, "base_model")} | paths).items():
        if path and parse_reference(path, directory) == parse_reference(text, directory):
            yield tree.problem(where, f"is the directory of {name!r}; write backbone: {name}")
            return


def _check_vocabulary(tree: Tree, directory: Path) -> Iterator[Problem]:
    """It is said once, and is the base's or the union of all."""
    said: list[Where] = [where for where in VOCABULARY if where[:1] in tree.lines]
    for where in said[1:]:
        first, line = said[0][0], tree.lines[said[0][:1]]
        yield tree.problem(where[:1], f"{first}, line {line}, says already which tokens the output has; remove one")
    for where in VOCABULARY[1:]:
        text = text_at(tree, *where)
        if (
            text
            and text not in ("base", "union")
            and parse_reference(text, directory) != reference_at(tree, directory, "base_model")
        ):
            yield tree.problem(where, "another model's tokenizer is not supported; write base or union")


def _check_pairs(tree: Tree) -> Iterator[Problem]:
    """Keys that exclude each other."""
    stages, order, rest, values = (("parameters", key) for key in ("stages", "order", "rest", "singular_values"))
    if stages in tree.lines and order in tree.lines:
        yield tree.problem(order, f"stages, line {tree.lines[stages]}, give the order already; remove one")
    if tree.at("parameters", "space") == "weights" and _is_other_than_one(tree.at(*rest)):
        yield tree.problem(rest, "scales deltas, and space is weights; remove one of the two")
    if tree.at("parameters", "space") == "weights" and tree.at(*values) == "level":
        yield tree.problem(values, "is for deltas, and space is weights; remove one of the two")
    if any(_settings(tree, ("weight",))):
        for where in _settings(tree, ("t",)):
            yield tree.problem(where, "sets a constant factor, so weight has no effect; remove one")


def _is_other_than_one(value: object) -> bool:
    try:
        return as_number(value) != 1
    except ValueError:
        return False


def _settings(tree: Tree, keys: Iterable[str]) -> Iterator[Where]:
    """Where the recipe, a slice or a model sets any of these keys."""
    for owner in owners(tree):
        yield from (place for key in keys if (place := (*owner, "parameters", key)) in tree.lines)


def _check_reach(tree: Tree, where: Where) -> Iterator[Problem]:
    """An entry {filter, value} after one that matches everything would never apply."""
    rules = tree.at(*where)
    for index, rule in enumerate(rules[:-1] if isinstance(rules, list) else []):
        if isinstance(rule, dict) and rule.get("filter", "*") == "*":
            line = tree.lines[(*where, index)]
            text = f"never applies, as the entry in line {line} matches every tensor; put that one last"
            yield tree.problem((*where, index + 1), text)
            return
