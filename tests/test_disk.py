"""Whole writes, and space that is set aside."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cpimerge import disk


@contextmanager
def opened(file: Path) -> Iterator[int]:
    handle = os.open(file, os.O_RDWR | os.O_CREAT)
    try:
        yield handle
    finally:
        os.close(handle)


def test_a_write_that_is_cut_short_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda handle, data, offset: pwrite(handle, data[:3], offset))
    with opened(tmp_path / "file") as handle:
        disk.write_at(handle, memoryview(b"0123456789"), 2)
    assert (tmp_path / "file").read_bytes() == b"\0\x000123456789"


def test_space_is_set_aside_and_the_size_stays(tmp_path: Path) -> None:
    with opened(tmp_path / "file") as handle:
        os.write(handle, b"abc")
        disk.reserve(handle, 1_000_000)
        assert os.fstat(handle).st_size == 3
        if disk._fallocate() is not None:  # and a file system that can, as all in common use
            assert disk.held_bytes(tmp_path) >= 1_000_000
        os.ftruncate(handle, 3)
    assert (tmp_path / "file").read_bytes() == b"abc"
    assert disk.held_bytes(tmp_path) < 100_000


def test_more_than_the_disk_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Is not even tried: the system would take all that there is before it fails."""
    called: list[int] = []
    monkeypatch.setattr(disk, "_fallocate", lambda: failing(errno.ENOSPC, called))
    with opened(tmp_path / "file") as handle, pytest.raises(OSError, match="No space left"):
        disk.reserve(handle, shutil.disk_usage(tmp_path).free * 2)
    assert not called


def failing(code: int, calls: list[int]) -> Callable[..., int]:
    def allocate(handle: int, mode: int, offset: object, size: object) -> int:
        import ctypes

        calls.append(mode)
        ctypes.set_errno(code)
        return -1 if len(calls) == 1 else 0

    return allocate


@pytest.mark.parametrize(
    ("code", "calls"), [(errno.EOPNOTSUPP, 1), (errno.ENOSYS, 1), (errno.EINVAL, 1), (errno.EINTR, 2)]
)
def test_what_the_system_cannot_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, calls: int) -> None:
    called: list[int] = []
    monkeypatch.setattr(disk, "_fallocate", lambda: failing(code, called))
    with opened(tmp_path / "file") as handle:
        disk.reserve(handle, 10)
    assert called == [disk.KEEP_SIZE] * calls


def test_a_full_disk_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fallocate = disk._fallocate()

    def fail_halfway(handle: int, mode: int, offset: object, size: object) -> int:
        if fallocate is not None:
            fallocate(handle, mode, offset, size)
        return failing(errno.ENOSPC, [])(handle, mode, offset, size)

    monkeypatch.setattr(disk, "_fallocate", lambda: fail_halfway)
    with opened(tmp_path / "file") as handle, pytest.raises(OSError, match="No space left"):
        disk.reserve(handle, 1_000_000)
    assert disk.held_bytes(tmp_path) < 100_000  # nothing is kept of it
    monkeypatch.setattr(disk, "_fallocate", lambda: None)
    with opened(tmp_path / "file") as handle:
        disk.reserve(handle, 1 << 62)


def test_what_a_directory_holds(tmp_path: Path) -> None:
    assert disk.held_bytes(tmp_path / "nowhere") == 0
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "file").write_bytes(bytes(10_000))
    (tmp_path / "link").symlink_to("/usr")
    assert 10_000 <= disk.held_bytes(tmp_path) < 100_000


# --- flushing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("refused", [False, True])
def test_a_system_whose_fsync_is_not_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: bool) -> None:
    """macOS: fsync hands a file to the disk, which may keep it in its own memory."""
    asked: list[tuple[str, int]] = []

    def fcntl(handle: int, command: int) -> None:
        asked.append(("fcntl", command))
        if refused:
            raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(disk, "FULL_FLUSH", 51)
    monkeypatch.delattr(os, "fdatasync")
    monkeypatch.setattr("fcntl.fcntl", fcntl)
    monkeypatch.setattr(os, "fsync", lambda handle: asked.append(("fsync", 0)))
    with opened(tmp_path / "file") as handle:
        for flush in (disk.flush_all, disk.flush_data, lambda _: disk.flush(tmp_path / "file")):
            asked.clear()
            flush(handle)
            assert asked == [("fcntl", 51), ("fsync", 0)][: 1 + refused]


def test_files_that_go_while_they_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(bytes(10_000))
    held, lstat = disk.held_bytes(tmp_path), os.lstat

    def last(path: str) -> os.stat_result:
        if path.endswith("b"):
            raise FileNotFoundError
        return lstat(path)

    monkeypatch.setattr(os, "lstat", last)
    assert disk.held_bytes(tmp_path) == held // 2
