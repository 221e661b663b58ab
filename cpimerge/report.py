"""Tables and sentences for people; rich renderables, made from results and nothing else."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from .budget import format_size
from .checkpoint import layer_of
from .plain_text import printable

if TYPE_CHECKING:
    from pathlib import Path

    from .demo import DemoResult
    from .needs import Needs
    from .plan_file import Blend, Pair, Plan

__all__ = [
    "demo_report",
    "demo_summary",
    "fuse_report",
    "needs_report",
    "plan_report",
    "plan_summary",
    "printable",
    "render",
    "share",
    "titled",
]

MATRIX_TASKS = 10  # what fits 80 columns; more are listed pair by pair
LISTED_PAIRS = 20
HALF_PRECISION = ("BF16", "F16")
Titled = tuple[Text, Table]
WIDE = 10_000  # columns where nothing limits them
NARROW = 80  # columns at least: a table that a terminal wraps is better than numbers cut short


def render(renderables: Iterable[RenderableType], width: int | None, color: bool) -> str:
    """As text: tables within `width` columns (None: as wide as they like), lines unbroken; nothing is markup."""
    columns = WIDE if width is None else max(width, NARROW)
    console = Console(
        file=io.StringIO(), width=columns, force_terminal=color, markup=False, emoji=False, highlight=False
    )
    with console.capture() as captured:
        for given in renderables:
            renderable = "\n".join(map(printable, given.split("\n"))) if isinstance(given, str) else given
            console.print(renderable, soft_wrap=not isinstance(renderable, Table))
    return captured.get()


def needs_report(needs: Needs) -> str:
    """What the run will need in memory, disk and, where it was probed, time: a line for each phase."""
    threads = f"{needs.threads} thread" + ("s" if needs.threads > 1 else "")
    planned = f"{_reads(needs, needs.plan_travel_bytes)}, writes at most {format_size(needs.plan_bytes)}"
    if needs.scratch_bytes:
        planned += f" (and about {format_size(needs.scratch_bytes)} that goes again)"
    fused = f"{_reads(needs, needs.fuse_travel_bytes)}, writes {format_size(needs.output_bytes)}"
    return (
        f"plan: {planned}{_takes(needs.plan_seconds)}\n"
        f"fuse: {fused}{_takes(needs.fuse_seconds)}\n"
        f"both: on {threads}, in at most {format_size(needs.memory_bytes)} of memory"
    )


def _reads(needs: Needs, travel_bytes: int) -> str:
    travels = f" ({format_size(travel_bytes)} travel from the Hub)" if travel_bytes else ""
    return f"reads {format_size(needs.input_bytes)}{travels}"


def _takes(seconds: float | None) -> str:
    return "" if seconds is None else f", takes {_seconds(seconds)}"


def _seconds(seconds: float) -> str:
    if seconds < 1:
        return "less than 1 s"
    if seconds < 120:
        return f"about {seconds:.0f} s"
    return f"about {seconds / 60:.0f} min" if seconds < 7200 else f"about {seconds / 3600:.1f} h"


def plan_report(plan: Plan) -> Iterator[RenderableType]:
    """What the plan found: tasks, sparsity, overlaps, stages, blends; then what to think of it."""
    sections: list[Iterable[RenderableType]] = [_tasks_table(plan), _sparsity_table(plan)]
    if plan.pairs:
        sections.append(_overlap_matrix(plan) if len(plan.tasks) <= MATRIX_TASKS else _overlap_list(plan))
        if plan.settings.tau == "auto":
            sections.append(_direction_list(plan))
    for section in (*sections, _stage_lines(plan), _blend_table(plan)):
        yield from section
        yield ""
    yield _layers_line(plan)
    yield from (f"note: {line}" for line in (*_remarks(plan), *map(printable, plan.notes)))


def _layers_line(plan: Plan) -> str:
    """How layers were found: what a gradient runs over, and what has one budget with scope: layer."""
    outside = sum(not layer_of(tensor.name) for tensor in plan.tensors)
    stacks = ", ".join(f"{printable(pattern)} ({count})" for pattern, count in plan.layers.items())
    tensors = "1 tensor" if outside == 1 else f"{outside} tensors"
    return f"Layers, by their names: {stacks or 'none'}; {tensors} outside"


def titled(title: str, headings: Sequence[str], rows: Iterable[Sequence[str]], names: int = 1) -> Titled:
    """A table under its title. The column `names`, from 0, holds names, which may fold; the others hold numbers."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 0, 0, 1))
    for number, heading in enumerate(headings):
        name = number == names
        table.add_column(heading, justify="left" if name else "right", no_wrap=not name, overflow="fold")
    for row in rows:
        table.add_row(*row)
    return Text(title, "bold"), table


def share(count: float, of: int) -> str:
    """`count` / `of` in per cent; only 0 is 0% and only all is 100%."""
    if count in (0, of):
        return "100%" if count else "0%"
    percent = 100 * count / of
    return "<0.01%" if percent < 0.01 else ">99.99%" if percent > 99.99 else f"{percent:.2f}%"


def _tasks_table(plan: Plan) -> Titled:
    rows = [
        (
            str(number),
            printable(task.name),
            share(task.changed, task.elements),
            f"{task.core:,}",
            f"{task.mean_in:.3g}",
            f"{task.mean_out:.3g}",
        )
        for number, task in enumerate(plan.tasks, 1)
    ]
    headings = ("#", "task", "changed", "core", "|Δ| in core", "|Δ| outside")
    return titled(f"Tasks: {plan.tasks[0].elements:,} elements, mean update |Δ|", headings, rows)


def _sparsity_table(plan: Plan) -> Titled:
    """METHOD §6, with both dtypes beside it."""
    base = _dtypes(tensor.base_dtype for tensor in plan.tensors if tensor.tasks)
    rows = []
    for number, task in enumerate(plan.tasks, 1):
        counts = (task.elements - task.changed, task.near, task.rounding)
        own = _dtypes(tensor.tasks[task.name].dtype for tensor in plan.tensors if tensor.tasks)
        shares = (share(count, task.elements) for count in counts)
        rows.append((str(number), printable(task.name), *shares, own, base))
    headings = ("#", "task", "|Δ| = 0", "≤ 1e-5", "≤ ½ ulp", "dtype", "base")
    return titled("Update sparsity: share of elements", headings, rows)


def _dtypes(dtypes: Iterable[str]) -> str:
    return "/".join(sorted(set(dtypes)))


def _overlap_matrix(plan: Plan) -> Titled:
    """The Jaccard index above the diagonal, lift below it."""
    cells: dict[tuple[str, str], str] = {}
    for pair in plan.pairs:
        cells[pair.a, pair.b] = share(pair.shared, pair.union)
        cells[pair.b, pair.a] = _lift(pair)
    names = [task.name for task in plan.tasks]
    rows = [(str(number), printable(a), *(cells.get((a, b), "·") for b in names)) for number, a in enumerate(names, 1)]
    headings = ("#", "task", *map(str, range(1, len(names) + 1)))
    title, table = titled("Overlap of cores: Jaccard index above the diagonal, × chance below", headings, rows)
    table.padding = (0, 0)
    table.columns[1].overflow = "ellipsis"  # the tables above have the whole names
    return title, table


def _overlap_list(plan: Plan) -> Titled:
    rows, more = _pair_rows(plan, lambda pair: pair.jaccard, lambda pair: (share(pair.shared, pair.union), _lift(pair)))
    return titled(f"Overlap of cores{more}", ("#", "tasks", "Jaccard", "× chance"), rows)


def _direction_list(plan: Plan) -> Titled:
    """What `tau: auto` goes by."""
    rows, more = _pair_rows(
        plan,
        lambda pair: pair.kappa,
        lambda pair: (
            f"{pair.compared:,}",
            *(share(count, pair.compared) if pair.compared else "–" for count in (pair.aligned, pair.expected)),
        ),
    )
    headings = ("#", "tasks", "shared in layers", "same direction", "by chance")
    return titled(f"Directions in what cores share{more}", headings, rows)


def _pair_rows(
    plan: Plan, rank: Callable[[Pair], float], cells: Callable[[Pair], tuple[str, ...]]
) -> tuple[list[tuple[str, ...]], str]:
    """The pairs of highest rank, and for the title how many they are where they are not all."""
    pairs = sorted(plan.pairs, key=lambda pair: -rank(pair))[:LISTED_PAIRS]
    numbers = {task.name: str(number) for number, task in enumerate(plan.tasks, 1)}
    rows: list[tuple[str, ...]] = [
        (f"{numbers[p.a]}, {numbers[p.b]}", f"{printable(p.a)}, {printable(p.b)}", *cells(p)) for p in pairs
    ]
    return rows, f" ({len(pairs)} highest of {len(plan.pairs)} pairs)" if len(pairs) < len(plan.pairs) else ""


def _lift(pair: Pair) -> str:
    if pair.lift is None:
        return "–"
    return f"×{pair.lift:,.0f}" if pair.lift >= 100 else f"×{pair.lift:.1f}"


def _stage_lines(plan: Plan) -> Iterator[str]:
    found = _groups(plan)
    settled = sorted(sorted(stage) for stage in plan.stages) == sorted(sorted(group) for group in found)
    tau = plan.settings.tau
    if tau == "auto":
        groups, how = (
            "groups of tasks that move what their cores share in the same direction",
            "By agreement (tau: auto)",
        )
    else:
        groups, how = f"groups of cores that overlap by tau = {tau:g} or more", f"By overlap (tau = {tau:g})"
    yield f"Stages: {groups if settled else 'as the recipe states them'}"
    yield from (f" {number}  {_names(stage, ', ')}" for number, stage in enumerate(plan.stages, 1))
    if not settled:
        yield f"{how} the groups would be: {'  '.join('{' + _names(group, ', ') + '}' for group in found)}"
    yield f"Backbone: {printable(plan.backbone)}   Fold: {_names(plan.fold, ' ← ')}"


def _names(names: Iterable[str], joint: str) -> str:
    return joint.join(map(printable, names))


def _groups(plan: Plan) -> list[list[str]]:
    """The groups that follow from the cores alone, whatever stages the recipe states."""
    import numpy as np

    from .agreement import agreements
    from .overlap import grouped

    place = {task.name: number for number, task in enumerate(plan.tasks)}
    counts = np.diag([task.core for task in plan.tasks])
    compared, aligned, expected = np.zeros_like(counts), np.zeros_like(counts), np.zeros(counts.shape)
    for pair in plan.pairs:
        both = [place[pair.a], place[pair.b]], [place[pair.b], place[pair.a]]
        counts[both], compared[both], aligned[both] = pair.shared, pair.compared, pair.aligned
        expected[both] = pair.expected
    tau = plan.settings.tau
    similarity = agreements(compared, aligned, expected)
    found = grouped("auto" if tau == "auto" else Fraction(str(tau)), counts, similarity)
    return [[plan.tasks[task].name for task in group] for group in found]


def _blend_table(plan: Plan) -> Titled:
    """How many tensors are blended by what, with the angles between what is blended."""
    actions = plan.actions
    rows = [(f"{actions[action]:,}", action, *_blend_cells(blends)) for action, blends in _blends(plan).items()]
    rows.append((f"{actions['identical']:,}", "identical, copied"))
    rows.append((f"{actions['copy']:,}", "not floats, copied"))
    headings = ("tensors", "outside the cores", "slerp steps", "angle min", "mean", "max")
    return titled("Blend", headings, rows)


def _blends(plan: Plan) -> dict[str, list[Blend]]:
    blends = [tensor.blend for tensor in plan.tensors if tensor.blend is not None]
    return {"slerp": [b for b in blends if b.slerped], "lerp": [b for b in blends if not b.slerped]}


def _blend_cells(blends: Sequence[Blend]) -> Iterator[str]:
    """Steps that were slerp, and the smallest, mean (over tensors) and largest angle, where there are any."""
    if blends:
        yield f"{sum(blend.slerped for blend in blends):,} of {sum(blend.steps for blend in blends):,}"
    known = [angles for blend in blends if (angles := [angle for angle in blend.angles if angle is not None])]
    if known:
        means = [angles[1] if blends[0].coefficients is None else sum(angles) / len(angles) for angles in known]
        for angle in (min(map(min, known)), sum(means) / len(means), max(map(max, known))):
            yield f"{angle:.2f}°"


def _remarks(plan: Plan) -> Iterator[str]:
    """What the numbers mean, where it is easily overlooked."""
    blends = [tensor.blend for tensor in plan.tensors if tensor.blend is not None]
    if any(blend.steps for blend in blends) and not any(blend.slerped for blend in blends):
        hint = ". Updates hardly ever are: try space: delta" if plan.settings.space == "weights" else ""
        yield f"what is blended is so nearly parallel (or zero) that every slerp is in effect a lerp{hint}"
    if levelled := sum(tensor.is_levelled for tensor in plan.tensors):
        yield f"levelled matrices: {levelled:,}. They take most of the time of fuse; singular_values: keep is faster"
    if len(plan.fold) == 1:
        yield f"nothing is blended: outside the cores the result is {printable(plan.backbone)}"
    if not any(task.core for task in plan.tasks):
        yield "no task has a core: nothing is transplanted"
    for task in plan.tasks:
        if 0 < task.core == task.changed:
            yield f"{printable(task.name)}: every element that changed is in the core"
    dtypes = {info.dtype for tensor in plan.tensors for info in tensor.tasks.values()}
    if dtypes.intersection(HALF_PRECISION):
        yield "stored in 16 bits, an update below ½ ulp is lost: part of |Δ| = 0 is rounding, not sparsity"


def plan_summary(plan: Plan, needs: Needs) -> dict[str, Any]:
    """The plan for machines: plan.json without the recipe and the tensors, of which it gives the counts."""
    return plan.model_dump(exclude={"tensors", "recipe"}) | {"actions": dict(plan.actions), "needs": needs.as_dict()}


def fuse_report(manifest: Mapping[str, Any], out: object) -> str:
    """Where the model is and what it was made of, in one line."""
    tensors = manifest["tensors"].values()
    counts = {action: sum(tensor["action"] == action for tensor in tensors) for action in ACTIONS}
    parts = ", ".join(f"{count:,} {ACTIONS[action]}" for action, count in counts.items() if count)
    files = len(manifest["shards"])
    return f"fused: {printable(out)}   {files} file{'s' * (files > 1)}; tensors: {parts}"


ACTIONS = {"slerp": "slerp", "lerp": "lerp", "identical": "identical everywhere", "copy": "not floating-point"}


def demo_report(result: DemoResult) -> Iterator[RenderableType]:
    """Scores of every model on every task, what they say, and the time they took."""
    rows = [
        (model, *(f"{row[task]:.1%}" for task in result.tasks), f"{result.relative(model):.1%}")
        for model, row in result.scores.items()
    ]
    headings = ("model", *result.tasks, "of experts")
    yield from titled(
        "Scores: share of the next bytes that are right, on test data held out of training", headings, rows, 0
    )
    yield "of experts: the score as a share of that of the task's own expert, in the mean over the tasks"
    yield f"\n{result.verdict()}"
    parts = ", ".join(f"{phase} {seconds:.1f} s" for phase, seconds in result.seconds.items())
    yield f"took {sum(result.seconds.values()):.1f} s: {parts}"


def demo_summary(result: DemoResult, kept: Path | None) -> dict[str, Any]:
    """The demo for machines; `kept`: where its checkpoints stay, None where they do not."""
    return {
        "scores": result.scores,
        "relative": {model: result.relative(model) for model in result.scores},
        "verdict": result.verdict(),
        "seconds": result.seconds,
        "directory": None if kept is None else str(kept),
    }
