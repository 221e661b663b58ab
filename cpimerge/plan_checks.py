"""What a plan must be for `fuse` to rely on it, beyond the types of its entries: whoever wrote it can seal anything."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING

from .checkpoint import FLOAT_BYTES, ITEM_BYTES, MAX_SIZE, UNNAMED, is_name, layer_of
from .dialect import has_control
from .levelling import can_level
from .plain_json import shown
from .recipe_checks import name_fault
from .yamltree import as_text

if TYPE_CHECKING:
    from .plan_file import Input, Plan, TensorPlan

__all__ = ["core_file", "plan_faults"]

MAX_RECIPE = 1_000_000  # characters, as of a recipe's file
VERSION = re.compile(r"[0-9A-Za-z.+!-]{1,100}")


def core_file(task: int) -> str:
    """Where the core of task number `task` lies in the plan directory."""
    return f"cores/{task:02d}.roaring"


def plan_faults(plan: Plan) -> Iterator[str]:
    """What is wrong with a plan whose entries are each of the right type, entry by entry."""
    if not VERSION.fullmatch(plan.cpimerge):
        yield f"cpimerge: {shown(plan.cpimerge)} is no version"
    if len(plan.recipe) > MAX_RECIPE:
        yield f"recipe: longer than {MAX_RECIPE} characters"
    for key, text in (("recipe", plan.recipe), ("chat_template", plan.chat_template or "")):
        if has_control(text):
            yield f"{key}: has control characters"
    yield from _name_faults(plan)
    for entry in plan.inputs:
        yield from _input_faults(entry)
    names = {task.name for task in plan.tasks}
    for tensor in plan.tensors:
        if fault := _tensor_fault(tensor, names, plan.settings.space == "delta"):
            yield f"tensor {shown(tensor.name)}: {fault}"
    yield from (f"tensor {shown(name)} stands there twice" for name in _repeated(t.name for t in plan.tensors))


def _fault_of(place: str, check: Callable[[], object]) -> Iterator[str]:
    try:
        check()
    except ValueError as error:
        yield f"{place}: {error}"


def _name_faults(plan: Plan) -> Iterator[str]:
    """Of tasks, and of where their cores are."""
    for number, task in enumerate(plan.tasks):
        yield from _fault_of(f"tasks.{number}.name", partial(as_text, task.name))
        if fault := name_fault(task.name):
            yield f"tasks.{number}.name: {shown(task.name)} cannot be a task's name, as {fault}"
        if task.core_file != core_file(number):
            yield f"tasks.{number}.core_file: must be {core_file(number)}, got {shown(task.core_file)}"
    yield from (f"tasks: {shown(name)} stands there twice" for name in _repeated(task.name for task in plan.tasks))
    yield from (f"inputs: {shown(name)} stands there twice" for name in _repeated(it.name for it in plan.inputs))
    if plan.backbone not in ("base", "backbone", *plan.order):
        yield f"backbone: {shown(plan.backbone)} is no task, nor base or backbone"
    if not all(plan.stages):
        yield "stages: one of them is empty"


def _repeated(names: Iterable[str]) -> list[str]:
    return [name for name, count in Counter(names).items() if count > 1]


def _input_faults(entry: Input) -> Iterator[str]:
    for path in (entry.path, *([] if entry.adapter is None else [entry.adapter])):
        if not path or "\0" in path:
            yield f"inputs: {shown(entry.name)}: {shown(path)} is no directory"
    for shard in entry.shards:
        if shard.file != os.path.basename(shard.file) or shard.file in ("", ".", "..") or "\0" in shard.file:
            yield f"inputs: {shown(entry.name)}: {shown(shard.file)} is not the name of a file"


def _tensor_fault(tensor: TensorPlan, tasks: set[str], is_delta: bool) -> str | None:
    if not is_name(tensor.name):
        return UNNAMED
    nbytes = ITEM_BYTES[tensor.dtype] * ITEM_BYTES[tensor.base_dtype]
    for size in tensor.shape:
        nbytes *= size
        if nbytes >= MAX_SIZE:
            return f"{shown(tensor.shape)} is larger than any file"
    is_float = tensor.base_dtype in FLOAT_BYTES
    if is_float == (tensor.action == "copy"):
        return f"{tensor.base_dtype} is not for the action {tensor.action}"
    if tensor.tasks.keys() != (tasks if is_float else set()):
        return "`tasks` must have every task" if is_float else "`tasks` must be empty"
    if tensor.is_levelled and not is_delta:
        return "`levelled` is for differences: space is weights"
    if tensor.is_levelled and not can_level(tensor.shape, layer_of(tensor.name)):
        return "`levelled` is for a matrix of a layer"
    return None
