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
    """Our seconds over theirs together: the median of what each round says, as a slow minute slows both."""
    return f"{statistics.median(our / sum(their) for our, *their in zip(ours, *theirs, strict=True)):.2f} ×"


def megabytes(nbytes: float) -> str:
    return f"{nbytes / 1e6:.0f} MB" if nbytes >= 1e7 else f"{nbytes / 1e6:.2f} MB"


def gigabytes(nbytes: float) -> str:
    return f"{nbytes / 1e9:.2f} GB"
