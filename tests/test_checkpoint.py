"""Reading checkpoint directories, with safetensors' own reader as the oracle."""

from __future__ import annotations

import hashlib
import json
import os
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import reference
import torch
from checkpoints import NAMES, save
from files import stored_bytes, tensors, write_raw
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from safetensors.torch import save_file
from trees import is_open

from cpimerge import CheckpointError, checkpoint
from cpimerge.checkpoint import Handles, Tensor, layer_of, natural_key, read_header
from cpimerge.directory import open_checkpoint
from cpimerge.plain_json import parse_object
from cpimerge.stream import OPEN_FILES

# --- names ------------------------------------------------------------------------------------------


def test_natural_order() -> None:
    ordered = [
        "2.w",
        "10.w",
        "a",
        "a.2",
        "a.10",
        "a.10.b",
        "layers.007",
        "layers.07",
        "layers.7",
        "layers.8",
        "layersX",
        "²",  # a digit to Python, no number
    ]
    shuffled = random.Random(0).sample(ordered, len(ordered))
    assert sorted(shuffled, key=natural_key) == ordered


@given(st.lists(st.integers(0, 10**30), unique=True), st.text("ab.", max_size=4))
def test_natural_order_is_that_of_the_numbers(numbers: list[int], prefix: str) -> None:
    found = sorted((f"{prefix}x.{n}.w" for n in numbers), key=natural_key)
    assert found == [f"{prefix}x.{n}.w" for n in sorted(numbers)]


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.3.mlp.weight", "model.layers.3."),
        ("model.layers.3.experts.7.w", "model.layers.3."),
        ("h.0", "h.0."),
        ("0", "0."),
        ("model.embed.weight", ""),
        ("model.layer3.w", ""),
        ("model.3x.w", ""),
        ("layers.3\n", ""),
        ("layers.².w", ""),
        ("layers..3.w", "layers..3."),
        ("", ""),
    ],
)
def test_layer_of(name: str, layer: str) -> None:
    assert layer_of(name) == layer


@given(st.text("a1.\n", max_size=8))
def test_layer_is_the_references(name: str) -> None:
    assert layer_of(name) == reference.layer(name)


@pytest.fixture
def handles() -> Iterator[Handles]:
    result = Handles(OPEN_FILES)
    yield result
    result.close()


def read(info: Tensor, size: int | None = None, start: int = 0) -> bytes:
    """Bytes of a tensor, through a handle of its own."""
    buffer, handles = bytearray(info.nbytes if size is None else size), Handles(OPEN_FILES)
    try:
        info.read_into(memoryview(buffer), start, handles)
    finally:
        handles.close()
    return bytes(buffer)


# --- one file ---------------------------------------------------------------------------------------


@given(tensors(min_size=0), st.booleans(), st.data())
def test_headers_are_read_as_safetensors_reads_them(
    content: dict[str, torch.Tensor], metadata: bool, data: st.DataObject
) -> None:
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory, "model.safetensors")
        save_file(content, file, metadata={"format": "pt", "a": "1"} if metadata else None)
        shard = read_header(file)
        assert shard.size == file.stat().st_size
        found = {info.name: info for info in shard.tensors}
        with safe_open(file, "pt") as expected:
            assert found.keys() == set(expected.keys())
            for name, info in found.items():
                assert info.dtype == expected.get_slice(name).get_dtype()
                assert list(info.shape) == expected.get_slice(name).get_shape()
                check_bytes(info, stored_bytes(expected.get_tensor(name)), data)


def check_bytes(info: Tensor, expected: bytes, data: st.DataObject) -> None:
    """Any part of a tensor can be read, in however many calls the system wants."""
    assert (info.nbytes, info.elements * info.item_bytes) == (len(expected), len(expected))
    start = data.draw(st.integers(0, len(expected)))
    size = data.draw(st.integers(0, len(expected) - start))
    with mock.patch.object(checkpoint, "MAX_READ_BYTES", 3):
        assert read(info, size, start) == expected[start : start + size]


def test_a_header_is_known_by_its_hash(tmp_path: Path) -> None:
    def digest(name: str, value: float) -> str:
        save_file({name: torch.full((2,), value)}, tmp_path / "file")
        return read_header(tmp_path / "file").header_xxh3

    assert digest("w", 1) == digest("w", 2)
    assert digest("w", 1) != digest("v", 1)


def test_the_same_header_in_several_files(tmp_path: Path, handles: Handles) -> None:
    """It is parsed once; the tensors are each file's own, and so are its faults, which other sizes make others."""
    for number in (1, 2):
        save_file({"w": torch.full((2,), number, dtype=torch.uint8)}, tmp_path / f"{number}")
    with mock.patch("cpimerge.checkpoint.parse_object", wraps=parse_object) as parse:
        found = [read_header(tmp_path / name).tensors[0] for name in "12"]
        assert parse.call_count == 1
        checkpoint.forget_headers()
        read_header(tmp_path / "1")
        assert parse.call_count == 2
    assert [info.file.name for info in found] == ["1", "2"]
    assert [read(info) for info in found] == [b"\1\1", b"\2\2"]
    for name, spoilt in {"short": 1, "long": -1, "again": 1}.items():
        data = (tmp_path / "1").read_bytes()
        (tmp_path / name).write_bytes(data[:-spoilt] if spoilt > 0 else data + b"x")
        fault = f"incomplete: {len(data) - 1} bytes" if spoilt > 0 else "1 bytes after the last tensor"
        with pytest.raises(CheckpointError, match=f"^{tmp_path / name}: {fault}"):
            read_header(tmp_path / name)


@pytest.mark.parametrize(
    ("spoil", "fault"),
    [
        (lambda file: file.write_bytes(file.read_bytes()[:-3]), "the file ended 3 bytes early. It changed during the "),
        (lambda file: file.unlink(), "cannot be read: No such file or directory"),
    ],
)
def test_a_file_that_changes_during_the_run(tmp_path: Path, spoil: Any, fault: str) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"w": torch.ones(4)}, file)
    (info,) = read_header(file).tensors
    spoil(file)
    with pytest.raises(CheckpointError) as error:
        read(info, 16)
    assert str(error.value).startswith(f"{file}: tensor 'w': {fault}")


def test_a_file_is_opened_once_and_closed_in_the_end(tmp_path: Path, handles: Handles) -> None:
    (tmp_path / "a").write_bytes(b"a")
    handle = handles.of(tmp_path / "a")
    with mock.patch.object(os, "open", side_effect=AssertionError):
        assert handles.of(tmp_path / "a") == handle
    assert is_open(handle)
    assert not os.get_inheritable(handle)
    handles.close()
    assert not is_open(handle)
    handles.close()  # again does no harm
    assert os.pread(handles.of(tmp_path / "a"), 9, 0) == b"a"  # and it can be used again


def test_only_so_many_files_are_open(tmp_path: Path, handles: Handles) -> None:
    files = [tmp_path / str(number) for number in range(2 * OPEN_FILES)]
    for file in files:
        file.write_text(file.name)
    seen = set()
    for file in [*files, *files[::-1]]:
        handle = handles.of(file)
        seen.add(handle)
        assert os.pread(handle, 9, 0).decode() == file.name
        assert sum(map(is_open, seen)) <= OPEN_FILES
    assert sum(map(is_open, seen)) == OPEN_FILES


def test_a_file_that_cannot_be_opened(tmp_path: Path, handles: Handles) -> None:
    with pytest.raises(FileNotFoundError):
        handles.of(tmp_path / "none")
    (tmp_path / "none").write_bytes(b"late")
    assert os.pread(handles.of(tmp_path / "none"), 9, 0) == b"late"


# Whatever safetensors refuses is refused here too, and as a CheckpointError.

GOOD = to_bytes({"a.w": torch.ones(2, 3), "b": torch.ones(5, dtype=torch.bfloat16), "c": torch.ones(0)}, {"k": "v"})
ODD = st.sampled_from(
    [
        None,
        True,
        0,
        -1,
        1.0,
        2**63,
        2**64,
        10**400,
        "x",
        "F32",
        "\ud800",
        [],
        [0],
        [0, 8],
        [8, 0],
        [[0]],
        {},
        {"dtype": 1},
    ]
)


def accepts(file: Path) -> bool:
    try:
        with safe_open(file, "np"):
            return True
    except SafetensorError:
        return False


def check_verdict(file: Path) -> None:
    problems: tuple[str, ...] = ()
    try:
        read_header(file)
    except CheckpointError as error:
        problems = error.problems
    assert all(problem.startswith(f"{file}: ") for problem in problems)
    assert problems or accepts(file)


@given(st.integers(0, len(GOOD) - 1), st.integers(0, 255), st.sampled_from(["change", "cut", "insert", "append"]))
def test_damaged_bytes(place: int, byte: int, damage: str) -> None:
    new = {
        "change": GOOD[:place] + bytes([byte]) + GOOD[place + 1 :],
        "cut": GOOD[:place],
        "insert": GOOD[:8] + bytes([byte]) + GOOD[8:],
        "append": GOOD + bytes([byte]),
    }
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory, "model.safetensors")
        file.write_bytes(new[damage])
        check_verdict(file)


@given(st.sampled_from(["a.w", "b", "c", "__metadata__"]), st.sampled_from(["dtype", "shape", "data_offsets"]), ODD)
def test_damaged_values(name: str, key: str, value: object) -> None:
    header = json.loads(GOOD[8 : 8 + int.from_bytes(GOOD[:8], "little")])
    data = GOOD[8 + int.from_bytes(GOOD[:8], "little") :]
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory, "model.safetensors")
        for damaged in (
            header | {name: value},
            header | {name: header[name] | {key: value}},
            header | {f"{name}{key}": value},
            {entry: content for entry, content in header.items() if entry != name},
        ):
            check_verdict(write_raw(file, damaged, data))


# --- directories ------------------------------------------------------------------------------------


def model() -> dict[str, torch.Tensor]:
    return {name: torch.full((2, i + 1), float(i)) for i, name in enumerate(NAMES)}


@pytest.mark.parametrize("shards", [1, 2, 3, 7])
def test_shards_make_one_checkpoint(tmp_path: Path, shards: int) -> None:
    expected = model()
    found = open_checkpoint(save(tmp_path / "m", expected, shards=shards))
    assert len(found.shards) == shards
    assert list(found.tensors) == [
        "lm_head.weight",
        "model.embed.weight",
        "model.layers.2.mlp.bias",
        "model.layers.2.mlp.weight",
        "model.layers.2.norm",
        "model.layers.10.mlp.weight",
        "model.layers.10.norm",
    ]
    assert found.nbytes == sum(tensor.nbytes for tensor in expected.values())
    for name, info in found.tensors.items():
        assert read(info) == stored_bytes(expected[name])


def test_one_file_is_preferred_to_an_index(tmp_path: Path) -> None:
    save(tmp_path / "m", model(), shards=2)
    save(tmp_path / "m", {"w": torch.ones(1)})
    assert list(open_checkpoint(tmp_path / "m").tensors) == ["w"]


@pytest.mark.parametrize(
    ("config", "tied"),
    [
        ({"tie_word_embeddings": True}, True),
        ({"tie_word_embeddings": False}, False),
        ({"tie_word_embeddings": "no"}, False),
        ({}, False),
    ],
)
def test_config(tmp_path: Path, config: dict[str, Any], tied: bool) -> None:
    found = open_checkpoint(save(tmp_path / "m", {"w": torch.ones(1)}, config=config))
    assert (found.config, found.ties_embeddings) == (config, tied)


def test_no_config(tmp_path: Path) -> None:
    save(tmp_path / "m", {"w": torch.ones(1)})
    (tmp_path / "m" / "config.json").unlink()
    assert open_checkpoint(tmp_path / "m").config == {}


def test_the_hub_caches_sha256(tmp_path: Path) -> None:
    """Snapshots of the Hub's cache are links to blobs, which are called by their sha256 if they are large files."""
    save(tmp_path / "plain", model(), shards=3)
    blobs, snapshot = (tmp_path / "models--org--m" / part for part in ("blobs", "snapshots/abc"))
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    digests = []
    for number, file in enumerate(sorted((tmp_path / "plain").iterdir())):
        digests.append(hashlib.sha256(file.read_bytes()).hexdigest())
        blob = blobs / (digests[-1][:40] if number == 1 else digests[-1])  # small files are called by their git id
        file.rename(blob)
        (snapshot / file.name).symlink_to(f"../../blobs/{blob.name}")
    assert [path.name for path in sorted(snapshot.iterdir())][:2] == ["config.json", "model-00001-of-00003.safetensors"]
    found = open_checkpoint(snapshot)
    assert [shard.sha256 for shard in found.shards] == [None, *digests[2:4]]
    assert list(found.tensors) == sorted(NAMES, key=natural_key)


def test_other_files_have_no_sha256(tmp_path: Path) -> None:
    name = hashlib.sha256().hexdigest()
    save_file({"w": torch.ones(1)}, tmp_path / name)
    save_file({"w": torch.ones(1)}, tmp_path / "model.safetensors")
    assert read_header(tmp_path / name).sha256 is None
    assert read_header(tmp_path / "model.safetensors").sha256 is None


@pytest.mark.parametrize("place", ["shape", "data_offsets"])
def test_minus_zero_is_no_size(place: str, tmp_path: Path) -> None:
    header = '{"w":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"__metadata__":{"note":"-0"}}'
    file = write_raw(tmp_path / "model.safetensors", header)
    assert [info.shape for info in read_header(file).tensors] == [(0,)]
    write_raw(file, header.replace(f'"{place}":[0', f'"{place}":[-0'))
    with pytest.raises(CheckpointError, match="-0 is not a size"):
        read_header(file)
    assert not accepts(file)
