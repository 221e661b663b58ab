"""Files that a run relies on: written whole, flushed, and with their space set aside before the work."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path

__all__ = ["flush", "flush_all", "flush_data", "held_bytes", "open_to_write", "reserve", "write_at"]

KEEP_SIZE = 1  # FALLOC_FL_KEEP_SIZE: space behind the end of the file, which stays where it is
NOT_OFFERED = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)  # by this file system
BLOCK_BYTES = 512  # what st_blocks counts, on every system

FULL_FLUSH: int | None = getattr(fcntl, "F_FULLFSYNC", None)  # macOS, whose fsync leaves it in the disk's own memory


def open_to_write(file: Path) -> int:
    """A handle of `file`, made if it is not there; what it holds stays. Raises OSError, also where it is a link."""
    return os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)


def write_at(handle: int, data: memoryview, offset: int) -> None:
    """Write all of `data`, contiguous bytes, at byte `offset`. Raises OSError."""
    while data:
        count = os.pwrite(handle, data, offset)
        data, offset = data[count:], offset + count


def flush(path: Path) -> None:
    """Have the disk take a file, or the entries of a directory. Raises OSError."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        flush_all(handle)
    finally:
        os.close(handle)


def flush_all(handle: int) -> None:
    """Have the disk take an open file, or the entries of a directory. Raises OSError."""
    if FULL_FLUSH is not None:
        with suppress(OSError):  # not every file system there offers it
            fcntl.fcntl(handle, FULL_FLUSH)
            return
    os.fsync(handle)


def flush_data(handle: int) -> None:
    """As `flush_all`, but for when the file was last changed, where that can be left. Raises OSError."""
    if hasattr(os, "fdatasync"):
        os.fdatasync(handle)
    else:
        flush_all(handle)


def reserve(handle: int, nbytes: int) -> None:
    """Set aside the disk's space for the first `nbytes` of a file, whose size stays as it is.

    Where the system or the file system cannot, nothing is set aside. Raises OSError where the disk lacks the space,
    without taking what is left of it.
    """
    allocate = _fallocate()
    if allocate is None or nbytes <= 0:
        return
    held, free = os.fstat(handle).st_blocks * BLOCK_BYTES, os.fstatvfs(handle)
    if nbytes - held > free.f_bavail * free.f_frsize:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    while allocate(handle, KEEP_SIZE, ctypes.c_int64(0), ctypes.c_int64(nbytes)):
        code = ctypes.get_errno()
        if code in NOT_OFFERED:
            return
        if code != errno.EINTR:
            os.ftruncate(handle, os.fstat(handle).st_size)  # what it got before it failed
            raise OSError(code, os.strerror(code))


@cache
def _fallocate() -> Callable[..., int] | None:
    """Linux's own call: posix_fallocate writes zeros where the file system has none of its own."""
    return getattr(ctypes.CDLL(None, use_errno=True), "fallocate64", None)


def held_bytes(directory: Path) -> int:
    """What the files in a directory take of the disk, set aside or written; 0 where it is not there."""
    held = 0
    for place, _, names in os.walk(directory):
        for name in names:
            with suppress(FileNotFoundError):  # another run may be ending there
                held += os.lstat(os.path.join(place, name)).st_blocks * BLOCK_BYTES
    return held
