"""Where inputs lie, and the floor: what reading and writing them takes without any merging."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from contenders import Contender, Merge, merge, nothing, remove, size_of

EXPERTS = 4


@dataclass(frozen=True)
class Bench:
    """The options. Inputs lie below `directory`, and stay; results go below `work`, which each section leaves empty."""

    directory: Path
    work: Path
    rounds: int
    scale: float
    mergekit: bool

    def checkpoints(self, model: str, experts: int = EXPERTS) -> list[Path]:
        """The base and its experts, made unless they are there."""
        place = self.directory / (model if self.scale == 1 else f"{model}-{self.scale}")
        script = str(Path(__file__).with_name("inputs.py"))
        options = ["--experts", str(experts), "--scale", str(self.scale)]
        subprocess.run([sys.executable, script, str(place), model, *options], check=True)
        return [place / name for name in ("base", *(f"expert{n}" for n in range(1, experts + 1)))]

    def startup(self) -> Merge:
        """The merge of one small tensor: all that it takes is start-up."""
        merged = merge(self.work, "point", self.checkpoints("point"))
        for contender in (merged.plan, merged.fuse, merged.both, merged.verify):
            contender.name = contender.name.replace("cpimerge", "start-up of")
        return merged


def weights(paths: Sequence[Path]) -> list[Path]:
    """The files that hold the tensors of these checkpoints."""
    return [file for path in paths for file in sorted(path.glob("*.safetensors"))]


def total(paths: Sequence[Path]) -> int:
    """Bytes of all of them."""
    return sum(size_of(file) for file in weights(paths))


def reading(paths: Sequence[Path], before: Callable[[], None] = nothing) -> Contender:
    """The floor of `plan`: to read all inputs."""
    return Contender("cat of all inputs", ["cat", *map(str, weights(paths))], before)


def copying(work: Path, path: Path, before: Callable[[], None] = nothing) -> Contender:
    """What `fuse` must do beside reading: write a model, and wait until it is on the disk."""
    copy = work / "copy"
    each = 'for file in "$@"; do dd if="$file" of="$0/${file##*/}" bs=4M conv=fsync || exit; done'

    def prepare() -> None:
        copy.mkdir()
        before()

    command = ["sh", "-c", each, str(copy), *map(str, weights([path]))]
    return Contender("flushed copy of one", command, prepare, after=partial(remove, copy))
