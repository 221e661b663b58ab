"""A small model, its experts, their plan, and which elements a stage must freeze, found the slow way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import reference
import torch
from checkpoints import save, write_recipe

import cpimerge

Masks = dict[str, torch.Tensor]

STAGES = [["c"], ["a", "d"], ["b"]]  # not in the order of the recipe
DENSITY = Fraction(1, 5)


class Small(torch.nn.Module):
    """Classifies short lists of tokens."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(11, 7)
        self.hidden = torch.nn.Linear(7, 9)
        self.norm = torch.nn.LayerNorm(9)
        self.head = torch.nn.Linear(9, 1)  # a row, of which the second of two processes has nothing

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.norm(torch.tanh(self.hidden(self.embed(tokens).mean(1))))
        score: torch.Tensor = self.head(hidden)
        return score


@dataclass(frozen=True)
class World:
    """`plan` is the plan's directory; `cores` are the reference's: flat indices by task and tensor."""

    plan: Path
    cores: Mapping[str, Mapping[str, list[int]]]
    shapes: Mapping[str, torch.Size]

    def masks(self, stage: int, freeze: str) -> Masks:
        """Where a tensor is frozen, bool of its shape: METHOD §5, element by element."""
        tasks = [
            task
            for number, group in enumerate(STAGES, 1)
            for task in group
            if number < stage or (freeze == "all" and number != stage)
        ]
        masks = {}
        for name, shape in self.shapes.items():
            mask = torch.zeros(shape.numel(), dtype=torch.bool)
            for task in tasks:
                for index in self.cores[task][name]:
                    mask[index] = True
            masks[name] = mask.reshape(shape)
        return masks


def make_world(directory: Path) -> World:
    """Base and experts of `Small` and their plan."""
    base = {name: value.clone() for name, value in Small().state_dict().items()}
    generator = torch.Generator().manual_seed(1)
    tasks = sorted(task for group in STAGES for task in group)
    experts = {
        task: {name: value + torch.randn(value.shape, generator=generator) / 50 for name, value in base.items()}
        for task in tasks
    }
    save(directory / "base", base)
    for task, tensors in experts.items():
        save(directory / task, tensors)
    parameters = {"density": DENSITY, "stages": STAGES, "granularity": "row"}
    models = [{"model": directory / task} for task in tasks]
    recipe = write_recipe(directory / "recipe.yml", base_model=directory / "base", models=models, parameters=parameters)
    cpimerge.plan(recipe, directory / "plan")
    found = reference.run(base, experts, reference.Settings(density=DENSITY, stages=STAGES))
    return World(directory / "plan", found.cores, {name: value.shape for name, value in base.items()})
