"""Uploading an output: what the Hub has then, what is refused before, and what is said where it fails."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import save, write_recipe
from files import tree
from hub_upload_server import LARGE, TOKEN, Refusal, Repository, UploadHub, upload_hub
from huggingface_hub import constants

import cpimerge
from cpimerge import OutputError

# huggingface_hub's own LFS code calls its HTTP library in a way that this one is giving up.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

NAME = "org/fused"
SHARDS = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output in three shards, one of them large enough to travel in parts."""
    home = tmp_path_factory.mktemp("home")
    rng = torch.Generator().manual_seed(0)
    base = {"a": torch.randn(150, 100, generator=rng), "b": torch.randn(20, 20, generator=rng), "c": torch.ones(20)}
    for task, name in enumerate(("base", "math", "code")):
        noise = torch.Generator().manual_seed(task)
        tuned = {k: v + 0.01 * task * torch.randn(v.shape, generator=noise) for k, v in base.items()}
        save(home / name, tuned)
    (home / "base" / "tokenizer.json").write_text(json.dumps({"vocab": {str(i): i for i in range(2000)}}))
    (home / "base" / "1_Pooling").mkdir()
    (home / "base" / "1_Pooling" / "config.json").write_text("{}")
    (home / "base" / "LICENSE").touch()
    models = [{"model": home / "math"}, {"model": home / "code"}]
    recipe = write_recipe(home / "recipe.yml", base_model=home / "base", models=models, parameters={"density": 0.1})
    cpimerge.merge(recipe, home / "out", threads=1, shard_size=1600)
    return home / "out"


@pytest.fixture
def out(original: Path, tmp_path: Path) -> Path:
    """A copy of it to spoil."""
    subprocess.run(["cp", "-r", original, tmp_path / "out"], check=True)
    return tmp_path / "out"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[UploadHub]:
    """The Hub, on this machine, reachable for huggingface_hub in this process; uploads go through LFS."""
    with upload_hub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nowhere")
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between tries
        yield server


def contents(directory: Path) -> dict[str, bytes]:
    return {name: content for name, content in tree(directory).items() if content is not None}


def refused(push: Callable[[], object]) -> list[str]:
    with pytest.raises(OutputError) as raised:
        push()
    return list(raised.value.problems)


# --- what arrives -----------------------------------------------------------------------------------


def test_the_hub_has_every_byte(out: Path, hub: UploadHub) -> None:
    pushed = cpimerge.push(out, NAME)
    repository = hub.repositories[NAME]
    assert repository.branches == {"main": contents(out) | {".gitattributes": b"*\n"}}
    assert (repository.private, repository.messages) == (False, ["Upload the merge"])
    assert repository.large == {name for name, content in contents(out).items() if len(content) >= LARGE}
    assert repository.large > {*SHARDS[:2], "tokenizer.json"}
    assert sorted(pushed.files) == sorted(contents(out))
    assert (pushed.url, pushed.commit) == (f"{hub.url}/{NAME}", "0" * 40)
    assert any(request.startswith("PUT /lfs/") and request.endswith("/2") for request in hub.requests)  # in parts


def test_what_is_announced_and_when(out: Path, hub: UploadHub) -> None:
    """All is checked, and the user told, before the Hub hears of it."""
    events: list[tuple[str, Any]] = []

    def announce(upload: Any) -> None:
        assert not hub.requests
        events.append(("announce", upload))

    def progress(phase: str, done: int, total: int) -> None:
        assert not hub.requests
        events.append((phase, (done, total)))

    (out / "README.md").write_text("---\ntags: [merge]\n---\nbetter\n")
    cpimerge.push(out, NAME, announce=announce, progress=progress)
    assert [name for name, _ in events[-2:]] == ["check", "announce"]
    upload = events[-1][1]
    sizes = {name: len(content) for name, content in contents(out).items()}
    assert (upload.files, upload.edited, upload.nbytes) == (sizes, ("README.md",), sum(sizes.values()))
    steps = [step for name, step in events if name == "check"]
    assert steps == sorted(steps)
    assert steps[-1] == (upload.nbytes, upload.nbytes)
    assert hub.repositories[NAME].branches["main"]["README.md"] == b"---\ntags: [merge]\n---\nbetter\n"


def test_private_branch_and_message(out: Path, hub: UploadHub) -> None:
    cpimerge.push(out, NAME, private=True, revision="try/2", message="p = 5 %")
    repository = hub.repositories[NAME]
    assert repository.private
    assert repository.branches == {
        "main": {".gitattributes": b"*\n"},
        "try/2": contents(out) | {".gitattributes": b"*\n"},
    }
    assert repository.messages == ["p = 5 %"]


def test_a_second_push_sends_no_weights_again(out: Path, hub: UploadHub) -> None:
    cpimerge.push(out, NAME)
    sent = sum(request.startswith("PUT") for request in hub.requests)
    assert sent >= 3
    (out / "LICENSE").write_text("mine")
    cpimerge.push(out, NAME, revision="main")
    assert sum(request.startswith("PUT") for request in hub.requests) == sent
    assert hub.repositories[NAME].branches["main"]["LICENSE"] == b"mine"


def test_links_to_the_very_files_are_followed(out: Path, hub: UploadHub, tmp_path: Path) -> None:
    """Shards may have been moved to another disk."""
    (out / SHARDS[0]).rename(tmp_path / "shard")
    (out / SHARDS[0]).symlink_to(tmp_path / "shard")
    cpimerge.push(out, NAME)
    assert hub.repositories[NAME].branches["main"][SHARDS[0]] == (tmp_path / "shard").read_bytes()


FROM_XET = """
import sys, time, hf_xet
original, cas, target = sys.argv[1:]
(known,) = hf_xet.hash_files([original])
wanted = hf_xet.PyXetDownloadInfo(target, known.hash, known.file_size)
hf_xet.download_files([wanted], f"local://{cas}", ("any", int(time.time()) + 3600), None, None)
"""


def test_through_xet_the_hub_has_every_byte(out: Path, hub: UploadHub, tmp_path: Path) -> None:
    """What huggingface_hub does as it is installed: large files go to another storage, in pieces."""
    pytest.importorskip("hf_xet")
    hub.xet = tmp_path / "cas"
    hub.xet.mkdir()
    home = {"HF_HOME": str(tmp_path / "home")}

    by_sha256 = {hashlib.sha256(content).hexdigest(): content for content in contents(out).values()}
    hub.recover = by_sha256.__getitem__  # the storage can be read when the upload is over
    result = command(out, hub, NAME, "-q", HF_HUB_DISABLE_XET="0", **home)
    assert result.returncode == 0, result.stderr  # a busy machine may make it warn and try again
    repository = hub.repositories[NAME]
    assert repository.branches["main"] == contents(out) | {".gitattributes": b"*\n"}
    assert repository.large > set(SHARDS[:2])
    assert not [request for request in hub.requests if "lfs" in request]
    for name in repository.large:
        line = [sys.executable, "-c", FROM_XET, str(out / name), str(hub.xet), str(tmp_path / "back")]
        subprocess.run(line, env=os.environ | home, check=True)
        assert (tmp_path / "back").read_bytes() == (out / name).read_bytes()


# --- what is refused before -------------------------------------------------------------------------


def mix_up(out: Path) -> None:
    """A shard is missing, and other files are there."""
    (out / SHARDS[0]).rename(out / "model.safetensors")
    (out / ".env").write_text("TOKEN=x")
    (out / ".git").mkdir()
    (out / ".git" / "config").touch()
    (out / "1_Pooling" / "notes.txt").touch()


def link(name: str, target: str) -> Callable[[Path], None]:
    """What puts a link in the place of a file."""

    def spoil(out: Path) -> None:
        (out / name).unlink(missing_ok=True)
        (out / name).symlink_to(target)

    return spoil


def pipe(out: Path) -> None:
    (out / "LICENSE").unlink()
    os.mkfifo(out / "LICENSE")


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


SPOILT: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "no manifest": (
        lambda out: (out / "cpimerge_manifest.json").unlink(),
        ["{out}: has no cpimerge_manifest.json. Give a directory that `cpimerge fuse` wrote"],
    ),
    "another manifest": (
        lambda out: (out / "cpimerge_manifest.json").write_text('{"format": "x"}'),
        ["{out}/cpimerge_manifest.json: is not a manifest that this cpimerge reads. Fuse again"],
    ),
    "a manifest that is no JSON": (
        lambda out: (out / "cpimerge_manifest.json").write_bytes(b"\xff"),
        ["{out}/cpimerge_manifest.json: is not a manifest that this cpimerge reads. Fuse again"],
    ),
    "another value in a shard": (
        lambda out: flip(out / SHARDS[1]),
        ["{out}/model-00002-of-00003.safetensors: its sha256 is not the manifest's. {again}"],
    ),
    "another index": (
        lambda out: flip(out / "model.safetensors.index.json"),
        ["{out}/model.safetensors.index.json: its sha256 is not the manifest's. {again}"],
    ),
    "a shard cut short": (
        lambda out: os.truncate(out / SHARDS[2], 20),
        ["{out}/model-00003-of-00003.safetensors: 20 bytes, 176 in the manifest. {again}"],
    ),
    "missing and unknown files": (
        mix_up,
        [
            "{out}/model-00001-of-00003.safetensors: missing, though the manifest names it. {again}",
            "{out}/.env: {foreign}",
            "{out}/.git/config: {foreign}",
            "{out}/1_Pooling/notes.txt: {foreign}",
            "{out}/model.safetensors: {foreign}",
        ],
    ),
    "a link to a secret": (
        link("README.md", "/etc/hostname"),
        ["{out}/README.md: is a link to what is not of the merge. Remove it"],
    ),
    "a link to a folder": (
        link("more", "/etc"),
        ["{out}/more: is no file. Remove it"],
    ),
    "a broken link": (
        link("LICENSE", "nowhere"),
        ["{out}/LICENSE: is no file. Remove it"],
    ),
    "a pipe": (
        pipe,
        ["{out}/LICENSE: is no file. Remove it"],
    ),
}


@pytest.mark.parametrize("kind", SPOILT)
def test_what_is_not_the_merge_is_not_uploaded(out: Path, hub: UploadHub, kind: str) -> None:
    spoil, expected = SPOILT[kind]
    spoil(out)
    parts = {
        "out": out,
        "again": "Fuse again: it is not what was written",
        "foreign": "is not of the merge, so it is not uploaded. Move it out of the directory",
    }
    assert refused(lambda: cpimerge.push(out, NAME)) == [line.format(**parts) for line in expected]
    assert hub.requests == []


@pytest.mark.parametrize(
    "name", ["fused", "a/b/c", "org/", "/fused", "org/fu sed", "org/-x", "org/a..b", "", "o/x.git"]
)
def test_malformed_names(out: Path, hub: UploadHub, name: str) -> None:
    problem = f"{name!r}: is not the name of a model on the Hub. Write it like org/name"
    assert refused(lambda: cpimerge.push(out, name)) == [problem]
    assert hub.requests == []


def test_offline_and_without_a_token(out: Path, hub: UploadHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    no_token = "no token of the Hub: log in with `hf auth login`, or set HF_TOKEN to one that may write"
    assert refused(lambda: cpimerge.push(out, NAME)) == [no_token]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    offline = "HF_HUB_OFFLINE is set, and forbids what push does. Unset it"
    assert refused(lambda: cpimerge.push(out, NAME)) == [offline]
    assert hub.requests == []


# --- what is refused there --------------------------------------------------------------------------


def test_other_weights_there(out: Path, hub: UploadHub) -> None:
    """A single file would be loaded instead of the new shards."""
    old = {"model.safetensors": b"old", "notes.md": b"old", "config.json": b"old"}
    hub.repositories[NAME] = Repository(False, {"main": dict(old)})
    problem = (
        f"{hub.url}/{NAME}: holds model.safetensors, which would stay beside the new weights. "
        "Give another name, or --force to delete all that the output lacks"
    )
    assert refused(lambda: cpimerge.push(out, NAME)) == [problem]
    assert hub.repositories[NAME].branches == {"main": old}
    assert refused(lambda: cpimerge.push(out, NAME, revision="new")) == [problem]  # it begins with what main has
    assert hub.repositories[NAME].branches == {"main": old}
    cpimerge.push(out, NAME, revision="new", force=True)
    assert hub.repositories[NAME].branches == {"main": old, "new": contents(out)}
    cpimerge.push(out, NAME, force=True)
    assert hub.repositories[NAME].branches == {"main": contents(out), "new": contents(out)}


def test_other_files_there_stay(out: Path, hub: UploadHub) -> None:
    hub.repositories[NAME] = Repository(False, {"main": {"notes.md": b"old", "config.json": b"old"}})
    cpimerge.push(out, NAME)
    assert hub.repositories[NAME].branches == {"main": contents(out) | {"notes.md": b"old"}}


def test_private_is_not_taken_lightly(out: Path, hub: UploadHub) -> None:
    hub.repositories[NAME] = Repository(False)
    problem = f"{hub.url}/{NAME}: is there already, and public. Make it private on the Hub first, or give another name"
    assert refused(lambda: cpimerge.push(out, NAME, private=True)) == [problem]
    assert hub.repositories[NAME].branches == {"main": {".gitattributes": b"*\n"}}


# --- errors of the Hub ------------------------------------------------------------------------------

BAD_TOKEN = "the Hub does not accept the token. Log in with `hf auth login`, or set HF_TOKEN to one that may write"
NO_RIGHTS = "the token may not write there. Use one with write access to org, or give another name"
AGAIN = "Push again: what the Hub has already is not sent twice"


@pytest.mark.parametrize(
    ("request_", "refusal", "problem"),
    [
        ("POST /api/repos/create", Refusal(401, message="Invalid credentials in Authorization header"), BAD_TOKEN),
        ("POST /api/repos/create", Refusal(403, message="You don't have the rights"), NO_RIGHTS),
        ("POST /api/repos/create", Refusal(400, message="Name is taken"), "the Hub refuses it: Name is taken"),
        ("POST /api/models/org/fused/preupload", Refusal(403), NO_RIGHTS),
        (
            "POST /org/fused.git/info/lfs",
            Refusal(403, message="Storage limit reached"),
            "the token may not write there. Use one with write access to org, or give another name",
        ),
        ("PUT /lfs", Refusal(500, message="It burns"), f"the upload failed: It burns. {AGAIN}"),
        ("POST /api/models/org/fused/commit", Refusal(503, message="Busy"), f"the upload failed: Busy. {AGAIN}"),
        ("POST /api/models/org/fused/commit", Refusal(429, message="Slow"), f"the upload failed: Slow. {AGAIN}"),
        (
            "POST /api/models/org/fused/commit",
            Refusal(412, message="A commit has happened since"),
            "the Hub refuses it: A commit has happened since",
        ),
    ],
)
def test_refusals(out: Path, hub: UploadHub, request_: str, refusal: Refusal, problem: str) -> None:
    hub.refuse[request_] = refusal
    assert refused(lambda: cpimerge.push(out, NAME)) == [f"{NAME}: {problem}"]


def test_a_card_that_the_hub_refuses(out: Path, hub: UploadHub) -> None:
    hub.metadata_problem = '"license" must be one of many'
    (problem,) = refused(lambda: cpimerge.push(out, NAME))
    assert problem == f'{NAME}: the Hub refuses it: Invalid metadata in README.md. - "license" must be one of many'


def test_nobody_there(out: Path, hub: UploadHub, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    (problem,) = refused(lambda: cpimerge.push(out, NAME))
    assert problem == f"{NAME}: the upload failed: [Errno 111] Connection refused. {AGAIN}"


def test_what_arrived_is_compared(out: Path, hub: UploadHub) -> None:
    """Whether a file changed after the check or on its way: the Hub must have what was checked."""
    hub.corrupt = True
    problems = refused(lambda: cpimerge.push(out, NAME))
    large = sorted(hub.repositories[NAME].large)
    assert sorted(problems) == [f"{NAME}: {path}: the Hub does not have what was checked. Push again" for path in large]


def test_a_file_that_changes_meanwhile(out: Path, hub: UploadHub) -> None:
    problems = refused(lambda: cpimerge.push(out, NAME, announce=lambda _: flip(out / SHARDS[0])))
    assert problems == [f"{NAME}: {SHARDS[0]}: the Hub does not have what was checked. Push again"]


# --- the command ------------------------------------------------------------------------------------


def command(out: Path, hub: UploadHub, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """A real run with nothing but the variables that huggingface_hub reads."""
    usual = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    environment = os.environ | usual | settings | {"PYTHONPATH": str(Path(cpimerge.__file__).parents[1])}
    line = [sys.executable, "-m", "cpimerge", "push", str(out), *arguments]
    return subprocess.run(line, env=environment, capture_output=True, text=True, check=False)


def test_the_command(out: Path, hub: UploadHub) -> None:
    (out / "README.md").write_text("---\ntags: [merge]\n---\nbetter\n")
    result = command(out, hub, NAME, "--private")
    count, nbytes = len(contents(out)), sum(map(len, contents(out).values()))
    assert result.stdout.splitlines() == [
        f"upload: {count} files, {nbytes / 1000:.1f} kB, to {NAME}",
        "edited since the merge: README.md",
        f"pushed: {hub.url}/{NAME}",
    ]
    assert result.returncode == 0
    assert set(result.stderr.splitlines()) <= {f"check: {tenth}0% of {nbytes / 1000:.1f} kB" for tenth in range(11)}
    assert hub.repositories[NAME].branches["main"] == contents(out) | {".gitattributes": b"*\n"}
    assert hub.repositories[NAME].private


def test_the_command_for_machines(out: Path, hub: UploadHub) -> None:
    result = command(out, hub, NAME, "--json", "--quiet")
    assert (result.returncode, result.stderr) == (0, "")
    assert json.loads(result.stdout) == {
        "url": f"{hub.url}/{NAME}",
        "commit": "0" * 40,
        "files": sorted(contents(out)),
    }
    failed = command(out, hub, "nonsense", "--json", "-q")
    problem = "'nonsense': is not the name of a model on the Hub. Write it like org/name"
    assert (failed.returncode, failed.stderr) == (1, f"error: {problem}\n")
    assert json.loads(failed.stdout) == {"errors": [problem]}


def test_only_push_uses_the_network(original: Path, hub: UploadHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole merge and its output, with a Hub at hand and a token: no socket is opened."""

    def refuse(*_: object) -> None:
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    home = original.parent
    cpimerge.merge(home / "recipe.yml", home / "again", threads=1)
    assert hub.requests == []
