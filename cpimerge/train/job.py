"""What a training run is, once all is checked that needs neither PyTorch nor the weights."""

from __future__ import annotations

import importlib.util
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from ..checkpoint import Checkpoint, collect
from ..companions import companion_files, unreadable
from ..errors import CheckpointError, ResourceError
from ..models import locate, open_model
from ..ordinary import open_ordinary
from ..quantized import refused
from ..references import Reference
from .sampling import Sample
from .settings import Settings

if TYPE_CHECKING:
    from .stage_cores import Freeze

__all__ = [
    "Cores",
    "Job",
    "Observer",
    "Outline",
    "StageOutline",
    "check_extra",
    "content_hash",
    "library_versions",
    "open_start",
]

EXTRA = ("torch", "transformers", "accelerate")
READ_BYTES = 1 << 20
# What accelerate reads from variables `ACCELERATE_...`, whatever transformers asks of it, and what says no there.
COMPUTING = (
    "MIXED_PRECISION",
    "DYNAMO_BACKEND",
    "USE_DEEPSPEED",
    "USE_FSDP",
    "USE_MEGATRON_LM",
    "USE_PARALLELISM_CONFIG",
    "USE_CPU",
    "TORCH_DEVICE",
)
OFF = ("", "0", "false", "no", "n", "f", "off")


@dataclass(frozen=True)
class StageOutline:
    """A stage to come: its tasks, the examples of all of them together, and its optimizer steps."""

    tasks: tuple[str, ...]
    examples: int
    steps: int


@dataclass(frozen=True)
class Outline:
    """What a run is going to do. `samples` and `holdout` are examples of each task; `cut`: how many were truncated."""

    stages: tuple[StageOutline, ...]
    samples: int
    holdout: int
    cut: Counter[str]
    notes: tuple[str, ...]


def _silent(*_: object) -> None:
    """Nobody watches."""


@dataclass(frozen=True)
class Observer:
    """Who is told of a run: what it is going to do, at which stage and step it goes on, and every step that is done."""

    progress: Callable[[str, int, int], None] = _silent
    resumed: Callable[[int, int], None] = _silent
    announce: Callable[[Outline], None] = _silent


@dataclass(frozen=True)
class Cores:
    """Whose cores are frozen in a stage of the plan: "prior", those of earlier stages, or "all", of all others."""

    plan_dir: Path
    freeze: Freeze


@dataclass(frozen=True)
class Job:
    """A run: the `kind` of work, where it starts, and its stages' tasks with the samples of each task.

    `cores` is None where nothing is frozen. `parts` decide the bytes of the result, by name; `facts`
    are what its record says of them. `inputs` are directories and files that are only read.
    """

    kind: str
    start: Checkpoint
    stages: Sequence[Sequence[str]]
    samples: Mapping[str, Sample]
    settings: Settings
    cores: Cores | None
    parts: Mapping[str, str]
    facts: Mapping[str, Any]
    inputs: Sequence[Path]
    notes: tuple[str, ...] = ()

    @property
    def tasks(self) -> list[str]:
        """All tasks in stage order."""
        return [task for stage in self.stages for task in stage]


def check_extra(settings: Settings) -> None:
    """Raise ResourceError where training is not possible here, or would not be what the settings say.

    Something is not installed, this is one process of many, or the environment tells accelerate to compute otherwise.
    """
    missing = [name for name in EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        raise ResourceError(f"training needs {' and '.join(missing)}: pip install 'cpimerge[train]'")
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ResourceError(
            "WORLD_SIZE: this trains in one process. For several, use cpimerge.train.FrozenCoresCallback in a script "
            "of your own (see docs/freezing.md)"
        )
    if problems := list(_contradictions(settings)):
        raise ResourceError(problems)


def _contradictions(settings: Settings) -> Iterator[str]:
    """A problem for each variable by which accelerate would compute other than it is told, and nobody would know."""
    for name in COMPUTING:
        value = os.environ.get(f"ACCELERATE_{name}", "")
        if value.lower() not in OFF and not (name == "MIXED_PRECISION" and value == "bf16" and settings.bf16):
            setting = " and give --bf16 for bfloat16" if name == "MIXED_PRECISION" else ""
            yield f"ACCELERATE_{name}={value}: would change what is computed. Unset it{setting}"


def library_versions() -> dict[str, str]:
    """Of the libraries that compute."""
    return {name: version(name) for name in EXTRA}


def open_start(reference: Reference) -> Checkpoint:
    """The checkpoint to train, by its headers. Raises CheckpointError listing all that is wrong with it."""
    start = open_model(locate(reference), None)
    if start.adapter is not None:
        raise CheckpointError(
            f"{start.adapter}: is an adapter, and training wants a whole model. Merge it into its model first"
        )
    problems = list(refused(start))
    with collect(start.path, problems):
        problems.extend(unreadable(start.path))
    if problems:
        raise CheckpointError(problems)
    return start


def content_hash(start: Checkpoint) -> str:
    """xxh3-128 of all files that a run takes from the directory. Raises CheckpointError where one cannot be read."""
    digest = xxhash.xxh3_128()
    for file in _files(start):
        try:
            with os.fdopen(open_ordinary(file), "rb") as stream:
                size = os.fstat(stream.fileno()).st_size
                digest.update(f"{file.relative_to(start.path).as_posix()} {size} ".encode())
                while block := stream.read(READ_BYTES):
                    digest.update(block)
        except OSError as error:
            raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from error
    return digest.hexdigest()


def _files(start: Checkpoint) -> Iterable[Path]:
    shards = {shard.file for shard in start.shards}
    return (*sorted(shards), *(file for file in companion_files(start.path) if file not in shards))
