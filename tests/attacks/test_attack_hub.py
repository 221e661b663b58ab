"""A Hub that lies: names of files that lead elsewhere, sizes and hashes that are none, answers from somewhere else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hub_models import contents
from hub_server import Hub

import cpimerge
from attacks.attack import snapshot

Listed = list[dict[str, Any]]


def named(name: str, **entries: Any) -> Callable[[Listed], Listed]:
    """One more file, which every base would have copied."""
    return lambda siblings: [*siblings, {"rfilename": name, "size": 5, "blobId": "0" * 40} | entries]


def each(**entries: Any) -> Callable[[Listed], Listed]:
    """All files with other entries."""
    return lambda siblings: [sibling | entries for sibling in siblings]


# What the Hub says it has; what is said of it, or None where it does no harm.
LISTS: dict[str, tuple[Callable[[Listed], Listed], str | None]] = {
    "above": (named("../../../../evil.txt"), "it lists a file '../../../../evil.txt' of 5 bytes, so it is no Hub"),
    "above, further in": (named("a/../../../../../evil.txt"), "it lists a file 'a/../../../../../evil.txt' of 5 bytes"),
    "absolute": (named("/evil.txt"), "it lists a file '/evil.txt' of 5 bytes"),
    "the directory above": (named(".."), "it lists a file '..' of 5 bytes"),
    "NUL": (named("evil\0.txt"), "it lists a file 'evil\\x00.txt' of 5 bytes"),
    "half a surrogate pair": (named("evil\ud800.txt"), "it lists a file 'evil\\ud800.txt' of 5 bytes"),
    "control characters": (named("evil\x1b[2J\n\u202e.txt"), "org/base: evil\x1b[2J\n\u202e.txt: the Hub answered 404"),
    "a long name": (named("evil" * 100), "org/base: " + "evil" * 100),
    "no name": (named(""), "it lists a file '' of 5 bytes"),
    "a name of another system": (named("..\\..\\evil.txt"), None),
    "a file in the place of a folder": (
        named("config.json/evil.txt"),
        "org/base: config.json/evil.txt: the Hub answered",
    ),
    "a negative size": (each(size=-(10**9)), "it lists a file 'README.md' of -1000000000 bytes"),
    "a size beyond numbers": (each(size=10**30), f"it lists a file 'README.md' of {10**30} bytes"),
    "a size that is none": (each(size="\x1b[2J"), "it lists a file 'README.md' of '\\x1b[2J' bytes"),
    "a hash that is none": (each(lfs={"sha256": "../../evil", "size": 5, "pointerSize": 1}), None),
    "no list": (lambda siblings: [{"rfilename": ["x"]}], "it lists a file ['x'] of 0 bytes"),
}


@pytest.mark.parametrize("way", ["cache", "stream"])
@pytest.mark.parametrize("case", LISTS)
def test_lists_of_files(published: Path, hub: Hub, tmp_path: Path, case: str, way: Any) -> None:
    """Each is refused in words, or does no harm; nothing lands outside of the cache and of the output."""
    hub.listed, problem = LISTS[case]
    before = snapshot(tmp_path)
    if problem is None:
        cpimerge.merge(published, tmp_path / "out", threads=1, download=way)
    else:
        with pytest.raises(cpimerge.CheckpointError) as error:
            cpimerge.merge(published, tmp_path / "out", threads=1, download=way)
        assert problem in error.value.problems[0]
    after = snapshot(tmp_path)
    assert {path: after.get(path) for path in before} == before
    assert all(path.startswith(("cache", "out", ".out")) for path in after.keys() - before.keys())
    assert not (tmp_path.parent / "evil.txt").exists()


def one_byte(siblings: Listed) -> Listed:
    return [it | {"size": 1} | ({"lfs": it["lfs"] | {"size": 1}} if "lfs" in it else {}) for it in siblings]


def test_sizes_that_lie(published: Path, hub: Hub, tmp_path: Path, from_directories: dict[str, bytes]) -> None:
    """What is loaded is checked by its own headers; what is streamed, against the size that was told."""
    hub.listed = one_byte
    with pytest.raises(cpimerge.CheckpointError, match="incomplete: 1 bytes, shorter than its own header"):
        cpimerge.merge(published, tmp_path / "out", threads=1, download="stream")
    assert not (tmp_path / "out").exists()
    cpimerge.merge(published, tmp_path / "out", threads=1, download="cache")
    assert contents(tmp_path / "out") == from_directories
