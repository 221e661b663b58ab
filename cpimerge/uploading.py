"""`push`: uploads an output to the Hugging Face Hub, after a look at every byte of it.

What goes up is what `fuse` wrote, and nothing that came to lie beside it. Everything on the network goes through
huggingface_hub: its tokens, its retries, its variables (HF_TOKEN, HF_ENDPOINT, ...).
"""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import huggingface_hub
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RevisionNotFoundError
from huggingface_hub.utils import (  # type: ignore[attr-defined] # documented there, not declared
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    validate_repo_id,
)
from pydantic import BaseModel, ConfigDict, ValidationError

from .companions import MANIFEST, is_weights
from .errors import OutputError
from .hub import HUB_ERRORS

__all__ = ["Destination", "Pushed", "Upload", "push_output"]

READ_BYTES = 1 << 20
MESSAGE = "Upload the merge"
MAKE_AGAIN = "Fuse again: it is not what was written"

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Destination:
    """A model repository on the Hub, `org/name`, and how to commit to it.

    `private`: of a repository that is not there yet. `revision`: a branch, made if it is not there; None: the main
    one. `force`: files that the repository has and the output lacks are deleted.
    """

    name: str
    private: bool = False
    revision: str | None = None
    message: str | None = None
    force: bool = False


@dataclass(frozen=True)
class Upload:
    """What will be uploaded: path in the output -> bytes. `edited`: files that were changed since the merge."""

    name: str
    files: Mapping[str, int]
    edited: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        return sum(self.files.values())


@dataclass(frozen=True)
class Pushed:
    """An upload that is complete: the model's address, the commit that holds it, and its files."""

    url: str
    commit: str
    files: tuple[str, ...]


class _File(BaseModel):
    model_config = ConfigDict(strict=True)
    size: int
    sha256: str


class _Manifest(BaseModel):
    """What `push` needs of cpimerge_manifest.json."""

    model_config = ConfigDict(strict=True)
    format: Literal["cpimerge manifest"]
    version: Literal[1]
    shards: dict[str, _File]
    files: dict[str, _File]


def push_output(
    directory: Path, destination: Destination, announce: Callable[[Upload], None], progress: Progress, bars: bool
) -> Pushed:
    """Check every file of the output in `directory`, and upload it; what the Hub has then is compared with it.

    `announce` is called before the network is touched. `bars`: huggingface_hub may show its own on stderr.
    Raises OutputError.
    """
    _check_destination(destination)
    upload, sha256 = _checked(directory, destination.name, progress)
    announce(upload)
    with _hub_errors(destination), _bars(bars):
        api = HfApi()
        url = _prepare(api, destination, upload)
        commit = api.upload_folder(
            repo_id=destination.name,
            folder_path=directory,
            revision=destination.revision,
            commit_message=destination.message or MESSAGE,
            allow_patterns=[glob.escape(name) for name in upload.files],
            delete_patterns="*" if destination.force else None,
        )
        _compare(api, destination, upload, sha256, commit.oid)
    return Pushed(url, commit.oid, tuple(upload.files))


def _check_destination(destination: Destination) -> None:
    """What is known to fail without asking the Hub."""
    problems: list[str] = []
    try:
        validate_repo_id(destination.name)
        well_named = "/" in destination.name
    except HFValidationError:
        well_named = False
    if not well_named:
        problems.append(f"{destination.name!r}: is not the name of a model on the Hub. Write it like org/name")
    if constants.HF_HUB_OFFLINE:
        problems.append("HF_HUB_OFFLINE is set, and forbids what push does. Unset it")
    elif not huggingface_hub.get_token():
        problems.append("no token of the Hub: log in with `hf auth login`, or set HF_TOKEN to one that may write")
    if problems:
        raise OutputError(problems)


# --- the directory ----------------------------------------------------------------------------------


def _checked(directory: Path, name: str, progress: Progress) -> tuple[Upload, dict[str, str]]:
    """What to upload, with every file's sha256. Raises OutputError with all that is not as the manifest says."""
    manifest = _manifest(directory)
    described = manifest.shards | manifest.files
    problems: list[str] = []
    with _read_errors(directory):
        found = sorted(_files(directory))
        problems.extend(_differences(directory, found, described))
        if problems:
            raise OutputError(problems)
        files = {path: (directory / path).stat().st_size for path in found}
        sha256 = _sha256(directory, files, progress)
    edited = [path for path in found if path in described and sha256[path] != described[path].sha256]
    problems.extend(f"{directory / path}: its sha256 is not the manifest's. {MAKE_AGAIN}" for path in _weights(edited))
    problems.extend(
        f"{directory / path}: is a link to what is not of the merge. Remove it"
        for path in edited
        if (directory / path).is_symlink()
    )
    if problems:
        raise OutputError(problems)
    return Upload(name, files, tuple(edited)), sha256


def _manifest(directory: Path) -> _Manifest:
    file = directory / MANIFEST
    try:
        return _Manifest.model_validate_json(file.read_bytes())
    except FileNotFoundError as error:
        raise OutputError(f"{directory}: has no {MANIFEST}. Give a directory that `cpimerge fuse` wrote") from error
    except ValidationError as error:
        raise OutputError(f"{file}: is not a manifest that this cpimerge reads. Fuse again") from error
    except OSError as error:
        raise OutputError(f"{file}: cannot be read: {error.strerror}") from error


def _files(directory: Path) -> Iterator[str]:
    """Every file below, and every link to a folder, as paths with slashes."""
    for folder, folders, files in os.walk(directory, onerror=_raise):
        links = [name for name in folders if Path(folder, name).is_symlink()]
        for name in (*files, *links):
            yield Path(folder, name).relative_to(directory).as_posix()


def _differences(directory: Path, found: Iterable[str], described: Mapping[str, _File]) -> Iterator[str]:
    """Problems that need no reading: files that are missing, that nobody knows, and weights of another size."""
    found = set(found)
    for path in sorted(found):
        if not (directory / path).is_file():
            yield f"{directory / path}: is no file. Remove it"
    for path in sorted(described.keys() - found):
        yield f"{directory / path}: missing, though the manifest names it. {MAKE_AGAIN}"
    found = {path for path in found if (directory / path).is_file()}
    for path in sorted(found - described.keys() - {MANIFEST}):
        yield f"{directory / path}: is not of the merge, so it is not uploaded. Move it out of the directory"
    for path in sorted(_weights(described.keys() & found)):
        size = (directory / path).stat().st_size
        if size != described[path].size:
            yield f"{directory / path}: {size} bytes, {described[path].size} in the manifest. {MAKE_AGAIN}"


def _weights(paths: Iterable[str]) -> list[str]:
    """What nobody edits by hand: weights and their index. A card, a config or a template may have been improved."""
    return [path for path in paths if is_weights(path.rpartition("/")[2])]


def _sha256(directory: Path, files: Mapping[str, int], progress: Progress) -> dict[str, str]:
    """The sha256 of every file; the phase is called "check"."""
    digests: dict[str, str] = {}
    done, total = 0, sum(files.values())
    buffer = memoryview(bytearray(READ_BYTES))
    for path in files:
        digest = hashlib.sha256()
        with (directory / path).open("rb", buffering=0) as stream:
            while count := stream.readinto(buffer):
                digest.update(buffer[:count])
                done += count
                progress("check", min(done, total), total)
        digests[path] = digest.hexdigest()
    progress("check", total, total)
    return digests


@contextmanager
def _read_errors(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(f"{error.filename or directory}: cannot be read: {error.strerror}") from error


def _raise(error: OSError) -> None:
    raise error


# --- the Hub ----------------------------------------------------------------------------------------


def _prepare(api: HfApi, destination: Destination, upload: Upload) -> str:
    """Make the repository and the branch; returns its address. Raises OutputError where it must not be written."""
    name, revision = destination.name, destination.revision
    url = str(api.create_repo(name, private=destination.private or None, exist_ok=True))
    if destination.private and not api.model_info(name).private:
        raise OutputError(
            f"{url}: is there already, and public. Make it private on the Hub first, or give another name"
        )
    there = _listed(api, name, revision) - upload.files.keys()
    if weights := [] if destination.force else sorted(_weights(there)):
        raise OutputError(
            f"{url}: holds {', '.join(weights)}, which would stay beside the new weights. "
            "Give another name, or --force to delete all that the output lacks"
        )
    if revision is not None:
        api.create_branch(name, branch=revision, exist_ok=True)
    return url


def _listed(api: HfApi, name: str, revision: str | None) -> set[str]:
    """The files of a branch; those of the main one where it is not there yet, since it begins with them."""
    try:
        return set(api.list_repo_files(name, revision=revision))
    except RevisionNotFoundError:
        return set(api.list_repo_files(name))


def _compare(api: HfApi, destination: Destination, upload: Upload, sha256: Mapping[str, str], commit: str) -> None:
    """Raise OutputError where the Hub does not have what was checked: a file changed meanwhile, or was left out."""
    there = {
        info.path: (info.size, info.lfs.sha256 if info.lfs else sha256.get(info.path))
        for info in api.get_paths_info(destination.name, list(upload.files), revision=commit)
        if isinstance(info, huggingface_hub.RepoFile)
    }
    wrong = [path for path, size in upload.files.items() if there.get(path) != (size, sha256[path])]
    if wrong:
        raise OutputError(
            [f"{destination.name}: {path}: the Hub does not have what was checked. Push again" for path in wrong]
        )


@contextmanager
def _hub_errors(destination: Destination) -> Iterator[None]:
    """What huggingface_hub raises becomes one line, with what to do."""
    try:
        yield
    except HUB_ERRORS as error:
        raise OutputError(f"{destination.name}: {_explained(destination, error)}") from error
    except RuntimeError as error:  # how it reports a transfer that failed
        cause = error.__cause__ or error
        raise OutputError(f"{destination.name}: {_explained(destination, cause)}") from error


def _explained(destination: Destination, error: BaseException) -> str:
    """Why an upload failed, and what to do about it."""
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else 0
    said = (error.server_message if isinstance(error, HfHubHTTPError) else None) or str(error) or type(error).__name__
    said = " ".join(said.split()).rstrip(".")
    organisation = destination.name.partition("/")[0]
    known = {
        401: "the Hub does not accept the token. Log in with `hf auth login`, or set HF_TOKEN to one that may write",
        403: f"the token may not write there. Use one with write access to {organisation}, or give another name",
        404: f"the Hub has no such repository or branch: {said}. Correct the name, and check the token's rights",
    }
    if status in known:
        return known[status]
    if (400 <= status < 500 and status != 429) or isinstance(error, ValueError):  # of metadata
        return f"the Hub refuses it: {said}"
    return f"the upload failed: {said}. Push again: what the Hub has already is not sent twice"


@contextmanager
def _bars(shown: bool) -> Iterator[None]:
    """huggingface_hub's progress bars, or none of them."""
    if shown or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
