"""A core: its bitmaps and where they begin, with the hash that a stranger would compute.

Oracles: positions ascend and lie within the chunk, and where CRoaring finds a bitmap sound it finds the same ones.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from contextlib import closing, suppress
from pathlib import Path
from random import Random

import numpy as np
import xxhash
from pyroaring import BitMap

from cpimerge.cores import CoreReader
from cpimerge.errors import PlanError

from ..bundles import join, split, write
from ..mutation import bundle
from ..target import Havoc, Run, Target
from .plan_files import npy, npy_data

BITMAPS, OFFSETS = "00.roaring", "00.npy"
CHUNKS, ELEMENTS = 6, (1 << 18, 1000, 1)
NUMBERS = (0, 1, 2, 8, 0x10000, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 12346, 12347, 1 << 63, (1 << 64) - 1)


def _prepare(scratch: Path) -> Run:
    file = scratch / BITMAPS

    def run(data: bytes) -> None:
        files = {BITMAPS: b"", OFFSETS: b"", **split(data, BITMAPS)}
        write(files, scratch, (BITMAPS, OFFSETS))
        offsets = npy_data(files[OFFSETS])
        digest = xxhash.xxh3_128_hexdigest(files[BITMAPS] + offsets)
        with closing(CoreReader(file, digest, max(0, len(offsets) // 8 - 1))) as reader:
            for chunk in range(-1, CHUNKS):
                for elements in ELEMENTS:
                    with suppress(PlanError):
                        _check(reader, chunk, elements, files)

    return run


def _check(reader: CoreReader, chunk: int, elements: int, files: Mapping[str, bytes]) -> None:
    found = reader.positions(chunk, elements)
    assert found.dtype == np.uint32
    assert found.ndim == 1
    values = found.astype(np.int64)
    assert not values.size or (values[0] >= 0 and values[-1] < elements and (np.diff(values) > 0).all())
    offsets = np.frombuffer(npy_data(files[OFFSETS]), np.uint64)
    begin, end = int(offsets[chunk]), int(offsets[chunk + 1])
    assert BitMap.deserialize(files[BITMAPS][begin:end]) == BitMap(array("I", found.tobytes()))


def _binary(data: bytes, random: Random, havoc: Havoc) -> bytes:
    """A number put in the place of another, or bytes."""
    if random.random() < 0.5 or len(data) < 8:
        return havoc(data)
    size = random.choice((2, 4, 8))
    place = random.randrange(0, len(data) - size + 1, 2)
    number = random.choice(NUMBERS) % (1 << 8 * size)
    return data[:place] + number.to_bytes(size, "little") + data[place + size :]


def _seeds() -> Mapping[str, bytes]:
    kinds = {
        "sparse": [BitMap([1, 5, 999]), BitMap(), BitMap([0])],
        "dense": [BitMap(range(0, 10_000, 2)), BitMap([70_000, 200_000])],
        "runs": [BitMap(range(5000)), BitMap(range(60_000, 70_000))],
    }
    seeds: dict[str, bytes] = {}
    for name, bitmaps in kinds.items():
        for bitmap in bitmaps if name == "runs" else []:
            bitmap.run_optimize()
        pieces = [bitmap.serialize() for bitmap in bitmaps]
        offsets = np.cumsum([0, *map(len, pieces)]).astype(np.uint64)
        seeds[name] = join({BITMAPS: b"".join(pieces), OFFSETS: npy(offsets)})
    return seeds


TARGET = Target(_prepare, _seeds, PlanError, bundle(BITMAPS, {BITMAPS: _binary, OFFSETS: _binary}), max_bytes=16384)
