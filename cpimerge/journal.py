"""What a run has done, in a file that outlives it: a record a line, so that the next run can go on from there."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import xxhash

from .disk import flush_data, open_to_write, write_at

__all__ = ["Journal", "Record", "read_records"]

Record = Mapping[str, Any]


class Journal:
    """Appends records to `file`: each is a line of its xxh3-64 in hex, a space, and JSON.

    `earlier` has those that the file held before, up to the first that is not whole: a run that is cut off, or a disk
    that loses power, leaves a torn last line. `records` counts them all.
    """

    def __init__(self, file: Path) -> None:
        self._handle = open_to_write(file)
        try:
            self.earlier, self._end = _whole_records(file.read_bytes())
            os.ftruncate(self._handle, self._end)
            self.records = len(self.earlier)
        except OSError:
            self.close()
            raise

    def append(self, record: Record) -> None:
        """Add a record and flush it. What it speaks of must be on the disk by now. Raises OSError."""
        text = json.dumps(record, separators=(",", ":"), allow_nan=False).encode()
        line = b"%s %s\n" % (xxhash.xxh3_64_hexdigest(text).encode(), text)
        write_at(self._handle, memoryview(line), self._end)
        flush_data(self._handle)
        self._end += len(line)
        self.records += 1

    def close(self) -> None:
        """Once is enough."""
        handle, self._handle = self._handle, -1
        if handle >= 0:
            os.close(handle)


def read_records(file: Path) -> list[Record]:
    """The records in `file`, up to the first that is not whole; it is left as it is. Raises OSError."""
    return _whole_records(file.read_bytes())[0]


def _whole_records(data: bytes) -> tuple[list[Record], int]:
    """All records before the first that is damaged, and where the last of them ends."""
    records: list[Record] = []
    end = 0
    for line in data.splitlines(keepends=True):
        digest, _, text = line.rstrip(b"\n").partition(b" ")
        if not line.endswith(b"\n") or digest != xxhash.xxh3_64_hexdigest(text).encode():
            break
        record = None
        with suppress(ValueError, RecursionError):  # whoever writes a journal by hand can give it any checksum
            record = json.loads(text)
        if not isinstance(record, dict):
            break
        records.append(record)
        end += len(line)
    return records, end
