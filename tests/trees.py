"""Directories as values, for tests that compare what was written."""

from __future__ import annotations

from pathlib import Path


def files(directory: Path) -> dict[str, bytes]:
    """The content of every file below `directory`, by its path relative to it."""
    every = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in every}
