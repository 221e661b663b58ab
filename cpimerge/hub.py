"""Models on the Hugging Face Hub: what its cache on this disk has, and fetching the rest where that is asked for.

Everything goes through huggingface_hub: its cache, its tokens, its retries, its variables (HF_HOME, HF_ENDPOINT, ...).
It is imported here alone, so that local models need neither it nor its settings.
"""

from __future__ import annotations

import errno
import json
import posixpath
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined] # exported when asked for

from .checkpoint import MAX_SIZE, is_unicode, shown
from .companions import MODULES, is_weights
from .errors import CheckpointError
from .hub_files import INDEXES, adapter_files, companions, is_below, is_small, weights
from .references import HubModel, Place

__all__ = [
    "HUB_ERRORS",
    "Listing",
    "RemoteFile",
    "cached",
    "download",
    "explained",
    "fetch",
    "fetch_part",
    "list_model",
]

# What huggingface_hub raises: its own errors and those of the HTTP library that it happens to use (httpx's are no
# OSErrors). ValueError: a name that the Hub does not allow, or a file too large for plain HTTP.
HUB_ERRORS: tuple[type[Exception], ...] = (OSError, ValueError, EntryNotFoundError, *HfHubHTTPError.__bases__)
RETRY_SECONDS = (1, 2, 4, 8)
SMALL_BYTES = 64_000_000  # an index larger than this leads to no model

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class RemoteFile:
    """A file on the Hub: bytes, and its sha256 where it is a large one."""

    name: str
    size: int
    sha256: str | None


@dataclass(frozen=True)
class Listing:
    """The files of a model that a merge needs, as they are at `commit`."""

    model: HubModel
    commit: str
    files: tuple[RemoteFile, ...]

    def snapshot(self) -> Path | None:
        """Its directory in the cache, if all the files are there."""
        found = [_in_cache(self, file.name) for file in self.files]
        if None in found or not found:
            return None
        depth = self.files[0].name.count("/") + 1
        return Path(str(found[0])).parents[depth - 1]


# --- the cache --------------------------------------------------------------------------------------


def cached(place: Place) -> Path:
    """The snapshot of a model in the Hugging Face cache; the network is not asked.

    Raises CheckpointError where the cache has none, or lacks some of its weights.
    """
    model = place.hub
    assert model is not None
    try:
        found = _snapshot(model)
    except HUB_ERRORS as error:
        if place.path == Path(f"/{model}"):  # as a plan calls what was streamed
            again = "add --download stream, or --download"
            text = f"not in the Hugging Face cache. It was read from the Hub when planned: {again}"
        else:
            text = (
                f"not in the Hugging Face cache, and {place.path} is no directory. "
                "Add --download to fetch the model from the Hub, or correct the path"
            )
        raise CheckpointError(f"{model}: {text}") from error
    if missing := _missing_weights(found):
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise CheckpointError(f"{model}: {found} is incomplete: it lacks {shown}. Add --download to complete it")
    return found


def _snapshot(model: HubModel) -> Path:
    try:
        return Path(huggingface_hub.snapshot_download(model.name, revision=model.revision, local_files_only=True))
    except LocalEntryNotFoundError as error:
        partial = getattr(error, "snapshot_path", None)  # it lacks files, perhaps none that are needed here
        if partial is None:
            raise
        return Path(partial)


def _missing_weights(snapshot: Path) -> list[str]:
    """Names of the weights that a snapshot lacks, as far as it can tell."""
    names = [file.name for file in snapshot.iterdir() if file.is_file()]  # not links to what is gone
    if adapter_files(names)[1:]:
        return []
    found = weights(names)
    if not found:  # of others, whoever reads them says what they are
        return [] if any(map(is_weights, names)) else ["its weights"]
    if found[0] in INDEXES:
        return sorted(set(_shards(snapshot / found[0])) - set(names))
    return []


def _shards(index: Path) -> list[str]:
    """The file names in an index; what is wrong with it is said where it is read."""
    try:
        content = json.loads(index.read_bytes()) if index.stat().st_size <= SMALL_BYTES else {}
    except (ValueError, RecursionError):
        content = {}
    found = content.get("weight_map") if isinstance(content, dict) else None
    return [name for name in found.values() if isinstance(name, str)] if isinstance(found, dict) else []


def _in_cache(listing: Listing, name: str) -> str | None:
    found = huggingface_hub.try_to_load_from_cache(listing.model.name, name, revision=listing.commit)
    return found if isinstance(found, str) else None


# --- the Hub ----------------------------------------------------------------------------------------


def download(wanted: Mapping[HubModel, bool], progress: Progress) -> None:
    """Fetch into the Hugging Face cache what it lacks of the models `wanted` (True: as a base, with all other files).

    `progress` gets the phase "download", on the calling thread but where huggingface_hub's Xet reports on its own.
    Raises CheckpointError saying of every model why it cannot be had; ResourceError where the disk is too small.
    """
    listings = list(_listings(wanted))
    missing = sum(file.size for listing in listings for file in listing.files if not _in_cache(listing, file.name))
    if missing:
        from .needs import check_disk

        check_disk(missing, Path(constants.HF_HUB_CACHE))
    bar = _bar_class(progress, missing)
    for listing in listings:
        for file in listing.files:
            revision = listing.model.revision or constants.DEFAULT_REVISION
            found = fetch(listing, file.name, revision=revision, tqdm_class=bar)
            if listing.commit not in found.parts:
                raise CheckpointError(f"{listing.model}: changed while it was being downloaded. Start again")
    if missing:
        progress("download", missing, missing)


def _listings(wanted: Mapping[HubModel, bool]) -> Iterator[Listing]:
    """Of all, or CheckpointError with every problem."""
    problems: list[str] = []
    for model, whole in wanted.items():
        try:
            yield list_model(model, whole)
        except CheckpointError as error:
            problems.extend(error.problems)
    if problems:
        raise CheckpointError(problems)


def list_model(model: HubModel, whole: bool, cache: Path | None = None) -> Listing:
    """Ask the Hub which files of a model a merge needs; `whole`: as a base, with all that the output takes over.

    Small files that tell are fetched for it, into `cache` (default: the Hugging Face cache). Raises CheckpointError.
    """
    if constants.HF_HUB_OFFLINE:
        raise CheckpointError(
            f"{model}: cannot be downloaded, as HF_HUB_OFFLINE is set. Unset it, or leave out --download"
        )
    try:
        info = huggingface_hub.HfApi().model_info(
            model.name, revision=model.revision, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT
        )
        files = {file.name: file for file in map(_remote_file, info.siblings or ())}
        if not re.fullmatch("[0-9a-f]{40}", commit := str(info.sha)):
            raise ValueError(f"it answers {commit[:80]!r} for a commit, so it is no Hub")
    except HUB_ERRORS as error:
        raise CheckpointError(explained(model, error)) from error
    except (AttributeError, KeyError, RecursionError, TypeError) as error:  # what huggingface_hub does not expect
        raise CheckpointError(explained(model, ValueError("its answer is not that of a Hub"))) from error
    everything = Listing(model, commit, tuple(files.values()))
    needed = _needed(everything, whole, lambda name: fetch(everything, name, cache=cache))
    return Listing(model, commit, tuple(files[name] for name in needed))


def _remote_file(answer: Any) -> RemoteFile:
    """Raises ValueError for what is no file of a repository."""
    found = RemoteFile(answer.rfilename, answer.size or 0, str(answer.lfs.sha256) if answer.lfs else None)
    if not (is_unicode(found.name) and is_below(found.name) and type(found.size) is int and 0 <= found.size < MAX_SIZE):
        raise ValueError(f"it lists a file {shown(found.name)} of {shown(found.size)} bytes, so it is no Hub")
    return found


def _needed(listing: Listing, whole: bool, read: Callable[[str], Path]) -> list[str]:
    names = {file.name for file in listing.files}
    index = next((name for name in weights(names) if name in INDEXES), None)
    shards = set(_shards(read(index))) if index else set()
    if absent := sorted(shards - names):
        raise CheckpointError(
            f"{listing.model}: its {index} names {_first(absent)}, which the Hub does not have. "
            "Give another revision of it, or another model"
        )
    found = weights(names, shards) + adapter_files(names)
    if not found:
        unread = sorted(filter(is_weights, names))
        raise CheckpointError(
            f"{listing.model}: has no weights as safetensors or pytorch_model.bin on the Hub"
            f"{f', only {_first(unread)}' if unread else ''}. Give the model that it was made from"
        )
    modules = _folders(read(MODULES)) if whole and MODULES in names else ()
    others = companions(names, modules) if whole else filter(is_small, names)
    return sorted({*found, *others})


def _first(names: Sequence[str]) -> str:
    return shown(names[0]) + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _folders(modules: Path) -> list[str]:
    """Folders that sentence-transformers' modules.json names."""
    try:
        entries = json.loads(modules.read_bytes())
    except (ValueError, RecursionError):
        return []
    found = [entry.get("path") for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
    return [posixpath.normpath(path) for path in found if isinstance(path, str) and posixpath.normpath(path) != "."]


def fetch(
    listing: Listing,
    name: str,
    *,
    cache: Path | None = None,
    revision: str | None = None,
    tqdm_class: type[Any] | None = None,
) -> Path:
    """One file of a model, in the cache: as it is, or fetched. huggingface_hub sees to its size and etag.

    `revision` instead of the listing's commit makes the cache remember what it stands for. Raises CheckpointError.
    """
    try:
        return Path(
            huggingface_hub.hf_hub_download(
                listing.model.name,
                name,
                revision=revision or listing.commit,
                cache_dir=cache,
                tqdm_class=tqdm_class or _bar_class(lambda *_: None, 0),
            )
        )
    except HUB_ERRORS as error:
        raise CheckpointError(explained(listing.model, error, name)) from error


def fetch_part(listing: Listing, name: str, part: range, out: IO[bytes]) -> None:
    """Write the bytes `part` of a file of a model to `out`, empty as yet. Raises CheckpointError.

    What breaks off is resumed by huggingface_hub; beyond that, a Hub that fails is asked again a few times.
    """
    url = huggingface_hub.hf_hub_url(listing.model.name, name, revision=listing.commit)
    headers = build_hf_headers() | {"Range": f"bytes={part.start}-{part.stop - 1}", "Accept-Encoding": "identity"}
    for wait in (*RETRY_SECONDS, None):
        try:
            http_get(
                url,
                cast(BinaryIO, _Limited(out, len(part))),
                headers=headers,
                expected_size=len(part),
                displayed_filename=name,
                tqdm_class=_bar_class(lambda *_: None, 0),
            )
            return
        except HUB_ERRORS as error:
            if wait is None or not _may_pass(error):
                raise CheckpointError(explained(listing.model, error, name)) from error
            time.sleep(wait)
            out.seek(0)
            out.truncate()


def _may_pass(error: Exception) -> bool:
    """Whether asking again may help: the Hub or the way to it fails, not this disk and not the question."""
    if isinstance(error, HfHubHTTPError):
        return bool(error.response.status_code >= 500)
    return isinstance(error, HfHubHTTPError.__bases__[0])


class _Limited:
    """A file that takes no more than it should: not every server knows how to send a part."""

    def __init__(self, file: IO[bytes], limit: int) -> None:
        self._file = file
        self._limit = limit

    def write(self, data: bytes) -> int:
        if self._file.tell() + len(data) > self._limit:
            raise OSError("it sends more than it is asked for, so nothing can be streamed from it")
        return self._file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _bar_class(progress: Progress, total: int) -> type[Any]:
    """A bar for huggingface_hub to move, which shows nothing: it tells `progress` how far all files together are."""
    done = 0

    class Bar:
        def __init__(self, *_: Any, **__: Any) -> None:
            self.total: float | None = None

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *_: object) -> None:
            """Nothing is open."""

        def update(self, n: float | None = 1) -> None:
            nonlocal done
            done = max(0, done + int(n or 0))
            if total:
                progress("download", min(done, total), total)

        def update_transfer(self, n: float | None = 1) -> None:
            """Xet counts what travels and what is written; its having this keeps it from counting both."""

        def __getattr__(self, name: str) -> Callable[..., None]:
            return lambda *_, **__: None  # whatever else a bar can do

    return Bar


# --- errors -----------------------------------------------------------------------------------------


def explained(model: HubModel, error: BaseException, file: str = "") -> str:
    """One line on why a model, or a file of it, cannot be had, and what to do."""
    what = f"{model}: {file}" if file else str(model)
    causes = list(_causes(error))
    for kind, text in _reasons(model):
        if any(isinstance(cause, kind) for cause in causes):
            return f"{what}: {text}"
    if any(isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT) for cause in causes):
        return f"{what}: the disk is full. Free some space, or use --download stream"
    status = next((cause.response.status_code for cause in causes if isinstance(cause, HfHubHTTPError)), None)
    if status in (401, 403):
        return f"{what}: the Hub refuses it ({status}). Log in with `hf auth login` as somebody who may read it"
    if status is not None:
        return f"{what}: the Hub answered {status}. Try again later"
    line = next(iter(str(causes[-1]).splitlines()), type(causes[-1]).__name__)
    return f"{what}: cannot be fetched from {constants.ENDPOINT}: {line}. Check the network and the name"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what led to it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _reasons(model: HubModel) -> Iterable[tuple[type[Exception], str]]:
    page = f"{constants.ENDPOINT}/{model.name}"
    return (
        (GatedRepoError, f"is gated. Accept its conditions at {page} and log in with `hf auth login`"),
        (RevisionNotFoundError, f"the Hub has no revision {model.revision!r} of it. Give a branch, tag or commit"),
        (
            RepositoryNotFoundError,
            "the Hub has no such model, or it is private. Correct the name, or log in with `hf auth login`",
        ),
        (OfflineModeIsEnabled, "cannot be downloaded, as HF_HUB_OFFLINE is set. Unset it, or leave out --download"),
    )
