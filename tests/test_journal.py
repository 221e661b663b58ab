"""The journal of a run: what is whole is read back, whatever became of the rest."""

from __future__ import annotations

import json
import os
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from cpimerge.journal import Journal

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(), children, max_size=3),
    max_leaves=8,
)
RECORDS = st.lists(st.dictionaries(st.text(), JSON, max_size=3), max_size=5)


def written(file: Path, records: list[dict[str, Any]]) -> bytes:
    file.unlink(missing_ok=True)
    with closing(Journal(file)) as journal:
        for record in records:
            journal.append(record)
        assert journal.records == len(records)
    return file.read_bytes()


def earlier(file: Path) -> list[Any]:
    with closing(Journal(file)) as journal:
        return list(journal.earlier)


def line(text: str) -> bytes:
    return f"{xxhash.xxh3_64_hexdigest(text.encode())} {text}\n".encode()


@given(records=RECORDS)
def test_records_come_back(tmp_path_factory: pytest.TempPathFactory, records: list[dict[str, Any]]) -> None:
    file = tmp_path_factory.getbasetemp() / "journal"
    data = written(file, records)
    assert [json.loads(entry.partition(b" ")[2]) for entry in data.splitlines()] == records
    assert earlier(file) == records
    assert file.read_bytes() == data


@given(records=RECORDS, data=st.data())
def test_a_torn_end_is_cut_off(
    tmp_path_factory: pytest.TempPathFactory, records: list[dict[str, Any]], data: st.DataObject
) -> None:
    file = tmp_path_factory.getbasetemp() / "torn"
    whole = written(file, records)
    size = data.draw(st.integers(0, len(whole)))
    file.write_bytes(whole[:size])
    kept = records[: whole[:size].count(b"\n")]
    assert earlier(file) == kept
    assert file.read_bytes() == b"".join(whole.splitlines(keepends=True)[: len(kept)])


@given(records=RECORDS.filter(len), data=st.data())
def test_a_flipped_bit_ends_what_is_believed(
    tmp_path_factory: pytest.TempPathFactory, records: list[dict[str, Any]], data: st.DataObject
) -> None:
    file = tmp_path_factory.getbasetemp() / "flipped"
    whole = bytearray(written(file, records))
    bit = data.draw(st.integers(0, 8 * len(whole) - 1))
    number = bytes(whole[: bit // 8]).count(b"\n")
    whole[bit // 8] ^= 1 << bit % 8
    file.write_bytes(whole)
    assert earlier(file) == records[:number]


@pytest.mark.parametrize(
    "tail",
    [
        b"\xff\x00 nonsense\n",
        b"\n",
        line("[1]"),
        line('"text"'),
        line("{"),
        line("[" * 100_000),
        line('{"n": ' + "9" * 10_000 + "}"),
        b"0" * 16 + b' {"a": 1}\n',
    ],
)
def test_what_is_no_record_ends_what_is_believed(tmp_path: Path, tail: bytes) -> None:
    whole = written(tmp_path / "journal", [{"a": 1}])
    (tmp_path / "journal").write_bytes(whole + tail + line('{"a": 2}'))
    assert earlier(tmp_path / "journal") == [{"a": 1}]
    with closing(Journal(tmp_path / "journal")) as journal:
        journal.append({"a": 3})
    assert earlier(tmp_path / "journal") == [{"a": 1}, {"a": 3}]


def test_a_record_is_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[int] = []
    file = tmp_path / "journal"
    monkeypatch.setattr("cpimerge.journal.flush_data", lambda handle: flushed.append(os.fstat(handle).st_size))
    with closing(Journal(file)) as journal:
        journal.append({"a": 1})
        journal.append({"b": 2})
    assert flushed == [len(line('{"a":1}')), file.stat().st_size]


def test_nan_is_no_json(tmp_path: Path) -> None:
    with closing(Journal(tmp_path / "journal")) as journal, pytest.raises(ValueError, match="JSON compliant"):
        journal.append({"a": float("nan")})
    assert (tmp_path / "journal").read_bytes() == b""
