"""Merging models that are read from the Hub: the same bytes, few of them on this disk, as many travel as announced."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from checkpoints import save, write_json
from click.testing import CliRunner
from hub_models import LIMITS, NAMES, contents, merged_locally, publish_adapter, recipe, tensors
from hub_server import Hub, Request
from safetensors.torch import save_file

import cpimerge
from cpimerge import analysis, cli, needs, pieces, remote
from cpimerge.needs import Needs
from cpimerge.plan_file import Plan

SHARD = ".safetensors"


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor of the models here is two pieces, and three tensors fill the room of one model."""
    monkeypatch.setattr(pieces, "PIECE_BYTES", 4096)
    monkeypatch.setattr(pieces, "ROOM_BYTES", 3 * 8192)
    monkeypatch.setattr(pieces, "LAYER_PIECES", 1000)


def announced(run: Callable[..., Any], *arguments: Any, **options: Any) -> Needs:
    seen: list[Needs] = []
    run(*arguments, announce=seen.append, **{"download": "stream", **LIMITS, **options})
    return seen[0]


def pieces_sent(hub: Hub) -> list[Request]:
    """The requests for parts of weights, not for the beginnings of files."""
    return [r for r in hub.requests if r.path.endswith(SHARD) and not (r.range or "").startswith("bytes=0-")]


@pytest.fixture(autouse=True)
def first_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_BYTES", 64)  # so that headers take a second request


def weights_travelled(hub: Hub, published: Path) -> int:
    """Bytes of tensors that were sent, headers apart."""
    total = 0
    for name in NAMES:
        for file in (published.parent / "hub" / name).glob("*" + SHARD):
            begin = 8 + struct.unpack("<Q", file.read_bytes()[:8])[0]
            for request in hub.requests:
                if request.path.startswith(f"/org/{name}/") and request.path.endswith(file.name):
                    start = int(re.findall(r"\d+", request.range or "")[0])
                    total += request.sent if start >= begin else 0
    return total


# --- the same result --------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 4])
def test_streamed_models_give_the_same_bytes(
    published: Path, hub: Hub, from_directories: dict[str, bytes], tmp_path: Path, threads: int
) -> None:
    cpimerge.merge(published, tmp_path / "out", download="stream", threads=threads)
    assert contents(tmp_path / "out") == from_directories
    assert not (tmp_path / "cache").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hub", "local", "local.yml", "out", "recipe.yml"]
    manifest = json.loads((tmp_path / "out" / "cpimerge_manifest.json").read_bytes())
    assert [entry["model"] for entry in manifest["inputs"]] == ["org/base", "org/math", "org/code"]
    assert all(shard["sha256"] for entry in manifest["inputs"] for shard in entry["shards"])
    card = huggingface_hub.ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.base_model == ["org/base", "org/math", "org/code"]


@pytest.mark.parametrize("scope", ["tensor", "layer", "global"])
@pytest.mark.parametrize("room", [1, 3, 100])
def test_what_travels_is_what_was_announced(
    published: Path, hub: Hub, tmp_path: Path, scope: str, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one thread, exactly; and whatever the room, the result is right."""
    monkeypatch.setattr(pieces, "ROOM_BYTES", room * 8192)
    monkeypatch.setattr(pieces, "ROOM_LAYERS", 1)
    expected = merged_locally(tmp_path, scope=scope)
    file = recipe(tmp_path / "scoped.yml", *(f"org/{name}" for name in NAMES), scope=scope)
    needed = announced(cpimerge.plan, file, tmp_path / "plan")
    tensor, once = 3 * 8192, 3 * 6 * 8192
    # Sampled and then scanned: with little room all of it twice, or the pool of embedding and head.
    again = {("global", 1): once, ("global", 3): once, ("layer", 1): 2 * tensor}.get((scope, room), 0)
    assert weights_travelled(hub, published) == needed.plan_travel_bytes == once + again
    hub.requests.clear()
    cpimerge.fuse(tmp_path / "plan", tmp_path / "out", download="stream", **LIMITS)
    assert weights_travelled(hub, published) == needed.fuse_travel_bytes == once
    assert contents(tmp_path / "out") == expected


def test_a_plan_that_was_cut_off_fetches_what_is_left(
    published: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pieces are gone, what was found in them is not."""
    monkeypatch.setattr(analysis, "CHUNK", 1)  # so that little tensors are not all examined together

    def stop(phase: str, done: int, total: int) -> None:
        if phase == "plan" and done >= total / 2:
            raise KeyboardInterrupt

    options: dict[str, Any] = {"download": "stream", "threads": 1}
    cpimerge.plan(published, tmp_path / "wanted", **options)
    whole = weights_travelled(hub, published)
    with pytest.raises(KeyboardInterrupt):
        cpimerge.plan(published, tmp_path / "plan", progress=stop, **options)
    hub.requests.clear()
    resumed: list[tuple[int, int]] = []
    cpimerge.plan(published, tmp_path / "plan", resumed=lambda *told: resumed.append(told), **options)
    assert 0 < weights_travelled(hub, published) < whole
    assert [0 < done < total for done, total in resumed] == [True]
    assert contents(tmp_path / "plan") == contents(tmp_path / "wanted")


def test_little_of_a_model_lies_on_the_disk_at_a_time(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    most: list[int] = []
    fill = pieces._fill

    def watch(*arguments: Any) -> None:
        held = [open_pieces(weights) for weights in seen]
        most.append(max(held, default=0))
        fill(*arguments)

    seen: list[pieces.Weights] = []
    begin = pieces.Weights.__init__

    def remember(self: pieces.Weights, *arguments: Any) -> None:
        begin(self, *arguments)
        seen.append(self)

    monkeypatch.setattr(pieces.Weights, "__init__", remember)
    monkeypatch.setattr(pieces, "_fill", watch)
    cpimerge.merge(published, tmp_path / "out", download="stream", **LIMITS)
    assert len(seen) == 3
    assert max(most) == 3 * 8192  # of 6 · 8192
    assert all(open_pieces(weights) == 0 for weights in seen)


def open_pieces(weights: pieces.Weights) -> int:
    """Bytes of the pieces of a model that are on the disk."""
    done = [held.file.result() for held in weights._held.values() if held.file.done()]
    return sum(file.seek(0, 2) for file in done)


# --- plans ------------------------------------------------------------------------------------------


def test_the_plan_names_models_and_commits(
    published: Path, hub: Hub, from_directories: dict[str, bytes], tmp_path: Path
) -> None:
    plan = cpimerge.plan(published, tmp_path / "plan", download="stream", **LIMITS)
    assert [entry.path for entry in plan.inputs] == [
        f"org/{name}@{hub.revisions[f'org/{name}']['main']}" for name in NAMES
    ]
    assert plan == Plan.load(tmp_path / "plan")
    hub.requests.clear()
    with pytest.raises(cpimerge.CheckpointError) as raised:
        cpimerge.fuse(tmp_path / "plan", tmp_path / "out", **LIMITS)
    assert not hub.requests
    where = "not in the Hugging Face cache. It was read from the Hub when planned: add --download stream, or --download"
    assert list(raised.value.problems) == [f"{entry.path}: {where}" for entry in plan.inputs]
    hub.revisions["org/math"]["main"] = hub.add("org/math", tmp_path / "hub" / "code", "later")  # moves on
    cpimerge.fuse(tmp_path / "plan", tmp_path / "streamed", download="stream", **LIMITS)
    cpimerge.fuse(tmp_path / "plan", tmp_path / "cached", download="cache", **LIMITS)
    cpimerge.fuse(tmp_path / "plan", tmp_path / "offline", **LIMITS)
    for out in ("streamed", "cached", "offline"):
        assert contents(tmp_path / out) == from_directories


def test_what_changes_between_plan_and_fuse_is_found(published: Path, hub: Hub, tmp_path: Path) -> None:
    cpimerge.plan(published, tmp_path / "plan", download="stream", **LIMITS)
    file = next((tmp_path / "hub" / "math").glob("*00002*" + SHARD))
    raw = bytearray(file.read_bytes())
    raw[-2] ^= 1
    file.write_bytes(raw)
    with pytest.raises(cpimerge.PlanError, match=r"tensor 'model.layers.\d.mlp.weight': changed since planned"):
        cpimerge.fuse(tmp_path / "plan", tmp_path / "out", download="stream", **LIMITS)
    assert not (tmp_path / "out").exists()


def test_what_the_cache_has_does_not_travel(
    published: Path, hub: Hub, from_directories: dict[str, bytes], tmp_path: Path
) -> None:
    huggingface_hub.snapshot_download("org/math")
    hub.requests.clear()
    plan = cpimerge.plan(published, tmp_path / "plan", download="stream", **LIMITS)
    assert {request.path.split("/")[2] for request in pieces_sent(hub)} == {"base", "code"}
    assert Path(plan.inputs[1].path).is_dir()
    cpimerge.fuse(tmp_path / "plan", tmp_path / "out", download="stream", **LIMITS)
    assert contents(tmp_path / "out") == from_directories


def test_local_models_are_not_streamed(
    published: Path, hub: Hub, from_directories: dict[str, bytes], tmp_path: Path
) -> None:
    cpimerge.merge(tmp_path / "local.yml", tmp_path / "out", download="stream", **LIMITS)
    assert contents(tmp_path / "out") == from_directories
    assert not hub.requests


def test_a_single_file_is_streamed_too(hub: Hub, tmp_path: Path) -> None:
    """Folders that the output takes over from the base are fetched whole, weights and all."""
    for seed, name in enumerate(NAMES):
        place = save(tmp_path / "hub" / name, tensors(seed))
        (place / "2_Dense").mkdir()
        save_file({"linear.weight": torch.ones(2, 2)}, place / "2_Dense" / "model.safetensors")
        (place / "modules.json").write_text(json.dumps([{"path": ""}, {"path": "2_Dense"}]))
        hub.add(f"org/{name}", place)
    expected = merged_locally(tmp_path)
    file = recipe(tmp_path / "recipe.yml", *(f"org/{name}" for name in NAMES))
    cpimerge.merge(file, tmp_path / "out", download="stream", **LIMITS)
    assert contents(tmp_path / "out") == expected
    assert "2_Dense/model.safetensors" in expected
    assert hub.fetched("2_Dense/model.safetensors") == ["2_Dense/model.safetensors"]


def test_the_estimate_says_what_travels_and_fetches_no_weights(published: Path, hub: Hub, tmp_path: Path) -> None:
    done = CliRunner().invoke(cli.main, ["plan", str(published), "--estimate", "--download", "stream"])
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[0].startswith("plan: reads 147.5 kB (147.5 kB travel from the Hub), writes ")
    assert done.stdout.splitlines()[1].startswith("fuse: reads 147.5 kB (147.5 kB travel from the Hub), writes 49.2 kB")
    assert weights_travelled(hub, published) == 0


@pytest.mark.parametrize("way", ["cache", "stream"])
def test_adapters_may_be_on_the_hub(published: Path, hub: Hub, tmp_path: Path, way: Any) -> None:
    """Alone, and on a model that is no input itself."""
    publish_adapter(hub, tmp_path)
    local = tmp_path / "hub"
    files = recipe(tmp_path / "a.yml", f"{local}/base", f"{local}/math+{local}/lora", f"{local}/lora")
    cpimerge.merge(files, tmp_path / "expected", **LIMITS)
    names = recipe(tmp_path / "b.yml", "org/base", "org/math+org/lora", "org/lora")
    needed = announced(cpimerge.plan, names, tmp_path / "plan", download=way)
    if way == "stream":
        assert weights_travelled(hub, published) == needed.plan_travel_bytes == 2 * 6 * 8192
    assert "adapter_model.safetensors" in hub.fetched()
    assert "README.md" not in hub.fetched()
    cpimerge.fuse(tmp_path / "plan", tmp_path / "out", download=way, **LIMITS)
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")
    commits = {name: hub.revisions[f"org/{name}"]["main"] for name in ("base", "math", "lora")}
    inputs = {entry.name: entry for entry in Plan.load(tmp_path / "plan").inputs}
    assert str(inputs["task0"].path).endswith(commits["math"])
    assert str(inputs["task0"].adapter).endswith(commits["lora"])
    card = huggingface_hub.ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.base_model == ["org/base", "org/math", "org/lora"]


# --- what goes wrong --------------------------------------------------------------------------------


@pytest.mark.parametrize("trouble", ["drop", 503])
def test_a_transfer_that_fails_is_tried_again(
    published: Path, hub: Hub, from_directories: dict[str, bytes], tmp_path: Path, trouble: str | int
) -> None:
    failed: set[tuple[str, str | None]] = set()

    def once(request: Request) -> str | int | None:
        key = request.path, request.range
        new = request.range is not None and key not in failed
        failed.add(key)
        return trouble if new else None

    hub.trouble = once
    cpimerge.merge(published, tmp_path / "out", download="stream", **LIMITS)
    assert contents(tmp_path / "out") == from_directories
    assert len(failed) > 18


@pytest.mark.parametrize(
    ("trouble", "text"),
    [
        (500, "org/math: model-00002-of-00003.safetensors: the Hub answered 500. Try again later"),
        (403, "org/math: model-00002-of-00003.safetensors: the Hub refuses it (403). Log in with `hf auth login`"),
        ("whole", "it sends more than it is asked for, so nothing can be streamed from it"),
        ("drop", "org/math: model-00002-of-00003.safetensors: cannot be fetched from http://127.0.0.1"),
    ],
)
def test_a_transfer_that_keeps_failing(
    published: Path, hub: Hub, tmp_path: Path, trouble: str | int, text: str
) -> None:
    """Once the plan has begun to read."""

    def fail(request: Request) -> str | int | None:
        start = int(re.findall(r"\d+", request.range or "0")[0])
        concerned = "/org/math/" in request.path and "00002" in request.path and start > 1000
        return trouble if concerned and (trouble != "drop" or request.range) else None

    hub.trouble = fail
    done = CliRunner().invoke(cli.main, ["plan", str(published), "-o", str(tmp_path / "plan"), "--download", "stream"])
    assert done.exit_code == 1
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert text in lines[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hub", "recipe.yml"]


def test_damaged_headers_are_found_as_in_files(published: Path, hub: Hub, tmp_path: Path) -> None:
    math, code = (next((tmp_path / "hub" / name).glob("*00002*" + SHARD)) for name in ("math", "code"))
    math.write_bytes(math.read_bytes()[:-3])
    code.write_bytes((1 << 40).to_bytes(8, "little") + b"{}")
    with pytest.raises(cpimerge.CheckpointError) as raised:
        cpimerge.plan(published, tmp_path / "plan", download="stream", **LIMITS)
    shown = " | ".join(raised.value.problems)
    assert re.search(
        r"org--math/snapshots/\w+/model-00002-of-00003.safetensors: incomplete: \d+ bytes, its header", shown
    )
    assert re.search(r"org--code/snapshots/\w+/model-00002-of-00003.safetensors: incomplete: 10 bytes, shorter", shown)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hub", "recipe.yml"]


def test_pickled_weights_are_not_streamed(published: Path, hub: Hub, tmp_path: Path) -> None:
    place = tmp_path / "hub" / "old"
    place.mkdir()
    torch.save(tensors(3), place / "pytorch_model.bin")
    write_json(place / "config.json", {"model_type": "test"})
    hub.add("org/old", place)
    with pytest.raises(cpimerge.CheckpointError) as raised:
        cpimerge.plan(recipe(tmp_path / "r.yml", "org/base", "org/old"), tmp_path / "p", download="stream", **LIMITS)
    assert raised.value.problems == (
        "org/old: its weights are pytorch_model.bin, which cannot be streamed. Use --download without stream",
    )
    assert "pytorch_model.bin" not in hub.fetched()


def test_too_little_disk_for_the_pieces(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(needs, "check_disk", lambda needed, directory: asked.append(needed))
    cpimerge.plan(published, tmp_path / "plan", download="stream", **LIMITS)
    rooms = [asked.index(number * 24576) for number in (1, 2, 3)]
    assert rooms == sorted(rooms)
    small = ("config.json", "model.safetensors.index.json", "tokenizer_config.json")
    assert asked[2] == sum((tmp_path / "hub" / "math" / name).stat().st_size for name in small)


def test_two_runs_for_one_target_do_not_share_their_pieces(published: Path, tmp_path: Path) -> None:
    with (
        remote.streams(tmp_path / "out"),
        pytest.raises(cpimerge.OutputError, match=r"/out: another run is writing it"),
    ):
        cpimerge.merge(published, tmp_path / "out", download="stream", **LIMITS)
