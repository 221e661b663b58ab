"""The steps of one optimizer, between which frozen elements stay as they are."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from ..errors import IncompatibleError
from .gaps import Gaps
from .placement import Placement, bits

__all__ = ["Part", "Steps"]

# What calls the hooks around the step of any optimizer: its frame says that a step is going on.
STEP = torch.optim.Optimizer.profile_hook_step(lambda optimizer: None).__code__


@dataclass(frozen=True)
class Part:
    """What is frozen of the parameter `name`: `gaps` are offsets in its memory, in which it lies as `place` says."""

    name: str
    place: Placement
    gaps: Gaps


Parts = list[tuple[torch.nn.Parameter, Part]]
Find = Callable[[torch.optim.Optimizer], Parts]


class _Held:
    """The values of a parameter's frozen elements while a step may move them."""

    def __init__(self, parameter: torch.nn.Parameter, part: Part) -> None:
        self.name = part.name
        self.values = part.gaps.take(bits(parameter))
        self._parameter = parameter
        self._part = part
        self._kind = parameter.dtype, parameter.device

    def put_back(self) -> bool:
        """False where the parameter was changed so that they are not found in it."""
        parameter = self._parameter
        if (parameter.dtype, parameter.device) != self._kind or not self._part.place.fits(parameter):
            return False
        self._part.gaps.put(self.values, bits(parameter))
        return True


class Steps:
    """Hooks around every step of `optimizer`; `find` says what is frozen in its parameters at the time."""

    def __init__(self, optimizer: torch.optim.Optimizer, find: Find) -> None:
        self.optimizer = optimizer
        self._find = find
        # What is to be put back after the step; of several steps where one calls that of its parent class, and of those
        # that ended in an error, which no hook tells.
        self._open: list[list[_Held]] = []
        self._hooks = [optimizer.register_step_pre_hook(self._before), optimizer.register_step_post_hook(self._after)]

    def end(self) -> list[str]:
        """Take the hooks away, and put back what a failed step has moved. Returns what is wrong."""
        for hook in self._hooks:
            hook.remove()
        return self._put_back_failed(0)

    def _before(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        # All are there but those of steps that called this one.
        if self._open and (problems := self._put_back_failed(_running(optimizer) - 1)):
            raise IncompatibleError(problems)
        parts = self._find(optimizer)
        _clear_all(parts)
        self._open.append([_Held(parameter, part) for parameter, part in parts])
        if len(args) > 1 and callable(args[1]):  # the first one is the optimizer
            return (args[0], _without(args[1], parts), *args[2:]), kwargs
        if callable(closure := kwargs.get("closure")):
            kwargs = kwargs | {"closure": _without(closure, parts)}
        return args, kwargs

    def _after(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        kind = type(optimizer).__name__
        if len(self._open) > 1:  # those after its own failed within it
            del self._open[max(_running(optimizer), 1) :]
        if not self._open:
            raise IncompatibleError(
                f"optimizer {kind}: a step ended whose beginning was not seen. Attach it between steps, and compile no "
                "step that calls another"
            )
        problems = [
            f"optimizer {kind}: gave parameter {held.name!r} another layout in its step, in which its frozen elements "
            "are not found. Use another optimizer"
            for held in self._open.pop()
            if not held.put_back()
        ]
        if problems:
            raise IncompatibleError(problems)

    def _put_back_failed(self, running: int) -> list[str]:
        """All but the first `running` steps have failed: what they moved goes back. Returns what is wrong."""
        problems: list[str] = []
        failed = self._open[max(running, 0) :]
        del self._open[max(running, 0) :]
        for step in reversed(failed):  # the first of them has the values from before all
            problems = [
                f"parameter {held.name!r}: was changed after a step that failed had moved its frozen elements, so that "
                "they cannot be put back. Load the model again"
                for held in step
                if not held.put_back()
            ]
        return problems


def _running(optimizer: torch.optim.Optimizer) -> int:
    """How many steps of the optimizer are going on, one within the other, the one whose hook this is included."""
    count, frame = 0, sys._getframe(1)
    while (above := frame.f_back) is not None:
        frame = above
        if frame.f_code is STEP and any(value is optimizer for value in frame.f_locals.values()):
            count += 1
    return count


def _without(closure: Callable[..., Any], parts: Parts) -> Callable[..., Any]:
    """The closure, whose gradients have nothing for frozen elements either: LBFGS steps by them."""

    @functools.wraps(closure)
    def evaluate(*args: Any, **kwargs: Any) -> Any:
        loss = closure(*args, **kwargs)
        _clear_all(parts)
        return loss

    return evaluate


def _clear_all(parts: Parts) -> None:
    for parameter, part in parts:
        _clear(parameter, part)


def _clear(parameter: torch.nn.Parameter, part: Part) -> None:
    """Set the gradients of its frozen elements to zero."""
    gradient = parameter.grad
    if gradient is None:
        return
    if gradient.layout is not torch.strided:
        raise IncompatibleError(f"parameter {part.name!r}: its gradient is sparse. Make its layer with sparse=False")
    if isinstance(gradient, DTensor) and isinstance(parameter, DTensor) and gradient.placements != parameter.placements:
        raise IncompatibleError(
            f"parameter {part.name!r}: is sharded as {parameter.placements}, its gradient as {gradient.placements}"
        )
    if not part.place.fits(gradient):  # autograd makes none such, but a user may set it
        with torch.no_grad():
            parameter.grad = gradient = torch.empty_like(parameter, dtype=gradient.dtype).copy_(gradient)
    part.gaps.clear(bits(gradient))
