"""Directories and file descriptors, for tests that compare what was written and see what is left open."""

from __future__ import annotations

import os
from pathlib import Path


def files(directory: Path) -> dict[str, bytes]:
    """The content of every file below `directory`, by its path relative to it."""
    every = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in every}


def is_open(handle: int) -> bool:
    """Whether it is a file descriptor of this process."""
    try:
        os.fstat(handle)
    except OSError:
        return False
    return True
