"""What an adapter does to one module, as its tensors' shapes and its config say: checked, and made a tensor."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from .adapted import AdaptedTensor, Kept, LowRank, ShiftedTensor
from .adapter_config import ADAPTER_CONFIG, AdapterConfig
from .checkpoint import Checkpoint, Tensor

__all__ = ["Fault", "Orientation", "Update"]

MANY = 1024  # a rank that is nothing unusual; one beyond it and the weight's own size takes memory to no use
OTHER_MODEL = "Was the adapter trained on another model?"


class Fault(NamedTuple):
    """What is wrong with a tensor of the adapter, and what to do."""

    name: str
    what: str


@dataclass(frozen=True)
class Update:
    """The update of a module's weight, scale · B·A, where its parts are all there.

    `module` as it was trained, without PEFT's prefix; `a` [rank, in, …], `b` [out, rank, …], of an `embedding`
    [rank, rows] and [columns, rank]; `magnitude` (DoRA) has `out` elements; `shift` is B's bias.
    """

    module: str
    embedding: bool
    a: Tensor
    b: Tensor
    magnitude: Tensor | None
    shift: Tensor | None
    weight: Tensor

    @property
    def last(self) -> str:
        """What the module is called within its layer."""
        return self.module.rsplit(".", 1)[-1]

    @property
    def is_low_rank(self) -> bool:
        """Whether A and B have the dimensions of factors."""
        a, b = self.a.shape, self.b.shape
        return 2 <= len(a) == len(b) and a[0] == b[1] and math.prod(b[2:]) == 1

    def fits(self, transposed: bool) -> bool:
        """Whether the factors' product has the shape of the weight, or that of its transpose."""
        outputs, inputs = self.b.shape[0], self.a.shape[1:]
        return self.weight.shape == ((*inputs, outputs) if transposed else (outputs, *inputs))

    def faults(self, config: AdapterConfig) -> Iterator[Fault]:
        """Where the parts do not agree with each other or with the config."""
        if not self.weight.is_float:
            yield Fault(
                self.a.name,
                f"updates {self.weight.name!r}, which is {self.weight.dtype}. "
                "Give the model in bfloat16 or float32, as it was before it was quantised",
            )
        if not self.is_low_rank:
            yield Fault(
                self.a.name,
                f"{list(self.a.shape)} and its B {list(self.b.shape)} are not [rank, in, …] and [out, rank, …]. "
                "If it was trained in parallel, gather its shards and save it again",
            )
        elif self.a.shape[0] != (rank := config.rank_of(self.module)):
            yield Fault(
                self.a.name, f"is of rank {self.a.shape[0]}, {ADAPTER_CONFIG} says {rank}. Save the adapter again"
            )
        elif rank > max(MANY, *self.weight.shape):
            yield Fault(
                self.a.name, f"is of rank {rank}, and updates only {list(self.weight.shape)}. Take another adapter"
            )
        yield from self._faults_of_extras(config)

    def _faults_of_extras(self, config: AdapterConfig) -> Iterator[Fault]:
        """What the config asks for beside the factors must be there, and nothing else."""
        extras = (
            (self.magnitude, config.use_dora, "lora_magnitude_vector", "use_dora"),
            (self.shift, config.lora_bias, "lora_B.bias", "lora_bias"),
        )
        for tensor, wanted, part, key in extras:
            if wanted and tensor is None:
                yield Fault(self.a.name, f"has no {part} beside it, though {key} is set. Complete the adapter")
            elif tensor is not None and not wanted:
                yield Fault(tensor.name, f"is of no use without {key} in {ADAPTER_CONFIG}. Save the adapter again")
            elif tensor is not None and not (
                tensor.elements == self.b.shape[0] and tensor.elements in (*tensor.shape, 1)
            ):
                shape = f"expected {self.b.shape[0]} elements, got {list(tensor.shape)}"
                yield Fault(tensor.name, f"{shape}. {OTHER_MODEL}")

    def mismatch(self) -> Fault:
        """Why it is not clear how the factors fit the weight."""
        weight = f"{self.weight.name!r} {list(self.weight.shape)}"
        if self.fits(False):
            return Fault(
                self.a.name,
                f"updates {weight}, which may be stored as [in, out] or as [out, in], and other layers do not tell. "
                "Merge the adapter into its base first (PEFT)",
            )
        return Fault(
            self.a.name, f"{list(self.a.shape)} and its B {list(self.b.shape)} do not fit {weight}. {OTHER_MODEL}"
        )

    def adapted(self, config: AdapterConfig, transposed: bool, kept: Kept) -> AdaptedTensor:
        """The weight with the update."""
        low_rank = LowRank(
            left=self.a if transposed else self.b,
            right=self.b if transposed else self.a,
            rank=self.a.shape[0],
            columns=self.b.shape[0] if transposed else math.prod(self.a.shape[1:]),
            transposed=transposed,
            scale=config.scale_of(self.module),
            magnitude=self.magnitude,
        )
        weight = self.weight
        return AdaptedTensor(weight.name, weight.dtype, weight.shape, weight.nbytes, weight, low_rank, kept)

    def shifted(self, config: AdapterConfig, bias: Tensor, shift: Tensor) -> ShiftedTensor:
        """The module's bias with the update's own."""
        scale = config.scale_of(self.module)
        return ShiftedTensor(bias.name, bias.dtype, bias.shape, bias.nbytes, bias, shift, scale)


class Orientation:
    """Whether weights are stored as [in, out] (GPT-2's Conv1D), not as [out, in].

    Shapes tell, but for square weights. Of these, layers of the same name tell, or else all that is known of the
    model's layers and `fan_in_fan_out`, if it agrees. PEFT asks the module's class, which a checkpoint has not.
    """

    def __init__(self, config: AdapterConfig, model: Checkpoint, updates: Iterable[Update]) -> None:
        self.seen: dict[str, set[bool]] = defaultdict(set)
        for update in updates:
            if not update.embedding and update.fits(False) != update.fits(True):
                self.seen[update.last].add(update.fits(True))
        for last, transposed in _biased(model):
            self.seen[last].add(transposed)
        self.everywhere = set().union(*self.seen.values()) | {config.fan_in_fan_out}

    def of(self, update: Update) -> bool | None:
        """Whether the weight is stored transposed; None: the factors do not fit, or nothing tells."""
        if update.embedding:
            return True if update.fits(True) else None
        if update.fits(False) != update.fits(True):
            return update.fits(True)
        if not update.fits(False):
            return None
        known = self.seen.get(update.last) or self.everywhere
        return next(iter(known)) if len(known) == 1 else None


def _biased(model: Checkpoint) -> Iterator[tuple[str, bool]]:
    """Layers whose bias tells which side of their weight is the output: last part of the name, whether [in, out]."""
    for name, weight in model.tensors.items():
        module = name.removesuffix(".weight")
        bias = model.tensors.get(f"{module}.bias")
        if bias is not None and module != name and len(weight.shape) == 2 and weight.shape[0] != weight.shape[1]:
            for transposed in (False, True):
                if bias.shape == weight.shape[transposed : transposed + 1]:
                    yield module.rsplit(".", 1)[-1], transposed
