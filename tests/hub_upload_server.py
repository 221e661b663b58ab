"""A server on this machine that speaks as much of the Hugging Face Hub's API as uploading a model takes.

It keeps what it is sent, byte for byte: small files in the commit, large ones (`LARGE` bytes or more) through LFS, in
one piece or, from `PART` bytes on, in parts; or through Xet, whose storage is then a directory.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_of_this_test"
LARGE = 1_000
PART = 40_000
Answer = tuple[int, Any]


@dataclass
class Repository:
    """What one has: a branch's name -> path -> bytes; which paths are in LFS; the messages of its commits."""

    private: bool
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {".gitattributes": b"*\n"}})
    large: set[str] = field(default_factory=set)
    messages: list[str] = field(default_factory=list)


class Refusal(Exception):
    """An answer that is an error: status, and what the Hub says in its headers."""

    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        self.status, self.code, self.message = status, code, message


class UploadHub:
    """The server: `repositories` by name, `requests` as "METHOD path".

    `refuse` maps the beginning of a request to the error that it gets. `metadata_problem` is what it says of a card;
    with `corrupt`, it keeps something else than it was sent. `xet` is the storage of large files, if it has one;
    `recover` reads a large file by its sha256.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []
        self.refuse: dict[str, Refusal] = {}
        self.metadata_problem = ""
        self.corrupt = False
        self.stored: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.xet: Path | None = None
        self.recover: Callable[[str], bytes] = self.stored.__getitem__
        self.url = ""

    def answer(self, method: str, target: str, token: str | None, body: bytes) -> Answer:
        """Status and JSON for a request."""
        path = unquote(urlsplit(target).path)
        request = f"{method} {path}"
        self.requests.append(request)
        for beginning, refusal in self.refuse.items():
            if request.startswith(beginning):
                raise refusal
        if not path.startswith("/lfs/") and token != f"Bearer {TOKEN}":
            raise Refusal(401, message="Invalid credentials in Authorization header")
        for pattern, handler in ROUTES:
            if match := re.fullmatch(pattern, request):
                return handler(self, body, *match.groups())
        raise Refusal(404, "EntryNotFound", f"no route for {request}")

    def repository(self, name: str) -> Repository:
        if name not in self.repositories:
            raise Refusal(404, "RepoNotFound", "Repository not found")
        return self.repositories[name]

    def branch(self, name: str, revision: str) -> dict[str, bytes]:
        """The files of a branch, or of a commit: all that is asked for is the latest of its branch."""
        branches = self.repository(name).branches
        if re.fullmatch("[0-9a-f]{40}", revision):
            return list(branches.values())[int(revision, 16)]
        if revision not in branches:
            raise Refusal(404, "RevisionNotFound", "Invalid rev id")
        return branches[revision]

    def commit_id(self, name: str, branch: str) -> str:
        return f"{list(self.repository(name).branches).index(branch):040x}"


# --- routes -----------------------------------------------------------------------------------------


def create(hub: UploadHub, body: bytes) -> Answer:
    wanted = json.loads(body)
    name = f"{wanted['organization']}/{wanted['name']}"
    answer = {"url": f"{hub.url}/{name}", "name": name}
    if name in hub.repositories:
        return 409, answer | {"error": "You already created this model repo"}
    hub.repositories[name] = Repository(wanted.get("visibility") == "private" or bool(wanted.get("private")))
    return 200, answer


def model(hub: UploadHub, body: bytes, name: str) -> Answer:
    repository = hub.repository(name)
    return 200, {"id": name, "private": repository.private, "sha": hub.commit_id(name, "main"), "siblings": []}


def create_branch(hub: UploadHub, body: bytes, name: str, branch: str) -> Answer:
    branches = hub.repository(name).branches
    if branch in branches:
        raise Refusal(409, message="Reference already exists")
    branches[branch] = dict(branches["main"])
    return 200, {}


def described(hub: UploadHub, name: str, path: str, content: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": "0" * 40}
    if path in hub.repository(name).large:
        oid = hashlib.sha256(content).hexdigest()
        entry["lfs"] = {"oid": oid, "size": len(content), "pointerSize": 134}
    return entry


def tree(hub: UploadHub, body: bytes, name: str, revision: str) -> Answer:
    return 200, [described(hub, name, path, content) for path, content in hub.branch(name, revision).items()]


def paths_info(hub: UploadHub, body: bytes, name: str, revision: str) -> Answer:
    found = hub.branch(name, revision)
    wanted = parse_qs(body.decode())["paths"]
    return 200, [described(hub, name, path, found[path]) for path in wanted if path in found]


def validate_yaml(hub: UploadHub, body: bytes) -> Answer:
    """The real one knows what metadata may say; here a test decides."""
    assert json.loads(body)["content"].startswith("---\n")
    problem = hub.metadata_problem
    return (400, {"errors": [{"message": problem}], "warnings": []}) if problem else (200, {"warnings": []})


def preupload(hub: UploadHub, body: bytes, name: str, revision: str) -> Answer:
    hub.branch(name, revision)
    answers = []
    for file in json.loads(body)["files"]:
        mode = "lfs" if file["size"] >= LARGE else "regular"
        answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": None})
    return 200, {"files": answers}


def lfs_batch(hub: UploadHub, body: bytes, name: str) -> Answer:
    objects = []
    for wanted in json.loads(body)["objects"]:
        oid, size = wanted["oid"], wanted["size"]
        upload: dict[str, Any] = {"href": f"{hub.url}/lfs/{oid}"}
        if size >= PART:
            count = -(-size // PART)
            parts = {f"{number:05d}": f"{hub.url}/lfs/{oid}/{number}" for number in range(1, count + 1)}
            upload["header"] = {"chunk_size": str(PART), **parts}
        objects.append(wanted if oid in hub.stored else wanted | {"actions": {"upload": upload}})
    return 200, {"transfer": "basic", "objects": objects}


def lfs_put(hub: UploadHub, body: bytes, oid: str) -> Answer:
    hub.stored[oid] = body
    return 200, {}


def lfs_part(hub: UploadHub, body: bytes, oid: str, number: str) -> Answer:
    hub.parts.setdefault(oid, {})[int(number)] = body
    return 200, {}


def lfs_complete(hub: UploadHub, body: bytes, oid: str) -> Answer:
    parts = hub.parts.pop(oid)
    assert [part["partNumber"] for part in json.loads(body)["parts"]] == sorted(parts)
    hub.stored[oid] = b"".join(parts[number] for number in sorted(parts))
    return 200, {}


def xet_token(hub: UploadHub, body: bytes, name: str, revision: str) -> Answer:
    return 200, {"casUrl": f"local://{hub.xet}", "accessToken": "any", "exp": int(time.time()) + 3600}


def commit(hub: UploadHub, body: bytes, name: str, branch: str) -> Answer:
    files, repository = dict(hub.branch(name, branch)), hub.repository(name)
    for line in body.splitlines():
        entry = json.loads(line)
        value = entry["value"]
        match entry["key"]:
            case "header":
                repository.messages.append(value["summary"])
            case "file":
                files[value["path"]] = base64.b64decode(value["content"])
            case "lfsFile":
                content = hub.recover(value["oid"])
                assert (hashlib.sha256(content).hexdigest(), len(content)) == (value["oid"], value["size"])
                files[value["path"]] = content + b"?" * hub.corrupt
                repository.large.add(value["path"])
            case "deletedFile":
                del files[value["path"]]
            case key:
                raise AssertionError(key)
    repository.branches[branch] = files
    oid = hub.commit_id(name, branch)
    return 200, {"commitUrl": f"{hub.url}/{name}/commit/{oid}", "commitOid": oid}


NAME = "([^/]+/[^/]+)"
ROUTES: list[tuple[str, Callable[..., Answer]]] = [
    ("POST /api/repos/create", create),
    (f"GET /api/models/{NAME}", model),
    (f"POST /api/models/{NAME}/branch/(.+)", create_branch),
    (f"GET /api/models/{NAME}/tree/(.+)", tree),
    (f"POST /api/models/{NAME}/paths-info/(.+)", paths_info),
    ("POST /api/validate-yaml", validate_yaml),
    (f"POST /api/models/{NAME}/preupload/(.+)", preupload),
    (f"GET /api/models/{NAME}/xet-write-token/(.+)", xet_token),
    (f"POST /{NAME}.git/info/lfs/objects/batch", lfs_batch),
    ("PUT /lfs/([0-9a-f]{64})", lfs_put),
    ("PUT /lfs/([0-9a-f]{64})/([0-9]+)", lfs_part),
    ("POST /lfs/([0-9a-f]{64})", lfs_complete),
    (f"POST /api/models/{NAME}/commit/(.+)", commit),
]


# --- the server -------------------------------------------------------------------------------------


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: UploadHub

    def _serve(self) -> None:
        headers = {"ETag": '"part"', "Content-Type": "application/json"}
        body = self._body()
        try:
            status, content = self.hub.answer(self.command, self.path, self.headers["Authorization"], body)
        except Refusal as refusal:
            status, content = refusal.status, {"error": refusal.message}
            headers |= {"X-Error-Code": refusal.code, "X-Error-Message": refusal.message}
        data = json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(data))}).items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def _body(self) -> bytes:
        if self.headers["Transfer-Encoding"] != "chunked":
            return self.rfile.read(int(self.headers["Content-Length"] or 0))
        pieces = []
        while size := int(self.rfile.readline(), 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    do_GET = do_POST = do_PUT = _serve

    def log_message(self, *_: object) -> None:
        """Tests are quiet."""


@contextmanager
def upload_hub() -> Iterator[UploadHub]:
    """A running server, on a free port of the loopback interface."""
    hub = UploadHub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True  # clients keep connections open
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
