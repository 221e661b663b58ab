"""Frozen cores: elements that no step of any optimizer moves, bit for bit.

Around each step, hooks of the optimizer set the gradients of frozen elements to zero, so that they leave no trace in
its moments, and put their values back, which weight decay or older momentum may have moved. Between steps nothing is
held but which elements are frozen.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch

from ..errors import IncompatibleError
from .gaps import Gaps
from .matching import matched
from .placement import Placement
from .stage_cores import Freeze, StageCores
from .steps import Part, Steps

__all__ = ["FrozenCores"]


@dataclass(frozen=True)
class _Known:
    """The model's parameters as they were found: all of them, and where each frozen one has its frozen elements."""

    parameters: frozenset[torch.nn.Parameter]
    parts: Mapping[torch.nn.Parameter, Part]

    def fits(self, parameters: Iterable[torch.nn.Parameter]) -> bool:
        """Whether those of `parameters` that have frozen elements still lie in memory as they did."""
        return all(self.parts[each].place.fits(each) for each in parameters if each in self.parts)


class FrozenCores:
    """The elements that one stage of a plan leaves as they are, in the parameters of a model.

    Sharded parameters (FSDP2) are held back by each process for its part of them. It does not matter whether they are
    sharded before this, before `attach` or after it.
    """

    def __init__(self, plan: str | Path, model: torch.nn.Module, *, stage: int, freeze: Freeze = "prior") -> None:
        """`plan` is a plan's directory; `stage` counts from 1 in the plan's order.

        `freeze`: "prior" freezes the cores of the tasks of earlier stages, "all" those of all other stages. An element
        in one of them is frozen, also where a task of the stage itself has it in its core.

        Raises PlanError where the plan or its cores are damaged, or it has no such stage; IncompatibleError naming each
        tensor that has frozen elements and no parameter of its shape.
        """
        self._cores = StageCores(Path(plan).expanduser(), stage, freeze)
        self._model = model
        self._attached: list[Steps] = []
        self._others: dict[torch.optim.Optimizer, set[torch.nn.Parameter]] = {}  # trained beside the model's
        self._known = self._find()

    @property
    def tasks(self) -> tuple[str, ...]:
        """Whose cores are frozen, in stage order."""
        return self._cores.tasks

    @property
    def tensors(self) -> Mapping[str, int]:
        """The model's parameters with frozen elements, and how many they are, of what this process holds of them."""
        return MappingProxyType({part.name: part.gaps.count for part in self._known.parts.values()})

    @property
    def elements(self) -> int:
        """How many elements are frozen, of what this process holds of the model."""
        return sum(self.tensors.values())

    @property
    def nbytes(self) -> int:
        """Bytes that are held between steps. During a step the elements' values are held, too."""
        return sum(part.gaps.nbytes for part in self._known.parts.values())

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """From now on no step of `optimizer`, which may be wrapped as accelerate does it, moves a frozen element.

        Raises IncompatibleError where it trains no parameter of the model, or copies of some; where no hooks are called
        around its steps; and where it is known to move parameters outside of them.
        """
        inner = _innermost(optimizer)
        if any(steps.optimizer is inner for steps in self._attached):
            return
        _refuse_movers(inner)
        self._known = self._find(self._known)
        self._note(inner, _trained(inner))
        self._attached.append(Steps(inner, self._parts_of))

    def detach(self) -> None:
        """Let all optimizers move everything again. What a step has moved that ended in an error, is put back.

        Raises IncompatibleError where that cannot be, as a parameter was changed since.
        """
        attached, self._attached = self._attached, []
        self._others.clear()
        problems = [problem for steps in attached for problem in steps.end()]
        if problems:
            raise IncompatibleError(problems)

    def _find(self, known: _Known | None = None) -> _Known:
        """The frozen elements in the parameters that the model has now; `known` if those are the same."""
        parameters, names = matched(self._model, self._cores.tensors)
        if known and known.parameters == parameters and known.parts.keys() == names.keys() and known.fits(names):
            return known
        parts = {}
        with self._cores.opened() as cores:
            for parameter, (name, tensors) in names.items():
                place = Placement.of(name, parameter)
                positions = cores.positions(tensors[0])
                for tied in tensors[1:]:
                    positions = np.union1d(positions, cores.positions(tied))
                parts[parameter] = Part(name, place, Gaps(place.offsets(positions)))
        return _Known(parameters, parts)

    def _note(self, optimizer: torch.optim.Optimizer, trained: set[torch.nn.Parameter]) -> None:
        """Remember what the optimizer trains beside the model.

        Raises IncompatibleError where that is all, or where it may be copies of the model's parameters.
        """
        kind = type(optimizer).__name__
        if trained.isdisjoint(self._known.parameters):
            raise IncompatibleError(
                f"optimizer {kind}: trains no parameter of the model, but another model's, or copies. Make it of "
                "`model.parameters()`"
            )
        others = trained - self._known.parameters
        shapes = {each.shape for each in others}
        for steps in self._attached:
            trained = trained | _trained(steps.optimizer)
        left = [
            repr(part.name)
            for parameter, part in self._known.parts.items()
            if parameter.requires_grad and parameter not in trained and parameter.shape in shapes
        ]
        if left:
            raise IncompatibleError(
                f"optimizer {kind}: trains tensors that are not the model's, in the shapes of {', '.join(left)}, which "
                "no attached optimizer trains. If they are copies, make it of `model.parameters()`; if not, attach the "
                "optimizer of those parameters first, or set their requires_grad to False"
            )
        self._others[optimizer] = others

    def _parts_of(self, optimizer: torch.optim.Optimizer) -> list[tuple[torch.nn.Parameter, Part]]:
        """What is frozen of the parameters that the optimizer has now.

        They are found anew where they were replaced, as sharding does it, or moved to another layout.
        """
        trained = _trained(optimizer)
        if not trained - self._known.parameters <= self._others[optimizer] or not self._known.fits(trained):
            self._known = self._find(self._known)
            self._note(optimizer, trained)
        return [(parameter, part) for parameter, part in self._known.parts.items() if parameter in trained]


def _innermost(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """PyTorch's own optimizer, around whose steps hooks are called, within what accelerate puts around it."""
    inner = optimizer
    while not _calls_hooks(inner):
        if not hasattr(inner, "optimizer"):
            raise IncompatibleError(f"optimizer {type(inner).__name__}: {_why_not(inner)}")
        inner = inner.optimizer
    return inner


def _calls_hooks(optimizer: object) -> bool:
    """PyTorch marks the steps that do; in the place of one may be what was wrapped around it, as schedulers do it."""
    hooks = (getattr(optimizer, f"_optimizer_step_{when}_hooks", None) for when in ("pre", "post"))
    steps = (getattr(each, "step", None) for each in (type(optimizer), optimizer))
    return all(isinstance(each, OrderedDict) for each in hooks) and all(hasattr(each, "hooked") for each in steps)


def _why_not(optimizer: object) -> str:
    if hasattr(getattr(type(optimizer), "step", None), "hooked"):
        return "its `step` was replaced by a function that may call no hooks. Override it in a subclass"
    return "is not one of PyTorch's kind, with hooks. Derive it from torch.optim.Optimizer, and call its constructor"


def _refuse_movers(optimizer: torch.optim.Optimizer) -> None:
    """Raise IncompatibleError where the optimizer is known to move parameters outside of its steps."""
    kind = type(optimizer).__name__
    if hasattr(optimizer, "fused_backward"):
        raise IncompatibleError(
            f"optimizer {kind}: moves parameters in `fused_backward`, not in its steps. Use another optimizer"
        )
    averages = hasattr(optimizer, "train") and hasattr(optimizer, "eval")
    if averages and any(group.get("weight_decay") for group in optimizer.param_groups):
        raise IncompatibleError(
            f"optimizer {kind}: is schedule-free: its `eval` would move frozen elements by the weight decay that its "
            "steps gather. Use weight_decay=0, or another optimizer"
        )


def _trained(optimizer: torch.optim.Optimizer) -> set[torch.nn.Parameter]:
    return {parameter for group in optimizer.param_groups for parameter in group["params"]}
