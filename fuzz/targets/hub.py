"""What a Hub answers: the list of a model's files, and the small files that lead to others.

Oracle: nothing is written but below the directory of the run or of the cache, and nothing else is asked (guard.py).
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.utils._http import default_client_factory

from cpimerge import hub
from cpimerge.errors import CpimergeError
from cpimerge.references import HubModel, Place, Reference
from cpimerge.remote import Streams

from ..bundles import join, split
from ..mutation import bundle, header, json_text
from ..target import Run, Target
from . import files

API = "api.json"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
MODEL = HubModel("org/name")
SERVED = ("model.safetensors.index.json", "modules.json", "config.json", "model.safetensors")
WORDS = (
    *(
        "sha",
        COMMIT,
        "siblings",
        "rfilename",
        "size",
        "lfs",
        "sha256",
        "pointerSize",
        "blobId",
        "id",
        "modelId",
        "private",
        "gated",
    ),
    *("weight_map", "path", "../../evil", "/tmp/evil", "a/../b", "model-00001-of-00002.safetensors", "x/config.json"),
    *(*SERVED, "adapter_config.json", "adapter_model.safetensors", "tokenizer.json", ".git/config", "README.md"),
)


def _prepare(scratch: Path) -> Run:
    http = import_module(type(huggingface_hub.get_session()).__module__.partition(".")[0])
    cache, room = scratch / "cache", scratch / "run"

    def run(data: bytes) -> None:
        served = split(data, API)
        for directory in (cache, room):
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir()
        with _served(http, lambda request: _answer(http, request, served), cache):
            with suppress(CpimergeError):
                hub.download({MODEL: True}, lambda *_: None)
            streams = Streams(room)
            located = streams.locate(Reference(Place(scratch / "none", MODEL)), True)
            streams.open(located.path)

    return run


@contextmanager
def _served(http: Any, answer: Callable[[Any], Any], cache: Path) -> Iterator[None]:
    """huggingface_hub asks `answer`, and nobody else."""
    settings: dict[str, Any] = {
        "HF_HUB_OFFLINE": False,
        "HF_HUB_CACHE": str(cache),
        "HF_TOKEN_PATH": str(cache / "no-token"),
    }
    client = http.Client(transport=http.MockTransport(answer), follow_redirects=True)
    with mock.patch.multiple(constants, **settings), mock.patch("time.sleep"):
        huggingface_hub.set_client_factory(lambda: client)
        try:
            yield
        finally:
            huggingface_hub.set_client_factory(default_client_factory)  # others in this process ask a Hub, too
            huggingface_hub.close_session()


def _answer(http: Any, request: Any, served: Mapping[str, bytes]) -> Any:
    path = request.url.path
    if path.startswith("/api/"):
        return http.Response(200, content=served.get(API, b"{}"), headers={"Content-Type": "application/json"})
    content = served.get(path.partition("/resolve/")[2].partition("/")[2], b"{}")
    part = request.headers.get("Range")
    whole = {
        "ETag": f'"{hashlib.sha1(content).hexdigest()}"',
        "X-Repo-Commit": COMMIT,
        "Content-Length": str(len(content)),
    }
    if request.method == "HEAD":
        return http.Response(200, headers=whole)
    if part is None:
        return http.Response(200, content=content, headers=whole)
    start, _, stop = part.removeprefix("bytes=").partition("-")
    piece = content[int(start) : int(stop or len(content)) + 1]
    where = {"Content-Range": f"bytes {start}-{int(start) + len(piece) - 1}/{len(content)}"}
    return http.Response(206, content=piece, headers=whole | where | {"Content-Length": str(len(piece))})


def _seeds() -> Mapping[str, bytes]:
    weights = files.weights(files.model())

    def listed(*names: str, **sizes: int) -> bytes:
        siblings: list[dict[str, Any]] = [{"rfilename": name, "size": 2} for name in names]
        digest = {"sha256": "b" * 64, "size": len(weights), "pointerSize": 134}
        siblings.append({"rfilename": "model.safetensors", "size": len(weights), "lfs": digest})
        return json.dumps({"id": "org/name", "sha": COMMIT, "siblings": siblings, **sizes}).encode()

    index = json.dumps({"weight_map": dict.fromkeys(files.model(), "model.safetensors")}).encode()
    modules = b'[{"path": "2_Dense"}, {"path": "../../evil"}]'
    return {
        "single": join({API: listed("config.json", "tokenizer.json"), "model.safetensors": weights}),
        "indexed": join({API: listed(SERVED[0]), SERVED[0]: index, "model.safetensors": weights}),
        "modules": join({API: listed("modules.json", "2_Dense/config.json"), "modules.json": modules}),
        "evil": join(
            {API: listed("../../evil.json", "/tmp/evil.json", "a/../../b.json"), "model.safetensors": weights}
        ),
    }


TARGET = Target(
    _prepare,
    _seeds,
    CpimergeError,
    bundle(API, {**dict.fromkeys((API, *SERVED[:3]), json_text(WORDS)), SERVED[3]: header(files.WORDS)}),
    WORDS,
    max_bytes=8192,
    memory=30_000_000,
)
