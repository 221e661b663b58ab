"""Exact, streaming core-parameter fusion (CPI-FT) of fine-tuned checkpoints, without loading a model."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .api import estimate, fuse, inspect, merge, plan, push, verify, verify_inputs
from .errors import (
    ChangedInputError,
    CheckpointError,
    CpimergeError,
    DataError,
    IncompatibleError,
    OutputError,
    PlanError,
    RecipeError,
    ResourceError,
)

if TYPE_CHECKING:
    from .recipe import Recipe, load_recipe

__version__ = "0.1.0"

__all__ = [
    "ChangedInputError",
    "CheckpointError",
    "CpimergeError",
    "DataError",
    "IncompatibleError",
    "OutputError",
    "PlanError",
    "Recipe",
    "RecipeError",
    "ResourceError",
    "estimate",
    "fuse",
    "inspect",
    "load_recipe",
    "merge",
    "plan",
    "push",
    "verify",
    "verify_inputs",
]


def __getattr__(name: str) -> Any:
    """`Recipe` and `load_recipe` on first use: the schema library takes longer to import than `--help` to print."""
    if name in ("Recipe", "load_recipe"):
        return getattr(import_module(".recipe", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
