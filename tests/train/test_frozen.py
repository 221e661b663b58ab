"""Frozen elements stay bit for bit, whatever optimizer trains, and the others go where they would have gone."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as effort
from hypothesis import strategies as st
from staged import Masks, Small, World, make_world
from torch import optim

from cpimerge.errors import IncompatibleError, PlanError
from cpimerge.train import FrozenCores, gaps
from cpimerge.train.placement import bits

Make = Callable[..., optim.Optimizer]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("staged"))


class Lion(optim.Optimizer):
    """As a user may write one: decoupled decay, the sign of a running mean."""

    def __init__(self, parameters: Any, lr: float, weight_decay: float = 0.0) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    mean = self.state[parameter].setdefault("mean", torch.zeros_like(parameter))
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.sub_(mean.lerp(parameter.grad, 0.1).sign_(), alpha=group["lr"])
                    mean.lerp_(parameter.grad, 0.01)


class Jumping(optim.SGD):
    """Moves on its own, and has its parent class move on from there, hooks included."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, lr)
        optim.SGD([torch.zeros(1, requires_grad=True)])  # from here on the parent's `step` has hooks

    def step(self, closure: Any = None) -> Any:
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.add_(1)
        return super().step(closure)


ELEMENTWISE: dict[str, Make] = {
    "sgd": partial(optim.SGD, momentum=0.9, nesterov=True, weight_decay=0.1),
    "sgd, fused": partial(optim.SGD, weight_decay=0.1, fused=True),
    "adam, L2": partial(optim.Adam, weight_decay=0.1, amsgrad=True),
    "adamw": partial(optim.AdamW, weight_decay=0.1, foreach=False),
    "adamw, foreach": partial(optim.AdamW, weight_decay=0.1, foreach=True),
    "adamw, fused": partial(optim.AdamW, weight_decay=0.1, fused=True),
    "adamw, negative": partial(optim.AdamW, weight_decay=0.1, maximize=True),
    "nadam": partial(optim.NAdam, weight_decay=0.1, decoupled_weight_decay=True),
    "radam": partial(optim.RAdam, weight_decay=0.1, decoupled_weight_decay=True),
    "adamax": partial(optim.Adamax, weight_decay=0.1),
    "adagrad": partial(optim.Adagrad, weight_decay=0.1),
    "adadelta": partial(optim.Adadelta, weight_decay=0.1),
    "rmsprop": partial(optim.RMSprop, weight_decay=0.1, momentum=0.5, centered=True),
    "rprop": optim.Rprop,
    "asgd": partial(optim.ASGD, weight_decay=0.1),
    "lion": partial(Lion, weight_decay=0.1),
    "jumping": Jumping,
}
DECOUPLED: dict[str, Make] = {  # weight decay that is added to gradients would be in the moments of every element
    **{kind: make for kind, make in ELEMENTWISE.items() if kind.startswith(("adamw", "nadam", "radam", "lion"))},
    "sgd": partial(optim.SGD, momentum=0.9),
    "rmsprop": partial(optim.RMSprop, momentum=0.5),
}
WHOLE = {"adafactor": partial(optim.Adafactor, weight_decay=0.1)}  # what an element does, others have a part in
FUSED_TYPES = (torch.float32, torch.float64)


def set_gradients(model: torch.nn.Module, step: int, strange: bool) -> None:
    """Random ones, the same for the same step; some of them NaN or Inf, or missing, where they are to be `strange`."""
    generator = torch.Generator().manual_seed(step)
    for number, parameter in enumerate(model.parameters()):
        gradient = torch.randn(parameter.shape, generator=generator)
        if strange:
            gradient[torch.rand(parameter.shape, generator=generator) < 0.1] = float("nan")
            gradient[torch.rand(parameter.shape, generator=generator) < 0.05] = float("inf")
        parameter.grad = None if strange and (step + number) % 3 == 0 else gradient.to(parameter.dtype)


def slow_step(model: torch.nn.Module, optimizer: optim.Optimizer, masks: Masks) -> None:
    """A step of the method, by masks: no gradient, and every frozen element as it was."""
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            parameter.grad[masks[name]] = 0
    optimizer.step()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.where(masks[name], before[name], parameter))


def same_bits(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (bits(a.contiguous()) == bits(b.contiguous())).reshape(a.shape)


@effort(max_examples=60)
@given(
    kind=st.sampled_from(sorted(ELEMENTWISE | WHOLE)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    stage=st.integers(1, 3),
    freeze=st.sampled_from(["prior", "all"]),
    steps=st.integers(1, 4),
    strange=st.booleans(),
    compiled=st.booleans(),
)
def test_any_optimizer(
    world: World,
    kind: str,
    dtype: torch.dtype,
    stage: int,
    freeze: Any,
    steps: int,
    strange: bool,
    compiled: bool,
) -> None:
    if "fused" in kind and dtype not in FUSED_TYPES:
        dtype = torch.float32
    make = (ELEMENTWISE | WHOLE)[kind]
    masks = world.masks(stage, freeze)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gaps, "COMPILED", {"cpu"} if compiled else set())
        models = [Small().to(dtype) for _ in range(3)]
        held, slow, free = models
        optimizers = [make(model.parameters(), lr=0.02) for model in models]
        frozen = FrozenCores(world.plan, held, stage=stage, freeze=freeze)
        frozen.attach(optimizers[0])
        start = copy.deepcopy(held)
        for step in range(steps):
            for model in models:
                set_gradients(model, step, strange)
            optimizers[0].step()
            slow_step(slow, optimizers[1], masks)
            optimizers[2].step()
    assert dict(frozen.tensors) == {name: int(mask.sum()) for name, mask in masks.items() if mask.any()}
    for (name, value), before, expected, plain in zip(
        held.named_parameters(), start.parameters(), slow.parameters(), free.parameters(), strict=True
    ):
        mask = masks[name]
        assert same_bits(value, before)[mask].all(), name
        assert same_bits(value, expected).all(), name
        if kind in ELEMENTWISE:
            assert same_bits(value, plain)[~mask].all(), name


@pytest.mark.parametrize("kind", sorted(ELEMENTWISE))
def test_without_it_they_move(world: World, kind: str) -> None:
    model = Small()
    start = copy.deepcopy(model)
    optimizer = ELEMENTWISE[kind](model.parameters(), lr=0.02)
    FrozenCores(world.plan, model, stage=3).attach(optimizer)
    other = copy.deepcopy(model)
    control = ELEMENTWISE[kind](other.parameters(), lr=0.02)
    for each, steps in ((model, optimizer), (other, control)):
        set_gradients(each, 0, strange=False)
        steps.step()
    mask = world.masks(3, "prior")["embed.weight"]
    assert same_bits(model.embed.weight, start.embed.weight)[mask].all()
    assert not same_bits(other.embed.weight, start.embed.weight)[mask].any()


@pytest.mark.parametrize("kind", DECOUPLED)
def test_they_leave_no_trace_in_the_moments(world: World, kind: str) -> None:
    model = Small()
    optimizer = DECOUPLED[kind](model.parameters(), lr=0.02)
    FrozenCores(world.plan, model, stage=2).attach(optimizer)
    for step in range(3):
        set_gradients(model, step, strange=False)
        optimizer.step()
    for name, parameter in model.named_parameters():
        mask = world.masks(2, "prior")[name]
        moments = [x for x in optimizer.state[parameter].values() if torch.is_tensor(x) and x.shape == parameter.shape]
        assert moments
        assert all((moment[mask] == 0).all() and (moment[~mask] != 0).all() for moment in moments), name


# --- training loops ---------------------------------------------------------------------------------


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("to_none", [False, True])
@pytest.mark.parametrize("low", [None, torch.bfloat16])
def test_a_training_loop(world: World, scaled: bool, to_none: bool, low: torch.dtype | None) -> None:
    """Clipping, accumulation, autocast, scaling of gradients, groups."""
    model = Small()
    start = copy.deepcopy(model)
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() <= 1], "lr": 0.1},
    ]
    optimizer = optim.AdamW(groups, lr=0.05)
    scaler = torch.amp.GradScaler("cpu", enabled=scaled)
    FrozenCores(world.plan, model, stage=3).attach(optimizer)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        optimizer.zero_grad(set_to_none=to_none)
        for _ in range(2):
            tokens = torch.randint(0, 11, (4, 5), generator=generator)
            with torch.autocast("cpu", dtype=low, enabled=low is not None):
                loss = (model(tokens).float() - tokens[:, :1]).square().mean()
            torch.autograd.backward(scaler.scale(loss))
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
    moved = 0
    for (name, value), before in zip(model.named_parameters(), start.parameters(), strict=True):
        mask = world.masks(3, "prior")[name]
        assert same_bits(value, before)[mask].all()
        moved += int((~same_bits(value, before)).sum())
    assert moved > 100


def test_clipping_sees_the_whole_gradient(world: World) -> None:
    model = Small()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    FrozenCores(world.plan, model, stage=3).attach(optimizer)
    set_gradients(model, 0, strange=False)
    gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    assert torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9) == torch.nn.utils.get_total_norm(gradients)


def test_lbfgs_takes_the_frozen_elements_for_constants(world: World) -> None:
    """Also while it searches, no evaluation sees them moved; and the loss falls."""
    model = Small()
    start = copy.deepcopy(model)
    masks = world.masks(3, "all")
    optimizer: optim.Optimizer = optim.LBFGS(model.parameters(), lr=0.5, max_iter=7, line_search_fn="strong_wolfe")
    frozen = FrozenCores(world.plan, model, stage=3, freeze="all")
    frozen.attach(optimizer)
    tokens = torch.randint(0, 11, (8, 5), generator=torch.Generator().manual_seed(0))
    losses = []

    def held() -> bool:
        pairs = zip(model.named_parameters(), start.parameters(), strict=True)
        return all(torch.equal(value[masks[name]], before[masks[name]]) for (name, value), before in pairs)

    def closure() -> float:
        assert held()
        optimizer.zero_grad()
        loss = (model(tokens) - tokens[:, :1]).square().mean()
        torch.autograd.backward(loss)
        losses.append(float(loss.detach()))
        return losses[-1]

    optimizer.step(closure)
    optimizer.step(closure=closure)
    assert held()
    assert len(losses) > 4
    assert losses[-1] < 0.9 * losses[0]


def test_a_closures_gradients_are_cleared(world: World) -> None:
    model, mask = Small(), world.masks(3, "prior")["embed.weight"]
    optimizer = optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
    FrozenCores(world.plan, model, stage=3).attach(optimizer)

    def closure() -> float:
        set_gradients(model, 0, strange=False)
        return 1.5

    assert optimizer.step(closure) == 1.5
    assert (optimizer.state[model.embed.weight]["momentum_buffer"][mask] == 0).all()


def test_several_optimizers(world: World) -> None:
    model = Small()
    start = copy.deepcopy(model)
    parameters = list(model.parameters())
    optimizers = [optim.SGD(parameters[:2], lr=0.1, weight_decay=0.1), optim.AdamW(parameters[2:])]
    frozen = FrozenCores(world.plan, model, stage=3)
    for optimizer in (*optimizers, optimizers[0]):  # once more is no more
        frozen.attach(optimizer)
    set_gradients(model, 0, strange=False)
    for optimizer in optimizers:
        optimizer.step()
    masks = world.masks(3, "prior")
    for (name, value), before in zip(model.named_parameters(), start.parameters(), strict=True):
        assert torch.equal(same_bits(value, before), masks[name])


def test_a_step_that_fails_does_not_end_it(world: World) -> None:
    model = Small()
    start = copy.deepcopy(model)
    optimizer = optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    FrozenCores(world.plan, model, stage=3).attach(optimizer)

    def fails() -> float:
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        optimizer.step(fails)
    for step in range(2):
        set_gradients(model, step, strange=False)
        optimizer.step()
    masks = world.masks(3, "prior")
    assert all(
        same_bits(x, y)[masks[name]].all()
        for (name, x), y in zip(model.named_parameters(), start.parameters(), strict=True)
    )


def test_detached_everything_moves(world: World) -> None:
    model = Small()
    start = copy.deepcopy(model)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    frozen = FrozenCores(world.plan, model, stage=3)
    frozen.attach(optimizer)
    frozen.detach()
    set_gradients(model, 0, strange=False)
    optimizer.step()
    assert not any(same_bits(x, y).any() for x, y in zip(model.parameters(), start.parameters(), strict=True))
    frozen.attach(optimizer)
    before = copy.deepcopy(model)
    optimizer.step()
    masks = world.masks(3, "prior")
    for (name, value), was in zip(model.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(same_bits(value, was), masks[name])


# --- models -----------------------------------------------------------------------------------------


def step_and_compare(world: World, model: Small, optimizer: optim.Optimizer) -> None:
    """One step moves what is not frozen, and nothing else."""
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    set_gradients(model, 0, strange=False)
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(same_bits(parameter, start[name]), world.masks(3, "prior")[name]), name


def test_parameters_that_are_not_row_major(world: World) -> None:
    model = Small()
    with torch.no_grad():
        model.embed.weight.data = model.embed.weight.t().contiguous().t()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    FrozenCores(world.plan, model, stage=3).attach(optimizer)
    step_and_compare(world, model, optimizer)  # whose gradients are row-major
    model.hidden.weight.data = model.hidden.weight.t().contiguous().t()  # since it was attached
    step_and_compare(world, model, optimizer)


def test_parameters_that_are_replaced(world: World) -> None:
    """As sharding does it, also after it was attached."""
    model = Small()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    frozen = FrozenCores(world.plan, model, stage=3)
    frozen.attach(optimizer)
    model.embed.weight = torch.nn.Parameter(model.embed.weight.detach().clone())
    optimizer.param_groups[0]["params"][0] = model.embed.weight
    step_and_compare(world, model, optimizer)
    step_and_compare(world, model, optimizer)


def test_parameters_that_are_copied_behind_its_back(world: World) -> None:
    """As programs do that keep copies of higher precision: to train on would move everything."""
    model = Small()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    FrozenCores(world.plan, model, stage=3).attach(optimizer)
    optimizer.param_groups[0]["params"] = [torch.nn.Parameter(each.detach().clone()) for each in model.parameters()]
    with pytest.raises(IncompatibleError, match="optimizer SGD: trains no parameter of the model"):
        optimizer.step()


def test_an_optimizer_with_parameters_of_another_model_too(world: World) -> None:
    model, beside = Small(), torch.nn.Linear(2, 2)
    optimizer = optim.SGD([*model.parameters(), *beside.parameters()], lr=0.1)
    FrozenCores(world.plan, model, stage=3).attach(optimizer)
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
    step_and_compare(world, model, optimizer)


def test_an_optimizer_that_changes_the_layout_is_refused(world: World) -> None:
    class Turning(optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for parameter in self.param_groups[0]["params"]:
                parameter.data = (parameter.data + 1).t().contiguous().t()

    model = Small()
    optimizer = Turning(model.parameters(), lr=0.1)
    FrozenCores(world.plan, model, stage=3).attach(optimizer)
    start = model.norm.bias.detach().clone()
    with pytest.raises(IncompatibleError, match=r"Turning: gave parameter 'embed\.weight' another layout") as caught:
        optimizer.step()
    assert len(caught.value.problems) == 2  # the other matrix has one row
    assert torch.equal(same_bits(model.norm.bias, start), world.masks(3, "prior")["norm.bias"])


def test_a_sparse_gradient_is_refused(world: World) -> None:
    model = Small()
    model.embed.sparse = True
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    FrozenCores(world.plan, model, stage=3).attach(optimizer)
    torch.autograd.backward(model(torch.zeros(1, 2, dtype=torch.long)).sum())
    with pytest.raises(IncompatibleError, match=r"'embed\.weight': its gradient is sparse"):
        optimizer.step()


def test_tied_parameters_are_frozen_by_both_names(world: World) -> None:
    model = Small()
    model.norm.weight = model.norm.bias
    masks = world.masks(3, "prior")
    start = model.norm.bias.detach().clone()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    frozen = FrozenCores(world.plan, model, stage=3)
    frozen.attach(optimizer)
    set_gradients(model, 0, strange=False)
    optimizer.step()
    both = masks["norm.weight"] | masks["norm.bias"]
    assert both.sum() > masks["norm.bias"].sum()
    assert torch.equal(same_bits(model.norm.bias, start), both)


def test_what_does_not_train_is_no_matter(world: World) -> None:
    model = Small()
    model.embed.weight.requires_grad_(False)
    optimizer = optim.SGD([model.head.weight], lr=0.1)
    frozen = FrozenCores(world.plan, model, stage=3)
    frozen.attach(optimizer)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    start = model.head.weight.detach().clone()
    optimizer.step()
    assert torch.equal(same_bits(model.head.weight, start), world.masks(3, "prior")["head.weight"])


# --- optimizers that it cannot hold -----------------------------------------------------------------


class Wrapping(optim.Optimizer):
    """As wrappers are that skip the constructor, so that nothing calls the hooks that they have room for."""

    def __init__(self, optimizer: Any, kind: Any = OrderedDict) -> None:
        self.optimizer = optimizer
        self._optimizer_step_pre_hooks = kind()
        self._optimizer_step_post_hooks = kind()

    @property
    def param_groups(self) -> Any:  # type: ignore[override]
        return self.optimizer.param_groups

    def step(self, closure: Any = None) -> Any:
        return self.optimizer.step(closure)


class Inheriting(optim.SGD):
    """Has no hooks of its own for the hooked step of its parent class."""

    def __init__(self, optimizer: optim.Optimizer) -> None:
        optim.SGD([torch.zeros(1, requires_grad=True)])  # from here on the parent's `step` has hooks
        self.optimizer = optimizer
        self._optimizer_step_pre_hooks: Any = {}
        self.step = optimizer.step  # type: ignore[method-assign]


@pytest.mark.parametrize("wrap", [Wrapping, partial(Wrapping, kind=dict), Inheriting])
def test_the_optimizer_whose_hooks_run_is_found_in_wrappers(world: World, wrap: Make) -> None:
    model = Small()
    optimizer = wrap(Wrapping(optim.SGD(model.parameters(), lr=0.1)))
    FrozenCores(world.plan, model, stage=3).attach(optimizer)
    step_and_compare(world, model, optimizer)


def test_none_is_found(world: World) -> None:
    model = Small()
    frozen = FrozenCores(world.plan, model, stage=3)
    for wrapped in (object(), Wrapping(object())):
        with pytest.raises(IncompatibleError, match="optimizer object: is not one of PyTorch's kind, with hooks"):
            frozen.attach(Wrapping(wrapped))
    assert frozen._attached == []


def test_a_step_in_place_of_that_of_the_class(world: World) -> None:
    """Only where it is known to call that."""
    model = Small()
    frozen = FrozenCores(world.plan, model, stage=3)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    own = optimizer.step
    optimizer.step = MethodType(optim.SGD.step.__wrapped__, optimizer)  # type: ignore[attr-defined,method-assign]
    with pytest.raises(IncompatibleError, match="SGD: its `step` was replaced by a function that may call no hooks"):
        frozen.attach(optimizer)
    optimizer.step = own  # type: ignore[method-assign]
    scheduler = optim.lr_scheduler.ConstantLR(optimizer)  # puts a function of its own in place
    frozen.attach(optimizer)
    step_and_compare(world, model, optimizer)
    scheduler.step()
    step_and_compare(world, model, optimizer)


class Lomo(optim.Optimizer):
    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})

    def fused_backward(self, loss: torch.Tensor, lr: float) -> None: ...


def test_optimizers_that_update_in_backward_are_refused(world: World) -> None:
    model = Small()
    with pytest.raises(IncompatibleError, match="optimizer Lomo: moves parameters in `fused_backward`"):
        FrozenCores(world.plan, model, stage=3).attach(Lomo(model.parameters()))


class Averaging(optim.SGD):
    """As schedule-free optimizers: `eval` moves parameters to where `step` has only been in the optimizer's state."""

    def train(self) -> None: ...

    def eval(self) -> None: ...


def test_weight_decay_of_schedule_free_optimizers_is_refused(world: World) -> None:
    model = Small()
    frozen = FrozenCores(world.plan, model, stage=3)
    groups = [{"params": [each], "weight_decay": 0.0} for each in model.parameters()]
    optimizer = Averaging(groups, lr=0.1)
    frozen.attach(optimizer)
    step_and_compare(world, model, optimizer)
    groups[2]["weight_decay"] = 0.1
    with pytest.raises(IncompatibleError, match=r"Averaging: .* weight_decay=0"):
        frozen.attach(Wrapping(Averaging(groups, lr=0.1)))


def test_copies_of_some_parameters_are_refused(world: World) -> None:
    """As programs do that keep matrices in higher precision: the copies would move the matrices' frozen elements."""
    model = Small()
    matrices = [model.embed.weight, model.hidden.weight, model.head.weight]
    others = [each for each in model.parameters() if each.dim() == 1]
    copies = [torch.nn.Parameter(each.detach().double()) for each in matrices]
    optimizer = optim.SGD([*copies, *others], lr=0.1)
    frozen = FrozenCores(world.plan, model, stage=3)
    with pytest.raises(IncompatibleError, match="optimizer SGD: trains tensors that are not the model's") as caught:
        frozen.attach(optimizer)
    names = ["embed.weight", "hidden.weight", "head.weight"]
    assert [name for name in names if repr(name) in str(caught.value)] == names
    frozen.attach(optim.SGD(matrices, lr=0.1))  # which says that the copies are none
    frozen.attach(optimizer)


def test_copies_of_some_parameters_made_behind_its_back(world: World) -> None:
    model = Small()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    FrozenCores(world.plan, model, stage=3).attach(optimizer)
    optimizer.param_groups[0]["params"][0] = torch.nn.Parameter(model.embed.weight.detach().clone())
    before = copy.deepcopy(model)
    set_gradients(model, 0, strange=False)
    for _ in range(2):
        with pytest.raises(IncompatibleError, match=r"in the shapes of 'embed\.weight', which"):
            optimizer.step()
    assert all(torch.equal(x, y) for x, y in zip(model.parameters(), before.parameters(), strict=True))


def test_what_only_looks_like_copies(world: World) -> None:
    """Another model's parameters, where the model's own of that shape are trained, or not to be trained."""
    model, beside = Small(), Small()
    optimizer = optim.SGD([*model.parameters(), *beside.parameters()], lr=0.1)
    FrozenCores(world.plan, model, stage=3).attach(optimizer)
    step_and_compare(world, model, optimizer)
    model.requires_grad_(False)
    model.head.weight.requires_grad_(True)
    optimizer = optim.SGD([model.head.weight, *beside.hidden.parameters()], lr=0.1)
    FrozenCores(world.plan, model, stage=3).attach(optimizer)


# --- what it says -----------------------------------------------------------------------------------


@pytest.mark.parametrize("freeze", ["prior", "all"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_what_it_holds(world: World, stage: int, freeze: Any) -> None:
    frozen = FrozenCores(str(world.plan), Small(), stage=stage, freeze=freeze)
    masks = world.masks(stage, freeze)
    assert frozen.elements == sum(int(mask.sum()) for mask in masks.values())
    assert dict(frozen.tensors) == {name: int(mask.sum()) for name, mask in masks.items() if mask.any()}
    assert frozen.nbytes == frozen.elements  # a byte each, as no gap in this small model is 255 wide
    with pytest.raises(TypeError):
        frozen.tensors["embed.weight"] = 1  # type: ignore[index]


def test_during_a_step_their_values_are_held_too(world: World) -> None:
    model = Small()
    seen: list[int] = []

    class Looking(optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            (step,) = frozen._attached[0]._open
            seen.append(sum(held.values.nbytes for held in step))

    optimizer = Looking(model.parameters(), lr=0.1)
    frozen = FrozenCores(world.plan, model, stage=3)
    frozen.attach(optimizer)
    optimizer.step()
    assert seen == [4 * frozen.elements]
    assert frozen._attached[0]._open == []


def test_errors(world: World) -> None:
    model = Small()
    with pytest.raises(PlanError, match="stages are numbered 1 to 3"):
        FrozenCores(world.plan, model, stage=4)
    with pytest.raises(IncompatibleError) as caught:
        FrozenCores(world.plan, torch.nn.Linear(1, 9), stage=3)
    assert len(caught.value.problems) == len([mask for mask in world.masks(3, "prior").values() if mask.any()])
    frozen = FrozenCores(world.plan, model, stage=3)
    with pytest.raises(IncompatibleError, match="optimizer SGD: trains no parameter of the model"):
        frozen.attach(optim.SGD(Small().parameters(), lr=0.1))
    with pytest.raises(IncompatibleError, match="optimizer object: is not one of PyTorch's kind"):
        frozen.attach(object())  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "missing"), [("FrozenCores", "torch"), ("FrozenCoresCallback", "transformers")])
def test_what_is_missing_is_named(name: str, missing: str) -> None:
    code = f"import sys; sys.modules[{missing!r}] = None; import cpimerge.train; cpimerge.train.{name}"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stderr.splitlines()[-1] == (
        f"ModuleNotFoundError: {name} needs {missing}: pip install 'cpimerge[train]'"
    )


def test_its_import_is_light() -> None:
    code = "import sys, cpimerge.train; assert not {'torch', 'numba', 'transformers'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
