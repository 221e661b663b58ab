"""The tables of docs/grouping.md, from what relations.py measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .relations import CLASSES, DENSITIES, SCOPES

Found = Mapping[str, Any]  # of one kind of experts, as in relations.json
RULES = ("tau: auto", "tau: 0.1")
PERCENT = [f"{100 * float(density):g}%" for density in DENSITIES]


def relation_tables(found: Mapping[str, Found]) -> Mapping[str, Sequence[str]]:
    """By name, as lines of Markdown; `found` is by kind of experts."""
    return {
        "classes": [*class_rows(found["encoder"])],
        "exact": [*exact_rows(found)],
        "twos": [*two_rows(found["encoder"], found["causal"])],
    }


def class_rows(found: Found) -> Iterator[str]:
    """A row for each measure and density: the least and the largest value of every class, `scope: tensor`."""
    yield "| measure | density | " + " | ".join(f"{name} ({found['pairs'][name]})" for name in CLASSES) + " |"
    yield "|---|---|" + "---|" * len(CLASSES)
    for measure, title, spelled in (("Jaccard", "Jaccard index", _percents), ("agreement", "agreement", _numbers)):
        rows = {
            row["density"]: row for row in found["measures"] if (row["measure"], row["scope"]) == (measure, "tensor")
        }
        for density, percent in zip(DENSITIES, PERCENT, strict=True):
            cells = (spelled(rows[density][name]["least"], rows[density][name]["most"]) for name in CLASSES)
            name = f" {title}" if density == DENSITIES[0] else ""
            yield f"|{name} | {percent} | " + " | ".join(cells) + " |"


def _percents(least: float, most: float) -> str:
    return f"{100 * least:.1f} … {100 * most:.1f}%"


def _numbers(least: float, most: float) -> str:
    return f"{least:.2f} … {most:.2f}".replace("-", "−")


def exact_rows(found: Mapping[str, Found]) -> Iterator[str]:
    """A row for each rule, kind of experts and scope: the share of recipes whose groups are exactly right."""
    yield "| rule | experts | scope | " + " | ".join(PERCENT) + " |"
    yield "|---|---|---|" + "---|" * len(PERCENT)
    for rule in RULES:
        for kind, its in found.items():
            cuts = {(cut["scope"], cut["density"]): cut["exact"] for cut in its["cuts"] if cut["rule"] == rule}
            for scope in SCOPES:
                first = scope == SCOPES[0]
                names = (f"`{rule}`" if first and kind == next(iter(found)) else "", kind if first else "", scope)
                cells = (f"{cuts[scope, density]:.0%}" for density in DENSITIES)
                yield "|" + " |".join(f" {cell}" if cell else "" for cell in (*names, *cells)) + " |"


def two_rows(encoder: Found, causal: Found) -> Iterator[str]:
    """A row for each scope and density: of how many pairs `tau: auto` makes one group, by class."""
    columns = [(encoder, "halves"), (encoder, "sisters"), (encoder, "unrelated"), (causal, "unrelated")]
    yield "| scope | density | two halves | sisters | encoder: unrelated | causal: unrelated |"
    yield "|---|---|---|---|---|---|"
    for place, (one, other) in enumerate(zip(encoder["pairs grouped"], causal["pairs grouped"], strict=True)):
        cells = [
            f"{row[name]} of {found['pairs'][name]}" if place == 0 else f"{row[name]}"
            for row, (found, name) in zip((one, one, one, other), columns, strict=True)
        ]
        scope = f" {one['scope']}" if one["density"] == DENSITIES[0] else ""
        yield f"|{scope} | {PERCENT[DENSITIES.index(one['density'])]} | " + " | ".join(cells) + " |"
