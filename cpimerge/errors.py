"""Every error that cpimerge raises on purpose.

    CpimergeError
    ├── RecipeError          the recipe must change (file, line, key of every problem)
    ├── CheckpointError      a checkpoint on disk is damaged, incomplete or of an unsupported kind
    │   └── ChangedInputError    it was written to while it was read
    ├── IncompatibleError    checkpoints that cannot be merged with each other
    ├── DataError            training data must change (file and line of every problem)
    ├── PlanError            a plan directory is damaged, or the inputs changed since it was made
    ├── ResourceError        the memory budget or the free disk space does not suffice
    └── OutputError          an output cannot be written, or not uploaded

Children say who must act. An error holds one or more problems and its text has one line for each, so that a
person mends them all at once: `<path>: tensor 'X': expected …, got …. <what to do>`.
"""

from __future__ import annotations

from collections.abc import Iterable

__all__ = [
    "ChangedInputError",
    "CheckpointError",
    "CpimergeError",
    "DataError",
    "IncompatibleError",
    "OutputError",
    "PlanError",
    "RecipeError",
    "ResourceError",
]


class CpimergeError(Exception):
    """Root of the tree. `problems` holds one line of text for each thing that is wrong."""

    def __init__(self, problems: str | Iterable[str]) -> None:
        self.problems: tuple[str, ...] = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(self.problems))


class RecipeError(CpimergeError):
    """The recipe is wrong: every problem names its file, line and key."""


class CheckpointError(CpimergeError):
    """A checkpoint cannot be read as it stands: damaged, incomplete or of an unsupported kind."""


class ChangedInputError(CheckpointError):
    """A checkpoint was written to while it was read, so that nothing found in it can be believed."""


class IncompatibleError(CpimergeError):
    """Checkpoints differ in a way that no merge can bridge."""


class DataError(CpimergeError):
    """Training data is wrong, or does not suffice: every problem names its file, and its line where it has one."""


class PlanError(CpimergeError):
    """A plan directory cannot be obeyed: damaged, of another version, or its inputs have changed."""


class ResourceError(CpimergeError):
    """Memory budget or disk space is too small for this run."""


class OutputError(CpimergeError):
    """An output cannot be written, or not uploaded."""
