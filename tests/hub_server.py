"""A Hugging Face Hub of a few models on this machine: what huggingface_hub asks for, and nothing else."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".bin", ".model")  # what the Hub keeps as LFS files
MISSING = {
    "repo": (401, "RepoNotFound"),
    "revision": (404, "RevisionNotFound"),
    "file": (404, "EntryNotFound"),
    "gated": (403, "GatedRepo"),
}


@dataclass
class Request:
    """One request that came in, and the bytes of the body sent back."""

    method: str
    path: str
    range: str | None
    agent_token: str | None
    sent: int = 0


@dataclass
class Hub:
    """Models by their names; `revisions` of each lead to a commit, `commits` to the directory with its files.

    `trouble` may answer a request in another way: with a status, with "drop" (half of the body, then silence), or
    "whole" (as a server that knows nothing of ranges). `listed` may change what it says of a model's files.
    """

    url: str = ""
    revisions: dict[str, dict[str, str]] = field(default_factory=dict)
    commits: dict[str, Path] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    private: dict[str, str] = field(default_factory=dict)  # with the token that opens them
    requests: list[Request] = field(default_factory=list)
    trouble: Callable[[Request], int | str | None] = lambda request: None
    listed: Callable[[list[dict[str, Any]]], list[dict[str, Any]]] = lambda siblings: siblings

    def add(self, name: str, directory: Path, revision: str = "main") -> str:
        """Publish what `directory` holds; returns its commit."""
        commit = hashlib.sha1(f"{name} {revision} {directory}".encode()).hexdigest()
        self.revisions.setdefault(name, {})[revision] = commit
        self.commits[commit] = directory
        return commit

    def fetched(self, suffix: str = "") -> list[str]:
        """The files whose bodies were sent, by their names."""
        return [
            r.path.rpartition("/resolve/")[2].partition("/")[2]
            for r in self.requests
            if r.method == "GET" and "/resolve/" in r.path and r.path.endswith(suffix)
        ]

    def sent(self, suffix: str) -> int:
        """Bytes of the bodies sent of files that end with `suffix`."""
        return sum(r.sent for r in self.requests if r.method == "GET" and r.path.endswith(suffix))


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # a body must not wait for the receipt of its headers

    def __init__(self, hub: Hub, *arguments: Any) -> None:
        self.hub = hub
        super().__init__(*arguments)

    def do_GET(self) -> None:
        self.answer()

    def do_HEAD(self) -> None:
        self.answer()

    def log_message(self, *_: Any) -> None:
        """Nobody reads it."""

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
        request = Request(self.command, path, self.headers.get("Range"), token)
        self.hub.requests.append(request)
        trouble = self.hub.trouble(request)
        if isinstance(trouble, int):
            self.fail(trouble)
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            self.info(request, found[1], found[2] or "main")
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/(.+)", path):
            self.tree(request, found[1], found[2])
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self.file(request, (found[1], found[2], found[3]), trouble)
        else:
            self.fail(404)

    def fail(self, status: int, code: str | None = None) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def commit(self, request: Request, name: str, revision: str, of_file: bool) -> str | None:
        """The commit, unless the answer is an error."""
        hub = self.hub
        if name not in hub.revisions or hub.private.get(name, request.agent_token) != request.agent_token:
            self.fail(*MISSING["repo"])
            return None
        if of_file and name in hub.gated:
            self.fail(*MISSING["gated"])
            return None
        commit = hub.revisions[name].get(revision, revision)
        if commit not in hub.commits:
            self.fail(*MISSING["revision"])
            return None
        return commit

    def info(self, request: Request, name: str, revision: str) -> None:
        commit = self.commit(request, name, revision, False)
        if commit is None:
            return
        siblings = [sibling(file, self.hub.commits[commit]) for file in tree(self.hub.commits[commit])]
        siblings = self.hub.listed(siblings)
        body = {"_id": "0", "id": name, "sha": commit, "siblings": siblings, "private": False, "tags": []}
        self.send(request, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def tree(self, request: Request, name: str, revision: str) -> None:
        """What snapshot_download asks for."""
        commit = self.commit(request, name, revision, False)
        if commit is None:
            return
        entries = []
        for entry in (sibling(file, self.hub.commits[commit]) for file in tree(self.hub.commits[commit])):
            lfs = {**entry["lfs"], "oid": entry["lfs"]["sha256"]} if "lfs" in entry else None
            listed = {"type": "file", "oid": entry["blobId"], "size": entry["size"], "path": entry["rfilename"]}
            entries.append(listed | ({"lfs": lfs} if lfs else {}))
        self.send(request, json.dumps(entries).encode(), {"Content-Type": "application/json"})

    def file(self, request: Request, place: tuple[str, str, str], trouble: str | None) -> None:
        name, revision, file = place
        commit = self.commit(request, name, revision, True)
        if commit is None:
            return
        path = self.hub.commits[commit] / file
        if not path.is_file():
            self.fail(*MISSING["file"])
            return
        size, status, part = path.stat().st_size, 200, (0, path.stat().st_size)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{etag(path)}"', "Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", request.range or "")
        if asked and trouble != "whole":
            part, status = (int(asked[1]), min(int(asked[2] or size - 1) + 1, size)), 206
            headers["Content-Range"] = f"bytes {part[0]}-{part[1] - 1}/{size}"
        with open(path, "rb") as opened:
            opened.seek(part[0])
            body = opened.read(part[1] - part[0]) if request.method == "GET" else b""
        headers["Content-Length"] = str(part[1] - part[0])
        self.send(request, body, headers, status, trouble == "drop")

    def send(
        self, request: Request, body: bytes, headers: dict[str, str], status: int = 200, drop: bool = False
    ) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        body = body[: len(body) // 2] if drop else body
        request.sent = len(body)
        self.wfile.write(body)
        if drop:
            self.wfile.flush()
            self.close_connection = True


def tree(directory: Path) -> list[str]:
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())


def sibling(file: str, directory: Path) -> dict[str, Any]:
    path = directory / file
    entry: dict[str, Any] = {"rfilename": file, "size": path.stat().st_size, "blobId": etag(path)}
    if file.endswith(LARGE):
        entry["lfs"] = {"sha256": etag(path), "size": path.stat().st_size, "pointerSize": 130}
    return entry


def etag(path: Path) -> str:
    """As the Hub has it: a large file's sha256, a small one's git blob."""
    return _etag(path, path.stat().st_mtime_ns)


@lru_cache
def _etag(path: Path, _: int) -> str:
    content = path.read_bytes()
    if path.name.endswith(LARGE):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def serving() -> Iterator[Hub]:
    """A Hub on a port of the loopback interface."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, hub))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=partial(server.serve_forever, poll_interval=0.01))
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
