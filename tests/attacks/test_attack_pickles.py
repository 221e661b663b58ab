"""Pickles: programs, bombs, and archives whose directory lies; tests/test_pickled.py has those only damaged."""

from __future__ import annotations

import io
import json
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from attacks.attack import Spoil, both, done, fifo, link, refused, removed, sparse, text
from attacks.conftest import model

FILE = "math/pytorch_model.bin"
AGAIN = "Download or save it again"
CONVERT = "Load it with transformers and save it as safetensors"
UNTRUSTED = (
    "which is no part of plain tensors; nothing of it was run. Take the safetensors of this model. "
    "Only if you trust the file: load it with transformers and save it"
)
REFUSED = "math/pytorch_model.bin: PyTorch refuses it"  # in whatever words
CONSTANTS = {"AGAIN": AGAIN, "CONVERT": CONVERT, "UNTRUSTED": UNTRUSTED}
Records = dict[str, bytes]


def saved() -> Records:
    """What torch writes of the model."""
    stream = io.BytesIO()
    torch.save(model(0.5), stream)
    with zipfile.ZipFile(stream) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


def archive(more: Records | None = None, how: int = zipfile.ZIP_STORED, root: str = "archive/") -> Spoil:
    """math as such an archive, with other records."""

    def spoil(home: Path) -> None:
        (home / "math/model.safetensors").unlink()
        with zipfile.ZipFile(home / FILE, "w", how) as out:
            for name, content in (saved() | (more or {})).items():
                out.writestr(root + name, content)

    return spoil


def patched(change: Callable[[bytearray], object]) -> Spoil:
    """The same with bytes changed."""

    def spoil(home: Path) -> None:
        archive()(home)
        data = bytearray((home / FILE).read_bytes())
        change(data)
        (home / FILE).write_bytes(data)

    return spoil


def pickled(*parts: bytes) -> Spoil:
    """math with this pickle, of protocol 2."""
    return archive({"data.pkl": b"\x80\x02" + b"".join(parts) + b"."})


def name(module: str, what: str) -> bytes:
    return f"c{module}\n{what}\n".encode()


def words(content: str) -> bytes:
    return b"X" + struct.pack("<I", len(content.encode())) + content.encode()


def whole(number: int) -> bytes:
    raw = number.to_bytes((number.bit_length() + 8) // 8, "little", signed=True)
    return (b"\x8a" + bytes([len(raw)]) if len(raw) < 256 else b"\x8b" + struct.pack("<i", len(raw))) + raw


def wholes(numbers: list[int]) -> bytes:
    return b"(" + b"".join(map(whole, numbers)) + b"t"


def tensor(offset: int, size: list[int], stride: list[int], numel: int = 12, key: str = "0") -> Spoil:
    """A state dict of embed.weight, which is said to lie so in its record of 48 bytes."""
    storage = b"(" + words("storage") + name("torch", "FloatStorage") + words(key) + words("cpu") + whole(numel) + b"tQ"
    arguments = (
        storage + whole(offset) + wholes(size) + wholes(stride) + b"\x89" + name("collections", "OrderedDict") + b")R"
    )
    rebuilt = name("torch._utils", "_rebuild_tensor_v2") + b"(" + arguments + b"tR"
    return pickled(b"}" + words("embed.weight") + rebuilt + b"s")


def size_lies(data: bytearray) -> None:
    place = data.rfind(b"archive/data/0") - 26
    data[place : place + 8] = struct.pack("<II", 0x7FFFFFFF, 0x7FFFFFFF)


def index(weight_map: object) -> Spoil:
    return both(removed("math/model.safetensors"), text(f"{FILE}.index.json", json.dumps({"weight_map": weight_map})))


PROGRAMS: dict[str, tuple[Spoil, list[str]]] = {
    "a command": (
        pickled(name("os", "system"), words("touch mark"), b"\x85R"),
        [f"math/pytorch_model.bin: its pickle wants 'os.system', {UNTRUSTED}"],
    ),
    "an expression": (
        pickled(name("builtins", "eval"), words("1"), b"\x85R"),
        [f"math/pytorch_model.bin: its pickle wants 'builtins.eval', {UNTRUSTED}"],
    ),
    "a module of its own": (
        pickled(name("planted", "X"), b")R"),
        [f"math/pytorch_model.bin: its pickle wants 'planted.X', {UNTRUSTED}"],
    ),
    "a download": (
        pickled(name("torch.hub", "load"), b")R"),
        [f"math/pytorch_model.bin: its pickle wants 'torch.hub.load', {UNTRUSTED}"],
    ),
    "a loader in a loader": (
        pickled(name("torch", "load"), words("x"), b"\x85R"),
        [f"math/pytorch_model.bin: its pickle wants 'torch.load', {UNTRUSTED}"],
    ),
    "a name from the stack": (
        archive({"data.pkl": b"\x80\x04\x8c\x02os\x8c\x06system\x93."}),
        [f"math/pytorch_model.bin: its pickle has STACK_GLOBAL, which no state dict saved as usual has. {CONVERT}"],
    ),
    "a name by number": (
        pickled(b"\x82\x01"),
        [f"math/pytorch_model.bin: its pickle has EXT1, which no state dict saved as usual has. {CONVERT}"],
    ),
    "an instance": (
        pickled(b"(", words("x"), b"ios\nsystem\n"),
        [f"math/pytorch_model.bin: its pickle has INST, which no state dict saved as usual has. {CONVERT}"],
    ),
    "what only its writer knows": (
        archive({"data.pkl": b"Pfoo\n."}),
        [REFUSED],
    ),
    "a name that writes on the terminal": (
        pickled(name("\x1b[2J", "x\u202e")),
        [
            "math/pytorch_model.bin: its pickle is damaged: 'ascii' codec can't decode byte 0xe2 in position "
            f"1: ordinal not in range(128). {AGAIN}"
        ],
    ),
}

BOMBS: dict[str, tuple[Spoil, list[str]]] = {
    "a pickle of zeros, compressed": (
        archive({"data.pkl": bytes(100_000_000)}, zipfile.ZIP_DEFLATED),
        [f"math/pytorch_model.bin: 'archive/data.pkl' has 100000000 bytes. {CONVERT}"],
    ),
    "a record of zeros, compressed": (
        archive({"x": bytes(100_000_000)}, zipfile.ZIP_DEFLATED),
        [f"math/pytorch_model.bin: is compressed or encrypted. {CONVERT}"],
    ),
    "another compression": (
        archive(how=zipfile.ZIP_LZMA),
        [f"math/pytorch_model.bin: is compressed or encrypted. {CONVERT}"],
    ),
    "tuples in tuples": (
        pickled(b"(" * 500_000),
        [REFUSED],
    ),
    "lists in lists": (
        pickled(b"]" * 200_000 + b"a" * 199_999),
        [f"math/pytorch_model.bin: holds a list, not tensors by name. {CONVERT}"],
    ),
    "lists in lists, twice each": (
        pickled(b"]q\0" + b"".join(b"]q" + bytes([n, *b"(h", n - 1, *b"h", n - 1]) + b"e" for n in range(1, 60))),
        [
            "math/pytorch_model.bin: its pickle has one list in two places, which no state dict saved as usual "
            f"has. {CONVERT}"
        ],
    ),
    "a long number": (
        pickled(b"\x8b" + struct.pack("<i", 10_000_000) + b"\x7f" * 10_000_000),
        [REFUSED],
    ),
    "a long decimal": (
        archive({"data.pkl": b"I" + b"9" * 1_000_000 + b"\n."}),
        [f"math/pytorch_model.bin: its pickle is damaged: a number of more than 4300 digits. {AGAIN}"],
    ),
    "four gigabytes of bytes": (
        pickled(b"B" + struct.pack("<I", 0xFFFFFFFF)),
        [
            "math/pytorch_model.bin: its pickle is damaged: expected 4294967295 bytes in a bytes4, but only 1 "
            f"remain. {AGAIN}"
        ],
    ),
    "exabytes of bytes": (
        archive({"data.pkl": b"\x80\x05\x96" + struct.pack("<Q", 2**62)}),
        [
            "math/pytorch_model.bin: its pickle is damaged: expected 4611686018427387904 bytes in a "
            f"bytearray8, but only 0 remain. {AGAIN}"
        ],
    ),
    "a hole of a terabyte": (
        both(archive(), sparse(FILE)),
        [f"math/pytorch_model.bin: incomplete: 1099511627776 bytes, and no end of the archive. {AGAIN}"],
    ),
}

TENSORS: dict[str, tuple[Spoil, list[str]]] = {
    "before its record": (
        tensor(-3, [6, 2], [2, 1]),
        [REFUSED],
    ),
    "behind its record": (
        tensor(1, [6, 2], [2, 1]),
        [f"math/pytorch_model.bin: tensor 'embed.weight': needs 52 bytes of a record that has 48. {AGAIN}"],
    ),
    "far behind its record": (
        tensor(2**62, [6, 2], [2, 1]),
        [
            "math/pytorch_model.bin: tensor 'embed.weight': needs 18446744073709551664 bytes of a record that "
            f"has 48. {AGAIN}"
        ],
    ),
    "a negative size": (
        tensor(0, [-6, 2], [2, 1]),
        [REFUSED],
    ),
    "a size beyond numbers": (
        tensor(0, [2**62, 2], [2, 1]),
        [REFUSED],
    ),
    "a size beyond all": (
        tensor(0, [2**2000, 2], [2, 1]),
        [REFUSED],
    ),
    "a terabyte of one element": (
        tensor(0, [2**40], [0]),
        [f"math/pytorch_model.bin: tensor 'embed.weight': is not stored row by row (strides [0]). {CONVERT}"],
    ),
    "backwards": (
        tensor(11, [12], [-1]),
        [f"math/pytorch_model.bin: tensor 'embed.weight': needs 92 bytes of a record that has 48. {AGAIN}"],
    ),
    "a storage beyond numbers": (
        tensor(0, [6, 2], [2, 1], numel=2**2000),
        [REFUSED],
    ),
    "a record above": (
        tensor(0, [6, 2], [2, 1], key="../version"),
        [REFUSED],
    ),
    "a record that writes on the terminal": (
        tensor(0, [6, 2], [2, 1], key="\x1b[2J"),
        [REFUSED],
    ),
}

FILES: dict[str, tuple[Spoil, list[str]]] = {
    "a size that lies": (
        patched(size_lies),
        [f"math/pytorch_model.bin: tensor 'embed.weight': needs 48 bytes of a record that has 2147483647. {AGAIN}"],
    ),
    "a pipe": (
        both(archive(), fifo(FILE)),
        ["math/pytorch_model.bin: is no ordinary file, nor a link to one. Download it again"],
    ),
    "another file of this machine": (
        both(archive(), link(FILE, "OUTSIDE/secret.txt")),
        [
            f"math/pytorch_model.bin: is not an archive as torch.save writes it. {AGAIN}, or load it with "
            "transformers and save it as safetensors"
        ],
    ),
    "shards above": (
        index({"a": "../base/model.safetensors", "b": "/etc/passwd"}),
        [
            (
                "math/pytorch_model.bin.index.json: shard '../base/model.safetensors' is not the name of a file "
                f"beside it. {AGAIN}"
            ),
            (f"math/pytorch_model.bin.index.json: shard '/etc/passwd' is not the name of a file beside it. {AGAIN}"),
        ],
    ),
    "a shard with NUL": (
        index({"a": "x\0"}),
        ["math/x\\x00: missing, though pytorch_model.bin.index.json names it. Complete the download"],
    ),
}
TABLES = {"PROGRAMS": PROGRAMS, "BOMBS": BOMBS, "TENSORS": TENSORS, "FILES": FILES}
CASES = [(table, case) for table, cases in TABLES.items() for case in cases]


@pytest.mark.parametrize(("table", "case"), CASES)
def test_pickles(home: Path, table: str, case: str) -> None:
    spoil, problems = TABLES[table][case]
    spoil(home)
    found = [REFUSED if problem.startswith(f"{REFUSED}: ") else problem for problem in refused(home)]
    assert found == problems


@pytest.mark.parametrize(
    "spoil", [archive({"../../../outside/evil": b"x", "/etc/evil": b"y"}), archive(root="../")], ids=["records", "root"]
)
def test_records_are_never_unpacked(home: Path, spoil: Spoil) -> None:
    spoil(home)
    done(home)
    assert [path.name for path in (home.parent / "outside").iterdir()] == ["secret.txt"]
