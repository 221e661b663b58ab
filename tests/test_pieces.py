"""Weights in pieces: every byte is right whatever is read in which order, and no more is kept than should be."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import IO

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from cpimerge import pieces
from cpimerge.checkpoint import Handles, StoredTensor, Tensor, read_header
from cpimerge.errors import CheckpointError
from cpimerge.pieces import Piece, Room, StreamedTensor, Weights, travel_bytes


class Source:
    """A file elsewhere: what was fetched of it, in order."""

    def __init__(self, file: Path) -> None:
        self.raw = file.read_bytes()
        self.fetched: list[range] = []
        self.lock = threading.Lock()
        self.before: Callable[[range], None] = lambda part: None

    def fetch(self, name: str, part: range, out: IO[bytes]) -> None:
        assert name == "model.safetensors"
        self.before(part)
        with self.lock:
            self.fetched.append(part)
        out.write(self.raw[part.start : part.stop])


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layers of several tensors, a large tensor, an empty one, a tensor outside the layers."""
    generator = torch.Generator().manual_seed(0)

    def some(*shape: int) -> torch.Tensor:
        return torch.randint(0, 255, shape, generator=generator).to(torch.uint8)

    tensors = {f"model.layers.{i}.{kind}": some(40) for i in range(3) for kind in "abc"}
    tensors |= {"model.embed": some(100, 11), "model.empty": some(0), "norm": some(7)}
    path = tmp_path_factory.mktemp("source") / "model.safetensors"
    save_file(tensors, path)
    return path


def opened(file: Path, piece: int, room: int) -> tuple[Source, Weights, list[StreamedTensor]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "PIECE_BYTES", piece)
        patch.setattr(pieces, "LAYER_PIECES", 1 << 30)
        patch.setattr(pieces, "ROOM_BYTES", room)
        patch.setattr(pieces, "ROOM_LAYERS", 0)
        shard, source = read_header(file), Source(file)
        weights = Weights(source.fetch, file.parent, [shard])
    return source, weights, [StreamedTensor(t.name, t.dtype, t.shape, t.nbytes, t, weights) for t in shard.tensors]


def read(tensor: Tensor, start: int, size: int) -> bytes:
    buffer = bytearray(size)
    tensor.read_into(memoryview(buffer), start, Handles(2))
    return bytes(buffer)


@given(
    piece=st.integers(1, 300),
    room=st.integers(1, 3000),
    reads=st.lists(st.tuples(st.integers(0, 11), st.integers(0, 1200), st.integers(0, 1200)), max_size=30),
)
def test_every_read_gives_the_bytes_of_the_file(
    file: Path, piece: int, room: int, reads: list[tuple[int, int, int]]
) -> None:
    source, weights, tensors = opened(file, piece, room)
    for number, one, other in reads:
        tensor = tensors[number]
        start, stop = sorted((min(one, tensor.nbytes), min(other, tensor.nbytes)))
        begin = tensor.stored.offset + start
        assert read(tensor, start, stop - start) == source.raw[begin : begin + stop - start]
        kept = [part for part, held in weights._held.items() if held.file.done()]
        largest = max((part.stop - part.start for part in kept), default=0)
        assert sum(part.stop - part.start for part in kept) <= max(weights.room_bytes, largest)
    assert weights.room_bytes == max(room, piece)
    assert weights.fetched_bytes == sum(map(len, source.fetched))
    assert all(len(part) <= piece for part in source.fetched)
    weights.close()


def test_pieces_fill_the_data_and_never_join_layers(file: Path) -> None:
    _, _, tensors = opened(file, 100, 1000)
    found = sorted({(p.start, p.stop) for tensor in tensors for p in tensor.pieces})
    assert found[0][0] == min(tensor.stored.offset for tensor in tensors)
    assert found[-1][1] == file.stat().st_size
    assert all(before[1] == after[0] for before, after in pairwise(found))
    assert all(stop - start <= 100 for start, stop in found)
    by_layer: dict[tuple[int, int], set[str]] = {}
    for tensor in tensors:
        for p in tensor.pieces:
            by_layer.setdefault((p.start, p.stop), set()).add(tensor.name[:14])
    assert all(len(layers) == 1 for part, layers in by_layer.items() if any("layers" in name for name in layers))
    sizes = [tensor.stored.offset for tensor in tensors if tensor.name == "model.embed"]
    assert (sizes[0], sizes[0] + 100) in found


@given(st.lists(st.tuples(st.integers(0, 8), st.booleans()), max_size=60), st.integers(1, 50))
def test_the_room_keeps_what_was_used_last(uses: list[tuple[int, bool]], limit: int) -> None:
    """Against a list, in which what was used last stands last."""
    parts = [Piece(Path("f"), 0, 1 + 3 * i) for i in range(9)]
    room, kept = Room(limit), list[Piece]()
    for number, busy in uses:
        part = parts[number]
        held = set(kept[:1]) if busy else set()
        gone = room.use(part, held)
        if part in kept:
            assert gone is None
            kept.remove(part)
        else:
            expected = []
            for old in list(kept):
                if sum(p.stop for p in kept) + part.stop <= limit:
                    break
                if old not in held:
                    kept.remove(old)
                    expected.append(old)
            assert gone == expected
        kept.append(part)


def test_no_more_than_so_many_files_are_open(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "MOST_PIECES", 4)
    _, weights, tensors = opened(file, 10, 1 << 20)
    for tensor in tensors:
        read(tensor, 0, tensor.nbytes)
        assert len(weights._held) <= 4
    weights.close()


def test_threads_wait_for_one_fetch_and_never_lose_what_they_read(file: Path) -> None:
    source, weights, tensors = opened(file, 50, 120)
    wrong: list[str] = []

    def work(seed: int) -> None:
        order = random.Random(seed)
        for _ in range(150):
            tensor = order.choice(tensors)
            expected = source.raw[tensor.stored.offset : tensor.stored.offset + tensor.nbytes]
            if read(tensor, 0, tensor.nbytes) != expected:
                wrong.append(tensor.name)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    weights.close()


def test_two_threads_that_want_one_piece_fetch_it_once(file: Path) -> None:
    source, weights, tensors = opened(file, 1 << 20, 1 << 20)
    both = threading.Barrier(2)

    def meet(part: range) -> None:
        both.wait(10)  # while the second thread is on its way

    source.before = meet
    results: list[bytes] = []
    threads = [threading.Thread(target=lambda: results.append(read(tensors[1], 0, 40))) for _ in range(2)]
    threads[0].start()
    while not weights._held:
        pass
    threads[1].start()
    both.wait(10)
    for thread in threads:
        thread.join()
    assert results[0] == results[1]
    assert len(source.fetched) == 1
    weights.close()


def test_a_piece_has_no_name_on_the_disk(file: Path) -> None:
    _, weights, tensors = opened(file, 1 << 20, 1 << 20)
    read(tensors[0], 0, tensors[0].nbytes)
    assert [path.name for path in file.parent.iterdir()] == ["model.safetensors"]
    weights.close()


def test_what_goes_wrong_in_a_fetch_is_told(file: Path) -> None:
    source, weights, tensors = opened(file, 1 << 20, 1 << 20)

    def fail(part: range) -> None:
        raise CheckpointError("gone")

    source.before = fail
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"^gone$"):
            read(tensors[1], 0, 1)

    def full(part: range) -> None:
        raise OSError(28, "No space left on device")

    source, weights, tensors = opened(file, 1 << 20, 1 << 20)
    source.before = full
    with pytest.raises(CheckpointError, match=r"tensor '.*': cannot be kept on this disk: No space left on device"):
        read(tensors[1], 0, 1)
    weights.close()


@dataclass(frozen=True, slots=True)
class Computed(Tensor):
    """Computed from others, as a test needs it."""

    of: Tensor
    more: tuple[Tensor, ...]

    def read_into(self, buffer: memoryview, start: int, handles: Handles) -> None:
        raise NotImplementedError


def test_what_will_travel(file: Path) -> None:
    """Each piece once while it is kept; also for tensors that are computed from streamed ones."""
    source, weights, tensors = opened(file, 50, 100)
    by_name = {tensor.name: tensor for tensor in tensors}
    a, b = by_name["model.layers.0.a"], by_name["model.layers.1.a"]
    stored = StoredTensor("x", "U8", (1,), 1, file, 0)
    assert travel_bytes([]) == travel_bytes([stored]) == 0
    assert travel_bytes([a, a, b, a]) == sum(p.stop - p.start for p in a.pieces + b.pieces)
    computed = Computed("x", "U8", (1,), 1, stored, (a, b))
    assert travel_bytes([computed]) == travel_bytes([a, b])
    rng = np.random.default_rng(0)
    order = [tensors[i] for i in rng.integers(0, len(tensors), 200)]
    for tensor in order:
        read(tensor, 0, tensor.nbytes)
    assert travel_bytes(order) == weights.fetched_bytes == sum(map(len, source.fetched))
    weights.close()
