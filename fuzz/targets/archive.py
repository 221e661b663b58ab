"""`pytorch_model.bin` as a whole: the archive around the pickle.

Oracle: of what is accepted, PyTorch reads the same tensors.
"""

from __future__ import annotations

import io
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from random import Random

from cpimerge.errors import CheckpointError
from cpimerge.pickled import read_pickled

from ..target import Havoc, Run, Target
from .pickle import compare, saved

NAMES = (b"archive/data.pkl", b"archive/data/0", b"archive/byteorder", b"archive/version", b"PK\3\4", b"PK\1\2")


def _prepare(scratch: Path) -> Run:
    file = scratch / "pytorch_model.bin"

    def run(data: bytes) -> None:
        file.write_bytes(data)
        compare(read_pickled(file), data)

    return run


def _mutate(data: bytes, random: Random, havoc: Havoc) -> bytes:
    """Records doubled, dropped, renamed, compressed, cut; or bytes."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            records = [(info.filename, archive.read(info)) for info in archive.infolist()]
    except Exception:  # a broken archive stays one
        return havoc(data)
    if random.random() < 0.5 or not records:
        return havoc(data)
    place = random.randrange(len(records))
    name, content = records[place]
    match random.randrange(5):
        case 0:
            records.pop(place)
        case 1:
            records.insert(random.randrange(len(records)), (name, content))
        case 2:
            records[place] = (random.choice(NAMES).decode(), content)
        case 3:
            records[place] = (name, havoc(content))
        case _:
            records[place] = (name, content[: random.randrange(len(content) + 1)])
    out = io.BytesIO()
    kind = random.choice((zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    with warnings.catch_warnings(), zipfile.ZipFile(out, "w", kind) as archive:
        warnings.simplefilter("ignore")  # of one name twice
        for name, content in records:
            archive.writestr(name[:200], content)
    return out.getvalue()


def _seeds() -> Mapping[str, bytes]:
    return saved()


TARGET = Target(
    _prepare,
    _seeds,
    CheckpointError,
    _mutate,
    tuple(name.decode() for name in NAMES),
    max_bytes=8192,
    memory=20_000_000,
)
