"""Where each tensor lies in its model: its depth, by which gradients go, and its slice, if a recipe has slices.

As in mergekit: a gradient runs over the layers of the model, or of the slice; what is in no layer has its first value;
and with slices, what comes before the layers goes with the first slice and what comes after them with the last.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction

from .checkpoint import Tensor, layer_of
from .recipe import Recipe, Slice

__all__ = ["Position", "positions", "side_problems", "slice_problems"]

# What tensors outside the layers are called. Which side they are on is told by name, and else not known.
AFTER_EMBEDDINGS = re.compile(r"embed_out")
BEFORE = re.compile(r"embed|embd|(^|[._])emb(\.|$)|wte|wpe|(^|[._])pe(\.|$)|(^|\.)shared\.")
AFTER = re.compile(r"norm|ln_f|(^|\.)ln(\.|$)|head|output|score|classifier|pooler|(^|\.)cls\.|vocab_")


@dataclass(frozen=True)
class Position:
    """`depth` from 0 (first layer) to 1 (last) of the model or of the slice; `slices`: the slice, or all it may be."""

    depth: Fraction
    slices: tuple[int, ...] = (0,)


def positions(names: Iterable[str], slices: tuple[Slice, ...]) -> dict[str, Position]:
    """Where each of a model's tensors lies. With slices, they must divide its layers (see `slice_problems`)."""
    places = {name: _place(name) for name in names}
    if slices:
        return {name: _in_slices(name, place, slices) for name, place in places.items()}
    last = _last(places)
    return {name: Position(_depth(number, last.get(stack, 0))) for name, (stack, number) in places.items()}


def _place(name: str) -> tuple[str, int | None]:
    """The stack of layers that a tensor is in, and its layer; None outside the layers."""
    *stack, number = layer_of(name).rstrip(".").split(".")
    return ".".join(stack), int(number) if number else None


def _last(places: Mapping[str, tuple[str, int | None]]) -> dict[str, int]:
    """The last layer of each stack."""
    last: dict[str, int] = {}
    for stack, number in places.values():
        if number is not None:
            last[stack] = max(last.get(stack, 0), number)
    return last


def _depth(number: int | None, last: int) -> Fraction:
    """mergekit takes the end of a gradient where there is but one layer."""
    if number is None:
        return Fraction(0)
    return Fraction(number, last) if last else Fraction(1)


def _in_slices(name: str, place: tuple[str, int | None], slices: tuple[Slice, ...]) -> Position:
    _, number = place
    if number is None:
        return Position(Fraction(0), _outer_slices(name, len(slices)))
    index = next(index for index, slice in enumerate(slices) if number < slice.stop)
    first, stop = slices[index].first, slices[index].stop
    return Position(_depth(number - first, stop - first - 1), (index,))


def _outer_slices(name: str, count: int) -> tuple[int, ...]:
    if count == 1:
        return (0,)
    if BEFORE.search(name) and not AFTER_EMBEDDINGS.search(name):
        return (0,)
    return (count - 1,) if AFTER_EMBEDDINGS.search(name) or AFTER.search(name) else (0, count - 1)


def slice_problems(recipe: Recipe, names: Iterable[str]) -> Iterator[str]:
    """The slices must divide the layers of the one stack that the base has, and leave out none."""
    if not recipe.slices:
        return
    last = _last({name: _place(name) for name in names})
    end = recipe.slices[-1]
    where = f"{recipe.file or 'recipe'}:{end.line}: slices"
    if len(last) != 1:
        stacks = ", ".join(repr(stack) for stack in last) or "none"
        yield f"{where}: one stack of layers is needed, and the base has {stacks}. List the checkpoints under models"
    elif (layers := next(iter(last.values())) + 1) != end.stop:
        fault = "leave out layers" if end.stop < layers else "have layers too many"
        yield (
            f"{where}: {fault}: they stop before layer {end.stop}, and the base has {layers}. Give them "
            f"[0, {layers}] together, or use mergekit for a merge of parts"
        )


def side_problems(recipe: Recipe, tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """A tensor outside the layers may go with the first or the last slice only where that makes no difference."""
    for name, position in positions(tensors, recipe.slices).items():
        first, last = position.slices[0], position.slices[-1]
        if first != last and tensors[name].is_float and _numbers(recipe, name, first) != _numbers(recipe, name, last):
            where = f"{recipe.file or 'recipe'}:{recipe.slices[0].line}: slices"
            yield (
                f"{where}: tensor {name!r} is outside the layers, and its name does not tell whether before or after "
                "them. Give it the same parameters in the first and the last slice, by a filter"
            )


def _numbers(recipe: Recipe, name: str, slice: int) -> list[Fraction | None]:
    """All that the recipe sets for a tensor outside the layers."""
    start = Fraction(0)
    settings = (recipe.density_of, recipe.weight_of, recipe.t_of)
    return [of(task, name, start, slice) for task in recipe.tasks for of in settings]
