"""The tables of the pages in docs, written between marks in their texts: every figure there was measured."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, replace
from pathlib import Path
from statistics import mean
from typing import Any

from .constants import LOW_RANK, USUAL, Constants
from .merging import DEFAULTS
from .methods import UNSLERPED
from .prospects import Trial, prospect_tables
from .relation_tables import relation_tables
from .results import Line, figures, load, read, spread

DOCS = Path(__file__).parent.parent / "docs"
KINDS = ("reference", "merge", "training")


def write_pages(docs: Path = DOCS) -> None:
    """Put what was measured into all pages of `docs` that have tables of it."""
    write_tables(docs / "seesaw.md", tables())
    write_tables(docs / "grouping.md", relation_tables(read("relations")))
    write_tables(docs / "payoff.md", prospect_tables([Trial(**each) for each in read("prospects")]))


def write_tables(page: Path, tables: Mapping[str, Sequence[str]]) -> None:
    """Put `tables`, lines of Markdown by name, into `page`, each between `<!-- name -->` and `<!-- /name -->`.

    Raises ValueError where `page` has not exactly one place for each.
    """
    text = page.read_text(encoding="utf-8")
    for name, rows in tables.items():
        table = "\n".join(rows)
        marks = re.compile(rf"(?<=<!-- {name} -->\n).*?(?=<!-- /{name} -->)", re.DOTALL)
        text, found = marks.subn(f"{table}\n".replace("\\", r"\\"), text)
        if found != 1:
            raise ValueError(f"{page}: it has {found} places for the table {name!r}; one is needed")
    page.write_text(text, encoding="utf-8")


def tables() -> Mapping[str, Sequence[str]]:
    """Those of docs/seesaw.md by name, as lines of Markdown."""
    found = {}
    for learner in ("encoder", "causal"):
        lines = load(learner)
        found[learner] = [*comparison(lines)]
        found[f"{learner}-tasks"] = [*per_task(lines)]
    lines = [replace(line, settings="") for line in load("encoder")]
    found["ablations"] = [*comparison(lines, ("ablation",), ("CPI-FT", "full multi-task fine-tuning"))]
    found["slerp"] = [*comparison(lines, ("unslerped",), [*UNSLERPED])]
    found["staging"] = [*staging_rows(read("staging"))]
    found["forgetting"] = [*forgetting_rows(read("forgetting"))]
    found["rates"] = [*rate_rows(read("rates"))]
    tried = read("constants")
    found["constants"] = [*constants_rows(tried, USUAL)]
    found["low-rank"] = [*constants_rows(tried, LOW_RANK)]
    found["sweep"] = [*sweep_rows(read("sweep"))]
    return found


def comparison(lines: Sequence[Line], kinds: Sequence[str] = KINDS, also: Sequence[str] = ()) -> Iterator[str]:
    """A row for each method: relative to the experts in the mean and in the worst task, and the gap that is closed."""
    base, experts = lines[0], lines[1]
    yield "| | mean of experts | worst task | gap closed | settings |"
    yield "|---|--:|--:|--:|---|"
    for line in lines:
        if line.kind in kinds or line.name in also:
            shown = figures(line, base, experts)
            cells = (_cell(*shown.normalised), _cell(*shown.worst), _cell(*shown.closed), line.settings)
            yield f"| {line.name} | " + " | ".join(cells) + " |"


def per_task(lines: Sequence[Line]) -> Iterator[str]:
    """A row for each method: its accuracy on every task, in percent, the mean over the seeds."""
    tasks = list(lines[1].seeds[0])
    yield "| | " + " | ".join(tasks) + " |"
    yield "|---|" + "--:|" * len(tasks)
    for line in lines:
        if line.kind in KINDS:
            cells = (f"{100 * mean(scores[task] for scores in line.seeds):.1f}" for task in tasks)
            yield f"| {line.name} | " + " | ".join(cells) + " |"


def forgetting_rows(kept: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A row for each pair and way: the accuracy of both tasks in percent, the mean and the deviation over the seeds."""
    yield "| first → second | | first | second |"
    yield "|---|---|--:|--:|"
    for each in kept:
        cells = (_cell(*spread(seed[each[which]] for seed in each["seeds"])) for which in ("first", "second"))
        yield f"| {each['first']} → {each['second']} | {each['when']} | " + " | ".join(cells) + " |"


def staging_rows(cells: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A row for each density, a column for each threshold: the mean accuracy in percent and the number of stages."""
    taus = list(dict.fromkeys(cell["tau"] for cell in cells))
    yield "| density | " + " | ".join(f"τ = {tau}" for tau in taus) + " |"
    yield "|---|" + "--:|" * len(taus)
    for density in dict.fromkeys(cell["density"] for cell in cells):
        shown = (
            f"{100 * cell['mean']:.1f} ({_counts(cell['stages'])})" for cell in cells if cell["density"] == density
        )
        yield f"| {density} | " + " | ".join(shown) + " |"


def _counts(stages: Sequence[int]) -> str:
    """The numbers of stages of all seeds: one, where they are equal."""
    return "/".join(map(str, stages if len(set(stages)) > 1 else stages[:1]))


def rate_rows(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A row for each rate and merge: what is kept of the experts in the mean and in the worst task, in percent."""
    yield "| rate | merge | mean of experts | worst task |"
    yield "|---|---|--:|--:|"
    for each in rows:
        cells = (_cell(*spread(each[which])) for which in ("means", "worst"))
        yield f"| × {each['multiple']} | {each['merge']} | " + " | ".join(cells) + " |"


def constants_rows(rows: Sequence[Mapping[str, Any]], tried: Sequence[Constants]) -> Iterator[str]:
    """A row for each of `tried`: the mean of experts and the worst task of each kind of experts, means over seeds."""
    kept = {(each["experts"], Constants(**each["constants"])): each for each in rows}
    kinds = [kind for kind in dict.fromkeys(kind for kind, _ in kept) if (kind, tried[0]) in kept]
    names = ("cap_of_low_rank",) if tried is LOW_RANK else ("gain", "cap", "limit")
    yield "| " + " | ".join((*(name.replace("_", " ") for name in names), *kinds, "mean")) + " |"
    yield "|" + "--:|" * (len(names) + len(kinds) + 1)
    for these in sorted(tried, key=astuple):
        found = [tuple(mean(kept[kind, these][which]) for which in ("means", "worst")) for kind in kinds]
        found.append(tuple(map(mean, zip(*found, strict=True))))
        shown = (f"{100 * middle:.1f} / {100 * worst:.1f}" for middle, worst in found)
        mark = " (cpimerge's)" if these == Constants() else ""
        yield "| " + " | ".join((*(f"{getattr(these, name):g}" for name in names), *shown)) + f"{mark} |"


def sweep_rows(candidates: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A row for each candidate, best mean first."""
    yield "| settings | mean accuracy | worst task of expert |"
    yield "|---|--:|--:|"
    for each in sorted(candidates, key=lambda each: -each["mean"]):
        settings = ", ".join(f"{key} {value}" for key, value in each["settings"].items())
        settings += " (cpimerge's defaults)" if each["settings"] == DEFAULTS else ""
        yield f"| {settings} | {100 * each['mean']:.1f} | {100 * each['worst']:.1f} |"


def _cell(middle: float, spread: float | None) -> str:
    return f"{middle:.1f}" if spread is None else f"{middle:.1f} ± {spread:.1f}"
