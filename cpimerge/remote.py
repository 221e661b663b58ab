"""Models that are read from the Hub and never lie on this disk as a whole.

Configurations, tokenizers and headers are fetched first; weights as they are read (see pieces.py).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from io import BytesIO
from pathlib import Path

from .adapter import ADAPTER_FILES
from .checkpoint import MAX_HEADER_BYTES, Checkpoint, StoredTensor, Tensor, read_header
from .directory import open_checkpoint
from .errors import CheckpointError
from .hub import Listing, RemoteFile, fetch, fetch_part, list_model
from .models import Located, locate_both
from .pieces import StreamedTensor, Weights
from .references import STREAMED, HubModel, Place, Reference
from .staging import private_directory

__all__ = ["Streams", "streams"]

FIRST_BYTES = 1 << 20  # of a file, enough for most headers


class Streams:
    """Models of one run, read from the Hub. `directory` is the run's own, and for it alone."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._found: dict[HubModel, Path] = {}
        self._remote: dict[Path, tuple[Listing, RemoteFile]] = {}  # by where the header is
        self._weights: dict[Path, Weights] = {}

    @property
    def room_bytes(self) -> int:
        """What the pieces of all models opened so far take of the disk at most."""
        return sum(weights.room_bytes for weights in self._weights.values())

    @property
    def fetched_bytes(self) -> int:
        """What was fetched of weights, so far."""
        return sum(weights.fetched_bytes for weights in self._weights.values())

    def locate(self, reference: Reference, is_base: bool = False) -> Located:
        """Where the model lies: a directory, the Hugging Face cache, or the Hub. Raises CheckpointError."""

        def find(place: Place) -> Path:
            return self._directory_of(place, is_base and place is reference.model)

        return Located(*locate_both(reference, find), self.open)

    def open(self, path: Path) -> Checkpoint:
        """A checkpoint, wherever its weights are. Raises CheckpointError, or ResourceError for want of disk space."""
        remote = {file: found for file, found in self._remote.items() if file.parent == path}
        if not remote:
            return open_checkpoint(path)
        checkpoint = open_checkpoint(path, lambda file: read_header(file, remote[file][1].size))
        if path not in self._weights:
            listing = next(iter(remote.values()))[0]
            self._weights[path] = Weights(partial(fetch_part, listing), self._directory, checkpoint.shards)
            _check_disk(self.room_bytes, self._directory)
        streamed = partial(_streamed, self._weights[path])
        return replace(checkpoint, tensors={name: streamed(info) for name, info in checkpoint.tensors.items()})

    def close(self) -> None:
        """Delete all pieces."""
        for weights in self._weights.values():
            weights.close()

    def _directory_of(self, place: Place, whole: bool) -> Path:
        model = place.hub
        if model is None or place.is_local:
            return place.path
        if model not in self._found:
            listing = list_model(model, whole, self._directory)
            self._found[model] = listing.snapshot() or self._fetch(listing)
        return self._found[model]

    def _fetch(self, listing: Listing) -> Path:
        """All but the weights, and their headers."""
        shards = [file for file in listing.files if _is_streamed(file)]
        whole = [file for file in listing.files if file not in shards]
        if pickled := [file.name for file in whole if file.name.startswith("pytorch_model")]:
            raise CheckpointError(
                f"{listing.model}: its weights are {pickled[0]}, which cannot be streamed. "
                "Use --download without stream"
            )
        _check_disk(sum(file.size for file in whole), self._directory)
        snapshot = self._directory / f"models--{listing.model.name.replace('/', '--')}" / "snapshots" / listing.commit
        snapshot.mkdir(parents=True, exist_ok=True)
        for file in whole:
            fetch(listing, file.name, cache=self._directory)
        for file in shards:
            self._remote[_header(listing, file, snapshot)] = listing, file
        return snapshot


def _is_streamed(file: RemoteFile) -> bool:
    """A model's own weights are; an adapter and the weights of modules in folders are small."""
    return file.name.endswith(".safetensors") and "/" not in file.name and file.name not in ADAPTER_FILES


def _check_disk(needed: int, directory: Path) -> None:
    from .needs import check_disk  # with numba, which models on this disk need not wait for

    check_disk(needed, directory)


def _header(listing: Listing, file: RemoteFile, snapshot: Path) -> Path:
    """A file with the header of a safetensors file, and nothing else.

    It lies as in the Hugging Face cache, where a file's place says its sha256.
    """
    target = snapshot / file.name
    raw = _part(listing, file, 0, min(FIRST_BYTES, file.size))
    end = 8 + int.from_bytes(raw[:8], "little")
    if len(raw) < end <= min(file.size, 8 + MAX_HEADER_BYTES):  # else whoever reads it says what is wrong
        raw += _part(listing, file, len(raw), end)
    target.unlink(missing_ok=True)  # of the same commit under another name
    if file.sha256 is None or not re.fullmatch("[0-9a-f]{64}", file.sha256):
        target.write_bytes(raw[:end])
        return target
    blob = snapshot.parents[1] / "blobs" / file.sha256
    blob.parent.mkdir(exist_ok=True)
    blob.write_bytes(raw[:end])
    target.symlink_to(os.path.relpath(blob, snapshot))
    return target


def _part(listing: Listing, file: RemoteFile, start: int, stop: int) -> bytes:
    out = BytesIO()
    if start < stop:
        fetch_part(listing, file.name, range(start, stop), out)
    return out.getvalue()


def _streamed(weights: Weights, info: Tensor) -> Tensor:
    assert isinstance(info, StoredTensor)
    return StreamedTensor(info.name, info.dtype, info.shape, info.nbytes, info, weights)


@contextmanager
def streams(target: Path) -> Iterator[Streams]:
    """Models read from the Hub by a run that writes `target`, beside which lies what is fetched, until the end."""
    with private_directory(target, STREAMED) as directory:
        found = Streams(directory)
        try:
            yield found
        finally:
            found.close()
