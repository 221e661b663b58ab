"""From what a recipe calls a model to a checkpoint that can be read."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from . import buffers, ties
from .adapter import is_adapter, open_adapter
from .adapter_config import ADAPTER_CONFIG
from .checkpoint import Checkpoint
from .directory import open_checkpoint
from .errors import CheckpointError
from .references import HubModel, Place, Reference

__all__ = ["Locate", "Located", "finding", "locate", "locate_both", "open_model"]


@dataclass(frozen=True)
class Located:
    """Directories of a model on this disk: a checkpoint, perhaps with an adapter on it, or an adapter alone.

    `open` opens the checkpoint in `path`, whose weights may lie elsewhere.
    """

    path: Path
    adapter: Path | None = None
    open: Callable[[Path], Checkpoint] = open_checkpoint


# From a reference to where it lies; True: it is the base, whose other files the output takes over.
Locate = Callable[[Reference, bool], Located]
Progress = Callable[[str, int, int], None]


def locate(reference: Reference, is_base: bool = False) -> Located:
    """Where the model lies on this disk, the Hugging Face cache included. Raises CheckpointError where it does not."""
    return Located(*locate_both(reference, _directory))


@contextmanager
def finding(
    references: Iterable[tuple[str, Reference]], target: Path, download: str | None, progress: Progress
) -> Iterator[Locate]:
    """How to find the models of a run that writes `target`: their names ("base" is the base) and references.

    `download` None: on this disk alone. "cache": there, after fetching what the Hugging Face cache lacks. "stream":
    on the Hub, but for what this disk has. Raises CheckpointError or ResourceError.
    """
    remote: dict[HubModel, bool] = {}
    for name, reference in references:
        for place in (reference.model, reference.adapter):
            if place is not None and place.hub is not None and not place.is_local:
                is_base = name == "base" and place is reference.model
                remote[place.hub] = remote.get(place.hub, False) or is_base
    if remote and download == "stream":
        from .remote import streams

        with streams(target) as found:
            yield found.locate
        return
    if remote and download is not None:
        from .hub import download as fetch

        fetch(remote, progress)
    yield locate


def locate_both(reference: Reference, find: Callable[[Place], Path]) -> tuple[Path, Path | None]:
    """Where `find` says that the model and its adapter lie. Raises CheckpointError with what is wrong with both."""
    problems: list[str] = []
    found: list[Path] = []
    for place in (reference.model, reference.adapter):
        try:
            found += [] if place is None else [find(place)]
        except CheckpointError as error:
            problems.extend(error.problems)
    if problems:
        raise CheckpointError(problems)
    return found[0], found[1] if reference.adapter else None


def _directory(place: Place) -> Path:
    if place.is_local:
        return place.path
    from .hub import cached

    return cached(place)


def open_model(located: Located, base: Checkpoint | None) -> Checkpoint:
    """Read all headers. `base` is the recipe's, on which an adapter alone lies; None: there is none (yet).

    What the model and the base saved once and what twice is brought in line with the base (see ties.py), and so are
    buffers that only one of them saved (buffers.py).
    Raises CheckpointError listing all that is wrong with it.
    """
    opened = _open(located, base)
    return opened if base is None else ties.onto(base, buffers.onto(base, opened))


def _open(located: Located, base: Checkpoint | None) -> Checkpoint:
    if located.adapter is not None:
        same = base is not None and base.adapter is None and base.path == located.path
        return open_adapter(base if base is not None and same else located.open(located.path), located.adapter)
    if not is_adapter(located.path):
        return _noted(located.open(located.path))
    if base is None or base.adapter is not None:
        raise CheckpointError(
            f"{located.path}: holds an adapter, and the recipe's base is no model that it could lie on. "
            "Say on which model it was trained: model+adapter"
        )
    return open_adapter(base, located.path)


def _noted(model: Checkpoint) -> Checkpoint:
    """A full model, with a note where an adapter was saved beside it: other tools may take that instead."""
    if not os.path.isfile(model.path / ADAPTER_CONFIG):
        return model
    note = f"{model.path}: holds an adapter, too, which is not merged, as there is a full model beside it"
    return replace(model, notes=(*model.notes, note))
