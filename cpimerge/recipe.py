"""The YAML that a user wrote → one frozen `Recipe`, or one error that lists everything wrong with it.

    text → yamltree (data with lines) → recipe_schema (structure, values, values together) → Recipe

Every problem is a line such as `recipe.yml:12: parameters.densty: unknown key; did you mean 'density'?`. Only
the recipe itself is judged: whether a directory exists or a filter matches a tensor is for preflight to find
out. Numbers are exact, because the size of a core is ⌊p·n⌋ of the decimal as written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

from .errors import RecipeError
from .recipe_schema import (
    BACKBONE_WORDS,
    KEYS_OF_A_MODEL,
    Conflict,
    Document,
    Dtype,
    FilteredValue,
    Granularity,
    OwnSettings,
    Scope,
    Seeded,
    Space,
    Vocabulary,
    check_together,
    key_hint,
    task_name,
)
from .references import Reference, parse_reference
from .yamltree import Tree, Unreadable, Where, check, key_text, read_tree

__all__ = ["Exclude", "Recipe", "Rule", "Setting", "Task", "load_recipe", "matches", "parse_recipe"]

DEFAULT_DENSITY = Fraction(1, 100)
DEFAULT_WEIGHT = Fraction(1)
MAX_BYTES = 1_000_000
TAKEN_AS_WRITTEN = ("scope", "tau", "conflict", "space", "rest", "granularity")


@dataclass(frozen=True)
class Rule:
    """One or more numbers for the tensors that `filter` matches; None matches every tensor.

    Several values are a gradient: spread evenly over the depth of the model, straight lines between them.
    """

    filter: str | None
    values: tuple[Fraction, ...]
    line: int

    def at(self, depth: Fraction) -> Fraction:
        """The exact value at a depth from 0 (first layer) to 1 (last). Raises ValueError outside."""
        if not 0 <= depth <= 1:
            raise ValueError(f"depth must be from 0 to 1, got {depth}")
        position = depth * (len(self.values) - 1)
        left = int(position)
        right = min(left + 1, len(self.values) - 1)
        return self.values[left] + (position - left) * (self.values[right] - self.values[left])


@dataclass(frozen=True)
class Setting:
    """What the user wrote for `key`: "density", "weight" or "t"."""

    key: str
    rules: tuple[Rule, ...]

    def at(self, tensor: str, depth: Fraction) -> Fraction | None:
        """The first matching rule's value at a depth from 0 to 1; None where no rule matches the tensor."""
        for rule in self.rules:
            if rule.filter is None or matches(rule.filter, tensor):
                return rule.at(depth)
        return None


@dataclass(frozen=True)
class Task:
    """One expert: its name (usable as a file name), its checkpoint or adapter, and its own settings, if any."""

    name: str
    model: Reference
    line: int
    density: Setting | None = None
    weight: Setting | None = None
    t: Setting | None = None


@dataclass(frozen=True)
class Exclude:
    """Tensors that get no core."""

    filter: str
    line: int


@dataclass(frozen=True)
class Recipe:
    """A valid recipe. Nothing that it refers to need exist.

    `order` is "recipe" or the seed of a random order. `stages` holds task names; None: the overlaps decide.
    `backbone` is "last", "base", a task's name (all str), or another checkpoint (Reference).
    `dtype` is the output's; None keeps each tensor's. `vocabulary` is the output's; None: all models must have one.
    `lines` has the line of every key: `parameters.rest`. `text` is the YAML as written.
    """

    file: Path | None
    base: Reference
    tasks: tuple[Task, ...]
    density: Setting | None = None
    weight: Setting | None = None
    t: Setting | None = None
    scope: Scope = "tensor"
    tau: Fraction = Fraction(1, 10)
    order: Literal["recipe"] | int = "recipe"
    stages: tuple[tuple[str, ...], ...] | None = None
    backbone: str | Reference = "last"
    conflict: Conflict = "last"
    space: Space = "weights"
    rest: Fraction = Fraction(1)
    granularity: Granularity = "tensor"
    exclude: tuple[Exclude, ...] = ()
    dtype: Dtype | None = None
    vocabulary: Vocabulary | None = None
    lines: Mapping[str, int] = field(default_factory=dict, hash=False, repr=False)
    text: str = field(default="", repr=False)

    def density_of(self, task: Task, tensor: str, depth: Fraction) -> Fraction:
        """The share of elements in the task's core, 0 to 1."""
        density = _resolve(task.density, self.density, tensor, depth)
        return DEFAULT_DENSITY if density is None else density

    def weight_of(self, task: Task, tensor: str, depth: Fraction) -> Fraction:
        """The task's weight in the blend, 0 or more."""
        weight = _resolve(task.weight, self.weight, tensor, depth)
        return DEFAULT_WEIGHT if weight is None else weight

    def t_of(self, task: Task, tensor: str, depth: Fraction) -> Fraction | None:
        """The constant factor with which the task is folded in, 0 to 1; None: its share by weight."""
        return _resolve(task.t, self.t, tensor, depth)


def _resolve(own: Setting | None, shared: Setting | None, tensor: str, depth: Fraction) -> Fraction | None:
    """A model's own setting where it speaks of the tensor, else the recipe's."""
    value = own.at(tensor, depth) if own else None
    return shared.at(tensor, depth) if value is None and shared else value


def matches(filter: str, tensor: str) -> bool:
    """Whether a filter matches a tensor's name: as a glob if it has any of `*?[`, else as a part of it."""
    return fnmatchcase(tensor, filter) if any(char in filter for char in "*?[") else filter in tensor


def load_recipe(path: str | Path) -> Recipe:
    """Read a recipe file. Raises RecipeError, which lists every problem with its line and key."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from error
    if len(raw) > MAX_BYTES:
        raise RecipeError(f"{path}: is larger than 1 MB; a recipe is a short YAML file")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise RecipeError(f"{path}:{line}: is not UTF-8 text; save the recipe as UTF-8") from None
    return parse_recipe(text, path, path.parent)


def parse_recipe(text: str, file: Path | None, directory: Path) -> Recipe:
    """Parse a recipe whose relative paths are relative to `directory`; `file` is its name in messages.

    Raises RecipeError, which lists every problem with its line and key.
    """
    try:
        tree = read_tree(text)
    except Unreadable as error:
        raise RecipeError(f"{file or 'recipe'}:{error.problem}") from None
    document, problems = check(tree, Document, key_hint)
    problems = [*tree.problems, *problems, *check_together(tree, directory)]
    if document is None or problems:
        in_order = sorted(problems, key=lambda problem: problem.line)
        raise RecipeError(f"{file or 'recipe'}:{problem}" for problem in in_order)
    return _build(document, tree, directory, file=file, text=text)


def _build(document: Document, tree: Tree, directory: Path, *, file: Path | None, text: str) -> Recipe:
    shared = document.parameters
    tasks = tuple(_task(document, tree, index, directory) for index in range(len(document.models)))
    backbone = shared.backbone or "last"
    is_name = backbone in (*BACKBONE_WORDS, *(task.name for task in tasks))
    return Recipe(
        file=file,
        base=parse_reference(document.base_model, directory),
        tasks=tasks,
        order=shared.order.seed if isinstance(shared.order, Seeded) else "recipe",
        stages=tuple(tuple(stage) for stage in shared.stages) if shared.stages else None,
        backbone=backbone if is_name else parse_reference(backbone, directory),
        exclude=tuple(
            Exclude(filter, tree.lines["parameters", "exclude", index])
            for index, filter in enumerate(shared.exclude or ())
        ),
        dtype=document.dtype,
        vocabulary=document.vocabulary,
        lines={key_text(where): line for where, line in tree.lines.items() if where},
        text=text,
        **_settings_of(shared, tree, ("parameters",)),
        **{key: value for key in TAKEN_AS_WRITTEN if (value := getattr(shared, key)) is not None},
    )


def _task(document: Document, tree: Tree, index: int, directory: Path) -> Task:
    model, where = document.models[index], ("models", index)
    return Task(
        name=task_name(tree, index, directory),
        model=parse_reference(model.model, directory),
        line=tree.lines[where],
        **_settings_of(model.parameters, tree, (*where, "parameters")),
    )


def _settings_of(own: OwnSettings, tree: Tree, where: Where) -> dict[str, Any]:
    return {key: _setting(key, getattr(own, key), tree, (*where, key)) for key in KEYS_OF_A_MODEL}


def _setting(key: str, written: Any, tree: Tree, where: Where) -> Setting | None:
    if written is None:
        return None
    if isinstance(written, list) and isinstance(written[0], FilteredValue):
        rules = [_rule(entry.filter, entry.value, tree.lines[*where, n]) for n, entry in enumerate(written)]
    else:
        rules = [_rule(None, written, tree.lines[where])]
    return Setting(key, tuple(rules))


def _rule(filter: str | None, value: Fraction | list[Fraction], line: int) -> Rule:
    return Rule(filter, tuple(value) if isinstance(value, list) else (value,), line)
