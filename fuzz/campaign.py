"""Runs targets for a while, some at a time, and tells what came of it."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from .target import CORPUS, Target, load

__all__ = ["Outcome", "Settings", "keep", "run_all", "table"]

ROOT = Path(__file__).parents[1]
ONE_INPUT_SECONDS = 20  # a machine under load may take long for what takes no time
RSS_MB = 3000
ENDED = "it ended"
KEPT_BYTES = 30_000  # of a target's corpus, past findings apart
GRACE_SECONDS = 600  # for imports, and kernels that are compiled first


@dataclass(frozen=True)
class Settings:
    """When each target ends (`runs`: after so many inputs; -1: none), how many run at a time, and the seed.

    `state` is where what is found lies between runs.
    """

    seconds: int
    runs: int
    jobs: int
    state: Path
    seed: int


@dataclass(frozen=True)
class Outcome:
    """What came of one target. `covered`: blocks of code at the start and at the end. `failed`: it did not run."""

    name: str
    executions: int
    accepted: int
    corpus: int
    new: int
    covered: tuple[int, int]
    findings: tuple[Path, ...]
    failed: str = ""


def run_all(names: Sequence[str], settings: Settings) -> Iterator[Outcome]:
    """The outcomes in the order of `names`, each as soon as it and those before it are there."""
    with ThreadPoolExecutor(settings.jobs) as pool:
        yield from pool.map(partial(_run, settings=settings), names)


def _run(name: str, settings: Settings) -> Outcome:
    """One target in a process of its own, since it may bring that down."""
    found, inputs = settings.state / name / "findings", settings.state / name / "inputs"
    for directory in (found, inputs):
        directory.mkdir(parents=True, exist_ok=True)
    (found.parent / "accepted").write_text("0")
    before = {file: file.stat().st_mtime_ns for file in found.iterdir()}
    with tempfile.TemporaryDirectory(prefix="fuzz-seeds-") as seeds:
        begin_with = [inputs, *_directories(name, Path(seeds))]
        options = (
            *(f"-max_total_time={settings.seconds}", f"-timeout={ONE_INPUT_SECONDS}", f"-rss_limit_mb={RSS_MB}"),
            *(f"-artifact_prefix={found}/", "-print_final_stats=1"),
            *(f"-seed={settings.seed}", f"-runs={settings.runs}"),
        )
        log = _engine(name, found, options, begin_with, settings.seconds + GRACE_SECONDS)
    (settings.state / name / "log").write_text(log, encoding="utf-8")
    new = tuple(sorted(file for file in found.iterdir() if before.get(file) != file.stat().st_mtime_ns))
    return _outcome(name, log, int((found.parent / "accepted").read_text() or 0), new)


def _directories(name: str, seeds: Path) -> Iterator[Path]:
    """Where inputs to begin with lie; the target's seeds are written by its own process, into `seeds`."""
    yield seeds
    if (CORPUS / name).is_dir():
        yield CORPUS / name


def _engine(name: str, found: Path, options: Iterable[str], directories: Sequence[Path], limit: int) -> str:
    """What libFuzzer says. Inputs that it finds go to the first of `directories`; seeds are put into the second."""
    command = [sys.executable, "-m", "fuzz.engine", name, str(found), str(directories[1]), *options]
    try:
        done = subprocess.run(
            [*command, *map(str, directories)],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=limit,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        return f"{(error.output or b'').decode(errors='replace')}\n{ENDED} not within {limit} seconds\n"
    log = done.stdout.decode(errors="replace")
    return f"{log}\n{ENDED} with status {done.returncode}\n" if done.returncode else log


def _outcome(name: str, log: str, accepted: int, findings: tuple[Path, ...]) -> Outcome:
    covered = [int(count) for count in re.findall(r"^#\d+\s+(?:INITED|DONE).* cov: (\d+)", log, re.MULTILINE)]
    executed = re.findall(r"number_of_executed_units: (\d+)", log) or re.findall(r"^#(\d+)\s", log, re.MULTILINE)
    if (not executed or f"\n{ENDED}" in log) and not findings:
        return Outcome(name, 0, 0, 0, 0, (0, 0), (), log[-2000:])
    corpus = re.findall(r" corp: (\d+)/", log)
    added = re.findall(r"new_units_added:\s+(\d+)", log)
    return Outcome(
        name,
        executions=int(executed[-1]) if executed else 0,
        accepted=accepted,
        corpus=int(corpus[-1]) if corpus else 0,
        new=int(added[-1]) if added else 0,
        covered=(covered[0], covered[-1]) if covered else (0, 0),
        findings=findings,
    )


COLUMNS = ("target", "executions", "accepted", "corpus", "new inputs", "blocks", "new blocks", "findings")


def table(outcomes: Iterable[Outcome]) -> Iterator[str]:
    """A line for each outcome, and one above them."""
    yield f"{COLUMNS[0]:13}" + "".join(f"{column:>12}" for column in COLUMNS[1:])
    for it in outcomes:
        first, last = it.covered
        numbers = (it.executions, it.accepted, it.corpus, it.new, last, last - first, len(it.findings))
        yield f"{it.name:13}" + "".join(f"{number:12,}" for number in numbers)


def keep(names: Sequence[str], state: Path) -> Iterator[str]:
    """Merge what was found into the corpus, as few inputs as cover the same code. Yields a line a target."""
    for name in names:
        directory, inputs = CORPUS / name, state / name / "inputs"
        directory.mkdir(parents=True, exist_ok=True)
        inputs.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
            seeds, merged, found = (Path(scratch, folder) for folder in ("seeds", "merged", "found"))
            for folder in (seeds, merged, found):
                folder.mkdir()
            _engine(
                name,
                found,
                ["-set_cover_merge=1", f"-timeout={ONE_INPUT_SECONDS}"],
                [merged, seeds, directory, inputs],
                900,
            )
            yield _replace(name, directory, merged, load(name))


def _replace(name: str, directory: Path, merged: Path, target: Target) -> str:
    """What was merged takes the place of the corpus, but for past findings and the seeds, which code makes."""
    known = {*target.seeds().values(), *(file.read_bytes() for file in directory.glob("finding-*"))}
    for file in directory.iterdir():
        if not file.name.startswith("finding-"):
            file.unlink()
    room = KEPT_BYTES
    for file in sorted(merged.iterdir()):  # by their hashes, so some of every kind
        content = file.read_bytes()
        if content not in known and len(content) <= min(room, target.max_bytes):
            (directory / file.name[:16]).write_bytes(content)
            room -= len(content)
    files = [file for file in directory.iterdir()]
    return f"{name:13} {len(files):5} files {sum(file.stat().st_size for file in files):9,} bytes"
