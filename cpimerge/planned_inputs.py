"""The inputs of a plan, opened again by whoever obeys it: they must be what was planned."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from .adapter import ADAPTER_FILES
from .budget import format_size
from .checkpoint import Checkpoint, forget_headers
from .compatibility import differences
from .errors import CheckpointError, PlanError
from .models import Locate, locate, open_model
from .pieces import FETCH_BYTES
from .plan_file import Plan, Vocabulary
from .quantized import refused
from .vocabulary import settle

__all__ = ["open_inputs"]

PLAN_AGAIN = "The inputs are not those that were planned: run `cpimerge plan` again"


def open_inputs(plan: Plan, find: Locate = locate) -> dict[str, Checkpoint]:
    """Every checkpoint of the plan by name, where `find` finds it.

    Raises PlanError naming all that changed since; where that is nothing, CheckpointError naming all that cannot be
    read: it may be back in a moment.
    """
    checkpoints: dict[str, Checkpoint] = {}
    unread: list[str] = []
    changed: list[str] = []
    for planned in plan.inputs:
        try:
            located = find(planned.reference, planned.name == "base")
            checkpoint = checkpoints[planned.name] = open_model(located, checkpoints.get("base"))
        except CheckpointError as error:
            unread.extend(error.problems)
            continue
        now = {shard.file.name: (shard.size, shard.header_xxh3) for shard in checkpoint.shards}
        then = {shard.file: (shard.size, shard.header_xxh3) for shard in planned.shards}
        differing = sorted(file for file in now.keys() | then.keys() if now.get(file) != then.get(file))
        changed.extend(f"{_place(checkpoint, file)}: {_change(now.get(file), then.get(file))}" for file in differing)
    forget_headers()
    if changed:
        raise PlanError([*changed, *unread, PLAN_AGAIN])
    if unread:
        raise CheckpointError(unread)
    if plan.vocabulary is not None:
        checkpoints = _in_one_vocabulary(plan.vocabulary, checkpoints)
    _check_fit(plan, checkpoints)
    return checkpoints


def _check_fit(plan: Plan, checkpoints: Mapping[str, Checkpoint]) -> None:
    """Raise PlanError where preflight would have refused this: the plan need not come from a `cpimerge plan`."""
    base = checkpoints["base"]
    tensors = {name: (list(info.shape), info.dtype) for name, info in base.tensors.items()}
    if {tensor.name: (tensor.shape, tensor.base_dtype) for tensor in plan.tensors} != tensors:
        raise PlanError("plan.json: tensors are not the base's. Run `cpimerge plan` again")
    problems = [problem for other in checkpoints.values() for problem in (*differences(base, other), *refused(other))]
    for planned in plan.inputs:
        needed = checkpoints[planned.name].scratch_bytes
        if needed > planned.scratch_bytes + FETCH_BYTES:  # which a model takes that is streamed by now
            problems.append(
                f"{checkpoints[planned.name].where}: takes {format_size(needed)} a thread, as is not planned"
            )
    if problems:
        raise PlanError([*problems, PLAN_AGAIN])


def _in_one_vocabulary(planned: Vocabulary, checkpoints: Mapping[str, Checkpoint]) -> dict[str, Checkpoint]:
    """As they were planned. Raises PlanError where their tokenizers say something else by now."""
    settled = settle(checkpoints, planned.mode)
    problems = settled.damaged + settled.problems
    if not problems and settled.vocabulary != planned:
        now = settled.vocabulary.tokens_xxh3 if settled.vocabulary else {}
        names = (name for name, xxh3 in planned.tokens_xxh3.items() if now.get(name) != xxh3)
        problems = [f"{checkpoints[name].where}: its tokens changed since it was planned" for name in names]
    if problems or settled.vocabulary != planned:
        raise PlanError([*problems, PLAN_AGAIN])
    return settled.checkpoints


def _place(checkpoint: Checkpoint, file: str) -> Path:
    """Where a shard is, or was: of an adapter or of the model under it."""
    return (checkpoint.where if file in ADAPTER_FILES else checkpoint.path) / file


def _change(now: tuple[int, str] | None, then: tuple[int, str] | None) -> str:
    if now is None or then is None:
        return "not there when planned" if then is None else "gone since it was planned"
    if now[0] != then[0]:
        return f"{now[0]} bytes, was {then[0]} when planned"
    return "its header changed since it was planned"
