"""Several files in one input: each begins with a line that names it, so that an input can be read and edited."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

__all__ = ["join", "split", "write"]

MARK = re.compile(rb"(?:\A|\n)----- ([\w./-]{1,80})\n")


def split(data: bytes, first: str) -> dict[str, bytes]:
    """Name -> content; what no line names is the file `first`. Of two with one name, the later counts."""
    pieces = MARK.split(data)
    files = {first: pieces[0]} if pieces[0] else {}
    names = (name.decode() for name in pieces[1::2])
    return files | dict(zip(names, pieces[2::2], strict=True))


def join(files: Mapping[str, bytes]) -> bytes:
    """An input that `split` takes apart again."""
    return b"\n".join(b"----- %s\n%s" % (name.encode(), content) for name, content in files.items())


def write(files: Mapping[str, bytes], directory: Path, names: tuple[str, ...]) -> None:
    """Make exactly those of `names` in `directory` that are among `files`; other names are left alone."""
    for name in names:
        if name in files:
            (directory / name).write_bytes(files[name])
        else:
            (directory / name).unlink(missing_ok=True)
