"""The sections of `bench.py` beside the main one. Each runs its commands in turn and returns what it found."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from contenders import LEVELLED, Merge, drop_cache, in_turn, merge, peak_anonymous, scarce_memory
from floor import Bench, copying, reading, total, weights
from tables import gigabytes, megabytes, seconds, table, times

COUNTS = (2, 4, 8, 16)
SETTINGS = {
    "scope: global": {"scope": "global"},
    "scope: layer": {"scope": "layer"},
    "granularity: row": {"granularity": "row"},
    "space: delta, singular_values: keep": {"space": "delta", "singular_values": "keep"},
    "cpimerge's defaults": LEVELLED,
}
SHARED_BYTES, THREAD_BYTES = 400_000_000, 64_000_000  # the budget that cpimerge promises by default
TIGHT_BYTES = 450_000_000
CACHE_BYTES = 1_500_000_000  # what the page cache is left with where memory is scarce


def scopes(bench: Bench) -> str:
    """Other settings, against the usual ones."""
    paths, startup = bench.checkpoints("usual"), bench.startup()
    merges = {"usual": merge(bench.work, "usual", paths, startup)}
    merges |= {
        name: merge(bench.work, f"setting{number}", paths, startup, settings)
        for number, (name, settings) in enumerate(SETTINGS.items())
    }
    _run(bench, startup, merges)
    work = {name: (merged.plan.work, merged.fuse.work) for name, merged in merges.items()}
    head = ["setting", "plan, seconds", "against usual", "fuse, seconds", "against usual"]
    return table(head, [[name, *_beside_first(work, name)] for name in work])


def experts(bench: Bench) -> str:
    """Growth with the number of experts."""
    paths = bench.checkpoints("usual")
    return _growth(bench, {f"{count} experts": _linked(bench.work, paths, count) for count in COUNTS})


def _linked(work: Path, paths: Sequence[Path], count: int) -> list[Path]:
    """The base and `count` directories with the files of the experts, over and over, by hard links: no disk needed."""
    base, *real = paths
    links = [work / f"expert{number}of{count}" for number in range(count)]
    for number, directory in enumerate(links):
        directory.mkdir()
        for file in real[number % len(real)].iterdir():
            os.link(file, directory / file.name)
    return [base, *links]


def sizes(bench: Bench) -> str:
    """Growth with the size of the model."""
    cases = [bench.checkpoints(model) for model in ("little", "usual")]
    return _growth(bench, {f"{gigabytes(total(paths[:1]))} a checkpoint": paths for paths in cases})


def small(bench: Bench) -> str:
    """The same bytes in few tensors and in many."""
    return _growth(bench, {"300 tensors": bench.checkpoints("few"), "20,100 tensors": bench.checkpoints("many")})


def mixture(bench: Bench) -> str:
    """The same bytes in large tensors and in such as the experts of a real mixture have."""
    return _growth(bench, {"6 tensors": bench.checkpoints("blocks"), "375 tensors": bench.checkpoints("matrices")})


def _growth(bench: Bench, cases: Mapping[str, Sequence[Path]]) -> str:
    """Seconds for each GB that is read, without start-up, relative to the first case."""
    startup = bench.startup()
    merges = {
        name: merge(bench.work, f"case{number}", paths, startup) for number, (name, paths) in enumerate(cases.items())
    }
    _run(bench, startup, merges)
    paces = {name: _paces(merged, total(cases[name])) for name, merged in merges.items()}
    head = ["inputs", "read", "plan, s/GB", "against first", "fuse, s/GB", "against first"]
    return table(head, [[name, gigabytes(total(cases[name])), *_beside_first(paces, name)] for name in paces])


def _paces(merged: Merge, nbytes: int) -> tuple[list[float], list[float]]:
    """Seconds of `plan` and of `fuse` for each GB, in every round."""
    gb = nbytes / 1e9
    return [value / gb for value in merged.plan.work], [value / gb for value in merged.fuse.work]


def _run(bench: Bench, startup: Merge, merges: Mapping[str, Merge]) -> None:
    in_turn([one for merged in (startup, *merges.values()) for one in (merged.plan, merged.fuse)], bench.rounds)


def _beside_first(cases: Mapping[str, tuple[list[float], list[float]]], name: str) -> list[str]:
    """Cells: the seconds of `plan` and their ratio to those of the first case, and the same for `fuse`."""
    first = next(iter(cases))
    return [
        cell
        for ours, theirs in zip(cases[name], cases[first], strict=True)
        for cell in (seconds(ours), times(ours, theirs) if name != first else "")
    ]


def cold(bench: Bench) -> str:
    """The same commands with inputs that are not in the page cache. Linux only."""
    return _cold(bench, bench.checkpoints("usual"))


def large(bench: Bench) -> str:
    """Those of a model whose files may be more than the page cache holds. Linux only."""
    return _cold(bench, bench.checkpoints("large", 2))


def _cold(bench: Bench, paths: Sequence[Path]) -> str:
    startup = bench.startup()
    merged = merge(bench.work, "cold", paths, startup)
    read, copy, plan, fuse = reading(paths), copying(bench.work, paths[0]), merged.plan, merged.fuse
    for contender in (read, copy, plan, fuse):
        contender.before = _dropping(weights(paths), contender.before)
    with scarce_memory(_default_budget() + CACHE_BYTES):
        in_turn([startup.plan, startup.fuse, read, copy, plan, fuse], bench.rounds)
    against = {
        plan.name: f"{times(plan.work, read.work)} {read.name}",
        fuse.name: f"{times(fuse.work, read.work)} {read.name}, {times(fuse.work, read.work, copy.work)} both",
    }
    every, one = total(paths) / 1e9, total(paths[:1]) / 1e9  # GB
    rows = [
        [
            contender.name,
            seconds(contender.work),
            seconds([each / gb for each in contender.work]),
            megabytes(contender.peak),
            against.get(contender.name, ""),
        ]
        for contender, gb in ((read, every), (copy, one), (plan, every), (fuse, every))
    ]
    head = ["inputs not in the page cache", "seconds without start-up", "for each GB read", "peak memory", "against"]
    return table(head, rows)


def _default_budget() -> int:
    """Bytes that cpimerge may allocate on this machine, which `--memory` changes."""
    return SHARED_BYTES + len(os.sched_getaffinity(0)) * THREAD_BYTES


def _dropping(files: Sequence[Path], before: Callable[[], None]) -> Callable[[], None]:
    def prepare() -> None:
        before()
        drop_cache(files)

    return prepare


def memory(bench: Bench) -> str:
    """What the merge of one tensor of 1 GiB allocates, against the budget. Linux only."""
    merged = merge(bench.work, "giant", bench.checkpoints("giant", 2))
    rows = [
        *_budget_rows(merged, [], _default_budget()),
        *_budget_rows(merged, ["--memory", f"{TIGHT_BYTES}", "--threads", "1"], TIGHT_BYTES),
    ]
    return table(["command", "peak of RssAnon", "budget", ""], rows)


def _budget_rows(merged: Merge, options: Sequence[str], budget: int) -> list[list[str]]:
    rows = []
    for contender in (merged.plan, merged.fuse):
        contender.before()
        peak = peak_anonymous([*contender.command, *options])
        name = " ".join([contender.name, *options])
        rows.append([name, megabytes(peak), megabytes(budget), "kept" if peak <= budget else "BROKEN"])
    return rows
