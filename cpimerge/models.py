"""From what a recipe calls a model to a checkpoint that can be read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .checkpoint import Checkpoint
from .directory import open_checkpoint
from .references import Place, Reference

__all__ = ["Located", "locate", "open_model"]


@dataclass(frozen=True)
class Located:
    """Directories of a model on this disk: a checkpoint, perhaps with an adapter on it, or an adapter alone."""

    path: Path
    adapter: Path | None = None


def locate(reference: Reference) -> Located:
    """Where the model lies on this disk. Raises CheckpointError where it does not."""
    adapter = reference.adapter
    return Located(_directory(reference.model), None if adapter is None else _directory(adapter))


def _directory(place: Place) -> Path:
    return place.path


def open_model(located: Located, base: Checkpoint | None) -> Checkpoint:
    """Read all headers. `base` is the recipe's, for an adapter alone; None: the model is the base itself.

    Raises CheckpointError listing all that is wrong with it.
    """
    return open_checkpoint(located.path)
