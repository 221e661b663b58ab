"""The pickle within `pytorch_model.bin`, whose archive is always sound.

Oracle: of what is accepted, PyTorch's own loader reads the same tensors; nothing is executed (see guard.py).
"""

from __future__ import annotations

import io
import pickletools
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from random import Random

import torch

from cpimerge.checkpoint import Shard
from cpimerge.errors import CheckpointError
from cpimerge.pickled import DTYPES, read_pickled

from ..target import Havoc, Run, Target

WORDS = (
    *("ctorch._utils\n_rebuild_tensor_v2\n", "ctorch\nFloatStorage\n", "ctorch\nbfloat16\n", "storage", "cpu"),
    *("cos\nsystem\n", "cbuiltins\neval\n", "ccollections\nOrderedDict\n", "ctorch._utils\n_rebuild_parameter\n"),
    *("ctorch.storage\nUntypedStorage\n", "ctorch._utils\n_rebuild_tensor_v3\n"),
)


SIZES = (24, 4, 12)  # of the records, in bytes: as the seeds have them


def _prepare(scratch: Path) -> Run:
    file = scratch / "pytorch_model.bin"

    def run(data: bytes) -> None:
        archive = _archive(data)
        file.write_bytes(archive)
        compare(read_pickled(file), archive)

    return run


def _archive(pickle: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("archive/data.pkl", pickle)
        archive.writestr("archive/byteorder", b"little")
        for key, size in enumerate(SIZES):
            archive.writestr(f"archive/data/{key}", bytes(range(size)))
        archive.writestr("archive/version", b"3\n")
    return out.getvalue()


def compare(shard: Shard, data: bytes) -> None:
    """Names, dtypes, shapes and bytes are what PyTorch reads, if it reads them: it minds what concerns no tensor."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = torch.load(io.BytesIO(data), weights_only=True)
    except Exception:  # such as a record longer than its tensor, or a version that is no number
        return
    assert {info.name for info in shard.tensors} == theirs.keys()
    for info in shard.tensors:
        tensor = theirs[info.name]
        assert (info.dtype, info.shape) == (DTYPES[str(tensor.dtype).removeprefix("torch.")], tuple(tensor.shape))
        raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        assert data[info.offset : info.offset + info.nbytes] == raw, f"{info.name!r} has other bytes"


def _mutate(data: bytes, random: Random, havoc: Havoc) -> bytes:
    """Operations doubled, dropped, moved or changed; or bytes."""
    places: list[int] = []
    with suppress(ValueError, RecursionError):
        places.extend(place or 0 for _, _, place in pickletools.genops(data))
    if len(places) < 2 or random.random() < 0.3:
        return havoc(data)
    pieces = [data[a:b] for a, b in zip(places, [*places[1:], len(data)], strict=True)]
    place, other = random.randrange(len(pieces)), random.randrange(len(pieces))
    match random.randrange(5):
        case 0:
            pieces.pop(place)
        case 1:
            pieces.insert(other, pieces[place])
        case 2:
            pieces[place] = pieces[other]
        case 3:
            pieces[place] = pieces[place][:1] + havoc(pieces[place][1:])
        case _:
            pieces.insert(place, random.choice(WORDS).encode())
    return b"".join(pieces)


def saved() -> dict[str, bytes]:
    """Files as `torch.save` writes them, by what they hold."""
    shared = torch.arange(6.0).reshape(2, 3)
    contents = {
        "plain": OrderedDict(a=torch.arange(6.0).reshape(2, 3), b=torch.ones(2, dtype=torch.bfloat16)),
        "shared": {"a": shared, "b": shared[1:], "c": shared},
        "kinds": {"p": torch.nn.Parameter(torch.ones(6)), "m": torch.ones(4) > 0, "s": torch.ones(3)},
        "integers": {"i": torch.arange(3), "u": torch.ones(2).to(torch.uint16), "e": torch.empty(0, 3)},
        "others": {"d": torch.ones(3).double(), "f8": torch.ones(4).to(torch.float8_e4m3fn), "n": 3},
    }
    found: dict[str, bytes] = {}
    for name, content in contents.items():
        out = io.BytesIO()
        torch.save(content, out)
        found[name] = out.getvalue()
    return found


def _seeds() -> Mapping[str, bytes]:
    pickles: dict[str, bytes] = {}
    for name, raw in saved().items():
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            pickles[name] = archive.read("archive/data.pkl")
    return pickles


TARGET = Target(_prepare, _seeds, CheckpointError, _mutate, WORDS, max_bytes=4096, memory=20_000_000)
