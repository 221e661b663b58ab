"""What goes on around a step: steps that fail, that call others, and closures."""

from __future__ import annotations

import copy
import functools
import gc
import weakref
from typing import Any

import pytest
import torch
from staged import Masks, Small, World, make_world
from test_frozen import same_bits, set_gradients
from torch import optim

from cpimerge.errors import IncompatibleError
from cpimerge.train import FrozenCores


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("staged"))


@pytest.fixture
def masks(world: World) -> Masks:
    return world.masks(3, "prior")


def moved(model: torch.nn.Module, start: torch.nn.Module, masks: Masks) -> int:
    """How many frozen elements."""
    pairs = zip(model.named_parameters(), start.parameters(), strict=True)
    return sum(int((~same_bits(value, before))[masks[name]].sum()) for (name, value), before in pairs)


def refuse(*_: Any) -> None:
    raise torch.OutOfMemoryError


def attached(world: World) -> tuple[Small, Small, optim.Optimizer, FrozenCores]:
    """A model, what it started from, its optimizer and what is frozen of it."""
    model = Small()
    optimizer = optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1, foreach=True)
    frozen = FrozenCores(world.plan, model, stage=3)
    frozen.attach(optimizer)
    return model, copy.deepcopy(model), optimizer, frozen


def fail(model: Small, optimizer: optim.Optimizer) -> None:
    """In the middle of AdamW's foreach step, after weight decay has moved everything."""
    set_gradients(model, 0, strange=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "_foreach_sqrt", refuse)
        with pytest.raises(torch.OutOfMemoryError):
            optimizer.step()


# --- steps that fail --------------------------------------------------------------------------------


@pytest.mark.parametrize("failures", [1, 3])
def test_what_a_step_moved_that_failed_is_put_back_before_the_next(world: World, masks: Masks, failures: int) -> None:
    model, start, optimizer, frozen = attached(world)
    for _ in range(failures):
        fail(model, optimizer)
        assert moved(model, start, masks) > 60  # of 75: two are zero, which decay does not move
        assert len(frozen._attached[0]._open) == 1
    optimizer.step()
    assert moved(model, start, masks) == 0
    assert frozen._attached[0]._open == []


def test_or_by_detaching(world: World, masks: Masks) -> None:
    model, start, optimizer, frozen = attached(world)
    fail(model, optimizer)
    frozen.detach()
    assert moved(model, start, masks) == 0
    optimizer.step()
    assert moved(model, start, masks) > 60


def test_a_failed_step_keeps_nothing_of_its_callers(world: World) -> None:
    model, _, optimizer, _ = attached(world)

    def batch() -> weakref.ref[torch.Tensor]:
        activations = torch.ones(3)
        fail(model, optimizer)
        return weakref.ref(activations)

    gc.collect()
    gc.disable()
    try:
        assert batch()() is None
    finally:
        gc.enable()


def test_what_was_changed_since_the_failure_cannot_be_put_back(world: World, masks: Masks) -> None:
    model, _, optimizer, frozen = attached(world)
    fail(model, optimizer)
    model.hidden.to(torch.float64)
    model.norm.weight.data = torch.ones(9, 2)[:, 0]
    with pytest.raises(IncompatibleError, match=r"'hidden\.weight': was changed after a step that failed") as caught:
        optimizer.step()
    assert len(caught.value.problems) == sum(bool(masks[f"hidden.{x}"].any()) for x in ("weight", "bias")) + 1
    before = copy.deepcopy(model)
    frozen.detach()
    assert all(torch.equal(x, y) for x, y in zip(model.parameters(), before.parameters(), strict=True))


def test_detaching_lets_go_of_all_even_if_one_cannot_be_put_back(world: World, masks: Masks) -> None:
    model = Small()
    parameters = list(model.parameters())
    optimizers = [optim.AdamW(part, weight_decay=0.1, foreach=True) for part in (parameters[:2], parameters[2:])]
    frozen = FrozenCores(world.plan, model, stage=3)
    start = copy.deepcopy(model)
    for optimizer in optimizers:
        frozen.attach(optimizer)
        fail(model, optimizer)
    model.embed.to(torch.float64)
    with pytest.raises(IncompatibleError, match=r"'embed\.weight'"):
        frozen.detach()
    model.embed.to(torch.float32)
    others = {name: mask for name, mask in masks.items() if name != "embed.weight"}
    assert moved(model, start, others | {"embed.weight": torch.zeros(11, 7, dtype=torch.bool)}) == 0
    assert frozen._attached == []
    for optimizer in optimizers:
        assert not optimizer._optimizer_step_pre_hooks
        assert not optimizer._optimizer_step_post_hooks


class Retrying(optim.SGD):
    """Moves, calls its parent's step, which fails, moves, calls it again, and moves."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, lr)
        optim.SGD([torch.zeros(1, requires_grad=True)])  # from here on the parent's `step` has hooks
        self.failures = 0

    def move(self) -> None:
        with torch.no_grad():
            for parameter in self.param_groups[0]["params"]:
                parameter.add_(1)

    def closure(self) -> float:
        self.move()
        self.failures += 1
        if self.failures % 2:
            raise ArithmeticError
        return 0.0

    def step(self, closure: Any = None) -> Any:
        self.move()
        try:
            return super().step(self.closure)
        except ArithmeticError:
            self.move()
            if closure is not None:  # it was the last try
                raise
            return super().step(self.closure)
        finally:
            self.move()


def test_a_step_within_a_step_that_fails(world: World, masks: Masks) -> None:
    model = Small()
    start = copy.deepcopy(model)
    optimizer = Retrying(model.parameters(), lr=0.1)
    frozen = FrozenCores(world.plan, model, stage=3)
    frozen.attach(optimizer)
    for again in range(2):
        set_gradients(model, again, strange=False)
        optimizer.step()
        assert moved(model, start, masks) == 0
        with pytest.raises(ArithmeticError):
            optimizer.step(lambda: 0.0)
        assert moved(model, start, masks) == frozen.elements
        optimizer.failures = 1
        optimizer.step()
        assert moved(model, start, masks) == 0
        assert frozen._attached[0]._open == []
        optimizer.failures = 0


def test_a_step_that_began_before(world: World) -> None:
    """Nothing is known of what its elements were."""
    model = Small()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    frozen = FrozenCores(world.plan, model, stage=3)

    def closure() -> float:
        frozen.attach(optimizer)
        return 0.0

    with pytest.raises(IncompatibleError, match="optimizer SGD: a step ended whose beginning was not seen"):
        optimizer.step(closure)


# --- closures ---------------------------------------------------------------------------------------


class Curious(optim.SGD):
    """Gives its closure arguments, and takes another function."""

    def step(self, closure: Any, report: Any, *, named: Any) -> Any:  # type: ignore[override]
        self.seen = closure, report, named
        return closure(1, second=2)


@pytest.mark.parametrize("by_name", [False, True])
def test_only_the_closure_is_wrapped(world: World, by_name: bool) -> None:
    model, mask = Small(), world.masks(3, "prior")["embed.weight"]
    optimizer = Curious(model.parameters(), lr=0.1)
    FrozenCores(world.plan, model, stage=3).attach(optimizer)

    def closure(first: int, *, second: int) -> tuple[int, int]:
        """Sets gradients."""
        set_gradients(model, 0, strange=False)
        return first, second

    if by_name:
        result = optimizer.step(closure=closure, report=print, named=len)
    else:
        result = optimizer.step(closure, print, named=len)
    assert result == (1, 2)
    seen, report, named = optimizer.seen
    assert (report, named) == (print, len)
    assert (seen.__name__, seen.__doc__) == ("closure", "Sets gradients.")
    assert model.embed.weight.grad is not None
    assert torch.equal(model.embed.weight.grad == 0, mask)


def test_a_closure_that_is_no_function(world: World) -> None:
    model = Small()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    FrozenCores(world.plan, model, stage=3).attach(optimizer)
    assert optimizer.step(functools.partial(float, "1.5")) == 1.5
