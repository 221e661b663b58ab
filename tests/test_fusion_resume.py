"""A fuse that was cut off anywhere goes on where it was, and ends in the bytes of one that was not."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from checkpoints import save, write_recipe
from files import tree
from hypothesis import given, settings
from hypothesis import strategies as st

import cpimerge
from cpimerge import CheckpointError, OutputError, PlanError, fusion, stream, writer
from cpimerge.writer import BegunShard, FinishedShard, OutputTensor, ShardLayout, shard_records

SHARDS = 40_000  # bytes: some tensors each
NAMES = [f"model.layers.{number}.w" for number in range(8)]


class Stop(BaseException):
    """In place of Ctrl-C, at a chosen moment."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three checkpoints of tensors of several chunks each, and their plan."""
    home = tmp_path_factory.mktemp("models")
    generator = torch.Generator().manual_seed(0)
    for name in ("base", "a", "b"):
        tensors = {n: torch.randn(70, 100, generator=generator) for n in NAMES}
        save(home / name, {**tensors, "empty": torch.zeros(0), "steps": torch.arange(5)})
    recipe = write_recipe(
        home / "recipe.yml",
        base_model=home / "base",
        models=[{"model": home / "a"}, {"model": home / "b"}],
        dtype="bfloat16",
        parameters={"density": 0.1, "conflict": "largest"},
    )
    with small_chunks():
        cpimerge.plan(recipe, home / "plan", threads=1)
        cpimerge.fuse(home / "plan", home / "out", threads=1, shard_size=SHARDS)
    return home


@contextmanager
def small_chunks() -> Iterator[None]:
    """Chunks of 1,000 elements, and a record whenever something was written."""
    with mock.patch.object(stream, "CHUNK", 1_000), mock.patch.object(writer, "FLUSH_BYTES", 1):
        yield


@pytest.fixture(autouse=True)
def small() -> Iterator[None]:
    with small_chunks():
        yield


def fuse(home: Path, out: Path, stop_at: int | None = None, **options: Any) -> tuple[list[tuple[int, int]], list[int]]:
    """Fuse; returns what `resumed` was told, and the bytes done as told by progress. Stops at step `stop_at`."""
    resumed: list[tuple[int, int]] = []
    steps: list[int] = []

    def progress(phase: str, done: int, total: int) -> None:
        steps.append(done)
        if len(steps) == stop_at:
            raise Stop

    cpimerge.fuse(
        home / "plan",
        out,
        shard_size=options.pop("shard_size", SHARDS),
        progress=progress,
        resumed=lambda done, total: resumed.append((done, total)),
        **options,
    )
    return resumed, steps


def steps_in_all(home: Path, out: Path) -> list[int]:
    _, steps = fuse(home, out, threads=1)
    shutil.rmtree(out)
    return steps


def journal(out: Path) -> list[dict[str, Any]]:
    lines = (out.parent / f".{out.name}.partial" / "journal").read_text().splitlines()
    return [json.loads(line.partition(" ")[2]) for line in lines]


def tensor_bytes_recorded(out: Path) -> int:
    """Of whole tensors, by the last record of each shard."""
    files = out.parent / f".{out.name}.partial" / "files"
    total = 0
    for name, record in shard_records(journal(out)[1:]).items():
        header = 8 + int.from_bytes((files / name).read_bytes()[:8], "little")
        total += (record.end if isinstance(record, BegunShard) else record.size) - header
    return total


def test_every_place(models: Path, tmp_path: Path) -> None:
    """Cut off at every chunk; the next run has other threads, and takes over all whole tensors."""
    every = steps_in_all(models, tmp_path / "out")
    total = every[-1]
    took_over = []
    for place in range(1, len(every) + 1):
        out = tmp_path / "out"
        with pytest.raises(Stop):
            fuse(models, out, place, threads=1)
        assert not out.exists()
        recorded = tensor_bytes_recorded(out) if (tmp_path / ".out.partial").exists() else 0
        resumed, steps = fuse(models, out, threads=1 + place % 3)
        assert resumed == ([(recorded, total)] if recorded else [])
        assert steps[-1:] == ([] if recorded == total else [total])
        assert all(step > recorded for step in steps)
        took_over.append(recorded)
        assert tree(out) == tree(models / "out")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
        shutil.rmtree(out)
    tensor = 70 * 100 * 2
    assert took_over == sorted(took_over)
    assert {n // tensor for n in took_over} == set(range(len(NAMES) + 1))  # a whole tensor is never done again


def test_small_tensors_come_together(tmp_path: Path) -> None:
    """In one write, in the bytes that each by itself has; cut off anywhere, whole ones are taken over."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(30,), (40,), (0,), (3, 90), (100, 25), (7,), (50, 2), (1,), (20,), (2100,), (64,)]
    for name in ("base", "a", "b"):
        tensors: dict[str, torch.Tensor] = {
            f"layers.{number}.w": torch.randn(shape, generator=generator) for number, shape in enumerate(shapes)
        }
        same = torch.arange(60, dtype=torch.float32)
        save(tmp_path / name, {**tensors, "layers.6.same": same, "layers.7.ids": torch.arange(9)})
    recipe = write_recipe(
        tmp_path / "recipe.yml",
        base_model=tmp_path / "base",
        models=[{"model": tmp_path / "a"}, {"model": tmp_path / "b"}],
        parameters={"density": 0.1, "singular_values": "keep"},
    )
    cpimerge.plan(recipe, tmp_path / "plan")
    out, alone = tmp_path / "out", tmp_path / "alone"
    with mock.patch.object(fusion, "CHUNK", 0):  # no two of them fit
        fuse(tmp_path, alone)
    for most in (1, 60, 150, 400, 1_000_000):
        with mock.patch.object(fusion, "CHUNK", most):
            every = steps_in_all(tmp_path, out)
            for place in range(1, len(every) + 1):
                with pytest.raises(Stop):
                    fuse(tmp_path, out, place, threads=1 + place % 2)
                recorded = tensor_bytes_recorded(out) if (tmp_path / ".out.partial").exists() else 0
                resumed, _ = fuse(tmp_path, out)
                assert resumed == ([(recorded, every[-1])] if recorded else [])
                assert tree(out) == tree(alone)
                shutil.rmtree(out)
    assert len(every) < len(shapes)  # with the most room


@given(
    runs=st.lists(st.tuples(st.integers(1, 50), st.integers(1, 3)), max_size=4),
)
@settings(max_examples=25)
def test_cut_off_again_and_again(
    models: Path, tmp_path_factory: pytest.TempPathFactory, runs: list[tuple[int, int]]
) -> None:
    home = tmp_path_factory.mktemp("again")
    for stop_at, threads in runs:
        with suppress(Stop):
            fuse(models, home / "out", stop_at, threads=threads, force=True)
        assert {path.name for path in home.iterdir()} <= {".out.partial", "out"}
        assert tree(home / "out") in ({}, tree(models / "out"))
    fuse(models, home / "out", force=True)
    assert tree(home / "out") == tree(models / "out")
    assert [path.name for path in home.iterdir()] == ["out"]


def flip(file: Path, place: int) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def partial_shard(root: Path) -> Path:
    """The shard that was being written."""
    records = shard_records(json.loads(x.partition(" ")[2]) for x in (root / "journal").read_text().splitlines())
    return root / "files" / next(name for name, record in records.items() if isinstance(record, BegunShard))


def first_shard(root: Path) -> Path:
    return min((root / "files").glob("*.safetensors"))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a bit of the shard at hand": lambda root: flip(partial_shard(root), 500),
    "its end": lambda root: cut(partial_shard(root)),
    "the shard at hand": lambda root: partial_shard(root).unlink(),
    "a whole shard": lambda root: first_shard(root).unlink(),
    "the end of a whole shard": lambda root: cut(first_shard(root)),
    "a bit of a whole shard": lambda root: flip(first_shard(root), 500),
    "all files": lambda root: shutil.rmtree(root / "files"),
    "the journal": lambda root: (root / "journal").unlink(),
    "the end of the journal": lambda root: cut(root / "journal"),
    "a bit of the journal": lambda root: flip(root / "journal", -20),
    "its opening": lambda root: flip(root / "journal", 30),
}


@pytest.mark.parametrize("lost", list(DAMAGE))
def test_what_the_disk_lost_is_done_again(models: Path, tmp_path: Path, lost: str) -> None:
    every = steps_in_all(models, tmp_path / "out")
    with pytest.raises(Stop):
        fuse(models, tmp_path / "out", len(every) * 3 // 4, threads=1)
    before = tensor_bytes_recorded(tmp_path / "out")
    DAMAGE[lost](tmp_path / ".out.partial")
    resumed, _ = fuse(models, tmp_path / "out", threads=2)
    assert sum(done for done, _ in resumed) < before
    assert tree(tmp_path / "out") == tree(models / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def record(**changes: Any) -> dict[str, Any]:
    return {"shard": "model.safetensors", "tensors": 1, "end": 100, "xxh3": "0" * 16, **changes}


@pytest.mark.parametrize(
    "entry",
    [
        {},
        record(tensors="1"),
        record(end=None),
        record(more=1),
        record(shard=3),
        {"shard": "x", "size": 1, "mtime_ns": 1.5, "sha256": "0"},
    ],
)
def test_records_that_are_none(entry: dict[str, Any]) -> None:
    assert shard_records([entry]) == {}
    known = BegunShard(**record())
    assert shard_records([record(), entry]) == {"model.safetensors": known}


@pytest.mark.parametrize("tensors", [-1, 0, 3, 1 << 70])
def test_records_that_do_not_fit(tensors: int) -> None:
    layout = ShardLayout("x", [OutputTensor("a", "F32", (2,)), OutputTensor("b", "F32", (3,))])
    ends = {1: len(layout.header()) + 8, 2: len(layout.header()) + 20}
    assert all(BegunShard(**record(tensors=n, end=end)).fits(layout) for n, end in ends.items())
    assert not BegunShard(**record(tensors=1, end=ends[2])).fits(layout)
    assert not any(BegunShard(**record(tensors=tensors, end=end)).fits(layout) for end in (0, *ends.values()))


def test_a_shard_that_is_none_holds_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    entry = (tmp_path / "file").stat()
    finished = FinishedShard(shard="file", size=3, mtime_ns=entry.st_mtime_ns, sha256="0")
    (tmp_path / "link").symlink_to("file")
    assert finished.holds(tmp_path / "file")
    assert not finished.holds(tmp_path / "link")
    assert not finished.holds(tmp_path / "absent")
    os.utime(tmp_path / "file", ns=(0, entry.st_mtime_ns + 1))
    assert not finished.holds(tmp_path / "file")


def interrupted(models: Path, tmp_path: Path) -> None:
    with pytest.raises(Stop):
        fuse(models, tmp_path / "out", 36, threads=1)


def test_another_plan_and_other_shards_are_refused(models: Path, tmp_path: Path) -> None:
    interrupted(models, tmp_path)
    before = tree(tmp_path)
    with pytest.raises(OutputError, match="another fuse: of other inputs or settings"):
        fuse(models, tmp_path / "out", shard_size=SHARDS + 1)
    shutil.copytree(models / "plan", tmp_path / "other" / "plan")
    text = (tmp_path / "other" / "plan" / "plan.json").read_text().replace('"largest"', '"last"')
    (tmp_path / "other" / "plan" / "plan.json").write_text(text)
    with pytest.raises(OutputError, match="another fuse: of other inputs or settings"):
        fuse(tmp_path / "other", tmp_path / "out")
    shutil.rmtree(tmp_path / "other")
    assert tree(tmp_path) == before
    resumed, _ = fuse(models, tmp_path / "out", shard_size=SHARDS + 1, restart=True)
    assert resumed == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_an_input_that_changed_meanwhile(models: Path, tmp_path: Path) -> None:
    """What is done was made of the planned inputs; what is left is refused, and then nothing stays."""
    home = tmp_path / "models"
    shutil.copytree(models, home)
    recipe = home / "recipe.yml"
    recipe.write_text(recipe.read_text().replace(str(models), str(home)))
    cpimerge.plan(recipe, home / "plan", threads=1, force=True)
    (tmp_path / "work").mkdir()
    interrupted(home, tmp_path / "work")
    flip(home / "a" / "model.safetensors", (home / "a" / "model.safetensors").stat().st_size - 300)
    with pytest.raises(PlanError, match="changed since planned"):
        fuse(home, tmp_path / "work" / "out")
    assert not list((tmp_path / "work").iterdir())


def test_an_input_that_cannot_be_read_for_a_while(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(models, tmp_path)
    before = tensor_bytes_recorded(tmp_path / "out")
    preadv = os.preadv

    def broken(handle: int, buffers: Any, offset: int) -> int:
        if os.readlink(f"/proc/self/fd/{handle}").startswith(str(models)):
            raise OSError(5, "Input/output error")
        return preadv(handle, buffers, offset)

    with monkeypatch.context() as patched:
        patched.setattr(os, "preadv", broken)
        patched.setattr(stream, "_read_fast", lambda *arguments: False)
        with pytest.raises(CheckpointError, match="cannot be read: Input/output error") as raised:
            fuse(models, tmp_path / "out")
    assert "--restart" in raised.value.__notes__[0]
    resumed, _ = fuse(models, tmp_path / "out")
    assert [done for done, _ in resumed] == [before]
    assert tree(tmp_path / "out") == tree(models / "out")


def test_a_disk_that_is_full_for_a_while(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(models, tmp_path)
    pwrite = os.pwrite

    def full(handle: int, data: Any, offset: int) -> int:
        if offset > 20_000:
            raise OSError(28, "No space left on device")
        return pwrite(handle, data, offset)

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", full)
        with pytest.raises(OutputError) as raised:
            fuse(models, tmp_path / "out")
    assert str(raised.value) == f"{tmp_path}/out: cannot be written: No space left on device"
    assert "--restart" in raised.value.__notes__[0]
    fuse(models, tmp_path / "out")
    assert tree(tmp_path / "out") == tree(models / "out")


def test_space_is_set_aside_before_anything_is_written(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, int]] = []

    def reserve(handle: int, nbytes: int) -> None:
        asked.append((Path(os.readlink(f"/proc/self/fd/{handle}")).name, nbytes))
        if len(asked) == 3:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("cpimerge.fusion.reserve", reserve)
    with pytest.raises(OutputError, match="No space left on device"):
        fuse(models, tmp_path / "out")
    assert asked == [(path.name, path.stat().st_size) for path in sorted((models / "out").glob("*.safetensors"))[:3]]
    assert not list(tmp_path.iterdir())


def test_a_merge_goes_on_with_its_plan(models: Path, tmp_path: Path) -> None:
    planned: list[str] = []

    def stop(phase: str, done: int, total: int) -> None:
        planned.append(phase)
        if phase == "fuse" and done > total / 2:
            raise Stop

    cpimerge.merge(models / "recipe.yml", tmp_path / "whole", shard_size=SHARDS, threads=1)
    with pytest.raises(Stop):
        cpimerge.merge(models / "recipe.yml", tmp_path / "out", shard_size=SHARDS, progress=stop)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.merge", ".out.partial", "whole"]
    planned.clear()
    resumed: list[int] = []
    cpimerge.merge(
        models / "recipe.yml",
        tmp_path / "out",
        shard_size=SHARDS,
        progress=lambda phase, done, total: planned.append(phase),
        resumed=lambda done, total: resumed.append(done),
    )
    assert set(planned) == {"fuse"}
    assert len(resumed) == 1
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]
