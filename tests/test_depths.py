"""Where tensors lie: depths for gradients, and slices."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest

from cpimerge.checkpoint import StoredTensor, Tensor
from cpimerge.depths import Position, positions, side_problems, slice_problems
from cpimerge.recipe import Recipe, Slice, parse_recipe

NAMES = [
    "model.embed_tokens.weight",
    *(f"model.layers.{number}.mlp.weight" for number in range(5)),
    "model.norm.weight",
    "lm_head.weight",
]


def sliced(*ranges: tuple[int, int], extra: str = "") -> Recipe:
    """A recipe with these slices; the first of them has a density of its own."""
    slices = "".join(
        f"  - sources: [{{model: ./a, layer_range: [{first}, {stop}]}}]\n"
        + ("    parameters: {density: 0.5}\n" if number == 0 else "")
        for number, (first, stop) in enumerate(ranges)
    )
    text = f"merge_method: cpi\nbase_model: ./base\nslices:\n{slices}{extra}"
    return parse_recipe(text, Path("recipe.yml"), Path("/"))


def tensors(names: list[str], dtype: str = "F32") -> dict[str, Tensor]:
    return {name: StoredTensor(name, dtype, (1,), 4, Path(), 0) for name in names}


def test_depths_of_a_whole_model() -> None:
    quarters = [Position(Fraction(number, 4)) for number in range(5)]
    start = Position(Fraction(0))
    assert list(positions(NAMES, ()).values()) == [start, *quarters, start, start]


def test_a_lone_layer_is_at_the_end() -> None:
    """As in mergekit."""
    assert positions(["layers.0.w", "embed", "other.0.w", "other.1.w"], ()) == {
        "layers.0.w": Position(Fraction(1)),
        "embed": Position(Fraction(0)),
        "other.0.w": Position(Fraction(0)),
        "other.1.w": Position(Fraction(1)),
    }


def test_depths_in_slices() -> None:
    slices = (Slice(0, 3, 1), Slice(3, 4, 2), Slice(4, 5, 3))
    expected = [(Fraction(0), 0), (Fraction(0), 0), (Fraction(1, 2), 0), (Fraction(1), 0)]
    expected += [(Fraction(1), 1), (Fraction(1), 2), (Fraction(0), 2), (Fraction(0), 2)]
    found = positions(NAMES, slices)
    assert [(place.depth, *place.slices) for place in found.values()] == expected


@pytest.mark.parametrize(
    ("ranges", "names", "problem"),
    [
        ([(0, 3), (3, 5)], NAMES, None),
        (
            [(0, 3), (3, 4)],
            NAMES,
            "leave out layers: they stop before layer 4, and the base has 5. Give them [0, 5] together",
        ),
        (
            [(0, 3), (3, 8)],
            NAMES,
            "have layers too many: they stop before layer 8, and the base has 5. Give them [0, 5] together",
        ),
        (
            [(0, 1)],
            ["a.0.w", "b.0.w"],
            "one stack of layers is needed, and the base has 'a', 'b'. List the checkpoints",
        ),
        ([(0, 1)], ["embed"], "one stack of layers is needed, and the base has none. List the checkpoints"),
    ],
)
def test_slices_cover_the_layers(ranges: list[tuple[int, int]], names: list[str], problem: str | None) -> None:
    recipe = sliced(*ranges)
    found = list(slice_problems(recipe, names))
    if problem is None:
        assert found == []
    else:
        (text,) = found
        assert text.startswith(f"recipe.yml:{recipe.slices[-1].line}: slices: {problem}")


def test_without_slices_there_is_nothing_to_cover() -> None:
    recipe = parse_recipe("merge_method: cpi\nbase_model: b\nmodels: [{model: a}]", None, Path("/"))
    assert list(slice_problems(recipe, ["a.0.w", "b.0.w"])) == []
    assert list(side_problems(recipe, tensors(["a.0.w", "scale"]))) == []


def test_a_tensor_on_an_unknown_side() -> None:
    """Only where the first and the last slice set it differently, and only if it has floats."""
    names = [*NAMES, "scale"]
    (problem,) = side_problems(sliced((0, 3), (3, 5)), tensors(names))
    assert problem.startswith("recipe.yml:4: slices: tensor 'scale' is outside the layers, and its name does not tell")
    assert list(side_problems(sliced((0, 3), (3, 5)), tensors(names, "I64"))) == []
    assert list(side_problems(sliced((0, 3), (3, 5), extra="parameters: {density: 0.5}"), tensors(names))) == []
    assert list(side_problems(sliced((0, 5)), tensors(names))) == []
