"""What a run needs in memory, and how a memory budget is kept. All sizes in bytes."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from .errors import ResourceError

__all__ = ["Budget", "format_size", "parse_size", "usable_threads"]

MB = 1_000_000
# What the interpreter allocates beside the chunks: 90 MB with numba and numpy loaded, 202 MB in the one run on a
# machine that compiles the kernels, and 25 MB for the sample of a large pool (RssAnon on Linux, which
# tests/test_determinism.py samples).
RUNTIME_BYTES = 240 * MB
DEFAULT_SHARED_BYTES = 400 * MB
DEFAULT_THREAD_BYTES = 64 * MB
# Of cgroups, version 2 and 1: the limit of the group that a container sees as the root.
CONTAINER_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
UNITS = {"B": 1, "KB": 1000, "MB": MB, "GB": 1000 * MB, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}
SIZE = re.compile(r"\s*([0-9]{1,20}(?:\.[0-9]{1,20})?)\s*((?:[KMG]i?)?B)?\s*", re.IGNORECASE | re.ASCII)


def parse_size(text: str | int) -> int:
    """`512MB`, `2 GiB` or plain bytes → bytes. Raises ValueError saying what is accepted."""
    match = SIZE.fullmatch(str(text))
    if not match:
        raise ValueError(f"{text!r} is not a size: write it like 512MB or 2GiB")
    return int(Fraction(match[1]) * UNITS[(match[2] or "B").upper()])


def format_size(nbytes: float) -> str:
    """Bytes for people, in powers of ten: `1.4 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 999.95:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} TB"


def usable_threads() -> int:
    """Processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Budget:
    """Threads, the bytes that the process may allocate, and how many matrices it may hold whole at a time."""

    threads: int
    peak_bytes: int
    matrices: int = 1

    @classmethod
    def divide(cls, chunk_bytes: int, threads: int | None, memory: int | str | None, matrix_bytes: int = 0) -> Budget:
        """Divide `memory` (bytes in all; default 400 MB + 64 MB a thread, or what is needed) among the threads.

        The default is no more than the machine has, or the container, where less is enough.

        `chunk_bytes` is what each thread needs at least, and `matrix_bytes` what one of them needs beside it, or as
        many at a time as there is room for (by default in half of the machine's memory). Raises ResourceError where
        the budget cannot hold that.
        """
        threads = usable_threads() if threads is None else threads
        if threads < 1:
            raise ResourceError(f"threads: at least 1 is needed, got {threads}")
        least = RUNTIME_BYTES + threads * chunk_bytes + matrix_bytes
        have = _machine_bytes()
        total = max(least, min(DEFAULT_SHARED_BYTES + threads * DEFAULT_THREAD_BYTES, have))
        if memory is not None:
            total = _size(memory)
        elif matrix_bytes:
            total = max(total, min(least + (threads - 1) * matrix_bytes, have // 2))
        counted = "1 thread" if threads == 1 else f"{threads} threads"
        if total < least:
            raise ResourceError(
                f"memory: {format_size(total)} is too little for {counted} and this many models: "
                f"at least {_rounded_up(least)} is needed. {_way_out(threads, chunk_bytes, matrix_bytes)}"
            )
        if memory is None and total > have:
            raise ResourceError(
                f"memory: the models take {_rounded_up(least)} on {counted}, and this machine has {format_size(have)}. "
                "Use fewer threads or fewer models; of an adapter, see whether its rank makes sense"
                f"{_of_levelled(matrix_bytes)}"
            )
        matrices = 1 + (total - least) // matrix_bytes if matrix_bytes else 1
        return cls(threads, total, min(matrices, threads))


def _machine_bytes() -> int:
    """Physical memory, or what a container may take of it."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for file in CONTAINER_LIMITS:
        with suppress(OSError, ValueError):  # there is none, or it says "max"
            found.append(int(file.read_text(encoding="ascii")))
    return min(found)


def _size(memory: int | str) -> int:
    try:
        return parse_size(memory)
    except ValueError as error:
        raise ResourceError(f"memory: {error}") from error


def _way_out(threads: int, chunk_bytes: int, matrix_bytes: int) -> str:
    keep = _of_levelled(matrix_bytes)
    if threads == 1:
        return f"Raise the budget{keep}"
    return f"Raise it, or use one thread ({_rounded_up(RUNTIME_BYTES + chunk_bytes + matrix_bytes)}){keep}"


def _of_levelled(matrix_bytes: int) -> str:
    return f". Levelled matrices take {_rounded_up(matrix_bytes)} of it (singular_values)" if matrix_bytes else ""


def _rounded_up(nbytes: int) -> str:
    """In whole megabytes, such that the size named is enough."""
    return f"{-(-nbytes // MB)} MB"
