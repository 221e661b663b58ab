"""What may be written where in a recipe, and which values go together; what to do about the rest, in words."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, PlainValidator, Tag

from .references import parse_reference
from .yamltree import (
    Problem,
    Some,
    Text,
    Tree,
    Where,
    Whole,
    as_number,
    as_text,
    choice,
    describe,
    key_text,
    nearest,
    number,
    written,
)

Scope = Literal["tensor", "layer", "global"]
Conflict = Literal["last", "first", "largest", "mean", "elect"]
Space = Literal["weights", "delta"]
Granularity = Literal["tensor", "row"]
Dtype = Literal["float32", "float16", "bfloat16"]
Vocabulary = Literal["base", "union"]

BACKBONE_WORDS = ("base", "last")
RESERVED_NAMES = (*BACKBONE_WORDS, "backbone")  # "backbone": how the plan calls one that is given by path
KEYS_OF_A_MODEL = ("density", "weight", "t")

# The schema: what may be written where.

N = TypeVar("N")
R = TypeVar("R")
Share = Annotated[Fraction, number(0, 1)]
Density = Annotated[Fraction, number(0, 1, " (a share: 1 % is 0.01)")]
Weight = Annotated[Fraction, number(0)]
Gradient = Annotated[
    Annotated[N, Tag("<scalar>")] | Annotated[Some[N], Tag("<list>")],
    written("a number or a list of numbers"),
]
Numbers = Annotated[
    Annotated[N, Tag("<scalar>")] | Annotated[Some[N], Tag("<list>")] | Annotated[Some[R], Tag("<mappings>")],
    written("a number, a list of numbers or a list of {filter, value}"),
]
DTYPE_HINTS = {
    "bf16": "did you mean 'bfloat16'?",
    "fp16": "did you mean 'float16'?",
    "half": "did you mean 'float16'?",
    "fp32": "did you mean 'float32'?",
    "float": "did you mean 'float32'?",
    "auto": "leave dtype out to keep the dtypes of the base",
}


def _only_method(value: object) -> str:
    if (text := as_text(value)) != "cpi":
        raise ValueError(f"{describe(text)} is not supported; cpimerge has one method, cpi")
    return text


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class FilteredValue(_Strict):
    """An entry {filter, value} of a setting; its kinds differ in the numbers they allow."""

    filter: Text | None = None


class _DensityRule(FilteredValue):
    value: Gradient[Density]


class _WeightRule(FilteredValue):
    value: Gradient[Weight]


class _ShareRule(FilteredValue):
    value: Gradient[Share]


class Seeded(_Strict):
    """The random `order`."""

    seed: Whole


Order = Annotated[
    Annotated[Literal["recipe"], choice(Literal["recipe"]), Tag("<scalar>")] | Annotated[Seeded, Tag("<mapping>")],
    written("recipe or {seed: a whole number}"),
]


class OwnSettings(_Strict):
    """A model's `parameters`."""

    density: Numbers[Density, _DensityRule] | None = None
    weight: Numbers[Weight, _WeightRule] | None = None
    t: Numbers[Share, _ShareRule] | None = None


class _Shared(OwnSettings):
    """The recipe's `parameters`."""

    scope: Annotated[Scope, choice(Scope)] | None = None
    tau: Share | None = None
    stages: Some[Some[Text]] | None = None
    order: Order | None = None
    backbone: Text | None = None
    conflict: Annotated[Conflict, choice(Conflict)] | None = None
    space: Annotated[Space, choice(Space)] | None = None
    rest: Share | None = None
    granularity: Annotated[Granularity, choice(Granularity)] | None = None
    exclude: list[Text] | None = None


class _Model(_Strict):
    model: Text
    name: Text | None = None
    parameters: OwnSettings = OwnSettings()


class Document(_Strict):
    """The whole recipe."""

    merge_method: Annotated[str, PlainValidator(_only_method)]
    base_model: Text
    models: Some[_Model]
    parameters: _Shared = _Shared()
    dtype: Annotated[Dtype, choice(Dtype, DTYPE_HINTS)] | None = None
    vocabulary: Annotated[Vocabulary, choice(Vocabulary)] | None = None


# What to do about a key that is missing or does not belong where it is.

MISSING_HINTS = {
    "merge_method": "write merge_method: cpi",
    "base_model": "give the directory of the models' common base checkpoint",
    "models": "list the fine-tuned checkpoints, each as '- model: DIRECTORY'",
    "model": "give the directory of a fine-tuned checkpoint",
    "value": "give a number or a list of numbers",
    "seed": "give a whole number",
}
NOT_SUPPORTED = {
    "slices": "list whole checkpoints under models",
    "modules": "list whole checkpoints under models",
    "tokenizer_source": "remove it; the base's tokenizer is kept",
    "tokenizer": "remove it; the base's tokenizer is kept",
    "chat_template": "remove it; the base's is kept",
    "out_dtype": "use dtype, which is the output's",
    "normalize": "remove it; shares by weight always add up to 1",
    "lambda": "use rest, the factor on the non-core with space: delta",
    "int8_mask": "remove it",
}


def key_hint(where: Where, missing: bool) -> str:
    """What to say of a key that is missing, or of one that the schema does not have there."""
    key, parent = str(where[-1]), where[:-1]
    if missing:
        return f"is missing; {MISSING_HINTS[key]}"
    schema = _schema_at(parent)
    if schema is _Model and key in KEYS_OF_A_MODEL:
        return f"belongs under {key_text((*parent, 'parameters'))}"
    if schema in (Document, _Model) and key in _Shared.model_fields:
        return "belongs under the recipe's parameters"
    if schema is OwnSettings and key in _Shared.model_fields:
        return f"belongs under the recipe's parameters; a model's own are {', '.join(KEYS_OF_A_MODEL)}"
    if schema is not Document and key in Document.model_fields:
        return "belongs at the top level of the recipe"
    if key in NOT_SUPPORTED:
        return f"is not supported; {NOT_SUPPORTED[key]}"
    return f"unknown key; {nearest(key, schema.model_fields, 'valid keys')}"


def _schema_at(where: Where) -> type[BaseModel]:
    """The schema of the mapping at a place."""
    match [step for step in where if isinstance(step, str)]:
        case []:
            return Document
        case ["models"]:
            return _Model
        case ["models", "parameters"]:
            return OwnSettings
        case ["parameters"]:
            return _Shared
        case [*_, "order"]:
            return Seeded
    return _ShareRule


# Checks of several values together. They read the tree, so as to run also where the schema found problems.


def check_together(tree: Tree, directory: Path) -> Iterator[Problem]:
    """All that is wrong with values that are each valid."""
    names = [task_name(tree, model, directory) for model in range(_model_count(tree))]
    yield from _check_names(tree, names)
    if names and "" not in names:
        yield from _check_stages(tree, names)
        yield from _check_backbone(tree, names, directory)
    yield from _check_pairs(tree)
    for where in _settings(tree, KEYS_OF_A_MODEL):
        yield from _check_reach(tree, where)


def _model_count(tree: Tree) -> int:
    models = tree.at("models")
    return len(models) if isinstance(models, list) else 0


def _text_at(tree: Tree, *where: str | int) -> str:
    """The text at a place; "" where there is none or the schema refuses it."""
    try:
        return as_text(tree.at(*where))
    except ValueError:
        return ""


def task_name(tree: Tree, model: int, directory: Path) -> str:
    """A model's name as given, else its directory's; "" where neither is known."""
    if ("models", model, "name") in tree.lines:
        return _text_at(tree, "models", model, "name")
    path = _text_at(tree, "models", model, "model")
    return parse_reference(path, directory).name if path else ""


def _check_names(tree: Tree, names: list[str]) -> Iterator[Problem]:
    """Each is usable as a file name, and no two are the same."""
    lines: dict[str, int] = {}
    for model, name in enumerate(names):
        given = ("models", model, "name") in tree.lines
        where = ("models", model, "name" if given else "model")
        if not _text_at(tree, *where):
            continue
        remedy = "give another name" if given else "set name: for this model"
        if fault := _name_fault(name):
            yield tree.problem(where, f"{name!r} cannot be a task's name, as {fault}; {remedy}")
        elif name in lines:
            yield tree.problem(where, f"a task is named {name!r} already, line {lines[name]}; {remedy}")
        lines.setdefault(name, tree.lines[where])


def _name_fault(name: str) -> str | None:
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
            name = _text_at(tree, *where)
            if name in lines:
                yield tree.problem(where, f"{name!r} is in a stage already, line {lines[name]}; remove one")
            elif name in names:
                lines[name] = tree.lines[where]
            elif name:
                yield tree.problem(where, f"no task is named {name!r}; {nearest(name, names, 'tasks')}")
    if left := [name for name in names if name not in lines]:
        yield tree.problem(("parameters", "stages"), f"must have every task; missing: {', '.join(left)}")


def _check_backbone(tree: Tree, names: list[str], directory: Path) -> Iterator[Problem]:
    """It is a word, a task's name, or the path of yet another checkpoint."""
    where = ("parameters", "backbone")
    text = _text_at(tree, *where)
    if not text or text in (*BACKBONE_WORDS, *names):
        return
    if not ("/" in text or text.startswith((".", "~"))):
        hint = nearest(text, (*BACKBONE_WORDS, *names), "valid names")
        yield tree.problem(where, f"no task is named {text!r}; {hint} (a path needs a '/', such as ./{text})")
        return
    paths = {name: _text_at(tree, "models", model, "model") for model, name in enumerate(names)}
    for name, path in ({"base": _text_at(tree, "base_model")} | paths).items():
        if path and parse_reference(path, directory) == parse_reference(text, directory):
            yield tree.problem(where, f"is the directory of {name!r}; write backbone: {name}")
            return


def _check_pairs(tree: Tree) -> Iterator[Problem]:
    """Keys that exclude each other."""
    stages, order, rest = (("parameters", key) for key in ("stages", "order", "rest"))
    if stages in tree.lines and order in tree.lines:
        yield tree.problem(order, f"stages, line {tree.lines[stages]}, give the order already; remove one")
    if (tree.at("parameters", "space") or "weights") == "weights" and _is_other_than_one(tree.at(*rest)):
        yield tree.problem(rest, "scales deltas, and space is weights; write space: delta, or remove rest")
    if any(_settings(tree, ("weight",))):
        for where in _settings(tree, ("t",)):
            yield tree.problem(where, "sets a constant factor, so weight has no effect; remove one")


def _is_other_than_one(value: object) -> bool:
    try:
        return as_number(value) != 1
    except ValueError:
        return False


def _settings(tree: Tree, keys: Iterable[str]) -> Iterator[Where]:
    """Where the recipe or a model sets any of these keys."""
    owners: list[Where] = [("models", model) for model in range(_model_count(tree))]
    for owner in [*owners, ()]:
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
