"""Sizes as `--memory` and `--shard-size` take them. Oracle: the number as written, exactly."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path

from cpimerge.budget import UNITS, format_size, parse_size

from ..mutation import lines
from ..target import Run, Target

WORDS = ("512", "MB", "GiB", "kb", "B", ".5", "1e9", "9" * 400, "inf", "nan", "-1", " ", "1_000", "\u0661", "\u00bd")


def _prepare(_: Path) -> Run:
    def run(data: bytes) -> None:
        text = data.decode("utf-8", "surrogateescape")
        size = parse_size(text)
        number = text.strip().rstrip("kKmMgGiIbB").strip()
        unit = text.strip()[len(number) :].strip().upper() or "B"
        exact = Fraction(number) * UNITS[unit]
        assert 0 <= exact - size < 1
        assert format_size(size)

    return run


def _seeds() -> Mapping[str, bytes]:
    return {"plain": b"1000000", "megabytes": b"512MB", "spaced": b" 1.5 GiB "}


TARGET = Target(_prepare, _seeds, ValueError, lines(WORDS), WORDS, max_bytes=1024)
