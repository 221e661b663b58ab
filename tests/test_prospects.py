"""What a plan says of tasks that look wrong, on tiny checkpoints whose numbers are known."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from checkpoints import save, write_recipe

import cpimerge
from cpimerge.plan_file import Plan
from cpimerge.prospects import UNEQUAL, UNEQUAL_KEPT, size, unequal

Tensors = dict[str, torch.Tensor]
LARGE = "model.layers.0.w"
BASE_SIZE = 2.0  # the mean magnitude of the base's weights


def base() -> Tensors:
    signs = torch.tensor([1.0, -1.0]).repeat(5000)
    return {"model.layers.0.w": (BASE_SIZE * signs).reshape(100, 100), "model.layers.1.w": BASE_SIZE * signs[:30]}


def moved(size: float, seed: int = 0) -> Tensors:
    """The base with updates of mean magnitude `size`, in directions of their own."""
    generator = torch.Generator().manual_seed(seed)
    signs = {name: torch.randint(0, 2, tensor.shape, generator=generator) * 2 - 1 for name, tensor in base().items()}
    steps = {name: torch.rand(tensor.shape, generator=generator) + 0.5 for name, tensor in base().items()}
    return {name: tensor + size * signs[name] * steps[name] for name, tensor in base().items()}


def apart(step: float, seed: int) -> Tensors:
    """The base with every element `step` away, in directions of their own."""
    generator = torch.Generator().manual_seed(seed)
    signs = {name: torch.randint(0, 2, tensor.shape, generator=generator) * 2 - 1 for name, tensor in base().items()}
    return {name: tensor + step * signs[name] for name, tensor in base().items()}


def notes(home: Path, experts: Mapping[str, Tensors], **parameters: object) -> list[str]:
    save(home / "base", base())
    for name, tensors in experts.items():
        save(home / name, tensors)
    models = [{"model": home / name} for name in experts]
    settings = {"density": 0.1, "stages": [[name] for name in experts]} | parameters
    write_recipe(home / "recipe.yml", base_model=home / "base", models=models, parameters=settings)
    return cpimerge.plan(home / "recipe.yml", home / "plan", threads=1, force=True).notes


def test_nothing_is_said_of_ordinary_updates(tmp_path: Path) -> None:
    assert notes(tmp_path, {"math": moved(0.01, 1), "code": moved(0.01, 2), "chat": moved(0.015, 3)}) == []


def test_a_task_that_is_the_base(tmp_path: Path) -> None:
    assert notes(tmp_path, {"math": moved(0.01), "code": base()}) == [
        "'code' is the base: no element differs, so it has no core and weakens the other updates. "
        "Leave it out, or correct its path"
    ]


def test_two_tasks_that_are_one(tmp_path: Path) -> None:
    experts = {"math": moved(0.01, 1), "code": moved(0.01, 2), "chat": moved(0.01, 1)}
    assert "'math' and 'chat' are the same model, which counts twice. Leave one of them out" in notes(tmp_path, experts)


def test_two_tasks_that_are_both_the_base_are_told_once_each(tmp_path: Path) -> None:
    assert len(notes(tmp_path, {"math": base(), "code": base()})) == 2


@pytest.mark.parametrize(("step", "noted"), [(0.99, False), (1.1, True)])
def test_an_update_as_large_as_the_weights(tmp_path: Path, step: float, noted: bool) -> None:
    """From half of them on; every element of the base has the size 2, and of this update exactly `step`."""
    task = {name: tensor + step for name, tensor in base().items()}
    found = notes(tmp_path, {"math": task})
    expected = (
        f"the update of 'math' is {step / BASE_SIZE:.2g} times as large as the weights of the base: it is hardly a "
        "fine-tune of this base, and what is fused with it will hardly work. Take the model that it was trained from "
        "as base_model"
    )
    assert found == [expected] * noted


def test_a_base_without_weights_says_nothing_of_size(tmp_path: Path) -> None:
    zeros = {name: torch.zeros_like(tensor) for name, tensor in base().items()}
    save(tmp_path / "base", zeros)
    save(tmp_path / "math", {name: tensor + 1 for name, tensor in zeros.items()})
    write_recipe(tmp_path / "recipe.yml", base_model=tmp_path / "base", models=[{"model": tmp_path / "math"}])
    assert cpimerge.plan(tmp_path / "recipe.yml", tmp_path / "plan", threads=1).notes == []


# --- two that descend from one ----------------------------------------------------------------------


@pytest.mark.parametrize(("against", "noted"), [(1, True), (2, False)])
def test_what_was_trained_from_another_task(tmp_path: Path, against: int, noted: bool) -> None:
    """Of 1,003 elements in both cores (⌊0.1·10000⌋ + ⌊0.1·30⌋), one or two move in opposite directions.

    Half do by chance, so one is 2 of 1,000 beyond that.
    """
    first = moved(0.01)
    second = {name: tensor + (tensor - base()[name]) / 10 for name, tensor in first.items()}
    update = (first[LARGE] - base()[LARGE]).flatten()
    for place in update.abs().argsort(descending=True)[:against]:
        second[LARGE].view(-1)[place] = base()[LARGE].flatten()[place] - 1.1 * update[place]
    found = notes(tmp_path, {"math": first, "code": second})
    expected = (
        "'math' and 'code' move 99.9% of what their cores share in the same direction, 50.0% by chance, as models do "
        "of which one was trained from the other, or both from another model than this base: what they have in common "
        "would count twice. If so, take that model as base_model, or leave one of them out"
    )
    assert found == [expected] * noted


@pytest.mark.parametrize(("density", "noted"), [(0.085, True), (0.075, False)])
def test_hundreds_of_elements_are_needed_to_tell(tmp_path: Path, density: float, noted: bool) -> None:
    """Half of 852 is more than 400, half of 752 is not."""
    first = moved(0.01)
    second = {name: tensor + (tensor - base()[name]) / 10 for name, tensor in first.items()}
    found = notes(tmp_path, {"math": first, "code": second}, density=density)
    assert [note.startswith("'math' and 'code' move 100.0% of what") for note in found] == [True] * noted


def test_shrinking_alike_is_no_descent(tmp_path: Path) -> None:
    """Weight decay: all weights of both tasks move towards zero, and 1 of 100 away from it, others in each task."""
    experts = {}
    for seed, name in enumerate(("math", "code")):
        generator = torch.Generator().manual_seed(seed)
        shares = {key: torch.rand(tensor.shape, generator=generator) / 100 for key, tensor in base().items()}
        shrunk = {key: 1 - share * (1 - 2 * (share > 0.0099)) for key, share in shares.items()}
        experts[name] = {key: tensor * shrunk[key] for key, tensor in base().items()}
    assert notes(tmp_path, experts, density=1) == []
    pair = Plan.load(tmp_path / "plan").pairs[0]
    assert pair.aligned > 0.97 * pair.compared
    assert abs(pair.kappa) < 0.1


# --- updates of unequal size ------------------------------------------------------------------------


def test_unequal_by_hand() -> None:
    assert unequal([3.0, 12.0]) == 4
    assert unequal([12.0, 1.0, 3.0]) == 6
    assert unequal([2.0, 12.0, 1.0, 3.0]) == 6
    assert unequal([1.0, 1.0, 1.0]) == 1


def test_sizes_are_the_mean_magnitudes(tmp_path: Path) -> None:
    task = moved(0.01)
    notes(tmp_path, {"math": task})
    every = torch.cat([(tensor - base()[name]).double().abs().flatten() for name, tensor in task.items()])
    (planned,) = Plan.load(tmp_path / "plan").tasks
    assert size(planned) == pytest.approx(float(every.mean()), rel=1e-6)
    assert size(planned.model_copy(update={"elements": 0, "core": 0})) == 0


@pytest.mark.parametrize(
    ("singular_values", "limit"), [("level", UNEQUAL), ("keep", UNEQUAL_KEPT)], ids=["level", "keep"]
)
@pytest.mark.parametrize(("beyond", "noted"), [(-0.1, False), (0.1, True)])
def test_one_update_far_larger_than_the_others(
    tmp_path: Path, beyond: float, noted: bool, singular_values: str, limit: float
) -> None:
    """All have the same magnitudes times a factor, in other directions."""
    times = limit + beyond
    experts = {"math": apart(0.01, 1), "code": apart(0.01 * times, 2), "chat": apart(0.002, 3), "law": apart(0.011, 4)}
    found = notes(tmp_path, experts, singular_values=singular_values)
    expected = (
        f"the update of 'code' is {times:.2g} times as large as the median of the other tasks': the fusion may be "
        "mostly 'code', and the others may fall below the base. Compare it with a plain average, give it a smaller "
        "weight, or take an earlier checkpoint of it (docs/payoff.md)"
    )
    assert found == [expected] * noted


@pytest.mark.parametrize(
    ("weighed", "noted"),
    [
        ({"density": 0, "space": "weights"}, False),
        ({"density": 0}, True),
        ({"space": "weights"}, True),
        ({"weight": 1}, False),
    ],
)
def test_who_averages_or_weighs_the_models_is_not_told(tmp_path: Path, weighed: dict[str, object], noted: bool) -> None:
    assert len(notes(tmp_path, {"math": apart(0.09, 1), "code": apart(0.01, 2)}, **weighed)) == noted


def test_the_weights_are_sampled_everywhere(tmp_path: Path) -> None:
    """A base whose largest tensor is mostly zeros: at both ends, or in the middle."""
    generator = torch.Generator().manual_seed(0)
    for filled in (slice(0, 20), slice(40, 60), slice(80, 100)):
        start = {LARGE: torch.zeros(100, 100)}
        start[LARGE][filled] = 2.0  # a fifth: 0.4 in the mean
        task = {LARGE: start[LARGE] + 0.1 * torch.randn(100, 100, generator=generator)}  # 0.08, a fifth of that
        save(tmp_path / "base", start)
        save(tmp_path / "math", task)
        write_recipe(tmp_path / "recipe.yml", base_model=tmp_path / "base", models=[{"model": tmp_path / "math"}])
        assert cpimerge.plan(tmp_path / "recipe.yml", tmp_path / "plan", threads=1, force=True).notes == []


def test_of_two_it_is_the_other(tmp_path: Path) -> None:
    (note,) = notes(tmp_path, {"math": apart(0.09, 1), "code": apart(0.01, 2)})
    assert note.startswith("the update of 'math' is 9 times as large as that of the other task: ")


def test_a_copy_of_the_base_is_not_one_of_the_others(tmp_path: Path) -> None:
    found = notes(tmp_path, {"math": apart(0.05, 1), "code": apart(0.05, 2), "chat": base()})
    assert [note.partition(":")[0] for note in found] == ["'chat' is the base"]
