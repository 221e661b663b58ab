"""Sizes as people write them, and how a memory budget is divided."""

from __future__ import annotations

import pytest

from cpimerge.budget import RUNTIME_BYTES, Budget, format_size, parse_size
from cpimerge.errors import ResourceError

MB = 1_000_000


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("512MB", 512 * MB),
        ("2 GiB", 2 << 30),
        ("1.5gb", 1500 * MB),
        ("1000", 1000),
        (7, 7),
        ("3kb", 3000),
        ("9B", 9),
        ("1.1GB", 1100 * MB),
    ],
)
def test_parse_size(text: str | int, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize(
    "text", ["", "MB", "-1MB", "12 elephants", "1e9", "1,5GB", "1iB", "1\u212aB", "\u0661", "9" * 400]
)
def test_parse_size_refuses(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size: write it like 512MB or 2GiB"):
        parse_size(text)


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (999_960, "1.0 MB"), (5e9, "5.0 GB"), (2e15, "2000.0 TB")],
)
def test_format_size(nbytes: float, text: str) -> None:
    assert format_size(nbytes) == text


def test_the_default_is_shared_bytes_and_some_for_each_thread() -> None:
    budget = Budget.divide(10 * MB, 2, None)
    assert budget.peak_bytes == 400 * MB + 2 * 64 * MB
    assert budget.peak_bytes >= RUNTIME_BYTES + 2 * 10 * MB


def test_the_default_grows_where_the_least_is_more() -> None:
    budget = Budget.divide(500 * MB, 2, None)
    assert budget.peak_bytes == RUNTIME_BYTES + 1000 * MB


def test_a_given_budget_is_kept_to_the_byte() -> None:
    least = RUNTIME_BYTES + 3 * 10 * MB
    assert Budget.divide(10 * MB, 3, least).peak_bytes == least
    assert Budget.divide(10 * MB, 3, least + 30).peak_bytes == least + 30
    with pytest.raises(ResourceError, match=r"memory: .* is too little for 3 threads .* or use one thread"):
        Budget.divide(10 * MB, 3, least - 1)
    with pytest.raises(ResourceError, match="Raise the budget"):
        Budget.divide(10 * MB, 1, 5)


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ResourceError, match="threads: at least 1 is needed, got 0"):
        Budget.divide(1, 0, None)
    with pytest.raises(ResourceError, match="memory: 'lots' is not a size"):
        Budget.divide(1, 1, "lots")
