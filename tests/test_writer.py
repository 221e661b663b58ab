"""Files byte by byte as the reference writers', and directories that appear only when they are complete."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from checkpoints import save, write_recipe
from files import DTYPES, stored_bytes, tensors, tree
from huggingface_hub import save_torch_state_dict
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes

from cpimerge import OutputError, fuse, plan, writer
from cpimerge.checkpoint import natural_key
from cpimerge.directory import open_checkpoint
from cpimerge.writer import (
    OutputTensor,
    ShardLayout,
    ShardWriter,
    check_target,
    index_json,
    shard_layouts,
    shard_limit,
    staged_directory,
)

NAMES = {dtype: name for name, dtype in DTYPES.items()}


def outputs(content: dict[str, torch.Tensor]) -> list[OutputTensor]:
    return [OutputTensor(name, NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in content.items()]


def write(directory: Path, layout: ShardLayout, content: dict[str, torch.Tensor]) -> str:
    """Write a shard in pieces of up to three bytes; returns its sha256."""
    with closing(ShardWriter(directory / layout.filename, layout.header())) as file:
        for tensor in layout.tensors:
            data = stored_bytes(content[tensor.name])
            for start in range(0, len(data), 3):
                file.append(memoryview(data[start : start + 3]))
        return file.finish()


# --- files ------------------------------------------------------------------------------------------


@given(tensors())
@example({dtype: torch.ones(2, dtype=DTYPES[dtype]) for dtype in DTYPES})
@example({'\x00\n\x1f\x7f"\\/\u2028é😀': torch.ones(())})
def test_files_are_the_reference_writers(content: dict[str, torch.Tensor]) -> None:
    (layout,) = shard_layouts(outputs(content))
    with tempfile.TemporaryDirectory() as directory:
        digest = write(Path(directory), layout, content)
        written = Path(directory, "model.safetensors").read_bytes()
    assert written == to_bytes(content, {"format": "pt"})
    assert digest == hashlib.sha256(written).hexdigest()


@given(tensors(min_size=2, max_size=8), st.integers(1, 40))
def test_shards_are_those_of_hugging_face(content: dict[str, torch.Tensor], limit: int) -> None:
    """File names, split, every byte of every shard, and what the index says."""
    content = {name: content[name] for name in sorted(content, key=natural_key)}
    with tempfile.TemporaryDirectory() as temporary:
        ours, theirs = Path(temporary, "ours"), Path(temporary, "theirs")
        ours.mkdir()
        theirs.mkdir()
        save_torch_state_dict(content, theirs, max_shard_size=limit)
        layouts = shard_layouts(outputs(content), limit)
        for layout in layouts:
            write(ours, layout, content)
        if len(layouts) > 1:
            (ours / "model.safetensors.index.json").write_text(index_json(layouts))
        check_same(ours, theirs, content)


def check_same(ours: Path, theirs: Path, content: dict[str, torch.Tensor]) -> None:
    files = sorted(file.name for file in ours.iterdir())
    assert files == sorted(file.name for file in theirs.iterdir())
    for name in files:
        if name.endswith(".json"):
            index, expected = (json.loads((directory / name).read_bytes()) for directory in (ours, theirs))
            count = sum(tensor.numel() for tensor in content.values())
            assert index == expected | {"metadata": expected["metadata"] | {"total_parameters": count}}
        else:
            assert (ours / name).read_bytes() == (theirs / name).read_bytes()
    assert {name: info.nbytes for name, info in open_checkpoint(ours).tensors.items()} == {
        name: tensor.nbytes for name, tensor in content.items()
    }


@pytest.mark.parametrize("limit", ["2kB", "6KB", "1MB"])
def test_shards_are_those_of_transformers(tmp_path: Path, limit: str) -> None:
    """The same split, file names and index as save_pretrained, tensors taken in its order."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {"vocab_size": 32, "hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=3, tie_word_embeddings=False))
    model.save_pretrained(tmp_path, max_shard_size=limit)
    layouts = shard_layouts(outputs(dict(model.state_dict())), shard_limit(limit))
    assert {layout.filename: {tensor.name for tensor in layout.tensors} for layout in layouts} == {
        file.name: load_file(file).keys() for file in tmp_path.glob("*.safetensors")
    }
    assert len(layouts) == {"2kB": 6, "6KB": 2, "1MB": 1}[limit]
    if len(layouts) > 1:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_bytes())
        assert json.loads(index_json(layouts)) == index


@pytest.mark.parametrize(
    ("size", "limit"),
    [(None, 5_000_000_000), ("5GB", 5_000_000_000), ("1.5 MB", 1_500_000), ("2GiB", 2 << 30), ("7", 7), (7, 7)],
)
def test_shard_limit(size: int | str | None, limit: int) -> None:
    assert shard_limit(size) == limit


@pytest.mark.parametrize(
    ("size", "problem"),
    [
        (0, "a file of 0 bytes holds nothing: write it like 5GB"),
        ("0GB", "a file of 0 bytes holds nothing: write it like 5GB"),
        ("0.4B", "a file of 0 bytes holds nothing: write it like 5GB"),
        (-5, "-5 is not a size: write it like 512MB or 2GiB"),
        ("5 gigs", "'5 gigs' is not a size: write it like 512MB or 2GiB"),
        ("", "'' is not a size: write it like 512MB or 2GiB"),
    ],
)
def test_nonsense_shard_sizes(size: int | str, problem: str) -> None:
    with pytest.raises(OutputError) as raised:
        shard_limit(size)
    assert str(raised.value) == f"shard_size: {problem}"


def test_an_exception_closes_the_file(tmp_path: Path) -> None:
    """An unclosed file would be a ResourceWarning, and so an error."""
    layout = ShardLayout("model.safetensors", [OutputTensor("w", "F32", (2,))])
    with pytest.raises(ZeroDivisionError), closing(ShardWriter(tmp_path / layout.filename, layout.header())):
        _ = 1 / 0
    assert (tmp_path / "model.safetensors").read_bytes() == layout.header()


def test_a_file_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("mine")
    with pytest.raises(FileExistsError):
        ShardWriter(tmp_path / "model.safetensors", b"")
    assert (tmp_path / "model.safetensors").read_text() == "mine"


# --- directories ------------------------------------------------------------------------------------


def produce(
    target: Path, text: str = "new", *, force: bool = False, meanwhile: Callable[[], object] = lambda: None
) -> None:
    """Write a directory with one file; `meanwhile` is called before it is published."""
    with staged_directory(target, force, []) as staging:
        (staging / "file").write_text(text)
        meanwhile()


@contextmanager
def working_directory(directory: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(directory)
    try:
        yield
    finally:
        os.chdir(before)


def test_a_directory_appears_at_the_end(tmp_path: Path) -> None:
    with staged_directory(tmp_path / "a" / "out", False, []) as staging:
        (staging / "deep").mkdir()
        (staging / "deep" / "file").write_text("new")
        assert staging.parent == tmp_path / "a"
        assert not (tmp_path / "a" / "out").exists()
    assert tree(tmp_path) == {"a": None, "a/out": None, "a/out/deep": None, "a/out/deep/file": b"new"}


def test_an_empty_directory_is_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    produce(tmp_path / "out")
    assert tree(tmp_path) == {"out": None, "out/file": b"new"}


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("force", [False, True])
def test_nothing_is_left_of_a_failure(tmp_path: Path, error: type[BaseException], force: bool) -> None:
    if force:
        produce(tmp_path / "out", "old")
    before = tree(tmp_path)

    def fail() -> None:
        raise error

    with pytest.raises(error):
        produce(tmp_path / "out", force=force, meanwhile=fail)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("failing", ["os.fsync", "os.rename"])
def test_nothing_is_left_where_publishing_fails(tmp_path: Path, failing: str) -> None:
    error = OSError(5, "Input/output error", "somewhere")
    with mock.patch(failing, side_effect=error), pytest.raises(OutputError) as raised:
        produce(tmp_path / "out")
    assert str(raised.value) == f"{tmp_path}/out: cannot be written: somewhere: Input/output error"
    assert tree(tmp_path) == {}


def test_what_was_there_comes_back_where_publishing_fails(tmp_path: Path) -> None:
    produce(tmp_path / "out", "old")
    before = tree(tmp_path)
    rename = os.rename

    def fail_once(source: Path, target: Path) -> None:
        if source.name == ".out.partial":
            raise OSError(28, "No space left on device")
        rename(source, target)

    with mock.patch("os.rename", fail_once), pytest.raises(OutputError) as raised:
        produce(tmp_path / "out", force=True)
    assert str(raised.value) == f"{tmp_path}/out: cannot be written: No space left on device"
    assert tree(tmp_path) == before


def test_everything_is_flushed_before_it_is_published(tmp_path: Path) -> None:
    events: list[tuple[str, str]] = []

    def flushed(handle: int) -> None:
        events.append(("flush", os.path.relpath(os.readlink(f"/proc/self/fd/{handle}"), tmp_path)))

    def renamed(source: Path, target: Path) -> None:
        events.append(("rename", target.name))
        source.replace(target)

    with mock.patch("os.fsync", flushed), mock.patch("os.rename", renamed):
        produce(tmp_path / "out")
    assert events == [("flush", ".out.partial/file"), ("flush", ".out.partial"), ("rename", "out"), ("flush", ".")]


def test_force_replaces_everything(tmp_path: Path) -> None:
    produce(tmp_path / "out", "old")
    (tmp_path / "out" / "other").write_text("old")
    with pytest.raises(OutputError) as raised:
        produce(tmp_path / "out")
    problem = "not empty. Give another output directory, or --force to replace all of it"
    assert str(raised.value) == f"{tmp_path}/out: {problem}"
    produce(tmp_path / "out", force=True)
    assert tree(tmp_path) == {"out": None, "out/file": b"new"}


def test_what_came_in_meanwhile_is_not_replaced(tmp_path: Path) -> None:

    def another() -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "file").write_text("another's")

    with pytest.raises(OutputError, match="not empty"):
        produce(tmp_path / "out", meanwhile=another)
    assert tree(tmp_path) == {"out": None, "out/file": b"another's"}


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk/out")
    for text in ("old", "new"):
        produce(tmp_path / "out", text, force=True)
        assert (tmp_path / "out").is_symlink()
        assert tree(tmp_path / "disk") == {"out": None, "out/file": text.encode()}


def test_relative_and_home_directories(tmp_path: Path) -> None:
    with working_directory(tmp_path), mock.patch.dict(os.environ, {"HOME": str(tmp_path / "home")}):
        produce(Path("a/../b"))
        produce(Path("~/c"))
    assert sorted(tree(tmp_path)) == ["b", "b/file", "home", "home/c", "home/c/file"]


@pytest.mark.parametrize(
    ("target", "inputs", "problem"),
    [
        (".", [], "holds {cwd}, which would be lost. Give another output directory"),
        ("..", [], "holds {cwd}, which would be lost. Give another output directory"),
        ("/", [], "holds {cwd}, which would be lost. Give another output directory"),
        ("/proc", [], "is a mount point, which cannot be replaced. Give a new directory in it"),
        ("../base", ["../base"], "holds ../base, which would be lost. Give another output directory"),
        ("../base/x", ["../base"], "lies in ../base, which is an input. Give a directory outside of it"),
    ],
)
def test_targets_that_cannot_be(tmp_path: Path, target: str, inputs: list[str], problem: str) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "base").mkdir()
    with working_directory(tmp_path / "work"), pytest.raises(OutputError) as raised:
        check_target(Path(target), True, map(Path, inputs))
    assert str(raised.value) == f"{target}: {problem.format(cwd=tmp_path / 'work')}"


# --- several runs -----------------------------------------------------------------------------------


def test_a_second_run_is_refused(tmp_path: Path) -> None:
    with staged_directory(tmp_path / "out", False, []) as staging:
        (staging / "file").write_text("first")
        with pytest.raises(OutputError) as raised:
            produce(tmp_path / "out", "second", force=True)
        (tmp_path / "link").symlink_to("out")
        with pytest.raises(OutputError):
            produce(tmp_path / "link", "third")
    problem = "another run is writing it. Wait for it, or give another directory"
    assert str(raised.value) == f"{tmp_path}/out: {problem}"
    assert tree(tmp_path / "out") == {"file": b"first"}
    produce(tmp_path / "out", "fourth", force=True)
    assert sorted(tree(tmp_path)) == ["link", "out", "out/file"]


def test_a_lock_that_its_owner_removes_is_no_lock(tmp_path: Path) -> None:
    """Between opening the lock file and locking it, the run that held it may have ended and removed it."""
    os_open, opened = os.open, []

    def open_and_lose(path: Any, *arguments: Any) -> int:
        opened.append(path)
        handle = os_open(path, *arguments)
        if len(opened) == 1:
            os.unlink(path)
        return handle

    with mock.patch("os.open", open_and_lose):
        handle = writer._lock(tmp_path / "lock")
    assert len(opened) == 2
    assert os.path.samestat(os.fstat(handle), os.stat(tmp_path / "lock"))
    os.close(handle)


KILLED = """
import os, signal, sys
from pathlib import Path
from cpimerge.writer import staged_directory
with staged_directory(Path(sys.argv[1]), True, []) as staging:
    (staging / "deep").mkdir()
    (staging / "deep" / "model.safetensors").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_leftovers_of_a_killed_run(tmp_path: Path) -> None:
    """A killed run leaves nothing under the final name, and the next one removes what it left elsewhere."""
    produce(tmp_path / "out", "old")
    run = subprocess.run([sys.executable, "-c", KILLED, tmp_path / "out"], check=False)
    assert run.returncode == -signal.SIGKILL
    assert tree(tmp_path / "out") == {"file": b"old"}
    assert (tmp_path / ".out.partial" / "deep" / "model.safetensors").read_text() == "half"
    produce(tmp_path / "out", force=True)
    assert tree(tmp_path) == {"out": None, "out/file": b"new"}


@pytest.mark.parametrize("leftover", ["file", "link"])
def test_other_leftovers(tmp_path: Path, leftover: str) -> None:
    """Only what lies under the hidden name goes, not what a link there points to."""
    produce(tmp_path / "precious", "old")
    if leftover == "file":
        (tmp_path / ".out.partial").write_text("x")
    else:
        (tmp_path / ".out.partial").symlink_to("precious")
    produce(tmp_path / "out")
    assert sorted(tree(tmp_path)) == ["out", "out/file", "precious", "precious/file"]


# --- a real run -------------------------------------------------------------------------------------

KILLED_FUSE = """
import os, signal, sys
import cpimerge
def progress(phase, done, total):
    if done >= total / 2:
        os.kill(os.getpid(), signal.SIGKILL)
cpimerge.fuse(sys.argv[1], sys.argv[2], threads=1, progress=progress)
"""


def test_a_killed_fuse_and_the_next(tmp_path: Path) -> None:
    names = [f"layers.{number}.w" for number in range(8)]
    for shift, directory in enumerate(("base", "math", "code")):
        save(tmp_path / directory, {name: torch.full((50, 3), float(shift)) for name in names})
    models = [{"model": tmp_path / "math"}, {"model": tmp_path / "code"}]
    plan(write_recipe(tmp_path / "recipe.yml", base_model=tmp_path / "base", models=models), tmp_path / "plan")
    run = subprocess.run([sys.executable, "-c", KILLED_FUSE, tmp_path / "plan", tmp_path / "out"], check=False)
    assert run.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert (tmp_path / ".out.partial" / "model.safetensors").stat().st_size > 4 * 600
    manifest = fuse(tmp_path / "plan", tmp_path / "out", threads=1)
    assert sorted(path.name for path in tmp_path.glob(".*")) == []
    fused = tmp_path / "out" / "model.safetensors"
    digest = hashlib.sha256(fused.read_bytes()).hexdigest()
    assert manifest["shards"] == {fused.name: {"size": fused.stat().st_size, "sha256": digest}}
    assert load_file(fused).keys() == set(names)
