"""The steps of one optimizer, between which frozen elements stay as they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from ..errors import IncompatibleError
from .gaps import Gaps
from .placement import Placement, bits

__all__ = ["Part", "Steps"]


@dataclass(frozen=True)
class Part:
    """What is frozen of the parameter `name`: `gaps` are offsets in its memory, in which it lies as `place` says."""

    name: str
    place: Placement
    gaps: Gaps


Parts = list[tuple[torch.nn.Parameter, Part]]
Find = Callable[[torch.optim.Optimizer], Parts]


class Steps:
    """Hooks around every step of `optimizer`; `find` says what is frozen in its parameters at the time."""

    def __init__(self, optimizer: torch.optim.Optimizer, find: Find) -> None:
        self.optimizer = optimizer
        self._find = find
        # What is to be put back after the step; of several steps where one calls that of its parent class.
        self._open: list[list[tuple[torch.nn.Parameter, Part, torch.Tensor]]] = []
        self._hooks = [optimizer.register_step_pre_hook(self._before), optimizer.register_step_post_hook(self._after)]

    def end(self) -> None:
        """Take the hooks away."""
        for hook in self._hooks:
            hook.remove()
        self._open.clear()

    def _before(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        parts = self._find(optimizer)
        _clear_all(parts)
        self._open.append([(parameter, part, part.gaps.take(bits(parameter))) for parameter, part in parts])

        def without(closure: Callable[[], Any]) -> Callable[[], Any]:
            """The closure, whose gradients have nothing for frozen elements either: LBFGS steps by them."""

            def evaluate() -> Any:
                loss = closure()
                _clear_all(parts)
                return loss

            return evaluate

        changed = tuple(without(value) if i and callable(value) else value for i, value in enumerate(args))
        closure = kwargs.get("closure")
        return changed, kwargs if closure is None else kwargs | {"closure": without(closure)}

    def _after(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        problems = []
        for parameter, part, values in self._open.pop():
            if part.place.fits(parameter):
                part.gaps.put(values, bits(parameter))
            else:
                problems.append(
                    f"optimizer {type(optimizer).__name__}: gave parameter {part.name!r} another layout in its step, "
                    "in which its frozen elements are not found. Use another optimizer"
                )
        if problems:
            raise IncompatibleError(problems)


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
