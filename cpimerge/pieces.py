"""Weights that lie elsewhere: they come as they are read, in pieces, and go again.

A piece is a range of bytes of a safetensors file: neighbouring tensors of one layer, or a part of a large tensor. What
was used longest ago goes when others need its room. A piece is a file without a name, so nothing of it stays behind,
however the run ends.
"""

from __future__ import annotations

import os
import tempfile
import threading
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import IO

from .checkpoint import Handles, Shard, StoredTensor, Tensor, layer_of
from .errors import CheckpointError

__all__ = ["StreamedTensor", "Weights", "travel_bytes"]

PIECE_BYTES = 64_000_000
ROOM_BYTES = 512_000_000  # for the pieces of one model, unless its largest layer needs more
ROOM_LAYERS = 2  # what it then holds of these, and a piece: embedding, head and what else is outside the layers
LAYER_PIECES = 8
MOST_PIECES = 32  # of one model, each of which is an open file
FETCH_BYTES = 24_000_000  # of memory, while a thread fetches: huggingface_hub passes on 10 MB at a time

# Writes a part of a file, found by its name, to an empty file. Raises CheckpointError where it cannot be had.
Fetch = Callable[[str, range, IO[bytes]], None]


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes [start, stop) of the file whose header is `file`."""

    file: Path
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class StreamedTensor(Tensor):
    """A tensor that lies elsewhere: `stored` says where in which file."""

    stored: StoredTensor
    weights: Weights

    @property
    def pieces(self) -> list[Piece]:
        """The pieces that hold it."""
        return self.weights.pieces_of(self.stored.file, self.stored.offset, self.stored.offset + self.nbytes)

    @property
    def scratch_bytes(self) -> int:
        """What a fetch takes."""
        return FETCH_BYTES

    def read_into(self, buffer: memoryview, start: int, handles: Handles) -> None:
        """As for every `Tensor`; what is not on this disk is fetched."""
        try:
            self.weights.read(self.stored.file, self.stored.offset + start, buffer)
        except OSError as error:
            raise CheckpointError(
                f"{self.stored.file}: tensor {self.name!r}: cannot be kept on this disk: {error.strerror}"
            ) from error


class Room:
    """Which pieces of one model are kept: those used last, of at most so many bytes and so many pieces."""

    def __init__(self, nbytes: int) -> None:
        self._limit = nbytes
        self._kept: dict[Piece, int] = {}  # with their sizes; those used last stand last
        self._nbytes = 0

    def use(self, piece: Piece, busy: Collection[Piece] = ()) -> list[Piece] | None:
        """Keep `piece`; returns the pieces that must go for it, none of them `busy`. None: it was there."""
        size = self._kept.pop(piece, None)
        if size is not None:
            self._kept[piece] = size
            return None
        size = piece.stop - piece.start
        gone = []
        for old in list(self._kept):
            if self._nbytes + size <= self._limit and len(self._kept) < MOST_PIECES:
                break
            if old not in busy:
                self._nbytes -= self._kept.pop(old)
                gone.append(old)
        self._kept[piece] = size
        self._nbytes += size
        return gone


class _Held:
    """A piece on this disk, or on its way to it, and how many threads read it."""

    def __init__(self) -> None:
        self.file: Future[IO[bytes]] = Future()
        self.users = 0

    def close(self) -> None:
        if self.file.done() and self.file.exception() is None:
            self.file.result().close()


class Weights:
    """The weights of one model, readable by byte range from any thread.

    `fetch` fetches the pieces of `shards`, files of which only the headers are here; they lie in `directory`.
    """

    def __init__(self, fetch: Fetch, directory: Path, shards: Iterable[Shard]) -> None:
        shards = tuple(shards)
        largest = _largest_layer(shards)
        most = max(PIECE_BYTES, largest // LAYER_PIECES)
        self.room_bytes = max(ROOM_BYTES, ROOM_LAYERS * largest + PIECE_BYTES)
        self.fetched_bytes = 0
        self._fetch = fetch
        self._directory = directory
        self._pieces = {shard.file: list(_divide(shard, most)) for shard in shards}
        self._starts = {file: [piece.start for piece in pieces] for file, pieces in self._pieces.items()}
        self._room = Room(self.room_bytes)
        self._held: dict[Piece, _Held] = {}
        self._lock = threading.Lock()

    def pieces_of(self, file: Path, start: int, stop: int) -> list[Piece]:
        """Those that hold the bytes [start, stop) of a file."""
        starts = self._starts[file]
        return (
            self._pieces[file][bisect_right(starts, start) - 1 : bisect_right(starts, stop - 1)] if start < stop else []
        )

    def read(self, file: Path, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes of a file from `start` on. Raises CheckpointError, or OSError of this disk."""
        for piece in self.pieces_of(file, start, start + len(buffer)):
            begin, end = max(start, piece.start), min(start + len(buffer), piece.stop)
            with self._hold(piece) as kept:
                _fill(buffer[begin - start : end - start], kept, begin - piece.start)

    @contextmanager
    def _hold(self, piece: Piece) -> Iterator[IO[bytes]]:
        """The piece, which stays meanwhile. The first thread that wants it fetches it, the others wait."""
        with self._lock:
            gone = self._room.use(piece, {other for other, held in self._held.items() if held.users})
            for old in gone or ():
                self._held.pop(old).close()
            held = self._held.setdefault(piece, _Held())
            held.users += 1
        try:
            if gone is not None:
                self._bring(piece, held)
            yield held.file.result()
        finally:
            with self._lock:
                held.users -= 1

    def _bring(self, piece: Piece, held: _Held) -> None:
        """Onto this disk; what goes wrong is told to all who wait for it."""
        with ExitStack() as undo:
            try:
                file = undo.enter_context(tempfile.TemporaryFile(dir=self._directory))
                self._fetch(piece.file.name, range(piece.start, piece.stop), file)
                file.flush()
            except BaseException as error:
                held.file.set_exception(error)
                return
            undo.pop_all()
        with self._lock:
            self.fetched_bytes += piece.stop - piece.start
        held.file.set_result(file)

    def close(self) -> None:
        """Delete all pieces."""
        while self._held:
            self._held.popitem()[1].close()


def _fill(buffer: memoryview, file: IO[bytes], offset: int) -> None:
    done = 0
    while done < len(buffer):
        count = os.preadv(file.fileno(), [buffer[done:]], offset + done)
        if not count:
            raise OSError(0, "it lost what was fetched")
        done += count


def _largest_layer(shards: Iterable[Shard]) -> int:
    """Bytes of the largest layer, or tensor outside the layers."""
    sizes: dict[str, int] = {}
    for shard in shards:
        for info in shard.tensors:
            group = layer_of(info.name) or f"{info.name} by itself"
            sizes[group] = sizes.get(group, 0) + info.nbytes
    return max(sizes.values(), default=0)


def _divide(shard: Shard, most: int) -> Iterator[Piece]:
    """The pieces of a file, in its order, of at most `most` bytes and none with tensors of two layers."""
    start = stop = 0
    layer: str | None = None
    for info in sorted(shard.tensors, key=lambda info: info.offset):
        end = info.offset + info.nbytes
        if layer_of(info.name) != layer or end - start > most:
            yield from _cut(shard.file, start, stop, most)
            start, layer = info.offset, layer_of(info.name)
        stop = end
    yield from _cut(shard.file, start, stop, most)


def _cut(file: Path, start: int, stop: int, most: int) -> Iterator[Piece]:
    for begin in range(start, stop, most):
        yield Piece(file, begin, min(begin + most, stop))


def travel_bytes(tensors: Iterable[Tensor]) -> int:
    """What will be fetched where `tensors` are read wholly, in this order, each perhaps many times."""
    rooms: dict[Weights, Room] = {}
    total = 0
    for tensor in tensors:
        for part in _parts(tensor):
            room = rooms.setdefault(part.weights, Room(part.weights.room_bytes))
            total += sum(piece.stop - piece.start for piece in part.pieces if room.use(piece) is not None)
    return total


def _parts(tensor: Tensor) -> Iterator[StreamedTensor]:
    """The streamed tensors that a tensor is, or is computed from."""
    if isinstance(tensor, StreamedTensor):
        yield tensor
    elif not isinstance(tensor, StoredTensor):  # of which there are many, with nothing inside
        yield from _inside(tensor)


def _inside(tensor: Tensor) -> Iterator[StreamedTensor]:
    for field in fields(tensor):
        value = getattr(tensor, field.name)
        for one in value if isinstance(value, tuple | list) else (value,):
            if isinstance(one, Tensor):
                yield from _parts(one)
