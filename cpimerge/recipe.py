"""The YAML that a user wrote → one frozen `Recipe`, or one error that lists everything wrong with it.

    text → yamltree (data with lines) → recipe_schema (structure, values) → recipe_checks (values together) → Recipe

Every problem is a line such as `recipe.yml:12: parameters.densty: unknown key; did you mean 'density'?`. Only
the recipe itself is judged: whether a directory exists or a filter matches a tensor is for preflight to find
out. Numbers are exact, because the size of a core is ⌊p·n⌋ of the decimal as written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

from .errors import RecipeError
from .recipe_checks import check_together
from .recipe_models import base_entries, groups, task_name, tasks
from .recipe_schema import (
    BACKBONE_WORDS,
    KEYS_OF_A_MODEL,
    Conflict,
    Document,
    Dtype,
    FilteredValue,
    Granularity,
    Scope,
    Seeded,
    SingularValues,
    Space,
    Vocabulary,
    key_hint,
)
from .references import Reference, parse_reference
from .yamltree import Tree, Unreadable, Where, check, key_text, read_tree

__all__ = ["Exclude", "Recipe", "Rule", "Setting", "Task", "load_recipe", "matches", "parse_recipe"]

DEFAULT_DENSITY = Fraction(1, 100)
DEFAULT_WEIGHT = Fraction(1)
MAX_BYTES = 1_000_000
TAKEN_AS_WRITTEN = ("scope", "tau", "conflict", "space", "rest", "singular_values", "granularity")


@dataclass(frozen=True)
class Rule:
    """One or more numbers for the tensors that `filter` matches; None matches every tensor.

    Several values are a gradient: spread evenly over the depth of the model or slice, straight lines between them.
    A rule of a slice speaks of that slice's tensors only. `key` is where it stands: `models[0].parameters.density`.
    """

    filter: str | None
    values: tuple[Fraction, ...]
    line: int
    key: str = field(default="", compare=False)
    slice: int | None = None

    def at(self, depth: Fraction) -> Fraction:
        """The exact value at a depth from 0 (first layer) to 1 (last). Raises ValueError outside."""
        if not 0 <= depth <= 1:
            raise ValueError(f"depth must be from 0 to 1, got {depth}")
        if len(self.values) == 1:  # as mostly, for each of many tensors
            return self.values[0]
        position = depth * (len(self.values) - 1)
        left = int(position)
        right = min(left + 1, len(self.values) - 1)
        return self.values[left] + (position - left) * (self.values[right] - self.values[left])


@dataclass(frozen=True)
class Setting:
    """What the user wrote for `key`: "density", "weight" or "t"."""

    key: str
    rules: tuple[Rule, ...]

    def at(self, tensor: str, depth: Fraction, slice: int = 0) -> Fraction | None:
        """The first matching rule's value at a depth from 0 to 1; None where no rule matches the tensor."""
        for rule in self.rules:
            if rule.slice in (None, slice) and (rule.filter is None or matches(rule.filter, tensor)):
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
class Slice:
    """The layers from `first` to before `stop`, which have parameters of their own."""

    first: int
    stop: int
    line: int


@dataclass(frozen=True)
class Recipe:
    """A valid recipe. Nothing that it refers to need exist.

    `order` is "recipe" or the seed of a random order. `stages` holds task names; None: the overlaps decide.
    `backbone` is "last", "base", a task's name (all str), or another checkpoint (Reference).
    `singular_values` "level" has no effect where `space` is weights. `dtype` is the output's; None keeps each tensor's.
    `vocabulary` is the output's; None: all models must have one.
    `lines` has the line of every key: `parameters.rest`. `text` is the YAML as written.
    """

    file: Path | None
    base: Reference
    tasks: tuple[Task, ...]
    density: Setting | None = None
    weight: Setting | None = None
    t: Setting | None = None
    scope: Scope = "tensor"
    tau: Fraction | Literal["auto"] = "auto"
    order: Literal["recipe"] | int = "recipe"
    stages: tuple[tuple[str, ...], ...] | None = None
    backbone: str | Reference = "last"
    conflict: Conflict = "mean"
    space: Space = "delta"
    rest: Fraction = Fraction(1)
    singular_values: SingularValues = "level"
    granularity: Granularity = "tensor"
    exclude: tuple[Exclude, ...] = ()
    dtype: Dtype | None = None
    vocabulary: Vocabulary | None = None
    chat_template: str | None = None
    slices: tuple[Slice, ...] = ()
    notes: tuple[str, ...] = ()
    lines: Mapping[str, int] = field(default_factory=dict, hash=False, repr=False)
    text: str = field(default="", repr=False)

    @property
    def levels(self) -> bool:
        """Whether the singular values of what is outside the cores are made level."""
        return self.space == "delta" and self.rest > 0 and self.singular_values == "level"

    def density_of(self, task: Task, tensor: str, depth: Fraction, slice: int = 0) -> Fraction:
        """The share of elements in the task's core, 0 to 1."""
        density = _resolve(task.density, self.density, tensor, depth, slice)
        return DEFAULT_DENSITY if density is None else density

    def weight_of(self, task: Task, tensor: str, depth: Fraction, slice: int = 0) -> Fraction:
        """The task's weight in the blend, 0 or more."""
        weight = _resolve(task.weight, self.weight, tensor, depth, slice)
        return DEFAULT_WEIGHT if weight is None else weight

    def t_of(self, task: Task, tensor: str, depth: Fraction, slice: int = 0) -> Fraction | None:
        """The constant factor with which the task is folded in, 0 to 1; None: its share by weight."""
        return _resolve(task.t, self.t, tensor, depth, slice)


def _resolve(own: Setting | None, shared: Setting | None, tensor: str, depth: Fraction, slice: int) -> Fraction | None:
    """A model's own setting where it speaks of the tensor, else the recipe's."""
    value = own.at(tensor, depth, slice) if own else None
    return shared.at(tensor, depth, slice) if value is None and shared else value


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
    lists = [tasks(tree, group, directory) for group in groups(tree)]
    found = tuple(_task(document, tree, list(places), directory) for places in zip(*lists, strict=True))
    backbone = shared.backbone or "last"
    is_name = backbone in (*BACKBONE_WORDS, *(task.name for task in found))
    return Recipe(
        file=file,
        base=parse_reference(document.base_model, directory),
        tasks=found,
        order=shared.order.seed if isinstance(shared.order, Seeded) else "recipe",
        stages=tuple(tuple(stage) for stage in shared.stages) if shared.stages else None,
        backbone=backbone if is_name else parse_reference(backbone, directory),
        exclude=tuple(
            Exclude(filter, tree.lines["parameters", "exclude", index])
            for index, filter in enumerate(shared.exclude or ())
        ),
        dtype=document.out_dtype or document.dtype,
        vocabulary=_vocabulary(document),
        chat_template=document.chat_template,
        slices=tuple(_slices(document, tree)),
        notes=tuple(_notes(document, tree, directory, file)),
        lines={key_text(where): line for where, line in tree.lines.items() if where},
        text=text,
        **_settings(document, tree, [()]),
        **{key: value for key in TAKEN_AS_WRITTEN if (value := getattr(shared, key)) is not None},
    )


def _task(document: Document, tree: Tree, places: list[Where], directory: Path) -> Task:
    """The task that stands at `places`: one under `models`, or one in every slice."""
    where = places[0]
    return Task(
        name=task_name(tree, where, directory),
        model=parse_reference(_at(document, where).model, directory),
        line=tree.lines[where],
        **_settings(document, tree, places),
    )


def _at(node: Any, where: Where) -> Any:
    """What the schema has at a place."""
    for step in where:
        node = node[step] if isinstance(step, int) else getattr(node, step)
    return node


def _settings(document: Document, tree: Tree, places: list[Where]) -> dict[str, Any]:
    """What is set at these places. In a slice, what its source says comes before what the slice says."""
    owners = [owner for place in places for owner in ((place, place[:2]) if place[:1] == ("slices",) else (place,))]
    settings = {}
    for key in KEYS_OF_A_MODEL:
        rules = tuple(rule for owner in owners for rule in _rules(document, tree, (*owner, "parameters", key)))
        settings[key] = Setting(key, rules) if rules else None
    return settings


def _rules(document: Document, tree: Tree, where: Where) -> Iterator[Rule]:
    written = _at(document, where)
    entries: list[tuple[str | None, Any, Where]] = []
    if isinstance(written, list) and isinstance(written[0], FilteredValue):
        entries = [(entry.filter, entry.value, (*where, number)) for number, entry in enumerate(written)]
    elif isinstance(written, FilteredValue):
        entries = [(written.filter, _at(written, ("value",)), where)]
    elif written is not None:
        entries = [(None, written, where)]
    slice = int(where[1]) if where[0] == "slices" else None
    for filter, value, place in entries:
        values = tuple(value) if isinstance(value, list) else (value,)
        yield Rule(filter, values, tree.lines[place], key_text(where), slice)


def _vocabulary(document: Document) -> Vocabulary | None:
    """cpimerge's own word, or that of mergekit's recipes, where the base may also be called by its path."""
    source = document.tokenizer.source if document.tokenizer else document.tokenizer_source
    if source is None:
        return document.vocabulary
    return "union" if source == "union" else "base"


def _slices(document: Document, tree: Tree) -> Iterator[Slice]:
    for number, slice in enumerate(document.slices or ()):
        yield Slice(*slice.sources[0].layer_range, tree.lines["slices", number, "sources", 0, "layer_range"])


def _notes(document: Document, tree: Tree, directory: Path, file: Path | None) -> Iterator[str]:
    """What of the recipe has no effect, though nothing is wrong with it."""
    name = file or "recipe"
    for where in base_entries(tree, directory):
        yield f"{name}:{tree.lines[where]}: {key_text(where)}: is the base, which is read anyway; it is no task"
    for owner in ((), *(("slices", number) for number in range(len(document.slices or ())))):
        if (where := (*owner, "parameters", "int8_mask")) in tree.lines:
            yield f"{name}:{tree.lines[where]}: {key_text(where)}: changes nothing; cores are stored as bitmaps anyway"
