"""`sft` and `probe`: the public functions. They import PyTorch once everything is checked that does not need it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .settings import Settings

if TYPE_CHECKING:
    from ..references import Reference
    from ..staging import Target
    from .job import Outline
    from .stage_cores import Freeze

__all__ = ["probe", "sft"]


def _silent(*_: object) -> None:
    """Nobody watches."""


def sft(  # noqa: PLR0913 - all but three are keywords with a default
    plan_dir: str | Path,
    data: str | Path,
    out: str | Path,
    *,
    model: str | Path | None = None,
    freeze: Freeze = "prior",
    settings: Settings | None = None,
    force: bool = False,
    restart: bool = False,
    shard_size: int | str | None = None,
    progress: Callable[[str, int, int], None] = _silent,
    resumed: Callable[[int, int], None] = _silent,
    announce: Callable[[Outline], None] = _silent,
) -> dict[str, Any]:
    """Fine-tune in the stages of a plan: step 5 of CPI-FT, or with `model=None`, from the plan's base, DPI.

    `model` is what `fuse` wrote, or another model with the plan's tensors: a directory, or a model in the Hub's cache.
    `data` is a JSONL file whose lines name their task, or a directory of one `TASK.jsonl` a task. Stage k trains the
    tasks of group k, with the cores of earlier groups frozen (`freeze="prior"`), or those of all others ("all").

    Writes to the directory `out`, which appears when all of it is on the disk: a checkpoint with the model's tensor
    names, shapes and dtypes, `training_log.jsonl`, and `cpimerge_training.json`, whose content is returned.

    A run that was cut off is gone on with; `restart` begins anew; `force` replaces a non-empty `out`. `announce` is
    called once with what is to come, `resumed` with the stage and step from which the run goes on, `progress` with the
    stage, steps done and steps in all.

    Raises a `CpimergeError` listing every problem: DataError for the data, ResourceError where PyTorch, transformers
    or accelerate is missing.
    """
    from .job import Cores, Observer
    from .staged import train_stages

    if freeze not in ("prior", "all"):
        raise ValueError(f"freeze: {freeze!r}: expected 'prior' or 'all'")
    cores = Cores(Path(plan_dir).expanduser(), freeze)
    begin = None if model is None else _reference(model)
    observer = Observer(progress, resumed, announce)
    target = _target(out, force, restart, shard_size)
    return train_stages(cores, begin, Path(data).expanduser(), target, settings or Settings(), observer)


def probe(  # noqa: PLR0913 - all but four are keywords with a default
    base: str | Path,
    task: str,
    data: str | Path,
    out: str | Path,
    *,
    settings: Settings | None = None,
    force: bool = False,
    restart: bool = False,
    shard_size: int | str | None = None,
    progress: Callable[[str, int, int], None] = _silent,
    resumed: Callable[[int, int], None] = _silent,
    announce: Callable[[Outline], None] = _silent,
) -> dict[str, Any]:
    """Fine-tune `base` on the examples of one task: step 1 of CPI-FT, an expert for `plan`.

    `data` as for `sft`; examples of other tasks are left alone, and where a file's lines name no task, all are this
    one's. All else, what is raised included, as for `sft`.
    """
    from .job import Observer
    from .probing import train_probe

    observer = Observer(progress, resumed, announce)
    target = _target(out, force, restart, shard_size)
    return train_probe(_reference(base), task, Path(data).expanduser(), target, settings or Settings(), observer)


def _reference(model: str | Path) -> Reference:
    from ..references import parse_reference

    return parse_reference(str(model), Path.cwd())


def _target(out: str | Path, force: bool, restart: bool, shard_size: int | str | None) -> Target:
    from ..staging import Target
    from ..writer import shard_limit

    return Target(Path(out).expanduser(), force, restart, shard_limit(shard_size))
