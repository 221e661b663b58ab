"""A file that only grows, so that a run that is cut off can be gone on with from any length that was noted."""

from __future__ import annotations

import os
from pathlib import Path

import xxhash

from .disk import flush_data, open_to_write, reserve, write_at

__all__ = ["GrowingFile"]

BUFFER_BYTES = 1 << 16
READ_BYTES = 1 << 20


class GrowingFile:
    """Appends to `file`, through a buffer; `nbytes` of the disk are set aside for it.

    What an earlier run left in it counts as far as `go_on` says, and is written over from there.
    """

    def __init__(self, file: Path, nbytes: int = 0) -> None:
        """Raises OSError, also where `file` is a link or the disk lacks the space."""
        self._handle = open_to_write(file)
        self._buffer = bytearray()
        self._written = 0
        self._hashed = 0, xxhash.xxh3_128()  # so many bytes, and their hash
        try:
            reserve(self._handle, nbytes)
        except OSError:
            self.close()
            raise

    @property
    def size(self) -> int:
        """Bytes appended so far, those of an earlier run included."""
        return self._written + len(self._buffer)

    def append(self, data: bytes) -> None:
        self._buffer += data
        if len(self._buffer) >= BUFFER_BYTES:
            self.flush()

    def flush(self) -> None:
        """Hand everything to the system."""
        write_at(self._handle, memoryview(self._buffer), self._written)
        self._written, self._buffer = self.size, bytearray()

    def sync(self) -> None:
        """Have the disk take what was flushed; on any thread."""
        flush_data(self._handle)

    def read(self, start: int, count: int) -> bytes:
        """So many bytes from `start` on, which were flushed; fewer where the file ends."""
        parts = []
        while count and (part := os.pread(self._handle, count, start)):
            parts.append(part)
            start, count = start + len(part), count - len(part)
        return b"".join(parts)

    def digest(self, size: int) -> xxhash.xxh3_128:
        """The hash of the first `size` bytes, which were flushed; of fewer where the file ends.

        What was hashed the last time is not read again.
        """
        done, digest = self._hashed
        done, digest = (done, digest.copy()) if done <= size else (0, xxhash.xxh3_128())
        while done < size and (block := self.read(done, min(READ_BYTES, size - done))):
            digest.update(block)
            done += len(block)
        if done == size:
            self._hashed = size, digest.copy()
        return digest

    def holds(self, size: int, xxh3: str) -> bool:
        """Whether the file's first `size` bytes have this xxh3-128, in hex."""
        before = self._hashed
        if os.fstat(self._handle).st_size >= size and self.digest(size).hexdigest() == xxh3:
            return True
        self._hashed = before
        return False

    def go_on(self, size: int) -> None:
        """Append behind the first `size` bytes, which are an earlier run's."""
        self._written = size
        if self._hashed[0] > size:  # what comes behind these will be other bytes
            self._hashed = 0, xxhash.xxh3_128()

    def finish(self) -> None:
        """Give the file the size of what was appended, and the rest of its space back."""
        self.flush()
        os.ftruncate(self._handle, self._written)

    def close(self) -> None:
        """Once is enough. What was not flushed is lost."""
        handle, self._handle = self._handle, -1
        if handle >= 0:
            os.close(handle)
