"""How measurements are printed: medians, ratios of rounds, and tables in Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Sequence


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def seconds(rounds: Sequence[float]) -> str:
    return f"{statistics.median(rounds):.2f}"


def times(ours: Sequence[float], *theirs: Sequence[float]) -> str:
    """Our seconds over theirs together, in every round, as a slow minute slows both: the median, and least to most."""
    ratios = [our / sum(their) for our, *their in zip(ours, *theirs, strict=True)]
    spread = f" ({min(ratios):.2f} to {max(ratios):.2f})" if len(ratios) > 1 else ""
    return f"{statistics.median(ratios):.2f} ×{spread}"


def megabytes(nbytes: float) -> str:
    return f"{nbytes / 1e6:.0f} MB" if nbytes >= 1e7 else f"{nbytes / 1e6:.2f} MB"


def gigabytes(nbytes: float) -> str:
    return f"{nbytes / 1e9:.2f} GB"
