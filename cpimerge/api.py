"""The public functions. They import what they need when called, so that `import cpimerge` stays light."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from .errors import OutputError

if TYPE_CHECKING:
    from .budget import Budget
    from .comparison import Comparison
    from .inspection import Contents
    from .models import Locate
    from .needs import Needs
    from .plan_file import Plan
    from .preflight import Inputs
    from .recipe import Recipe
    from .staging import Target, Watch
    from .uploading import Pushed, Upload
    from .verify_results import InputsVerification, Verification

__all__ = ["estimate", "fuse", "inspect", "merge", "plan", "push", "verify", "verify_inputs"]

Progress = Callable[[str, int, int], None]  # phase ("download", "plan", "fuse", "inspect", …), bytes done, bytes in all
Resumed = Callable[[int, int], None]  # bytes that an earlier run has done, bytes in all
Download = Literal["cache", "stream"] | None
Limits = tuple[int | None, int | str | None]  # threads and memory


def _silent(*_: object) -> None:
    """Nobody watches."""


def plan(  # noqa: PLR0913 - all but two are keywords with a default
    recipe: str | Path | Recipe,
    out: str | Path,
    *,
    threads: int | None = None,
    memory: int | str | None = None,
    force: bool = False,
    restart: bool = False,
    progress: Progress = _silent,
    resumed: Resumed = _silent,
    announce: Callable[[Needs], None] = _silent,
    download: Download = None,
) -> Plan:
    """Make the plan of a merge and write it to the directory `out`.

    `recipe` is the path of a recipe or a `Recipe`; `threads` defaults to the processors at hand; `memory` is the
    budget of the whole process, in bytes or as text ("512MB"); `force` replaces a non-empty `out`. `announce` is
    called once with what the run will need, before any tensor is read; `progress` with bytes done and in all, which
    never fall and end equal. Both are called on the calling thread, and what they raise ends the run.

    A run that was killed, interrupted or failed on the way is gone on with: `resumed` is called once with the bytes
    that it had done and those in all. `restart` deletes what is left of it and begins anew.

    `download` decides on models that the recipe names as on the Hugging Face Hub: None takes what its cache has and
    leaves the network alone; "cache" first fetches what the cache lacks (phase "download", told on a thread of Xet's
    where the Hub uses that); "stream" fetches pieces of the weights as they are read and deletes them again.

    Returns what `plan.json` holds. Raises a `CpimergeError` listing every problem, before any tensor is read where
    headers show it. `out` appears when all of it is on disk.
    """
    from .staging import Target, Watch

    target = Target(Path(out), force, restart)
    with _checked(recipe, target, download, progress) as (inputs, _):
        return _plan(inputs, target, (threads, memory), Watch(progress, resumed), announce, levels=False)


def estimate(
    recipe: str | Path | Recipe,
    out: str | Path = ".",
    *,
    threads: int | None = None,
    memory: int | str | None = None,
    progress: Progress = _silent,
    download: Download = None,
) -> Needs:
    """What `plan` and then `fuse` would need: memory, disk and time, without doing either.

    The time follows from about a second of work on parts of the inputs, and of writing to the disk of `out`, which is
    left as it was; `fuse_seconds` is None where that cannot be written. With `download="stream"` the network decides,
    and both are None. Options and errors as for `plan`.
    """
    target = Path(out)
    with _found(_loaded(recipe), target, download, progress) as (inputs, _):
        budget, needs = _budgeted(inputs, (threads, memory), levels=True)
        if needs.plan_travel_bytes:
            return needs
        from .probe import seconds

        plan_seconds, fuse_seconds = seconds(inputs, budget, target)
        return replace(needs, plan_seconds=plan_seconds, fuse_seconds=fuse_seconds)


def _budgeted(inputs: Inputs, limits: Limits, *, levels: bool) -> tuple[Budget, Needs]:
    """What `plan` and then `fuse` may take. Without `levels`, no room is asked for what only `fuse` levels."""
    from .budget import Budget
    from .needs import matrix_bytes, plan_needs, worker_bytes

    budget = Budget.divide(worker_bytes(inputs, levels=levels), *limits, matrix_bytes(inputs) if levels else 0)
    return budget, plan_needs(inputs, budget)


@contextmanager
def _checked(
    recipe: str | Path | Recipe, target: Target, download: Download, progress: Progress
) -> Iterator[tuple[Inputs, Locate]]:
    """Everything that can be known without the numeric libraries: the recipe, all headers, and that `target` is free.

    Also where to find the models again: that holds within the block.
    """
    loaded = _loaded(recipe)
    from .staging import check_target

    if download:
        check_target(target, ())  # before anything is fetched
    with _found(loaded, target.directory, download, progress) as (inputs, find):
        check_target(target, inputs.directories)
        yield inputs, find


@contextmanager
def _found(recipe: Recipe, target: Path, download: Download, progress: Progress) -> Iterator[tuple[Inputs, Locate]]:
    """The recipe's models, compared by their headers."""
    from .models import finding
    from .preflight import check, references_of

    with finding(references_of(recipe).items(), target, download, progress) as find:
        yield check(recipe, find), find


def _plan(  # the inputs are checked, and `out` is free
    inputs: Inputs, target: Target, limits: Limits, watch: Watch, announce: Callable[[Needs], None], *, levels: bool
) -> Plan:
    from . import planning  # with numba, which a mistake in the recipe need not wait for
    from .needs import check_disk
    from .staging import staged_bytes

    budget, needs = _budgeted(inputs, limits, levels=levels)
    check_disk(needs.plan_bytes + needs.scratch_bytes - staged_bytes(target.directory), target.directory)
    announce(needs)
    return planning.make_plan(inputs, target, budget, watch)


def _fuse(plan: Plan, plan_dir: Path, target: Target, limits: Limits, watch: Watch, find: Locate) -> dict[str, Any]:
    from . import fusion
    from .budget import Budget
    from .needs import fuse_matrix_bytes, fuse_worker_bytes

    budget = Budget.divide(fuse_worker_bytes(plan), *limits, fuse_matrix_bytes(plan))
    return fusion.fuse_plan(plan, plan_dir, target, budget, watch, find)


def _loaded(recipe: str | Path | Recipe) -> Recipe:
    from .recipe import Recipe, load_recipe

    return recipe if isinstance(recipe, Recipe) else load_recipe(recipe)


def fuse(  # noqa: PLR0913 - all but two are keywords with a default
    plan_dir: str | Path,
    out: str | Path,
    *,
    threads: int | None = None,
    memory: int | str | None = None,
    force: bool = False,
    restart: bool = False,
    shard_size: int | str | None = None,
    progress: Progress = _silent,
    resumed: Resumed = _silent,
    download: Download = None,
) -> dict[str, Any]:
    """Obey the plan in `plan_dir`: write the fused checkpoint to the directory `out`.

    `shard_size` is the most tensor data that one file holds, in bytes or as text; the default is "5GB". Other options
    as for `plan`. Returns what `cpimerge_manifest.json` holds. Raises a `CpimergeError`; nothing appears under `out`
    then.
    """
    from .plan_file import Plan
    from .staging import Target, Watch, check_target
    from .writer import shard_limit

    target = Target(Path(out), force, restart, shard_limit(shard_size))
    loaded = Plan.load(Path(plan_dir))
    from .models import finding

    if download:
        check_target(target, [Path(plan_dir)])  # before anything is fetched
    references = [(entry.name, entry.reference) for entry in loaded.inputs]
    with finding(references, target.directory, download, progress) as find:
        return _fuse(loaded, Path(plan_dir), target, (threads, memory), Watch(progress, resumed), find)


def merge(  # noqa: PLR0913 - all but two are keywords with a default
    recipe: str | Path | Recipe,
    out: str | Path,
    *,
    threads: int | None = None,
    memory: int | str | None = None,
    force: bool = False,
    restart: bool = False,
    shard_size: int | str | None = None,
    progress: Progress = _silent,
    resumed: Resumed = _silent,
    announce: Callable[[Needs], None] = _silent,
    planned: Callable[[Plan], None] = _silent,
    download: Download = None,
) -> dict[str, Any]:
    """`plan` and `fuse` in one. The plan lies beside `out` meanwhile, and `planned` is called with it once.

    Options, return value and what is raised as for both; `resumed` may be called for each of them.
    """
    from .companions import read_manifest
    from .identity import merge_work
    from .staging import Target, Watch, forget, is_published, resumable_directory, staged_bytes
    from .writer import shard_limit

    goal = Path(out).expanduser()
    target = Target(goal, force, restart, shard_limit(shard_size))  # a mistake shows before hours of planning

    def check_disk(needs: Needs) -> None:  # so does a full disk
        from . import needs as sizes

        output_bytes = needs.output_bytes + needs.companion_bytes
        needed = needs.plan_bytes + max(needs.scratch_bytes, output_bytes)
        sizes.check_disk(needed - staged_bytes(goal) - staged_bytes(plan_target.directory), goal)
        announce(needs)

    with _checked(recipe, target, download, progress) as (inputs, find):
        merged = replace(target, keep_journal=True, work=merge_work(inputs, target.shard_bytes))
        with resumable_directory(target, ".merge") as directory:
            if is_published(merged):
                manifest = read_manifest(goal)
            else:
                limits, watch = (threads, memory), Watch(progress, resumed)
                plan_target = Target(directory / "plan", force=True, keep_journal=True)
                plan = _plan(inputs, plan_target, limits, watch, check_disk, levels=True)
                planned(plan)
                manifest = _fuse(plan, plan_target.directory, merged, limits, watch, find)
        forget(goal)  # last: until then the next run can tell that the output is this merge's
    return manifest


def push(  # noqa: PLR0913 - all but two are keywords with a default
    directory: str | Path,
    name: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    force: bool = False,
    progress: Progress = _silent,
    announce: Callable[[Upload], None] = _silent,
    bars: bool = False,
) -> Pushed:
    """Upload what `fuse` wrote to `directory` to the Hugging Face Hub as `name`, such as "org/name".

    Every file is read and compared with `cpimerge_manifest.json` before the network is touched, with `progress` for
    the phase "check"; then `announce` is called with what will be uploaded. The repository is made if it is not there,
    `private` if you say so; `revision` is a branch, made if it is not there; `message` is the commit's. A repository
    with other weights is refused; with `force`, all that the directory lacks is deleted from it. `bars` lets
    huggingface_hub show its own progress on stderr.

    Raises OutputError listing every problem.
    """
    from .uploading import Destination, push_output

    destination = Destination(name, private, revision, message, force)
    return push_output(Path(directory).expanduser(), destination, announce, progress, bars)


@overload
def inspect(
    path: str | Path,
    other: None = None,
    *,
    threads: int | None = None,
    memory: int | str | None = None,
    progress: Progress = _silent,
    download: Download = None,
) -> Contents: ...


@overload
def inspect(
    path: str | Path,
    other: str | Path,
    *,
    threads: int | None = None,
    memory: int | str | None = None,
    progress: Progress = _silent,
    download: Download = None,
) -> Comparison: ...


def inspect(
    path: str | Path,
    other: str | Path | None = None,
    *,
    threads: int | None = None,
    memory: int | str | None = None,
    progress: Progress = _silent,
    download: Download = None,
) -> Contents | Comparison:
    """What is in the checkpoint at `path`, by its headers; or how `other` differs from it, its base, in one read.

    Both may be whatever a recipe may call a model, relative to the working directory; `other` also an adapter alone,
    which lies on `path` then. `threads`, `memory` and `download` as for `plan`, where "stream" of one checkpoint
    fetches little more than its headers; `progress` for the phases "download" and "inspect". NaN, Inf and whatever
    cannot be compared are findings, no errors.

    Raises CheckpointError where a checkpoint cannot be read.
    """
    from .inspection import contents, opened

    with opened([str(path)] if other is None else [str(path), str(other)], download, progress) as models:
        if len(models) == 1:
            return contents(models[0])
        from .budget import Budget
        from .comparing import compare_checkpoints, worker_bytes

        budget = Budget.divide(worker_bytes(*(model.checkpoint for model in models)), threads, memory)
        return compare_checkpoints(models[0], models[1], budget, progress)


def verify(  # noqa: PLR0913 - all but two are keywords with a default
    out: str | Path,
    plan: str | Path | None = None,
    *,
    sample: float | str | None = None,
    threads: int | None = None,
    memory: int | str | None = None,
    progress: Progress = _silent,
    download: Download = None,
) -> Verification:
    """Prove that `fuse` wrote to `out` what its plan says: every file, every element, every core, by own arithmetic.

    `plan` is the directory of the plan; without it, it is looked for beside `out`. `sample` ("1%" or 0.01) reads about
    that share, which can refute but proves less. Other options as for `plan`; the phase is called "verify".

    What is wrong is in the result's `failures`. Raises a `CpimergeError` where nothing can be compared: no manifest, no
    plan, a file that cannot be read to its end.
    """
    from .verify_results import parse_share

    try:
        share = None if sample is None else parse_share(sample)
    except ValueError as error:
        raise OutputError(f"sample: {error}") from error
    directory = Path(out).expanduser()
    from .verifying import matrix_bytes, open_output, verify_output, worker_bytes

    output = open_output(directory, None if plan is None else Path(plan).expanduser())
    with _reading(output.plan, download, progress) as find:
        from .budget import Budget

        budget = Budget.divide(worker_bytes(output.plan), threads, memory, matrix_bytes(output.plan))
        return verify_output(output, find, budget, share, progress)


def verify_inputs(
    plan_dir: str | Path,
    *,
    threads: int | None = None,
    memory: int | str | None = None,
    progress: Progress = _silent,
    download: Download = None,
) -> InputsVerification:
    """Read all inputs of the plan in `plan_dir` and compare them with it: sizes, headers, and every tensor's content.

    Options and errors as for `verify`; what changed is in the result's `failures`.
    """
    from .plan_file import Plan

    directory = Path(plan_dir).expanduser()
    plan = Plan.load(directory)
    with _reading(plan, download, progress) as find:
        from .budget import Budget
        from .verify_sources import verify_plan_inputs, worker_bytes

        budget = Budget.divide(worker_bytes(plan), threads, memory)
        return verify_plan_inputs(plan, directory, find, budget, progress)


@contextmanager
def _reading(plan: Plan, download: Download, progress: Progress) -> Iterator[Locate]:
    """Where the plan's inputs are, for a run that writes nothing."""
    from .models import finding

    target = Path(tempfile.gettempdir(), f"cpimerge-{os.getpid()}")
    with finding([(entry.name, entry.reference) for entry in plan.inputs], target, download, progress) as find:
        yield find
