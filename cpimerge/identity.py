"""What decides a plan, and whether its inputs stay as they are while they are read."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import xxhash

from .adapter_config import ADAPTER_CONFIG
from .checkpoint import Checkpoint, Shard
from .errors import ChangedInputError, CheckpointError, CpimergeError
from .preflight import Inputs
from .references import planned_path
from .staging import Work

__all__ = ["Files", "merge_work", "plan_work"]


@dataclass(frozen=True)
class Files:
    """Every file with weights on this disk, as it was at first: size in bytes, time of its last writing, and inode."""

    states: Mapping[Path, tuple[int, int, int]]

    @classmethod
    def of(cls, inputs: Inputs) -> Files:
        """Raises CheckpointError naming all that cannot be found any more."""
        shards = {shard.file: shard for checkpoint in inputs.checkpoints for shard in checkpoint.shards}
        states: dict[Path, tuple[int, int, int]] = {}
        problems = []
        for file, shard in shards.items():
            if not _is_streamed(shard):
                try:
                    states[file] = _state(file)
                except OSError as error:
                    problems.append(f"{file}: cannot be read: {error.strerror}")
        if problems:
            raise CheckpointError(problems)
        return cls(states)

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Raises ChangedInputError naming all that have changed when the block ends.

        Whatever it found is worth nothing then, its errors included.
        """
        try:
            yield
        except CpimergeError as error:
            self._check(error)
            raise
        self._check(None)

    def _check(self, cause: CpimergeError | None) -> None:
        problems = [
            f"{file}: changed while it was read. Run again when nothing writes to it"
            for file, state in self.states.items()
            if _state_now(file) != state
        ]
        if problems:
            raise ChangedInputError(problems) from cause


def plan_work(inputs: Inputs, files: Files) -> Work:
    """The making of a plan, by all that decides it. No tensor is read for it."""
    recipe = replace(inputs.recipe, file=None)
    tensors = ((spec.name, spec.shape, spec.dtype, spec.eligible) for spec in inputs.tensors)
    vocabulary = inputs.vocabulary.model_dump_json() if inputs.vocabulary else None
    parts = {"the recipe": _hash(repr(recipe), recipe.text)}
    for name, checkpoint in zip(inputs.names, inputs.checkpoints, strict=True):
        where = planned_path(checkpoint.where)
        parts[where] = _hash(parts.get(where), name, *_description(checkpoint))
        for shard in checkpoint.shards:
            written = files.states.get(shard.file, (0, 0, 0))[1]
            place = Path(planned_path(shard.file.parent), shard.file.name)
            parts[str(place)] = _hash(shard.size, shard.header_xxh3, shard.sha256, written)
    return Work("plan", _hash(*parts.items(), *tensors, *inputs.notes, inputs.chat_template, vocabulary), parts)


def merge_work(inputs: Inputs, shard_bytes: int) -> Work:
    """A whole merge, by all that decides its plan, and the most bytes of tensors in one file of the output."""
    plan = plan_work(inputs, Files.of(inputs))
    return Work("merge", f"{plan.identity} {shard_bytes}", plan.parts)


def _description(checkpoint: Checkpoint) -> Iterator[str | None]:
    """What else than its weights says what a checkpoint is."""
    yield planned_path(checkpoint.path)
    yield json.dumps(checkpoint.config, sort_keys=True)
    if checkpoint.adapter is not None:
        yield planned_path(checkpoint.adapter)
        yield (checkpoint.adapter / ADAPTER_CONFIG).read_text("utf-8", "surrogateescape")


def _is_streamed(shard: Shard) -> bool:
    """Whether its file holds no more than its header, in a directory that goes when the run ends."""
    return planned_path(shard.file.parent) != str(shard.file.parent)


def _hash(*values: object) -> str:
    """xxh3-128 in hex."""
    digest = xxhash.xxh3_128()
    for value in values:
        digest.update(repr(value).encode("utf-8", "surrogateescape"))
        digest.update(b"\n")
    return digest.hexdigest()


def _state_now(file: Path) -> tuple[int, int, int] | None:
    try:
        return _state(file)
    except OSError:
        return None


def _state(file: Path) -> tuple[int, int, int]:
    found = os.stat(file)
    return found.st_size, found.st_mtime_ns, found.st_ino
