"""Models on the Hugging Face Hub: what its cache has, what --download fetches, and that nothing is asked unasked."""

from __future__ import annotations

import errno
import json
import os
import re
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from checkpoints import write_json
from click.testing import CliRunner
from hub_models import LIMITS, contents, recipe, tensors
from hub_server import Hub, Request, tree
from huggingface_hub import constants, file_download

import cpimerge
from cpimerge import cli, needs
from cpimerge.plan_file import Plan

ROOT = Path(__file__).parent.parent


def refuse(*_: Any) -> None:
    raise AssertionError("the network was touched")


def run(*arguments: object) -> str:
    """Errors of a command, which must fail, without tracebacks."""
    result = CliRunner().invoke(cli.main, [str(argument) for argument in arguments])
    assert result.exit_code == 1, result.output
    assert "Traceback" not in result.stderr
    return result.stderr


# --- the cache, and no network ----------------------------------------------------------------------


def test_what_the_cache_has_is_used_and_the_network_left_alone(
    published: Path, hub: Hub, from_directories: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("base", "math", "code"):
        huggingface_hub.snapshot_download(f"org/{name}")
    asked = len(hub.requests)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    plan = cpimerge.plan(published, tmp_path / "plan", **LIMITS)
    cpimerge.fuse(tmp_path / "plan", tmp_path / "fused", **LIMITS)
    cpimerge.merge(published, tmp_path / "merged", **LIMITS)
    assert cpimerge.estimate(published, tmp_path).plan_travel_bytes == 0
    assert contents(tmp_path / "fused") == contents(tmp_path / "merged") == from_directories
    assert len(hub.requests) == asked
    commit = hub.revisions["org/base"]["main"]
    assert plan.inputs[0].path == str(tmp_path / "cache" / "models--org--base" / "snapshots" / commit)
    manifest = json.loads((tmp_path / "fused" / "cpimerge_manifest.json").read_bytes())
    assert [entry["model"] for entry in manifest["inputs"]] == ["org/base", "org/math", "org/code"]


UNASKED = """
import json, socket, sys
from click.testing import CliRunner

def refuse(*_):
    attempts.append(1)
    raise OSError("no network")

attempts = []
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = socket.create_connection = refuse
from cpimerge.cli import main

codes = [CliRunner().invoke(main, command).exit_code for command in json.loads(sys.argv[1])]
print(json.dumps([codes, len(attempts)]))
"""
COMMANDS = [
    ["--help"],
    ["plan", "--help"],
    ["plan", "absent.yml", "-o", "plan"],
    ["plan", "recipe.yml", "-o", "plan"],
    ["plan", "recipe.yml", "--estimate"],
    ["fuse", "plan", "-o", "out"],
    ["merge", "recipe.yml", "-o", "merged"],
    ["inspect", "org/base"],
    ["inspect", "org/base", "org/math"],
]


@pytest.mark.parametrize(("cached", "codes"), [(False, [0, 0, *[1] * 7]), (True, [0, 0, 1, *[0] * 6])])
def test_no_command_touches_the_network_unasked(
    published: Path, hub: Hub, tmp_path: Path, cached: bool, codes: list[int]
) -> None:
    for name in ("base", "math", "code") if cached else ():
        huggingface_hub.snapshot_download(f"org/{name}")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))}
    settings = {"HF_HUB_CACHE": str(tmp_path / "cache"), "HF_ENDPOINT": hub.url, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", UNASKED, json.dumps(COMMANDS)]
    asked = len(hub.requests)
    done = subprocess.run(command, cwd=tmp_path, env=kept | settings, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [codes, 0]
    assert len(hub.requests) == asked


def test_all_missing_models_are_named_at_once_with_both_readings(published: Path, tmp_path: Path, hub: Hub) -> None:
    with pytest.raises(cpimerge.CheckpointError) as raised:
        cpimerge.plan(published, tmp_path / "plan", **LIMITS)
    assert raised.value.problems == tuple(
        f"org/{name}: not in the Hugging Face cache, and {tmp_path / 'org' / name} is no directory. "
        "Add --download to fetch the model from the Hub, or correct the path"
        for name in ("base", "math", "code")
    )
    assert not hub.requests
    assert not (tmp_path / "plan").exists()


def test_a_directory_comes_before_the_hub(
    published: Path, tmp_path: Path, hub: Hub, from_directories: dict[str, bytes]
) -> None:
    (tmp_path / "org").symlink_to("hub")
    cpimerge.merge(published, tmp_path / "out", download="cache", **LIMITS)
    assert contents(tmp_path / "out") == from_directories
    assert not hub.requests


def test_an_incomplete_snapshot_is_named_with_what_it_lacks(published: Path, tmp_path: Path) -> None:
    for name in ("base", "code"):
        huggingface_hub.snapshot_download(f"org/{name}")
    found = huggingface_hub.snapshot_download("org/math", ignore_patterns=["*-00001-*", "*-00003-*"])
    with pytest.raises(cpimerge.CheckpointError) as raised:
        cpimerge.plan(published, tmp_path / "plan", **LIMITS)
    assert raised.value.problems == (
        f"org/math: {found} is incomplete: it lacks model-00001-of-00003.safetensors, "
        "model-00003-of-00003.safetensors. Add --download to complete it",
    )


def test_a_snapshot_without_any_weights_is_incomplete(published: Path, tmp_path: Path) -> None:
    found = huggingface_hub.hf_hub_download("org/base", "config.json")
    with pytest.raises(cpimerge.CheckpointError) as raised:
        cpimerge.plan(published, tmp_path / "plan", **LIMITS)
    assert raised.value.problems[0] == (
        f"org/base: {Path(found).parent} is incomplete: it lacks its weights. Add --download to complete it"
    )


NO_TOKENIZER = (
    "{}: the Hugging Face cache has no tokenizer of it, so the output gets none. Add --download to have it, "
    "if the Hub does"
)


@pytest.mark.parametrize(
    ("config", "noted"), [({"text_config": {"vocab_size": 64}}, True), ({"hidden_size": 32}, False)]
)
def test_a_base_without_its_tokenizer_is_noted(
    published: Path, tmp_path: Path, config: dict[str, Any], noted: bool
) -> None:
    """As the cache has it after transformers loaded the model alone."""
    write_json(tmp_path / "hub" / "base" / "config.json", config)
    for name in ("math", "code"):
        huggingface_hub.snapshot_download(f"org/{name}")
    found = huggingface_hub.snapshot_download("org/base", allow_patterns=["model*", "config.json"])
    notes = cpimerge.plan(published, tmp_path / "plan", **LIMITS).notes
    assert (NO_TOKENIZER.format(found) in notes) == noted
    notes = cpimerge.plan(published, tmp_path / "plan", force=True, download="cache", **LIMITS).notes
    assert NO_TOKENIZER.format(found) not in notes


def test_local_models_need_no_part_of_the_hub(from_directories: dict[str, bytes], tmp_path: Path) -> None:
    code = "import sys; sys.modules['cpimerge.hub'] = None; import cpimerge; cpimerge.merge(*sys.argv[1:])"
    command = [sys.executable, "-c", code, str(tmp_path / "local.yml"), str(tmp_path / "out")]
    subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)
    assert contents(tmp_path / "out") == from_directories


# --- download ---------------------------------------------------------------------------------------


def test_download_fetches_what_is_needed_and_no_more(
    published: Path, hub: Hub, from_directories: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, int, int]] = []
    cpimerge.merge(published, tmp_path / "out", download="cache", progress=lambda *call: calls.append(call), **LIMITS)
    assert contents(tmp_path / "out") == from_directories
    shards = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    expert = ["config.json", "model.safetensors.index.json", *shards, "tokenizer_config.json"]
    base = sorted([*expert, "generation_config.json"])
    by_model: dict[str, set[str]] = {}
    for request in hub.requests:
        if request.method == "GET" and "/resolve/" in request.path:
            name, _, file = request.path.partition("/resolve/")
            by_model.setdefault(name, set()).add(file.partition("/")[2])
    assert by_model == {"/org/base": set(base), "/org/math": set(expert), "/org/code": set(expert)}
    downloads = [(done, total) for phase, done, total in calls if phase == "download"]
    size = sum((tmp_path / "hub" / name / file).stat().st_size for name in ("base", "math", "code") for file in expert)
    size += len(b"{}")
    index_size = sum((tmp_path / "hub" / name / expert[1]).stat().st_size for name in ("base", "math", "code"))
    assert downloads[-1] == (size - index_size, size - index_size)  # the indexes came first, to know the shards
    assert downloads == sorted(downloads)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    cpimerge.merge(published, tmp_path / "again", **LIMITS)
    assert contents(tmp_path / "again") == from_directories


def test_download_again_fetches_nothing(published: Path, hub: Hub, tmp_path: Path) -> None:
    cpimerge.plan(published, tmp_path / "plan", download="cache", **LIMITS)
    hub.requests.clear()
    calls: list[str] = []
    cpimerge.plan(
        published,
        tmp_path / "plan",
        force=True,
        download="cache",
        progress=lambda *call: calls.append(call[0]),
        **LIMITS,
    )
    assert hub.fetched() == []
    assert "download" not in calls


def test_a_plan_holds_on_to_its_commit(
    published: Path, hub: Hub, from_directories: dict[str, bytes], tmp_path: Path
) -> None:
    plan = cpimerge.plan(published, tmp_path / "plan", download="cache", **LIMITS)
    hub.add("org/math", tmp_path / "hub" / "code", "later")
    hub.revisions["org/math"]["main"] = hub.revisions["org/math"].pop("later")
    hub.requests.clear()
    cpimerge.fuse(tmp_path / "plan", tmp_path / "out", download="cache", **LIMITS)
    assert contents(tmp_path / "out") == from_directories
    assert not hub.requests
    moved = cpimerge.plan(published, tmp_path / "moved", download="cache", **LIMITS)
    assert moved.inputs[1].path != plan.inputs[1].path


def test_what_was_planned_can_be_fetched_again(
    published: Path, hub: Hub, from_directories: dict[str, bytes], tmp_path: Path
) -> None:
    cpimerge.plan(published, tmp_path / "plan", download="cache", **LIMITS)
    (tmp_path / "cache").rename(tmp_path / "gone")
    commit = hub.revisions["org/math"]["main"]
    with pytest.raises(
        cpimerge.CheckpointError, match=rf"org/math@{commit}: not in the Hugging Face cache.*--download"
    ):
        cpimerge.fuse(tmp_path / "plan", tmp_path / "out", **LIMITS)
    cpimerge.fuse(tmp_path / "plan", tmp_path / "out", download="cache", **LIMITS)
    assert contents(tmp_path / "out") == from_directories
    assert (tmp_path / "out" / "generation_config.json").is_file()


def test_a_revision_is_a_branch_a_tag_or_a_commit(published: Path, hub: Hub, tmp_path: Path) -> None:
    commit = hub.add("org/math", tmp_path / "hub" / "code", "v2")
    tagged = recipe(tmp_path / "tag.yml", "org/base", "org/math@v2")
    pinned = recipe(tmp_path / "commit.yml", "org/base", f"org/math@{commit}")
    first = cpimerge.plan(tagged, tmp_path / "a", download="cache", **LIMITS)
    second = cpimerge.plan(pinned, tmp_path / "b", **LIMITS)  # in the cache by now
    assert first.inputs[1] == second.inputs[1]
    assert Path(first.inputs[1].path).name == commit
    third = cpimerge.plan(tagged, tmp_path / "c", **LIMITS)
    assert third.inputs == first.inputs


def test_pickled_weights_are_fetched_only_where_there_are_no_others(published: Path, hub: Hub, tmp_path: Path) -> None:
    directory = tmp_path / "hub" / "old"
    directory.mkdir()
    torch.save(tensors(3), directory / "pytorch_model.bin")
    write_json(directory / "config.json", {"model_type": "test"})
    hub.add("org/old", directory)
    mixed = recipe(tmp_path / "mixed.yml", "org/base", "org/old")
    cpimerge.plan(mixed, tmp_path / "plan", download="cache", **LIMITS)
    assert "pytorch_model.bin" in hub.fetched()
    assert [name for name in hub.fetched() if name.endswith((".gguf", ".onnx", ".pth"))] == []


def test_the_token_is_sent_and_private_models_are_found_with_it(
    published: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.private["org/math"] = "hf_secret"
    assert "org/math: the Hub has no such model, or it is private" in run(
        "plan", published, "-o", tmp_path / "p", "--download"
    )
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    cpimerge.plan(published, tmp_path / "p", download="cache", **LIMITS)


# --- what goes wrong --------------------------------------------------------------------------------


def test_every_model_that_cannot_be_had_is_named_at_once(published: Path, hub: Hub, tmp_path: Path) -> None:
    wrong = recipe(tmp_path / "wrong.yml", "org/absent", "org/math@nowhere", "org/code", "org/empty")
    (tmp_path / "hub" / "empty").mkdir()
    (tmp_path / "hub" / "empty" / "model.gguf").write_bytes(b"x")
    hub.add("org/empty", tmp_path / "hub" / "empty")
    text = run("plan", "--download", wrong, "-o", tmp_path / "plan")
    assert text.splitlines() == [
        "error: org/absent: the Hub has no such model, or it is private. Correct the name, or log in with "
        "`hf auth login`",
        "error: org/math@nowhere: the Hub has no revision 'nowhere' of it. Give a branch, tag or commit",
        "error: org/empty: has no weights as safetensors or pytorch_model.bin on the Hub, only 'model.gguf'. "
        "Give the model that it was made from",
    ]
    assert hub.fetched(".safetensors") == []


@pytest.mark.parametrize("download", ["cache", "stream"])
@pytest.mark.parametrize("absent", ["model-00009-of-00009.safetensors", "../../secret", "a\nb"])
def test_an_index_of_files_that_the_hub_lacks(
    published: Path, hub: Hub, tmp_path: Path, download: str, absent: str
) -> None:
    """Said before any of its weights are fetched, and not as something that --download would mend."""
    index = tmp_path / "hub" / "math" / "model.safetensors.index.json"
    content = json.loads(index.read_bytes())
    content["weight_map"]["lm_head.weight"] = absent
    write_json(index, content)
    assert run("plan", published, "--download", download, "-o", tmp_path / "plan") == (
        f"error: org/math: its model.safetensors.index.json names {absent!r}, which the Hub does not have. "
        "Give another revision of it, or another model\n"
    )
    assert not [r for r in hub.requests if r.path.startswith("/org/math/") and r.path.endswith(".safetensors")]


def test_a_gated_model_says_where_to_ask(published: Path, hub: Hub, tmp_path: Path) -> None:
    hub.gated.add("org/math")
    assert run("plan", published, "--download", "-o", tmp_path / "plan") == (
        f"error: org/math: model.safetensors.index.json: is gated. Accept its conditions at {hub.url}/org/math and log "
        "in with `hf auth login`\n"
    )


@pytest.mark.parametrize(
    ("status", "text"), [(500, "the Hub answered 500. Try again later"), (403, "refuses it (403)")]
)
def test_a_hub_that_fails(published: Path, hub: Hub, tmp_path: Path, status: int, text: str) -> None:
    hub.trouble = lambda request: status
    shown = run("plan", published, "--download", "-o", tmp_path / "plan").splitlines()
    assert len(shown) == 3
    assert all(text in line for line in shown)


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ({}, "its answer is not that of a Hub"),
        ({"id": "org/base", "siblings": [{"rfilename": "x", "lfs": {"size": 1}}]}, "its answer is not that of a Hub"),
        ({"id": "org/base", "siblings": [7]}, "its answer is not that of a Hub"),
        ({"id": "org/base", "sha": "main", "siblings": []}, "it answers 'main' for a commit, so it is no Hub"),
        *(
            (
                {"id": "org/base", "siblings": [{"rfilename": name, "size": size}]},
                f"it lists a file {name!r} of {size} by",
            )
            for name, size in [("../x", 1), ("/x", 1), ("a//b", 1), ("x\0", 1), ("\ud800", 1), ("x", -1), (7, 1)]
        ),
    ],
)
def test_a_hub_that_is_none(
    answer: dict[str, Any], text: str, published: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answered(*_: object, **__: object) -> Any:
        return huggingface_hub.hf_api.ModelInfo(**answer)  # type: ignore[no-untyped-call]

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", answered)
    with pytest.raises(
        cpimerge.CheckpointError, match=re.escape(f"org/base: cannot be fetched from {hub.url}: {text}")
    ):
        cpimerge.plan(published, tmp_path / "plan", download="cache", **LIMITS)
    assert hub.requests == []


def test_a_hub_that_does_not_answer(published: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()

    def wait(request: Request) -> int:
        over.wait(20)
        return 500

    hub.trouble = wait
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.2)
    shown = run("plan", published, "--download", "-o", tmp_path / "plan").splitlines()
    over.set()
    assert len(shown) == 3
    assert all(re.search(r"cannot be fetched from http\S+: .*timed out\. Check the network", line) for line in shown)


def test_a_disk_that_fills_up(published: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(file_download, "http_get", full)
    assert run("plan", published, "--download", "-o", tmp_path / "plan").splitlines()[0] == (
        "error: org/base: model.safetensors.index.json: the disk is full. Free some space, or use --download stream"
    )


def test_no_network_at_all(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    shown = run("plan", published, "--download", "-o", tmp_path / "plan").splitlines()
    assert len(shown) == 3
    assert shown[0].startswith("error: org/base: cannot be fetched from http://127.0.0.1:9: ")


@pytest.mark.parametrize("way", ["cache", "stream"])
def test_offline_and_download_contradict(
    published: Path, hub: Hub, tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    text = run("plan", published, f"--download={way}", "-o", tmp_path / "plan")
    assert text.splitlines() == [
        f"error: org/{name}: cannot be downloaded, as HF_HUB_OFFLINE is set. Unset it, or leave out --download"
        for name in ("base", "math", "code")
    ]
    assert not hub.requests


def test_a_transfer_that_breaks_off_is_resumed(
    published: Path, hub: Hub, from_directories: dict[str, bytes], tmp_path: Path
) -> None:
    broken: set[str] = set()

    def drop_once(request: Request) -> str | None:
        new = request.method == "GET" and request.path.endswith(".safetensors") and request.path not in broken
        broken.add(request.path) if new else None
        return "drop" if new else None

    hub.trouble = drop_once
    cpimerge.merge(published, tmp_path / "out", download="cache", **LIMITS)
    assert len(broken) == 9
    assert contents(tmp_path / "out") == from_directories


def test_too_little_disk_is_said_before_anything_large_is_fetched(
    published: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(needed: int, directory: Path) -> None:
        raise cpimerge.ResourceError(f"{directory}: {needed}")

    monkeypatch.setattr(needs, "check_disk", full)
    with pytest.raises(cpimerge.ResourceError, match=re.escape(f"{tmp_path / 'cache'}: ")):
        cpimerge.plan(published, tmp_path / "plan", download="cache", **LIMITS)
    assert hub.fetched(".safetensors") == []


def test_a_full_target_is_said_before_anything_is_fetched(published: Path, hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for arguments in (["plan", published], ["merge", published]):
        assert "not empty" in run(*arguments, "--download", "-o", tmp_path / "full")
    assert not hub.requests


def test_what_progress_raises_ends_the_download(published: Path, hub: Hub, tmp_path: Path) -> None:
    def stop(phase: str, done: int, total: int) -> None:
        raise KeyError(phase)

    with pytest.raises(KeyError, match="download"):
        cpimerge.plan(published, tmp_path / "plan", download="cache", progress=stop, **LIMITS)
    assert len(hub.fetched()) <= 4
    assert not (tmp_path / "plan").exists()


@pytest.mark.parametrize(
    ("arguments", "way"),
    [
        (["--download", "recipe.yml"], "cache"),
        (["recipe.yml", "--download"], "cache"),
        (["recipe.yml", "--download", "cache"], "cache"),
        (["--download", "stream", "recipe.yml"], "stream"),
        (["--download=stream", "recipe.yml"], "stream"),
        (["--download", "--", "recipe.yml"], "cache"),
        (["recipe.yml"], None),
    ],
)
def test_the_option_may_stand_alone(arguments: list[str], way: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    def plan(recipe: Path, output: Path, **options: Any) -> Plan:
        given.update(options, recipe=recipe)
        raise cpimerge.PlanError("seen")

    monkeypatch.setattr("cpimerge.api.plan", plan)
    assert "seen" in run("plan", "-o", "out", *arguments)
    assert (given["download"], given["recipe"]) == (way, Path("recipe.yml"))


def test_the_server_shows_what_it_holds(hub: Hub, published: Path, tmp_path: Path) -> None:
    listed = huggingface_hub.HfApi().model_info("org/base", files_metadata=True)
    assert [file.rfilename for file in listed.siblings or ()] == tree(tmp_path / "hub" / "base")
