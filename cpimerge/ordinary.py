"""Small files of strangers, opened with care: ordinary ones, of a bounded size, in the directory where they seem to be.

A pipe would be waited for without end, a device read without end, and a sparse file of a terabyte takes no disk. A link
in what somebody else packed may lead to any file of this machine, which a merge would then publish.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from pathlib import Path

from .errors import CheckpointError

__all__ = ["LEADS_OUT", "check_inside", "leads_out", "open_ordinary", "read_ordinary"]

LEADS_OUT = "is a link out of its directory, and the output would get what it leads to. Put the file itself there"
# Where the Hugging Face cache keeps the files that its snapshots link to.
BLOB = re.compile(r"/[a-z]+--[^/]+/blobs/[0-9a-f]{40,64}$")


def open_ordinary(file: Path) -> int:
    """A handle of `file`, open for reading. Raises OSError, also where it is a pipe, a device or a directory."""
    handle = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # opening a pipe waits, otherwise
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "is no ordinary file", str(file))
    except OSError:
        os.close(handle)
        raise
    return handle


def read_ordinary(file: Path, limit: int) -> bytes:
    """All of a file of at most `limit` bytes. Raises OSError, also where it is larger or no ordinary file."""
    with os.fdopen(open_ordinary(file), "rb") as stream:
        size = os.fstat(stream.fileno()).st_size  # what is asked for is allocated at once
        if size <= limit and len(raw := stream.read(size + 1)) <= limit:
            return raw
    raise OSError(errno.EFBIG, f"is larger than {limit // 1_000_000} MB, as no such file is", str(file))


def leads_out(file: Path, directory: Path) -> bool:
    """Whether `file`, in `directory` by its name, is somewhere else: a link, or in a linked folder, leads out of it.

    Not where it leads to a file that the Hugging Face cache keeps: all of a snapshot's are such links.
    """
    real = os.path.realpath(file)
    inside = os.path.realpath(directory)
    return not real.startswith(os.path.join(inside, "")) and real != inside and not BLOB.search(real)


def check_inside(file: Path) -> None:
    """Raise CheckpointError where a link leads out of the directory of `file`, whose text may get into an output."""
    if leads_out(file, file.parent):
        raise CheckpointError(f"{file}: {LEADS_OUT}")
