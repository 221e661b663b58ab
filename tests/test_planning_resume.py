"""A plan that was cut off anywhere goes on where it was, and ends in the bytes of one that was not."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import wait
from contextlib import ExitStack, contextmanager
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import xxhash
from checkpoints import save, write_json, write_recipe
from files import tree
from hypothesis import given, settings
from hypothesis import strategies as st

import cpimerge
from cpimerge import (
    ChangedInputError,
    CheckpointError,
    IncompatibleError,
    OutputError,
    analysis,
    examination,
    fusion,
    passes,
    plan_files,
    plan_journal,
    planning,
    selection,
    stream,
)
from cpimerge.checkpoint import StoredTensor

assert planning  # imported by now: what it takes from modules is what these have before anything is patched

CHUNK = 600  # elements
BLOCK = 2  # chunks
SHAPES = {
    "embed.weight": (55, 40),
    "layers.0.bias": (7,),
    "layers.0.empty": (0, 3),
    "layers.0.ids": (5, 4),
    "layers.0.same": (30, 30),
    "layers.0.w": (21, 50),
    "layers.1.bias": (7,),
    "layers.1.wide": (2, 1300),
}
INTEGERS, SAME = ("layers.0.ids",), ("layers.0.same",)
TASKS = ("a", "b")
SMALL = {"small": 1 << 30, "mixed": 4500, "large": 0}  # pools of so many elements in all checkpoints are small
CASES = list(product(("tensor", "layer", "global"), ("tensor", "row"), SMALL))


class Stop(BaseException):
    """In place of Ctrl-C, at a chosen moment."""


@contextmanager
def small_chunks(pools: str = "mixed", **values: float) -> Iterator[None]:
    """Chunks, blocks and samples so small that little tensors have many; and a record whenever there is news."""
    constants: list[tuple[Any, str, float]] = [
        (stream, "CHUNK", CHUNK),
        (stream, "CHUNK_ROWS", 12),
        (examination, "BLOCK_CHUNKS", BLOCK),
        (examination, "SMALL", SMALL[pools]),
        (examination, "SMALL_ROWS", SMALL[pools]),
        (analysis, "CHUNK", CHUNK),
        (passes, "CHUNK", CHUNK),
        (selection, "WHOLE", 64),
        (selection, "SHARE", 4),
        (selection, "RUN", 8),
        (passes, "RUN", 8),
        (passes, "FEW", 0),
        (passes, "CROWDED", values.get("crowded", 0.9)),
        (selection, "DEVIATIONS", values.get("deviations", 3.5)),
        (plan_journal, "CHECKPOINT_SECONDS", 0.0),
    ]
    with ExitStack() as patched:
        for module, name, value in constants:
            patched.enter_context(mock.patch.object(module, name, value))
        yield


def write_models(home: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    base |= {name: torch.arange(20).reshape(SHAPES[name]) for name in INTEGERS}
    save(home / "base", base, shards=2)
    for task in TASKS:
        moved = {name: x + 0.1 * torch.randn(x.shape, generator=generator) for name, x in base.items()}
        save(home / task, moved | {name: base[name] for name in INTEGERS + SAME}, shards=2)
    return home


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("models"))


def recipe(home: Path, name: str = "recipe", **parameters: Any) -> Path:
    return write_recipe(
        home / f"{name}.yml",
        base_model=home / "base",
        models=[{"model": home / task} for task in TASKS],
        parameters={"density": 0.2} | parameters,
    )


def plan(path: Path, out: Path, stop_at: int | None = None, **options: Any) -> tuple[list[tuple[int, int]], list[int]]:
    """Plan; returns what `resumed` was told, and the bytes done as told by progress. Stops at step `stop_at`."""
    resumed: list[tuple[int, int]] = []
    steps: list[int] = []

    def progress(phase: str, done: int, total: int) -> None:
        steps.append(done)
        if len(steps) == stop_at:
            raise Stop

    cpimerge.plan(path, out, progress=progress, resumed=lambda *told: resumed.append(told), **options)
    return resumed, steps


def cut_off(path: Path, out: Path, stop_at: int, **options: Any) -> None:
    with pytest.raises(Stop):
        plan(path, out, stop_at, **options)
    assert not out.exists()


def root(out: Path) -> Path:
    return out.parent / f".{out.name}.partial"


def journal(out: Path) -> list[dict[str, Any]]:
    lines = (root(out) / "journal").read_text().splitlines()
    return [json.loads(line.partition(" ")[2]) for line in lines]


def write_journal(out: Path, records: Sequence[dict[str, Any]]) -> None:
    lines = [json.dumps(record) for record in records]
    (root(out) / "journal").write_text("".join(f"{xxhash.xxh3_64_hexdigest(line.encode())} {line}\n" for line in lines))


def alone(tmp_path: Path, out: Path) -> bool:
    """Whether nothing lies beside the output."""
    return sorted(path.name for path in tmp_path.iterdir()) == [out.name]


# --- cut off everywhere -----------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES[::2], ids="-".join)
def test_every_place(models: Path, tmp_path: Path, case: tuple[str, str, str]) -> None:
    """Cut off at every step of the read; the next run has other threads and another budget."""
    scope, granularity, pools = case
    path = recipe(models, "-".join(case), scope=scope, granularity=granularity, space="delta")
    out = tmp_path / "plan"
    with small_chunks(pools):
        _, every = plan(path, out, threads=1)
        wanted = tree(out)
        took_over = [0]
        for place in range(1, len(every) + 1):
            shutil.rmtree(out)
            cut_off(path, out, place, threads=1 + place % 2)
            resumed, steps = plan(path, out, threads=1 + place % 3, memory=f"{500 + place}MB")
            done = resumed[0][0] if resumed else 0
            assert resumed in ([], [(done, every[-1])])
            assert done <= every[place - 1]
            assert all(done < step for step in steps[:-1])
            assert steps == sorted(steps)
            assert steps[-1] == every[-1]
            took_over.append(done)
            assert tree(out) == wanted
            assert alone(tmp_path, out)
    assert took_over == sorted(took_over)
    assert took_over[-1] == every[-1]  # cut off when all was read
    assert len(set(took_over)) >= (3 if pools == "small" else 6)


def test_only_whole_blocks_of_a_large_pool_are_left_out(models: Path, tmp_path: Path) -> None:
    """What is not read again is what was told; the sample is not taken again, either."""
    path, out = recipe(models, scope="global"), tmp_path / "plan"
    read: list[tuple[str, tuple[int, ...]]] = []
    read_runs = stream.Workers.read_runs

    def noted(self: stream.Workers, sources: Sequence[StoredTensor], starts: Sequence[int], run: int) -> None:
        read.append((sources[0].name, tuple(starts)))
        read_runs(self, sources, starts, run)

    with small_chunks("large"), mock.patch.object(stream.Workers, "read_runs", noted):
        _, every = plan(path, out, threads=1)
        shutil.rmtree(out)
        whole = list(read)
        scans = [(name, (start,)) for name in scanned_names() for start in starts_of(name)]
        assert [one for one in whole if one in scans] == scans
        for place in range(1, len(every) - 1):  # while it looks at the floats
            cut_off(path, out, place, threads=1)
            read.clear()
            resumed, _ = plan(path, out, threads=1)
            blocks = blocks_before(place)
            left = [one for block in block_starts()[blocks:] for one in block]
            assert read == (left if blocks else whole)
            assert resumed == ([(every[sum(len(b) for b in block_starts()[:blocks]) - 1], every[-1])] if blocks else [])
            shutil.rmtree(out)


def scanned_names() -> list[str]:
    """In the order of their reading: the pool of the floats, then what is no float, a pool of its own."""
    floats = [name for name, shape in SHAPES.items() if name not in INTEGERS and 0 not in shape]
    return [*floats, *INTEGERS]


def starts_of(name: str) -> list[int]:
    rows, row = (1, SHAPES[name][0]) if len(SHAPES[name]) == 1 else SHAPES[name]
    return list(range(0, rows * row, CHUNK))


def block_starts() -> list[list[tuple[str, tuple[int, ...]]]]:
    return [
        [(name, (start,)) for start in starts_of(name)[i : i + BLOCK]]
        for name in scanned_names()
        for i in range(0, len(starts_of(name)), BLOCK)
    ]


def blocks_before(chunks: int) -> int:
    """How many whole blocks so many chunks hold."""
    count = 0
    for block in block_starts():
        chunks -= len(block)
        if chunks < 0:
            break
        count += 1
    return count


@given(
    case=st.sampled_from(CASES),
    runs=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 3)), max_size=5),
    rough=st.sampled_from([{}, {"deviations": -2.0}, {"crowded": 0.0}, {"crowded": 0.01, "deviations": 0.1}]),
    coarse=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_cut_off_again_and_again(
    models: Path,
    tmp_path_factory: pytest.TempPathFactory,
    case: tuple[str, str, str],
    runs: list[tuple[int, int]],
    rough: dict[str, float],
    coarse: bool,
) -> None:
    """Also where brackets prove wrong, or hold too much to keep, so that pools are read twice."""
    scope, granularity, pools = case
    home = tmp_path_factory.mktemp("again")
    path = recipe(coarse_models(models) if coarse else models, "again", scope=scope, granularity=granularity)
    with small_chunks(pools, **rough):
        plan(path, home / "wanted", threads=2)
        for stop_at, threads in runs:
            try:
                plan(path, home / "plan", stop_at, threads=threads)
            except Stop:
                continue
            break
        plan(path, home / "plan", threads=2, force=True)
    assert tree(home / "plan") == tree(home / "wanted")
    shutil.rmtree(home)


def coarse_models(models: Path) -> Path:
    """The same on a grid, where many updates are equal."""
    home = models / "coarse"
    if not home.exists():
        generator = torch.Generator().manual_seed(1)
        base = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
        save(home / "base", base)
        for task in TASKS:
            save(home / task, {n: torch.randint(-1, 2, x.shape, generator=generator) / 4 for n, x in base.items()})
    return home


@pytest.mark.parametrize("scope", ["tensor", "global"])
@pytest.mark.parametrize("rough", [{"deviations": -2.0}, {"crowded": 0.0}], ids=["wrong brackets", "crowded"])
def test_cut_off_while_it_settles(models: Path, tmp_path: Path, scope: str, rough: dict[str, float]) -> None:
    """After the first look, and in the middle of a second one, where no progress is told."""
    path, out = recipe(coarse_models(models), f"settle-{scope}", scope=scope), tmp_path / "plan"
    add = plan_files.PlanFiles.add
    with small_chunks("large", **rough):
        plan(path, out, threads=2)
        wanted = tree(out)
        for stop_at in range(1, 100):
            shutil.rmtree(out)
            count = iter(range(1, 100))

            def stopping(self: Any, settled: Any, stop_at: int = stop_at, count: Iterator[int] = count) -> None:
                add(self, settled)
                if next(count) == stop_at:
                    raise Stop

            with mock.patch.object(plan_files.PlanFiles, "add", stopping):
                try:
                    plan(path, out, threads=2)
                except Stop:
                    with mock.patch.object(plan_files.PlanFiles, "add", add):
                        resumed, _ = plan(path, out, threads=2)
                else:
                    break
            assert resumed[0][0] > 0
            assert tree(out) == wanted
        assert stop_at > 5


# --- what was left is damaged -------------------------------------------------------------------------


def flip(file: Path, place: float) -> None:
    data = bytearray(file.read_bytes())
    data[int(place * (len(data) - 1))] ^= 4
    file.write_bytes(data)


def cut_short(file: Path, place: float) -> None:
    os.truncate(file, int(place * file.stat().st_size))


def empty_directory(file: Path, place: float) -> None:
    file.unlink()
    file.mkdir()


def link(file: Path, place: float) -> None:
    shutil.move(file, file.with_name("elsewhere"))
    file.symlink_to("elsewhere")


def garbage_behind(file: Path, place: float) -> None:
    with open(file, "ab") as stream:
        stream.write(b"\0garbage" * 1000)


HARMS: list[Callable[[Path, float], None]] = [
    flip,
    cut_short,
    lambda file, place: file.unlink(),
    empty_directory,
    link,
    garbage_behind,
]


@pytest.mark.parametrize("granularity", ["tensor", "row"])
@pytest.mark.parametrize("name", ["files/cores/00.roaring", "files/cores/01.roaring", "grams", "shelf", "journal"])
def test_damaged_leftovers(models: Path, tmp_path: Path, name: str, granularity: str) -> None:
    """As much as is whole is taken over, even nothing; the bytes are the same."""
    path, out = recipe(models, f"damaged-{granularity}", scope="layer", granularity=granularity), tmp_path / "plan"
    with small_chunks("mixed"):
        _, every = plan(path, out, threads=1)
        wanted, took_over = tree(out), []
        for harm, place in [*product(HARMS[:2], (0.0, 0.3, 0.6, 1.0)), *product(HARMS[2:], (0.0,))]:
            shutil.rmtree(out)
            for stop_at in (len(every) // 3, len(every) // 2):  # several records
                cut_off(path, out, stop_at, threads=1)
            harm(root(out) / name, place)
            resumed, _ = plan(path, out, threads=2)
            took_over.append(resumed[0][0] if resumed else 0)
            assert tree(out) == wanted
            assert alone(tmp_path, out)
    assert min(took_over) < max(took_over)


def test_a_record_that_others_do_not_lead_to(models: Path, tmp_path: Path) -> None:
    """Of a journal that lost a record, what is before it holds."""
    path, out = recipe(models, granularity="row"), tmp_path / "plan"
    with small_chunks("small"):
        plan(path, out, threads=1)
        wanted, took_over = tree(out), []
        for lost in (1, 2, 3):
            shutil.rmtree(out)
            for stop_at in (7, 7, 5):
                cut_off(path, out, stop_at, threads=1)
            records = journal(out)
            assert len(records) > 3
            write_journal(out, records[:lost] + records[lost + 1 :])
            resumed, _ = plan(path, out, threads=1)
            took_over.append(resumed[0][0] if resumed else 0)
            assert tree(out) == wanted
    assert took_over == sorted(set(took_over))
    assert took_over[0] == 0


FORGED: list[dict[str, Any]] = [
    {"first": -1},
    {"last": 1 << 40},
    {"chunks": 1 << 62},
    {"rows": -5},
    {"rows": 1 << 62},
    {"cores": []},
    {"cores": [{"ends": "AAAA", "xxh3": ""}] * 2},
    {"cores": [{"ends": "not base64!", "xxh3": ""}] * 2},
    {"table": ""},
    {"digests": "AAAAAAAAAAA="},
    {"problems": [[99, 0, "x"]]},
    {"problems": [["0", 0, "x"]]},
    {"more": 1},
]
FORGED_SCANS: list[dict[str, Any]] = [
    {"pool": 7},
    {"first": 1},
    {"last": 1 << 50},
    {"low": []},
    {"high": [1 << 40, 0]},
    {"table": "AAAA"},
    {"faults": [[0]]},
    {"overflows": "x"},
]


@pytest.mark.parametrize("forged", [*FORGED, *FORGED_SCANS], ids=str)
def test_records_that_make_no_sense(models: Path, tmp_path: Path, forged: dict[str, Any]) -> None:
    """Whoever writes a journal by hand can give it any checksum."""
    scope, pools = ("tensor", "small") if forged in FORGED else ("global", "large")
    path, out = recipe(models, f"forged-{scope}", scope=scope), tmp_path / "plan"
    with small_chunks(pools):
        plan(path, out, threads=1)
        wanted = tree(out)
        shutil.rmtree(out)
        cut_off(path, out, 6, threads=1)
        opening, first, *_ = journal(out)
        write_journal(out, [opening, first | forged])
        resumed, _ = plan(path, out, threads=1)
    assert resumed == []
    assert tree(out) == wanted


# --- other plans ----------------------------------------------------------------------------------------


def rewritten(home: Path) -> str:
    """A shard with the same header, and other numbers."""
    file = sorted((home / "a").glob("*.safetensors"))[1]
    before = file.stat()
    flip(file, 0.9)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    return str(file)


def other_config(home: Path) -> str:
    write_json(home / "b" / "config.json", {"model_type": "test", "hidden": 7})
    return str(home / "b")


def other_recipe(home: Path) -> str:
    text = (home / "recipe.yml").read_text()
    (home / "recipe.yml").write_text(text.replace("density: 0.2", "density: 0.3"))
    return "the recipe"


@pytest.mark.parametrize("change", [rewritten, other_config, other_recipe])
def test_what_another_plan_left_is_not_touched(tmp_path: Path, change: Callable[[Path], str]) -> None:
    path, out = recipe(write_models(tmp_path / "models")), tmp_path / "work" / "plan"
    with small_chunks():
        cut_off(path, out, 8, threads=1)
        left = tree(root(out))
        what = change(tmp_path / "models")
        with pytest.raises(OutputError) as raised:
            plan(path, out, threads=1)
        assert f"{root(out)} holds the beginning of another plan: {what} changed since. Finish" in str(raised.value)
        assert tree(root(out)) == left
        resumed, _ = plan(path, out, threads=1, restart=True)
        assert resumed == []
        plan(path, tmp_path / "work" / "fresh", threads=1)
        assert tree(out) == tree(tmp_path / "work" / "fresh")
        assert alone(tmp_path / "work", out) or sorted(p.name for p in (tmp_path / "work").iterdir()) == [
            "fresh",
            "plan",
        ]


def test_restart(models: Path, tmp_path: Path) -> None:
    path, out = recipe(models), tmp_path / "plan"
    with small_chunks():
        cut_off(path, out, 8, threads=1)
        resumed, steps = plan(path, out, threads=1, restart=True)
    assert resumed == []
    assert steps[0] < steps[8]


# --- inputs that change while they are read -----------------------------------------------------------------


def replaced(file: Path) -> None:
    shutil.copy2(file, file.with_name("copy"))
    os.replace(file.with_name("copy"), file)


@pytest.mark.parametrize("pools", ["small", "large"])
@pytest.mark.parametrize(
    "change",
    [
        lambda file: os.utime(file),
        lambda file: os.truncate(file, file.stat().st_size // 2),
        lambda file: file.unlink(),
        lambda file: flip(file, 0.9),
        replaced,
    ],
    ids=["touched", "cut short", "deleted", "written to", "replaced"],
)
def test_a_shard_that_changes_while_it_is_read(tmp_path: Path, pools: str, change: Callable[[Path], None]) -> None:
    home = write_models(tmp_path / "models")
    file = sorted((home / "a").glob("*.safetensors"))[1]

    def progress(phase: str, done: int, total: int) -> None:
        if done > total / 4 and not changed:
            changed.append(done)
            change(file)

    changed: list[int] = []
    (tmp_path / "work").mkdir()
    with small_chunks(pools), pytest.raises(ChangedInputError) as raised:
        cpimerge.plan(recipe(home, scope="layer"), tmp_path / "work" / "plan", threads=1, progress=progress)
    assert raised.value.problems == (f"{file}: changed while it was read. Run again when nothing writes to it",)
    assert isinstance(raised.value, CheckpointError)
    assert list((tmp_path / "work").iterdir()) == []  # what was done is worth nothing


def test_every_shard_that_changed_is_named(tmp_path: Path) -> None:
    home = write_models(tmp_path / "models")
    files = [*(home / "base").glob("*.safetensors"), *(home / "b").glob("*.safetensors")]

    def progress(phase: str, done: int, total: int) -> None:
        for file in files:
            os.utime(file)

    with pytest.raises(ChangedInputError) as raised:
        cpimerge.plan(recipe(home), tmp_path / "plan", progress=progress)
    assert {problem.partition(":")[0] for problem in raised.value.problems} == set(map(str, files))


# --- what is remembered -------------------------------------------------------------------------------------


def test_every_problem_is_told_though_found_by_several_runs(tmp_path: Path) -> None:
    home = write_models(tmp_path / "models")
    tensors = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    tensors["embed.weight"][1, 1] = torch.nan
    tensors["layers.0.w"][3, 3] = torch.inf
    tensors["layers.1.wide"][1, 1200] = 3e38
    base = {name: -x if name == "layers.1.wide" else torch.zeros_like(x) for name, x in tensors.items()}
    save(home / "base", base)
    save(home / "a", tensors)
    save(home / "b", base)
    for scope, pools in (("tensor", "small"), ("tensor", "large"), ("global", "large")):
        path, problems = recipe(home, scope=scope), []
        for stops in ([], [5, 9]):
            out = tmp_path / "plan"
            with small_chunks(pools):
                for stop_at in stops:
                    cut_off(path, out, stop_at, threads=1)
                with pytest.raises(IncompatibleError) as raised:
                    plan(path, out, threads=1)
            problems.append(raised.value.problems)
            assert sorted(p.name for p in tmp_path.iterdir()) == ["models"]
        assert problems[0] == problems[1]
        assert len(problems[0]) == 3


def test_a_run_shorter_than_the_time_between_records_flushes_nothing_until_it_is_published(
    models: Path, tmp_path: Path
) -> None:
    synced: list[str] = []
    with (
        small_chunks("large"),
        mock.patch.object(plan_journal, "CHECKPOINT_SECONDS", 1000.0),
        mock.patch.object(plan_files.PlanFiles, "sync", side_effect=lambda: synced.append("sync")),
    ):
        plan(recipe(models), tmp_path / "plan")
        assert synced == []
        cut_off(recipe(models), tmp_path / "again", 9)
        assert synced == ["sync"]
        resumed, _ = plan(recipe(models), tmp_path / "again")
        assert resumed[0][0] > 0


def test_a_disk_that_fails_in_the_background_is_told(models: Path, tmp_path: Path) -> None:
    """Also where that was the last thing that a run did."""
    tick, synced = plan_journal.PlanJournal._tick, 0

    def in_turn(self: plan_journal.PlanJournal) -> None:
        """Every record is written before the next one is begun: else how many there are depends on the disk's speed."""
        if self._flushing is not None:
            wait([self._flushing])
        tick(self)

    def plan_with(sync: Callable[[plan_files.PlanFiles], None], out: str) -> None:
        with (
            small_chunks("small"),
            mock.patch.object(plan_journal.PlanJournal, "_tick", in_turn),
            mock.patch.object(plan_files.PlanFiles, "sync", sync),
        ):
            plan(recipe(models), tmp_path / out, threads=1)

    def counted(self: plan_files.PlanFiles) -> None:
        nonlocal synced
        synced += 1

    plan_with(counted, "undisturbed")
    assert synced > 1
    for failing in (1, synced):
        count = iter(range(1, synced + 1))

        def sync(self: plan_files.PlanFiles, failing: int = failing, count: Iterator[int] = count) -> None:
            if next(count) == failing:
                raise OSError(5, "Input/output error")

        with pytest.raises(OutputError, match="cannot be written: Input/output error"):
            plan_with(sync, f"failing at {failing}")
        assert not (tmp_path / f"failing at {failing}").exists()


def test_the_disk_has_the_files_before_the_journal_speaks_of_them(models: Path, tmp_path: Path) -> None:
    """Every record comes after a flush of everything that grows, and the first one after one of the directories."""
    events: list[str] = []
    append, pwrite = plan_journal.PlanJournal._append, os.pwrite

    def flushed(handle: int) -> None:
        events.append("flush " + Path(os.readlink(f"/proc/self/fd/{handle}")).name)

    def written(handle: int, data: memoryview, place: int) -> int:
        if Path(os.readlink(f"/proc/self/fd/{handle}")).name == "journal":
            events.append("record")
        return pwrite(handle, data, place)

    with (
        small_chunks("large"),
        mock.patch.multiple("cpimerge.growing", flush_data=flushed),
        mock.patch.multiple("cpimerge.shelf", flush_data=flushed),
        mock.patch.object(os, "fsync", flushed),
        mock.patch.object(os, "pwrite", written),
        mock.patch.object(plan_journal.PlanJournal, "_append", lambda *args: append(*args)),
    ):
        cut_off(recipe(models), tmp_path / "plan", 12, threads=1)
    begun = events.index("record", events.index("record") + 1)  # the first record opens the journal
    names = {"flush shelf", "flush grams", "flush 00.roaring", "flush 01.roaring"}
    assert names | {"flush cores", "flush files", "flush .plan.partial"} <= set(events[:begun])
    since: set[str] = set()
    for event in events[begun + 1 :]:
        if event == "record":
            assert not since or names <= since
            since = set()
        else:
            since.add(event)


# --- killed ---------------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys, time
sys.path[:0] = sys.argv[3:]
import cpimerge
from test_planning_resume import small_chunks
steps = iter(range(1, 1000))
def progress(phase, done, total):
    if next(steps) == {stop_at}:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.02)  # in which the disk takes what the journal speaks of
with small_chunks("mixed"):
    cpimerge.{verb}(sys.argv[1], sys.argv[2], threads=2, progress=progress)
"""


def kill(verb: str, path: Path, out: Path, stop_at: int) -> None:
    code = KILLED.format(verb=verb, stop_at=stop_at)
    command = [sys.executable, "-c", code, str(path), str(out), str(Path(__file__).parent)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert not out.exists()


def test_killed(models: Path, tmp_path: Path) -> None:
    path, out = recipe(models, scope="layer"), tmp_path / "plan"
    with small_chunks():
        plan(path, tmp_path / "wanted")
    kill("plan", path, out, 9)
    kill("plan", path, out, 5)
    with small_chunks():
        resumed, _ = plan(path, out)
    assert resumed[0][0] > 0
    assert tree(out) == tree(tmp_path / "wanted")


def test_a_merge_that_was_killed_while_it_planned(models: Path, tmp_path: Path) -> None:
    path, out = recipe(models, scope="layer"), tmp_path / "out"
    resumed: list[tuple[int, int]] = []
    with small_chunks():
        cpimerge.merge(path, tmp_path / "wanted")
    kill("merge", path, out, 9)
    with small_chunks():
        cpimerge.merge(path, out, resumed=lambda *told: resumed.append(told))
    assert len(resumed) == 1
    assert tree(out) == tree(tmp_path / "wanted")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "wanted"]


def test_a_merge_that_was_cut_off_between_plan_and_fuse(models: Path, tmp_path: Path) -> None:
    path, out = recipe(models, scope="layer"), tmp_path / "out"
    phases: list[str] = []

    def stop(*_: object) -> None:
        raise Stop

    with small_chunks("large"):
        cpimerge.merge(path, tmp_path / "wanted")
        with pytest.raises(Stop):
            cpimerge.merge(path, out, planned=stop)
        left = [p.name for p in (tmp_path / ".out.merge" / ".plan.partial").iterdir()]
        assert left == ["journal"]  # what a complete plan does not need takes no disk meanwhile
        cpimerge.merge(path, out, progress=lambda phase, *_: phases.append(phase))
    assert set(phases) == {"fuse"}
    assert tree(out) == tree(tmp_path / "wanted")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "wanted"]


def test_a_merge_into_directories_that_it_makes(models: Path, tmp_path: Path) -> None:
    """Its plan lies where the next run looks for it, though their parents were not there at first."""
    out, phases = tmp_path / "deep" / "er" / "out", []

    def stop(phase: str, done: int, total: int) -> None:
        if phase == "fuse":
            raise KeyboardInterrupt

    with mock.patch.object(fusion, "CHUNK", 0), pytest.raises(KeyboardInterrupt):  # one tensor at a time
        cpimerge.merge(recipe(models), out, threads=1, progress=stop)
    cpimerge.merge(recipe(models), out, threads=1, progress=lambda phase, *_: phases.append(phase))
    assert set(phases) == {"fuse"}
    assert [path.name for path in tmp_path.rglob(".*")] == []


def test_a_full_disk_is_told_before_anything_is_read(models: Path, tmp_path: Path) -> None:
    full = OSError(28, "No space left on device")
    for module in ("growing", "shelf"):
        with (
            mock.patch(f"cpimerge.{module}.reserve", side_effect=full),
            mock.patch.object(stream.Workers, "read_runs", side_effect=AssertionError),
            pytest.raises(OutputError, match="No space left"),
        ):
            plan(recipe(models), tmp_path / "plan")
        assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere no space is set aside")
def test_what_was_set_aside_is_given_back(models: Path, tmp_path: Path) -> None:
    room: list[int] = []
    reserve = plan_files.PlanFiles.__init__

    def noted(self: plan_files.PlanFiles, staging: Any, asked: plan_files.Room) -> None:
        reserve(self, staging, asked)
        room.extend(os.stat(staging.files / f"cores/0{task}.roaring").st_blocks for task in range(2))

    with mock.patch.object(plan_files.PlanFiles, "__init__", noted):
        plan(recipe(models, density=1), tmp_path / "plan")
        used = [os.stat(tmp_path / "plan" / f"cores/0{task}.roaring") for task in range(2)]
    assert all(512 * blocks >= found.st_size > 0 for blocks, found in zip(room, used, strict=True))
    assert all(512 * found.st_blocks < found.st_size + 8192 for found in used)
