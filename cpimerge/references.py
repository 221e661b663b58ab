"""What a recipe may call a model: a directory, a model on the Hub, an adapter, or an adapter on a model."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["HubModel", "Place", "Reference", "is_cached", "parse_reference", "planned_path", "planned_place"]

# `org/name`, perhaps `@revision`. What begins with a dot, a slash or a tilde is a path.
HUB_NAME = re.compile(r"(?P<name>[A-Za-z0-9_][\w.-]*/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")

# In a cache of the Hub's models, and in the one that lasts for a run alone (see remote.py).
SNAPSHOT = re.compile(r"models--(?P<name>[^/]+)/snapshots/(?P<commit>[0-9a-f]{40})$")
STREAMED = ".stream"


@dataclass(frozen=True)
class HubModel:
    """A model on the Hugging Face Hub: `org/name`, at a branch, tag or commit; None: the default branch."""

    name: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{self.name}@{self.revision}" if self.revision else self.name


@dataclass(frozen=True)
class Place:
    """Where a checkpoint or an adapter is: the directory `path`, or, where there is none, a model on the Hub."""

    path: Path  # absolute and normalised, symbolic links kept; it need not exist
    hub: HubModel | None = field(default=None, compare=False)

    @property
    def is_local(self) -> bool:
        """Whether it can only be, or is, the directory `path`."""
        return self.hub is None or os.path.exists(self.path)  # False where it cannot be


@dataclass(frozen=True)
class Reference:
    """A model as a recipe names it: a checkpoint, or an adapter on one (`base+adapter`, as mergekit writes it).

    `model` may also be the directory of an adapter alone, which then lies on the recipe's base.
    """

    model: Place
    adapter: Place | None = None

    @property
    def name(self) -> str:
        """The last part of its name: what to call it where nobody says."""
        place = self.adapter or self.model
        return place.path.name if place.hub is None else place.hub.name.rpartition("/")[2]


def parse_reference(text: str, directory: Path) -> Reference:
    """A reference as written in a recipe whose relative paths are relative to `directory`."""
    model, _, adapter = text.partition("+")
    if not model or not adapter:  # a directory that is called so
        return Reference(_place(text, directory))
    return Reference(_place(model, directory), _place(adapter, directory))


def _place(text: str, directory: Path) -> Place:
    found = HUB_NAME.fullmatch(text)
    hub = HubModel(found["name"], found["revision"]) if found else None
    return Place(Path(os.path.abspath(directory / _expanded(text))), hub)


def _expanded(text: str) -> str:
    try:
        return os.path.expanduser(text)
    except ValueError:  # there is a NUL in it, so no such path either
        return text


def planned_path(path: Path) -> str:
    """What a plan calls a directory: its path, or `org/name@commit` where it goes at the end of the run."""
    found = SNAPSHOT.search(path.as_posix())
    lasts = not any(part.endswith(STREAMED) for part in path.parts)
    return str(path) if lasts or found is None else f"{_name(found)}@{found['commit']}"


def planned_place(text: str) -> Place:
    """The place that a plan calls `text`: a directory, or a model on the Hub at its commit.

    What was planned from the Hub's cache can be fetched again if it is no longer there.
    """
    if found := SNAPSHOT.search(text):
        return Place(Path(os.path.abspath(Path("/", text))), HubModel(_name(found), found["commit"]))
    return _place(text, Path("/"))


def is_cached(path: Path) -> bool:
    """Whether a directory is a model in a cache of the Hub's, which need not have all of its files."""
    return SNAPSHOT.search(path.as_posix()) is not None and planned_path(path) == str(path)


def _name(found: re.Match[str]) -> str:
    return found["name"].replace("--", "/", 1)
