"""What a plan's numbers say of whether the fusion will pay: notes on tasks that look wrong (docs/payoff.md).

Some are certain, such as a task that is the base itself. The rule for updates of unequal size was right on real
experts as often as that page says.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from statistics import median

import numpy as np

from .checkpoint import Handles, StoredTensor
from .plan_file import Plan, Task
from .preflight import Inputs, TensorSpec
from .recipe import Recipe
from .stream import values_of

__all__ = ["UNEQUAL", "UNEQUAL_KEPT", "prospects", "size", "unequal"]

UNEQUAL = 6.0  # from here on the largest update drowns the others; measured by seesaw/prospects.py
UNEQUAL_KEPT = 4.0  # and from here on where nothing is levelled; measured once, before levelling was the default
FOREIGN = 0.5  # of the weights' size: fine-tunes move them by 0.0001 to 0.1 of it, another model by 1.4
DESCENT = 0.998  # agreement of directions beyond chance; two runs of one task reach 0.993 (relations.json)
SURE = 400  # elements that chance would move apart, for it to mean anything; half of what is shared, as a rule
TENSORS = 16  # of the base, of which a sample is taken
PIECES, PIECE = 16, 256  # the sample of each of them: so many pieces of so many elements, evenly spread


def prospects(plan: Plan, inputs: Inputs) -> list[str]:
    """Notes on the tasks of `plan`, which was made from `inputs`: what was seen, what it means, what to do.

    Reads a few thousand of the base's weights where these are files on this disk. Raises CheckpointError where they
    cannot be read.
    """
    weights = _weights(plan, inputs)
    times = {task.name: _beside(plan, task.name, weights) for task in plan.tasks}
    foreign = [name for name in times if times[name] >= FOREIGN]
    notes = [*_copies(plan), *(_foreign(name, times[name]) for name in foreign)]
    if foreign:
        return notes
    notes.extend(_descent(plan))
    if not _is_weighed(plan, inputs.recipe):
        levels = any(tensor.is_levelled for tensor in plan.tensors)
        notes.extend(_unequal(plan.tasks, UNEQUAL if levels else UNEQUAL_KEPT))
    return notes


def size(task: Task) -> float:
    """The mean magnitude of a task's update, over all floating-point elements."""
    total = task.core * task.mean_in + (task.elements - task.core) * task.mean_out
    return total / task.elements if task.elements else 0.0


def unequal(sizes: Sequence[float]) -> float:
    """How many times the largest of two sizes or more, all above 0, is as large as the median of the others."""
    *others, largest = sorted(sizes)
    return largest / median(others)


def _copies(plan: Plan) -> Iterator[str]:
    """Tasks that are the base, and tasks that are each other."""
    for task in plan.tasks:
        if not task.changed:
            yield (
                f"{task.name!r} is the base: no element differs, so it has no core and weakens the other updates. "
                "Leave it out, or correct its path"
            )
    for a, b in combinations((task.name for task in plan.tasks if task.changed), 2):
        if _are_one(plan, a, b):
            yield f"{a!r} and {b!r} are the same model, which counts twice. Leave one of them out"


def _are_one(plan: Plan, a: str, b: str) -> bool:
    return all(tensor.xxh3[a] == tensor.xxh3[b] for tensor in plan.tensors)


def _foreign(name: str, times: float) -> str:
    return (
        f"the update of {name!r} is {times:.2g} times as large as the weights of the base: it is hardly a fine-tune of "
        "this base, and what is fused with it will hardly work. Take the model that it was trained from as base_model"
    )


def _is_weighed(plan: Plan, recipe: Recipe) -> bool:
    """Whether somebody has thought of the sizes and weighs the models, or averages them already."""
    average = recipe.space == "weights" and not any(task.core for task in plan.tasks)
    return average or recipe.weight is not None or any(task.weight for task in recipe.tasks)


def _descent(plan: Plan) -> Iterator[str]:
    """Two tasks whose updates have a large part in common."""
    for pair in plan.pairs:
        enough = pair.compared - pair.expected >= SURE
        if enough and pair.kappa >= DESCENT and not _are_one(plan, pair.a, pair.b):
            yield (
                f"{pair.a!r} and {pair.b!r} move {pair.aligned / pair.compared:.1%} of what their cores share in the "
                f"same direction, {pair.expected / pair.compared:.1%} by chance, as models do of which one was trained "
                "from the other, or both from another model than this base: what they have in common would count "
                "twice. If so, take that model as base_model, or leave one of them out"
            )


def _unequal(tasks: Sequence[Task], limit: float) -> Iterator[str]:
    """One update that is at least `limit` times as large as the others."""
    sizes = {task.name: size(task) for task in tasks if task.changed}
    if len(sizes) < 2 or not all(sizes.values()) or (times := unequal(list(sizes.values()))) < limit:
        return
    name = max(sizes, key=lambda name: sizes[name])
    others = "that of the other task" if len(sizes) == 2 else "the median of the other tasks'"
    yield (
        f"the update of {name!r} is {times:.2g} times as large as {others}: the fusion may be mostly {name!r}, and "
        "the others may fall below the base. Compare it with a plain average, give it a smaller weight, or take an "
        "earlier checkpoint of it (docs/payoff.md)"
    )


def _weights(plan: Plan, inputs: Inputs) -> dict[str, float]:
    """The mean magnitude of the base's weights in its largest tensors, by name; from a sample of each."""
    blended = {tensor.name for tensor in plan.tensors if tensor.action == "blend"}
    stored = [spec for spec in inputs.tensors if spec.name in blended and isinstance(spec.sources[0], StoredTensor)]
    largest = sorted(stored, key=lambda spec: -spec.elements)[:TENSORS]
    handles = Handles(1)
    try:
        return {spec.name: _mean_magnitude(spec, handles) for spec in largest if spec.elements}
    finally:
        handles.close()


def _mean_magnitude(spec: TensorSpec, handles: Handles) -> float:
    """Of a sample, or of all elements where these are fewer."""
    count = min(PIECES, max(1, spec.elements // PIECE))
    length = min(PIECE, spec.elements)
    starts = np.linspace(0, spec.elements - length, count, dtype=np.int64)
    pieces = [values_of(spec.sources[0], int(start), int(start) + length, handles) for start in starts]
    return float(np.abs(np.concatenate(pieces)).mean(dtype=np.float64))


def _beside(plan: Plan, task: str, weights: Mapping[str, float]) -> float:
    """The size of a task's update beside that of the base's weights, in the sampled tensors."""
    sampled = [tensor for tensor in plan.tensors if tensor.name in weights]
    own = sum(tensor.output.elements * weights[tensor.name] for tensor in sampled)
    return sum(tensor.tasks[task].sum_in + tensor.tasks[task].sum_out for tensor in sampled) / own if own else 0.0
