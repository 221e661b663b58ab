"""Small files are read whole, within bounds, where they are ordinary files in the place where they seem to be."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cpimerge.errors import CheckpointError
from cpimerge.ordinary import check_inside, leads_out, open_ordinary, read_ordinary


def test_an_ordinary_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 1000)
    assert read_ordinary(tmp_path / "file", 1000) == b"x" * 1000
    with pytest.raises(OSError, match="is larger than 0 MB, as no such file is"):
        read_ordinary(tmp_path / "file", 999)


def test_what_grows_while_it_is_read_is_no_larger_than_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"x" * 1000)
    small = os.stat_result((0o100644, 0, 0, 0, 0, 0, 10, 0, 0, 0))
    monkeypatch.setattr(os, "fstat", lambda handle: small)
    with pytest.raises(OSError, match="is larger than"):
        read_ordinary(tmp_path / "file", 10)


def test_what_is_no_ordinary_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    for place in (tmp_path / "pipe", tmp_path / "link", tmp_path, Path("/dev/zero")):
        open_files = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
        with pytest.raises(OSError, match="is no ordinary file"):
            open_ordinary(place)
        assert not open_files or len(os.listdir("/proc/self/fd")) == open_files
    with pytest.raises(FileNotFoundError):
        open_ordinary(tmp_path / "gone")


@pytest.mark.parametrize(
    ("target", "out"),
    [
        ("inside.txt", False),
        ("../model/inside.txt", False),
        ("../outside.txt", True),
        ("../models/inside.txt", True),  # whose path begins like the model's
        ("/etc/passwd", True),
        ("gone", False),
        ("../gone", True),
        (f"../models--org--name/blobs/{'0' * 40}", False),
        (f"../models--org--name/blobs/{'a' * 64}", False),
        (f"../models--org--name/blobs/{'a' * 39}", True),
        (f"../models--org--name/blobs/{'a' * 40}/x", True),
        (f"../blobs/{'a' * 64}", True),
    ],
)
def test_links_that_lead_out(tmp_path: Path, target: str, out: bool) -> None:
    """The Hub's cache keeps files beside its snapshots, called by their hash."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model/inside.txt").write_text("x")
    (tmp_path / "model/link").symlink_to(target)
    assert leads_out(tmp_path / "model/link", tmp_path / "model") is out
    if out:
        with pytest.raises(CheckpointError, match="link: is a link out of its directory"):
            check_inside(tmp_path / "model/link")
    else:
        check_inside(tmp_path / "model/link")


def test_a_model_that_is_a_link_itself_is_where_it_leads(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/inside.txt").write_text("x")
    (tmp_path / "alias").symlink_to("model")
    assert not leads_out(tmp_path / "alias/inside.txt", tmp_path / "alias")
