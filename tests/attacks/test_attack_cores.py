"""Cores and coefficients of a stranger's plan, with hashes that agree with them.

What a bitmap may hold is tested in tests/kernels/test_bitsets.py; here, that `fuse` never trusts one.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from attacks.attack import Spoil, check, fifo, folder, link, sparse, text
from attacks.sealing import core, rows

CORE = "plan/cores/00.roaring"
OFFSETS = "plan/cores/00.npy"
ROWS = "plan/coefficients.npy"
AGAIN = "Run `cpimerge plan` again"
NO_OFFSETS = f"{OFFSETS}: is not uint64 [4], as plan.json wants. {AGAIN}"
NO_ROWS = f"{ROWS}: is not float32 [10, 2], as plan.json wants. {AGAIN}"
NO_CORE = f"{CORE}: chunk 0 does not fit its tensor. {AGAIN}"
CONSTANTS = {"NO_OFFSETS": NO_OFFSETS, "NO_ROWS": NO_ROWS, "NO_CORE": NO_CORE, "AGAIN": AGAIN}


def bitmap(content: bytes) -> Spoil:
    """Every chunk with this for a bitmap."""
    return core(
        lambda data, chunks: content * chunks, lambda old, size: np.arange(len(old), dtype=np.uint64) * len(content)
    )


def listed(*lows: int) -> bytes:
    """A bitmap of one container that lists its elements as they stand here."""
    return struct.pack(f"<IIHHI{len(lows)}H", 12346, 1, 0, len(lows) - 1, 16, *lows)


def runs(containers: int) -> bytes:
    """65,536 elements a container in a few bytes, as pyroaring writes them."""
    marks = b"\xff" * -(-containers // 8)
    keys = b"".join(struct.pack("<HH", key, 0xFFFF) for key in range(containers))
    begin = 4 + len(marks) + 8 * containers
    offsets = b"".join(struct.pack("<I", begin + 6 * number) for number in range(containers))
    every = struct.pack("<HHH", 1, 0, 0xFFFF) * containers
    return struct.pack("<I", 12347 | (containers - 1) << 16) + marks + keys + offsets + every


def npy(name: str, header: str, body: bytes = b"") -> Spoil:
    """An array file with any header."""
    padded = header.encode() + b" " * (-(11 + len(header)) % 64) + b"\n"
    return text(name, b"\x93NUMPY\1\0" + struct.pack("<H", len(padded)) + padded + body)


def describe(descr: str, shape: str, order: bool = False) -> str:
    return f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}"


BITMAPS: dict[str, tuple[Spoil, list[str]]] = {
    "nothing": (bitmap(b""), [NO_CORE]),
    "rubbish": (bitmap(b"\xff" * 64), [NO_CORE]),
    "falling": (bitmap(listed(1, 0)), [NO_CORE]),
    "twice": (bitmap(listed(1, 1)), [NO_CORE]),
    "beyond the tensor": (bitmap(listed(6000)), [NO_CORE]),
    "bytes left over": (bitmap(listed(1) + b"\0\0"), [NO_CORE]),
    "a container too many": (bitmap(struct.pack("<IIHHIH", 12346, 1, 1, 0, 16, 0)), [NO_CORE]),
    "a size that lies": (
        bitmap(struct.pack("<IIHHI", 12346, 1, 0, 60_000, 16) + b"\xff" + bytes(8191)),
        [NO_CORE],
    ),
    "containers without end": (bitmap(struct.pack("<II", 12346, 0xFFFFFFFF)), [NO_CORE]),
    "runs": (bitmap(runs(1)), [NO_CORE]),
    "four billion elements": (
        bitmap(runs(1 << 16)),
        [f"plan/cores/00.roaring: has 2777100 bytes for 3 chunks. {AGAIN}"],
    ),
}

FILES: dict[str, tuple[Spoil, list[str]]] = {
    "a pipe": (fifo(CORE), [f"plan/cores/00.roaring: cannot be read: is no ordinary file. {AGAIN}"]),
    "a pipe of offsets": (fifo(OFFSETS), [f"plan/cores/00.npy: cannot be read: is no ordinary file. {AGAIN}"]),
    "a pipe of coefficients": (fifo(ROWS), [f"plan/coefficients.npy: cannot be read: is no ordinary file. {AGAIN}"]),
    "a device": (link(CORE, "/dev/zero"), [f"plan/cores/00.roaring: cannot be read: is no ordinary file. {AGAIN}"]),
    "a folder": (folder(CORE), [f"plan/cores/00.roaring: cannot be read: is no ordinary file. {AGAIN}"]),
    "another file of this machine": (
        link(CORE, "OUTSIDE/secret.txt"),
        [f"plan/cores/00.roaring: is not the core that the plan was saved with. {AGAIN}"],
    ),
    "offsets from another file": (link(OFFSETS, "OUTSIDE/secret.txt"), [NO_OFFSETS]),
    "a hole of a terabyte": (sparse(CORE), [f"plan/cores/00.roaring: has 1099511627776 bytes for 3 chunks. {AGAIN}"]),
    "a hole of offsets": (sparse(OFFSETS), [NO_OFFSETS]),
    "a hole of coefficients": (sparse(ROWS), [NO_ROWS]),
    "seven terabytes of offsets": (npy(OFFSETS, describe("'<u8'", "(1000000000000,)")), [NO_OFFSETS]),
    "ten gigabytes of offsets": (npy(OFFSETS, describe("'<u8'", "(1250000000,)")), [NO_OFFSETS]),
    "offsets that are objects": (npy(OFFSETS, describe("'|O'", "(4,)"), bytes(32)), [NO_OFFSETS]),
    "offsets that are records": (npy(OFFSETS, describe("[('a', '<u8')]", "(4,)"), bytes(32)), [NO_OFFSETS]),
    "offsets of nothing": (npy(OFFSETS, describe("'|V0'", "(4,)")), [NO_OFFSETS]),
    "an abyss for a header": (npy(OFFSETS, "[" * 9000), [NO_OFFSETS]),
    "a header that is a program": (
        npy(OFFSETS, describe("'<u8'", "__import__('planted')"), bytes(32)),
        [NO_OFFSETS],
    ),
    "a shape that is a program": (npy(ROWS, describe("'<f4'", "(10**10**10, 2)"), bytes(80)), [NO_ROWS]),
    "fewer than no coefficients": (npy(ROWS, describe("'<f4'", "(-10, 2)"), bytes(80)), [NO_ROWS]),
}

OFFSETS_THAT_LIE: dict[str, tuple[Spoil, list[str]]] = {
    "floats": (core(offsets=lambda old, size: old.astype(np.float64)), [NO_OFFSETS]),
    "two dimensions": (core(offsets=lambda old, size: old.reshape(1, -1)), [NO_OFFSETS]),
    "none": (core(offsets=lambda old, size: old[:1]), [NO_OFFSETS]),
    "falling": (
        core(offsets=lambda old, size: old[::-1].copy()),
        [f"plan/cores/00.npy: does not divide 00.roaring. {AGAIN}"],
    ),
    "falling in between": (
        core(offsets=lambda old, size: old[[0, 2, 1, 3]]),
        [f"plan/cores/00.npy: does not divide 00.roaring. {AGAIN}"],
    ),
    "beyond the file": (
        core(offsets=lambda old, size: old + np.uint64(1 << 40)),
        [f"plan/cores/00.npy: does not divide 00.roaring. {AGAIN}"],
    ),
    "beyond numbers": (
        core(offsets=lambda old, size: old + np.uint64(1 << 63)),
        [f"plan/cores/00.npy: does not divide 00.roaring. {AGAIN}"],
    ),
    "exabytes in a chunk": (
        core(offsets=lambda old, size: old * np.uint64(1 << 55)),
        [f"plan/cores/00.npy: does not divide 00.roaring. {AGAIN}"],
    ),
    "not to the end": (
        core(offsets=lambda old, size: old // np.uint64(2)),
        [f"plan/cores/00.npy: does not divide 00.roaring. {AGAIN}"],
    ),
}

COEFFICIENTS: dict[str, tuple[Spoil, list[str]]] = {
    "a column": (rows(lambda old: old[:, :1].copy()), [NO_ROWS]),
    "one dimension": (rows(lambda old: old.ravel()), [NO_ROWS]),
    "too few": (rows(lambda old: old[:1]), [NO_ROWS]),
    "doubles": (rows(lambda old: old.astype(np.float64)), [NO_ROWS]),
    "in another order of bytes": (rows(lambda old: old.astype(">f4")), [NO_ROWS]),
    "in another order": (rows(np.asfortranarray), [NO_ROWS]),
    "not a number": (
        rows(lambda old: old * np.float32("nan")),
        [f"plan/coefficients.npy: has a coefficient that is NaN or Inf. {AGAIN}"],
    ),
    "infinity": (
        rows(lambda old: old + np.float32("inf")),
        [f"plan/coefficients.npy: has a coefficient that is NaN or Inf. {AGAIN}"],
    ),
    "too large": (
        rows(lambda old: old * 0 + np.float32(3e38)),
        ["tensor 'embed.weight': flat index 6: the result does not fit float32. The inputs are too large to merge"],
    ),
}
TABLES = {"BITMAPS": BITMAPS, "FILES": FILES, "OFFSETS_THAT_LIE": OFFSETS_THAT_LIE, "COEFFICIENTS": COEFFICIENTS}
CASES = [(table, case) for table, cases in TABLES.items() for case in cases]


@pytest.mark.parametrize(("table", "case"), CASES)
def test_cores_and_coefficients(planned: Path, table: str, case: str) -> None:
    check(planned, *TABLES[table][case], command="fuse")
