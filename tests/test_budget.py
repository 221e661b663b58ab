"""Sizes as people write them, and how a memory budget is divided."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cpimerge import budget as budgets
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


@pytest.mark.parametrize(
    ("texts", "limit"),
    [
        (["max\n", None], None),
        ([None, None], None),
        (["1000000\n", None], 1_000_000),
        ([None, "2000000\n"], 2_000_000),
        ([None, "9223372036854771712\n"], None),  # version 1's way to say that there is none
        (["3000000", "2000000"], 2_000_000),
        (["", "\xff"], None),
    ],
)
def test_the_machine_is_no_larger_than_its_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, texts: list[str | None], limit: int | None
) -> None:
    places = tmp_path / "2", tmp_path / "1"
    for place, text in zip(places, texts, strict=True):
        if text is not None:
            place.write_text(text, encoding="latin-1")
    monkeypatch.setattr(budgets, "CONTAINER_LIMITS", places)
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert budgets._machine_bytes() == (limit or physical)


def test_the_default_is_no_more_than_the_machine_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many threads in a small container: more than they need is not asked for."""
    monkeypatch.setattr(budgets, "_machine_bytes", lambda: 1000 * MB)
    assert Budget.divide(MB, 16, None) == Budget(16, 1000 * MB)
    least = RUNTIME_BYTES + 16 * 40 * MB
    assert Budget.divide(40 * MB, 16, None).peak_bytes == 1000 * MB > least
    with pytest.raises(ResourceError, match=r"^memory: the models take 1040 MB on 16 threads, and .* has 1\.0 GB\. "):
        Budget.divide(50 * MB, 16, None)


def test_the_refusal_of_a_machine_names_levelled_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budgets, "_machine_bytes", lambda: 400 * MB)
    way_out = "Use fewer threads or fewer models; of an adapter, see whether its rank makes sense"
    for matrix, more in ((0, ""), (300 * MB, ". Levelled matrices take 300 MB of it (singular_values)")):
        with pytest.raises(ResourceError) as error:
            Budget.divide(200 * MB, 1, None, matrix)
        assert str(error.value).endswith(way_out + more)
