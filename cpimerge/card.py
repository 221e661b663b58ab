"""The model card of a fused checkpoint."""

from __future__ import annotations

import os
import re
from pathlib import Path

from .plain_text import code, plain_name, printable
from .plan_file import Plan
from .references import HubModel, planned_place

__all__ = ["hub_place", "model_card", "model_name", "recipe_without_places"]

# An absolute path in YAML, up to what may end a value; not the rest of a relative path or of an address.
ABSOLUTE_PATH = re.compile(r"""(?<![\w.*/:~-])(?:~[\w.-]*)?/[^\s"',}\]]*""")

# What makes text look other than it is read.
BIDIRECTIONAL = re.compile("[\u202a-\u202e\u2066-\u2069]")


def hub_place(path: str) -> HubModel | None:
    """The model on the Hub, at its commit, that a plan's path stands for; None for directories of one's own."""
    return planned_place(path).hub


def model_name(path: str) -> str:
    """What to call a checkpoint in public: its id on the Hub if it has one, else its directory's name."""
    place = hub_place(path)
    return place.name if place else Path(path).name


def _paths(plan: Plan) -> list[str]:
    """Every directory that was read, of models and of adapters."""
    return [path for entry in plan.inputs for path in (entry.path, entry.adapter) if path]


def recipe_without_places(plan: Plan) -> str:
    """The recipe as written, but for absolute paths: these say more about a machine than about a model."""
    recipe = plan.recipe
    for path in sorted(filter(os.path.isabs, _paths(plan)), key=len, reverse=True):
        recipe = recipe.replace(path, model_name(path))
    return ABSOLUTE_PATH.sub(lambda found: model_name(found[0].rstrip("/")), recipe)


def model_card(plan: Plan, library: str | None) -> str:
    """README.md: metadata that the Hub understands, then how the model came about.

    The Hub takes what `base_model` says for its own models, so directories that it does not know are not listed.
    """
    from huggingface_hub import ModelCardData  # which a mistake in the recipe need not wait for

    names = {entry.name: model_name(entry.adapter or entry.path) for entry in plan.inputs}
    known = list(dict.fromkeys(place.name for path in _paths(plan) if (place := hub_place(path))))
    data = ModelCardData(
        base_model=known or None,
        base_model_relation="merge" if known else None,
        library_name=library,
        tags=["merge", "cpimerge"],
    )
    actions = plan.actions
    base, backbone = names["base"], plain_name(plan.backbone)
    stages = "\n".join(f"{number}. {', '.join(map(plain_name, stage))}" for number, stage in enumerate(plan.stages, 1))
    tasks = "\n".join(
        f"- **{plain_name(task.name)}** ({code(names[task.name])}): {task.core:,} core elements" for task in plan.tasks
    )
    return f"""---
{data.to_yaml()}
---

# {plain_name(base)}, fused

Made from fine-tunes of {code(base)} with cpimerge {plan.cpimerge}: each task's core parameters were transplanted,
the rest was blended (core parameter isolation, [arXiv 2508.21741](https://arxiv.org/abs/2508.21741)).

## Tasks

{tasks}

## Stages

{stages}

Backbone: {backbone}. Tensors: {actions["slerp"]} blended with slerp, {actions["lerp"]} with lerp alone,
{actions["identical"]} identical everywhere, {actions["copy"]} not floating-point. Levelled matrices:
{sum(tensor.is_levelled for tensor in plan.tensors)}.
{_recipe_section(plan)}"""


def _recipe_section(plan: Plan) -> str:
    """The recipe in a fence that nothing in it closes; nothing where it was made in Python, without a text."""
    recipe = BIDIRECTIONAL.sub(lambda found: printable(found[0]), recipe_without_places(plan).rstrip())
    fence = "`" * (1 + max([2, *map(len, re.findall("`+", recipe))]))
    return f"\n## Recipe\n\n{fence}yaml\n{recipe}\n{fence}\n" if recipe else ""
