"""Compares the headers of all checkpoints with each other and with the recipe, before any tensor data is read.

Every problem of every checkpoint is found at once. What passes comes out as `Inputs`: the tensors to merge, with the
recipe's numbers settled for each.
"""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any

from .chat_template import settle_template
from .checkpoint import FLOAT_NAMES, Checkpoint, Tensor, collect, forget_headers, is_unicode, layer_of
from .companions import module_weights, unreadable
from .compatibility import differences, notes
from .depths import positions, side_problems, slice_problems
from .errors import CheckpointError, CpimergeError, IncompatibleError, RecipeError
from .hub_files import is_tokenizer
from .models import Locate, locate, open_model
from .plain_json import shown
from .plain_text import printable
from .plan_file import Vocabulary
from .quantized import quantization, refused, stale_config
from .recipe import Recipe, Setting, Task, matches
from .references import Reference, is_cached
from .ties import copies_in, judge
from .token_relations import vocab_sizes
from .vocabulary import Settled, settle

__all__ = ["Inputs", "TensorSpec", "check", "pools", "references_of"]

HEADER_DTYPES = {name: dtype for dtype, name in FLOAT_NAMES.items()}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of the merge: where it lies in every checkpoint, and the recipe's numbers for it.

    `sources` follow `Inputs.checkpoints`; `density`, `weight` and `t` follow the recipe's tasks.
    """

    name: str
    shape: tuple[int, ...]
    sources: tuple[Tensor, ...]
    dtype: str  # of the output, as safetensors spells it
    eligible: bool  # may have cores: floating-point and not excluded
    density: tuple[Fraction, ...]
    weight: tuple[Fraction, ...]
    t: tuple[Fraction | None, ...]

    @property
    def layer(self) -> str:
        return layer_of(self.name)

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def is_float(self) -> bool:
        return self.sources[0].is_float

    @property
    def source_bytes(self) -> int:
        """Bytes of this tensor in all checkpoints together."""
        return sum(info.nbytes for info in self.sources)


@dataclass(frozen=True)
class Inputs:
    """What a merge reads. `checkpoints`: the base, each task in recipe order, then the backbone if it is a path."""

    recipe: Recipe
    names: tuple[str, ...]  # of `checkpoints`: "base", the tasks' names, "backbone"
    checkpoints: tuple[Checkpoint, ...]
    tensors: tuple[TensorSpec, ...]  # natural-sorted by name
    notes: tuple[str, ...]
    chat_template: str | None = None  # of the output; None: the base's
    vocabulary: Vocabulary | None = None  # where theirs differ: the one that `checkpoints` are in the rows of

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all tensors in all checkpoints."""
        return sum(spec.source_bytes for spec in self.tensors)

    @property
    def directories(self) -> list[Path]:
        """Where the inputs lie, and no output may."""
        return [path for checkpoint in self.checkpoints for path in checkpoint.directories]

    @property
    def first_member(self) -> int:
        """Where the members of the blend begin among `checkpoints`: after the base, unless it is the backbone."""
        return 0 if self.recipe.backbone == "base" else 1


@dataclass
class _Findings:
    """Problems by who must act, in the order found, and notes."""

    recipe: list[str] = field(default_factory=list)
    checkpoints: list[str] = field(default_factory=list)
    incompatible: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def raise_any(self) -> None:
        """Raise one error with every problem; its class is that of the first kind present."""
        everything = self.recipe + self.checkpoints + self.incompatible
        kinds: list[tuple[list[str], type[CpimergeError]]] = [
            (self.recipe, RecipeError),
            (self.checkpoints, CheckpointError),
            (self.incompatible, IncompatibleError),
        ]
        for problems, kind in kinds:
            if problems:
                raise kind(everything)


def check(recipe: Recipe, find: Locate = locate) -> Inputs:
    """Open and compare everything that the recipe names, where `find` finds it.

    Reads headers, and of tensors only those that were saved twice (see ties.py).

    Raises RecipeError, CheckpointError or IncompatibleError, listing all problems of all checkpoints at once.
    """
    findings = _Findings(notes=list(recipe.notes))
    references = references_of(recipe)
    base = _open(recipe.base, None, find, findings)
    opened = {recipe.base: base}
    for reference in references.values():
        if reference not in opened:
            opened[reference] = _open(reference, base, find, findings)
    forget_headers()
    if base is not None:
        _check_base(base, recipe, findings)
        _judge(base, [other for other in opened.values() if other is not None and other is not base], findings)
    settled = _settle({name: opened[reference] for name, reference in references.items()}, recipe, findings)
    models = {reference: name for name, reference in references.items() if reference != recipe.base}
    for name in models.values() if base is not None else ():
        if name in settled.checkpoints:
            _compare(settled, name, findings)
    findings.raise_any()
    checkpoints = settled.checkpoints
    tensors = tuple(_specs(recipe, checkpoints))
    findings.recipe.extend(_budget_problems(recipe, tensors))
    findings.recipe.extend(_weight_problems(recipe, tensors))
    findings.notes.extend(_apart(recipe, checkpoints["base"], tensors))
    template = settle_template(recipe.chat_template, checkpoints, findings.checkpoints, findings.notes)
    findings.raise_any()
    return Inputs(
        recipe=recipe,
        names=tuple(checkpoints),
        checkpoints=tuple(checkpoints.values()),
        tensors=tensors,
        notes=tuple(map(printable, findings.notes)),  # what they quote may be no text that a file can hold
        chat_template=template,
        vocabulary=settled.vocabulary,
    )


def references_of(recipe: Recipe) -> dict[str, Reference]:
    """Name -> reference of every checkpoint, in the order of `Inputs.checkpoints`."""
    references = {"base": recipe.base} | {task.name: task.model for task in recipe.tasks}
    return references | ({"backbone": recipe.backbone} if isinstance(recipe.backbone, Reference) else {})


def _open(reference: Reference, base: Checkpoint | None, find: Locate, findings: _Findings) -> Checkpoint | None:
    try:
        located = find(reference, base is None)
        for path in filter(None, (located.path, located.adapter)):
            if not is_unicode(str(path)):
                raise CheckpointError(
                    f"{str(path)!r}: is not Unicode, so the plan cannot name it. Rename the directory"
                )
        checkpoint = open_model(located, base)
    except CheckpointError as error:
        findings.checkpoints.extend(error.problems)
        return None
    findings.checkpoints.extend(refused(checkpoint))
    findings.notes.extend(stale_config(checkpoint))
    findings.notes.extend(note for note in checkpoint.notes if note not in findings.notes)  # adapters share a model
    return checkpoint if quantization(checkpoint) is None else None  # its tensors compare with no others


def _check_base(base: Checkpoint, recipe: Recipe, findings: _Findings) -> None:
    """What only the base must do: have the tensors that filters speak of, and give the output its other files."""
    findings.recipe.extend(_filter_problems(recipe, list(base.tensors)))
    wrong = list(slice_problems(recipe, base.tensors))
    findings.recipe.extend(wrong or side_problems(recipe, base.tensors))
    with collect(base.path, findings.checkpoints):
        findings.checkpoints.extend(unreadable(base.path))
        findings.notes.extend(
            f"{file}: weights of another module, which are not merged; the output takes the base's"
            for file in module_weights(base.path)
        )
        findings.notes.extend(_without_tokenizer(base))


def _without_tokenizer(base: Checkpoint) -> Iterator[str]:
    """A note where the output gets no tokenizer because only the model itself was ever loaded from the Hub."""
    is_text = any(vocab_sizes(base.config, 0))
    if is_text and is_cached(base.path) and not any(map(is_tokenizer, os.listdir(base.path))):
        yield (
            f"{base.path}: the Hugging Face cache has no tokenizer of it, so the output gets none. "
            "Add --download to have it, if the Hub does"
        )


def _judge(base: Checkpoint, others: Sequence[Checkpoint], findings: _Findings) -> None:
    """Whether what was saved twice is equal, as far as the merge relies on it."""
    with collect(base.path, findings.checkpoints):
        problems, notes = judge(base, others)
        findings.incompatible.extend(problems)
        findings.notes.extend(notes)


def _settle(opened: dict[str, Checkpoint | None], recipe: Recipe, findings: _Findings) -> Settled:
    """Bring the vocabularies of those that could be opened together, if the base is there to compare with."""
    found = {name: checkpoint for name, checkpoint in opened.items() if checkpoint is not None}
    if "base" not in found:
        return Settled(found)
    settled = settle(found, recipe.vocabulary)
    findings.checkpoints.extend(settled.damaged)
    findings.incompatible.extend(settled.problems)
    findings.notes.extend(settled.notes)
    return settled


def _compare(settled: Settled, name: str, findings: _Findings) -> None:
    base, other = settled.checkpoints["base"], settled.checkpoints[name]
    findings.incompatible.extend(differences(base, other, settled.explained.get(name, frozenset())))
    with collect(other.path, findings.checkpoints):
        findings.notes.extend(notes(base, other, settled.vocabulary))


def _filter_problems(recipe: Recipe, names: list[str]) -> Iterator[str]:
    """A filter that matches no tensor is a mistake: name the nearest."""
    for key, filter, line in sorted(_filters(recipe), key=lambda found: found[2]):
        if not any(matches(filter, name) for name in names):
            where = f"{recipe.file or 'recipe'}:{line}: {key}"
            yield f"{where}: filter {shown(filter)} matches no tensor of the base; {_nearest(filter, names)}"


def _filters(recipe: Recipe) -> Iterator[tuple[str, str, int]]:
    """(key, filter, line) of every filter in the recipe."""
    for name in ("density", "weight", "t"):
        for setting in _settings(recipe, name):
            for rule in setting.rules:
                if rule.filter is not None:
                    yield rule.key, rule.filter, rule.line
    for exclude in recipe.exclude:
        yield "parameters.exclude", exclude.filter, exclude.line


def _settings(recipe: Recipe, name: str) -> Iterator[Setting]:
    """The recipe's own setting called `name`, then the tasks'."""
    owners: list[Recipe | Task] = [recipe, *recipe.tasks]
    settings: Iterator[Setting | None] = (getattr(owner, name) for owner in owners)
    return (setting for setting in settings if setting is not None)


def _nearest(filter: str, names: Iterable[str]) -> str:
    """The name, or dotted part of a name, that looks most like `filter`."""
    words = dict.fromkeys(part for name in names for part in (name, *name.split(".")))
    close = difflib.get_close_matches(filter.strip("*"), words, 1, 0.6)
    return f"did you mean {close[0]!r}?" if close else f"the first is {next(iter(words))!r}"


def _specs(recipe: Recipe, checkpoints: dict[str, Checkpoint]) -> Iterator[TensorSpec]:
    base = checkpoints["base"]
    place = positions(base.tensors, recipe.slices)
    for name, info in base.tensors.items():
        excluded = any(matches(exclude.filter, name) for exclude in recipe.exclude)

        def settled(of: Callable[[Task, str, Fraction, int], Any], name: str = name) -> tuple[Any, ...]:
            return tuple(of(task, name, place[name].depth, place[name].slices[0]) for task in recipe.tasks)

        yield TensorSpec(
            name=name,
            shape=info.shape,
            sources=tuple(checkpoint.tensors[name] for checkpoint in checkpoints.values()),
            dtype=HEADER_DTYPES[recipe.dtype] if recipe.dtype and info.is_float else info.dtype,
            eligible=info.is_float and not excluded,
            density=settled(recipe.density_of),
            weight=settled(recipe.weight_of),
            t=settled(recipe.t_of),
        )


def _budget_problems(recipe: Recipe, tensors: Iterable[TensorSpec]) -> Iterator[str]:
    """Tensors that share a budget must have one density for each task."""
    uneven: dict[tuple[str, int], dict[str, None]] = {}  # key and line of the setting -> pools, in order
    for (_, pool_name), pool in pools(tensors, recipe.scope).items():
        for number, task in enumerate(recipe.tasks):
            if len({spec.density[number] for spec in pool}) > 1:
                uneven.setdefault(_density_place(recipe, task), {})[pool_name] = None
    for (key, line), names in uneven.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        yield (
            f"{recipe.file or 'recipe'}:{line}: {key}: differs within {next(iter(names))}{more}, where scope: "
            f"{recipe.scope} has one budget. Write scope: tensor, or one density there"
        )


def _density_place(recipe: Recipe, task: Task) -> tuple[str, int]:
    """Key and line of the density that decides for a task: its own, else the recipe's."""
    rule = next(filter(None, (task.density, recipe.density))).rules[0]
    return rule.key, rule.line


def _weight_problems(recipe: Recipe, tensors: Iterable[TensorSpec]) -> Iterator[str]:
    """Equal shares of nothing: all weights 0, with a backbone that is a task."""
    backbone_weighs = recipe.backbone == "base" or isinstance(recipe.backbone, Reference)
    weightless = [spec.name for spec in tensors if spec.is_float and not any(spec.weight)]
    if not weightless or backbone_weighs:
        return
    rule = next(_settings(recipe, "weight")).rules[0]
    more = f" and {len(weightless) - 1} more" if len(weightless) > 1 else ""
    yield (
        f"{recipe.file or 'recipe'}:{rule.line}: {rule.key}: every task's weight is 0 for tensor "
        f"{weightless[0]!r}{more}. Give one of the tasks a weight there"
    )


def _apart(recipe: Recipe, base: Checkpoint, tensors: Iterable[TensorSpec]) -> Iterator[str]:
    """A note for each of the base's copies that may come out unlike its original."""
    specs = {spec.name: spec for spec in tensors}
    for twins in copies_in(base):
        copy, original = specs[twins.copy.name], specs[twins.original.name]
        numbers = [(spec.eligible, spec.density, spec.weight, spec.t) for spec in (copy, original)]
        if recipe.scope != "tensor" or numbers[0] != numbers[1]:
            yield (
                f"{base.path}: {copy.name} is a copy of {original.name}, and with these parameters they may come out "
                "different, so that they are tied no longer. To have one only, load the base with transformers and "
                "save it"
            )


def pools(tensors: Iterable[TensorSpec], scope: str) -> dict[tuple[str, str], list[TensorSpec]]:
    """The tensors by the budget they share (METHOD §1): each its own, a layer's, or the whole model's.

    Tensors without cores are their own pools under every scope. Keys are the kind of pool and its name.
    """
    result: dict[tuple[str, str], list[TensorSpec]] = {}
    for spec in tensors:
        layer = repr(spec.layer) if spec.layer else "the tensors outside the layers"
        shared = {"tensor": repr(spec.name), "layer": layer, "global": "the model"}[scope]
        key = (scope, shared) if spec.eligible else ("tensor", repr(spec.name))
        result.setdefault(key, []).append(spec)
    return result
