"""Which parameter of a model is which tensor of its checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch.nn.parallel import DataParallel, DistributedDataParallel

from ..errors import IncompatibleError
from ..plan_file import TensorPlan

__all__ = ["matched"]

ADAPTED = ("base_layer", "lora_", "modules_to_save")  # in names of peft
FLATTENED = ("_fsdp_wrapped_module", "_flat_param")  # in names of FSDP1
WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")  # in names of what torch.compile and checkpointing wrap


Parameters = frozenset[torch.nn.Parameter]
Matches = dict[torch.nn.Parameter, tuple[str, list[TensorPlan]]]


def matched(model: torch.nn.Module, tensors: Sequence[TensorPlan]) -> tuple[Parameters, Matches]:
    """All parameters of the model; and for those that the tensors are, their name in the model and the tensors.

    A parameter is several tensors where a model ties what the checkpoint does not. Names may differ by the prefix that
    transformers gives a model within another (`base_model_prefix`). Raises IncompatibleError naming each tensor without
    a parameter of its shape.
    """
    inner, parameters = _parameters(model)
    buffers = {_plain(name) for name, _ in inner.named_buffers()}
    prefix = getattr(inner, "base_model_prefix", "")
    problems: list[str] = []
    missing: list[str] = []
    found: Matches = {}
    for tensor in tensors:
        name = next((name for name in _names(tensor.name, prefix) if name in parameters), None)
        if name is None:
            is_buffer = not buffers.isdisjoint(_names(tensor.name, prefix))
            missing.append(f"tensor {tensor.name!r}: has frozen elements, and {_missing(is_buffer)}")
        elif (shape := list(parameters[name].shape)) != tensor.shape:
            problems.append(f"tensor {tensor.name!r}: expected {tensor.shape} (as planned), the model has {shape}")
        else:
            found.setdefault(parameters[name], (name, []))[1].append(tensor)
    if missing:
        problems += [hint] if (hint := _hint(inner, len(missing))) else missing
    if problems:
        raise IncompatibleError(problems)
    return frozenset(parameters.values()), found


def _missing(is_buffer: bool) -> str:
    if is_buffer:
        return "is a buffer of the model, which training may change without an optimizer. Exclude it in the recipe"
    return "the model has no parameter of that name. Train a model of the planned checkpoints' kind"


def _hint(model: torch.nn.Module, missing: int) -> str | None:
    """What a model has done to its parameters, where that may be why so many tensors are not found."""
    what = f"model {type(model).__name__}"
    for name, _ in model.named_parameters():
        if any(mark in name for mark in ADAPTED):
            return (
                f"{what}: has adapters (parameter {name!r}), with which {missing} tensors of the plan are not found. "
                "Train the whole model: to merge what adapters learn would move frozen elements"
            )
        if any(mark in name for mark in FLATTENED):
            return (
                f"{what}: is sharded by FSDP1 (parameter {name!r}), with which {missing} tensors of the plan are not "
                "found. Shard it by FSDP2: `fully_shard`, or accelerate's `fsdp_version: 2`"
            )
    return None


def _parameters(model: torch.nn.Module) -> tuple[torch.nn.Module, Mapping[str, torch.nn.Parameter]]:
    """The model within its wrappers, and all of its parameters by name, tied ones under each of theirs."""
    inner = model
    while (wrapped := _wrapped(inner)) is not None:
        inner = wrapped
    return inner, {_plain(name): value for name, value in inner.named_parameters(remove_duplicate=False)}


def _wrapped(model: torch.nn.Module) -> torch.nn.Module | None:
    wraps = isinstance(model, DataParallel | DistributedDataParallel)
    inner = getattr(model, "module" if wraps else "_orig_mod", None)
    return inner if isinstance(inner, torch.nn.Module) else None


def _plain(name: str) -> str:
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _names(name: str, prefix: str) -> Iterator[str]:
    """What a model may call the tensor: as it is, and with or without the prefix."""
    yield name
    if prefix:
        yield f"{prefix}.{name}"
        if name.startswith(f"{prefix}."):
            yield name.removeprefix(f"{prefix}.")
