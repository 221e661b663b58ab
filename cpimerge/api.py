"""The public functions. They import what they need when called, so that `import cpimerge` stays light."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .budget import Budget
    from .needs import Needs
    from .plan_file import Plan
    from .preflight import Inputs
    from .recipe import Recipe

__all__ = ["estimate", "fuse", "merge", "plan"]

Progress = Callable[[str, int, int], None]  # phase ("plan" or "fuse"), bytes done, bytes in all


def _silent(*_: object) -> None:
    """Nobody watches."""


def plan(  # noqa: PLR0913 - all but two are keywords with a default
    recipe: str | Path | Recipe,
    out: str | Path,
    *,
    threads: int | None = None,
    memory: int | str | None = None,
    force: bool = False,
    progress: Progress = _silent,
    announce: Callable[[Needs], None] = _silent,
) -> Plan:
    """Make the plan of a merge and write it to the directory `out`.

    `recipe` is the path of a recipe or a `Recipe`; `threads` defaults to the processors at hand; `memory` is the
    budget of the whole process, in bytes or as text ("512MB"); `force` replaces a non-empty `out`. `announce` is
    called once with what the run will need, before any tensor is read; `progress` with bytes done and in all, which
    never fall and end equal. Both are called on the calling thread, and what they raise ends the run.

    Returns what `plan.json` holds. Raises a `CpimergeError` listing every problem, before any tensor is read where
    headers show it. `out` appears when all of it is on disk.
    """
    inputs = _checked(recipe)
    from .writer import check_target

    check_target(Path(out), force, [checkpoint.path for checkpoint in inputs.checkpoints])
    from . import planning  # with numba, which a mistake in the recipe need not wait for
    from .needs import check_disk

    budget, needs = _budgeted(inputs, threads, memory)
    check_disk(needs.plan_bytes + needs.scratch_bytes, Path(out))
    announce(needs)
    return planning.make_plan(inputs, Path(out), budget, force, progress)


def estimate(
    recipe: str | Path | Recipe,
    out: str | Path = ".",
    *,
    threads: int | None = None,
    memory: int | str | None = None,
) -> Needs:
    """What `plan` and then `fuse` would need: memory, disk and time, without doing either.

    The time follows from about a second of work on parts of the inputs, and of writing to the disk of `out`, which is
    left as it was; `fuse_seconds` is None where that cannot be written. Options and errors as for `plan`.
    """
    inputs = _checked(recipe)
    budget, needs = _budgeted(inputs, threads, memory)
    from .probe import seconds

    plan_seconds, fuse_seconds = seconds(inputs, budget.threads, Path(out))
    return replace(needs, plan_seconds=plan_seconds, fuse_seconds=fuse_seconds)


def _budgeted(inputs: Inputs, threads: int | None, memory: int | str | None) -> tuple[Budget, Needs]:
    from .budget import Budget
    from .needs import plan_needs, worker_bytes

    budget = Budget.divide(worker_bytes(inputs), threads, memory)
    return budget, plan_needs(inputs, budget)


def _checked(recipe: str | Path | Recipe) -> Inputs:
    """Everything that can be known without the numeric libraries: the recipe and all headers."""
    from .preflight import check
    from .recipe import Recipe, load_recipe

    return check(recipe if isinstance(recipe, Recipe) else load_recipe(recipe))


def fuse(
    plan_dir: str | Path,
    out: str | Path,
    *,
    threads: int | None = None,
    memory: int | str | None = None,
    force: bool = False,
    progress: Progress = _silent,
) -> dict[str, Any]:
    """Obey the plan in `plan_dir`: write the fused checkpoint to the directory `out`.

    Options as for `plan`. Returns what `cpimerge_manifest.json` holds. Raises a `CpimergeError`; nothing appears
    under `out` then.
    """
    from .plan_file import Plan

    loaded = Plan.load(Path(plan_dir))
    from . import fusion
    from .budget import Budget
    from .needs import check_disk, fuse_worker_bytes

    budget = Budget.divide(fuse_worker_bytes(loaded), threads, memory)
    check_disk(loaded.output_bytes, Path(out))
    return fusion.fuse_plan(loaded, Path(plan_dir), Path(out), budget, force, progress)


def merge(  # noqa: PLR0913 - all but two are keywords with a default
    recipe: str | Path | Recipe,
    out: str | Path,
    *,
    threads: int | None = None,
    memory: int | str | None = None,
    force: bool = False,
    progress: Progress = _silent,
    announce: Callable[[Needs], None] = _silent,
    planned: Callable[[Plan], None] = _silent,
) -> dict[str, Any]:
    """`plan` and `fuse` in one. The plan lies beside `out` meanwhile, and `planned` is called with it once.

    Options, return value and what is raised as for both.
    """
    inputs = _checked(recipe)
    from .writer import check_target

    target = Path(out).expanduser().absolute()
    check_target(target, force, [checkpoint.path for checkpoint in inputs.checkpoints])

    def check_disk(needs: Needs) -> None:  # before hours of planning
        from . import needs as sizes

        sizes.check_disk(needs.plan_bytes + max(needs.scratch_bytes, needs.output_bytes), target)
        announce(needs)

    options: dict[str, Any] = {"threads": threads, "memory": memory, "progress": progress}
    with _directory_beside(target) as directory:
        planned(plan(inputs.recipe, directory, force=True, announce=check_disk, **options))
        return fuse(directory, target, force=force, **options)


@contextmanager
def _directory_beside(target: Path) -> Iterator[Path]:
    """Where the plan of a merge lies meanwhile, in the nearest parent of `target` that exists; gone afterwards.

    Its name is fixed, so that what a killed run left there is replaced by the next.
    """
    parent = next(place for place in target.parents if place.exists())
    directory = parent / f".{target.name}.plan"
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
