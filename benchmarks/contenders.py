"""Commands, each a process of its own, and what they took: seconds of each round, and peak memory."""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

BIN = Path(sys.executable).parent
CPIMERGE = str(BIN / "cpimerge")
OFFLINE = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
DENSITY = 0.01
USUAL = {"density": str(DENSITY), "tau": "0.1", "space": "weights"}  # the paper's fusion, within each tensor
LEVELLED = {"tau": "auto", "space": "delta"}  # with these, cpimerge's defaults
SAMPLE_SECONDS = 0.02
# Holds memory until its standard input is closed. Where the system runs out of it, this process is the one to end.
HOLD = """
import sys
with open("/proc/self/oom_score_adj", "w") as file:
    file.write("1000")
held = bytearray(b"1") * int(sys.argv[1])
print(flush=True)
sys.stdin.read()
"""


def nothing() -> None:
    """Nothing to prepare."""


@dataclass
class Contender:
    """A command with its seconds in every round and its peak resident memory in bytes.

    `startup` is the same command with no work to do; `before` prepares a run, `after` clears up, and neither is timed.
    """

    name: str
    command: Sequence[str]
    before: Callable[[], None] = nothing
    startup: Contender | None = None
    after: Callable[[], None] = nothing
    seconds: list[float] = field(default_factory=list)
    peak: int = 0

    def run(self) -> None:
        self.before()
        start = time.perf_counter()
        process = subprocess.Popen(self.command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=OFFLINE)
        assert process.stderr is not None
        errors = process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        self.seconds.append(time.perf_counter() - start)
        self.peak = max(self.peak, usage.ru_maxrss * 1024)
        if status:
            raise SystemExit(f"{self.name} failed:\n{errors.decode(errors='replace')}")
        self.after()

    def forget(self) -> None:
        """Start measuring anew."""
        self.seconds, self.peak = [], 0

    @property
    def work(self) -> list[float]:
        """Seconds of every round without start-up, whose median is taken off."""
        idle = statistics.median(self.startup.seconds) if self.startup else 0
        return [seconds - idle for seconds in self.seconds]


@dataclass(frozen=True)
class Merge:
    """`cpimerge plan`, `fuse` and `verify` of one recipe, and `cpimerge merge`. Each obeys what was made last."""

    recipe: Path
    plan_dir: Path
    out_dir: Path
    plan: Contender
    fuse: Contender
    both: Contender
    verify: Contender


def merge(
    work: Path,
    name: str,
    paths: Sequence[Path],
    startup: Merge | None = None,
    settings: Mapping[str, str] | None = None,
) -> Merge:
    """The merge of a base and its experts, in files below `work`; `settings`: parameters other than the usual ones."""
    recipe, plan, out, merged = (work / f"{name}{ending}" for ending in (".yml", "-plan", "-out", "-merged"))
    models = "".join(f"  - model: {path}\n" for path in paths[1:])
    parameters = "".join(f"  {key}: {value}\n" for key, value in {**USUAL, **(settings or {})}.items())
    recipe.write_text(f"merge_method: cpi\nbase_model: {paths[0]}\nmodels:\n{models}parameters:\n{parameters}")
    planning = Contender("cpimerge plan", [CPIMERGE, "plan", str(recipe), "-o", str(plan)], lambda: remove(plan))
    fusing = Contender("cpimerge fuse", [CPIMERGE, "fuse", str(plan), "-o", str(out)], lambda: remove(out))
    both = Contender("cpimerge merge", [CPIMERGE, "merge", str(recipe), "-o", str(merged)], lambda: remove(merged))
    verifying = Contender("cpimerge verify", [CPIMERGE, "verify", str(out), "--plan", str(plan)])
    if startup:
        planning.startup, fusing.startup = startup.plan, startup.fuse
        both.startup, verifying.startup = startup.both, startup.verify
    return Merge(recipe, plan, out, planning, fusing, both, verifying)


def in_turn(contenders: Sequence[Contender], rounds: int) -> None:
    """Run all of them, one after the other, `rounds` times.

    Those of cpimerge run once before that, which does not count: kernels are compiled, files are in the page cache.
    """
    for contender in contenders:
        if contender.startup:
            contender.run()
            contender.forget()
    for number in range(rounds):
        print(f"round {number + 1} of {rounds}", file=sys.stderr)
        for contender in contenders:
            contender.run()


def remove(path: Path) -> None:
    """What a command is about to write must not be there; nor may earlier writes still be on their way."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    os.sync()


def drop_cache(files: Sequence[Path]) -> None:
    """Ask the system to forget what it holds of these files, so that they are read from the disk. Linux only."""
    os.sync()  # what is not on the disk yet would stay
    for file in files:
        handle = os.open(file, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


@contextmanager
def scarce_memory(left: int) -> Iterator[None]:
    """Another process holds all memory but `left` bytes, which everything else must do with. Linux without swap only.

    A virtual machine may have given its free memory back to its host, and to get it again can take longer than to
    read from a disk. With little memory that is free, a page cache meets little of that.
    """
    if len(Path("/proc/swaps").read_text().splitlines()) > 1:
        raise SystemExit("memory that is held would be swapped out. Turn swap off: swapoff -a")
    held = max(0, _bytes_of("MemAvailable", Path("/proc/meminfo")) - left)
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(held)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        if not process.stdout.readline():
            raise SystemExit(f"{held} bytes of memory cannot be held; has this container so much?")
        yield
        if process.poll() is not None:
            raise SystemExit("the process that held memory was ended by the system: these rounds do not count")


def peak_anonymous(command: Sequence[str]) -> int:
    """Run a command and sample what it has allocated, libraries and page cache not counted; bytes. Linux only."""
    peak = 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=OFFLINE) as process:
        while process.poll() is None:
            peak = max(peak, _bytes_of("RssAnon", Path(f"/proc/{process.pid}/status")))
            time.sleep(SAMPLE_SECONDS)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    return peak


def _bytes_of(field: str, file: Path) -> int:
    """What a file in /proc says; 0 where it does not, as that of a process that has just ended."""
    fields = dict(line.split(":", 1) for line in file.read_text().splitlines())
    return 1024 * int(fields.get(field, "0 kB").split()[0])


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files below a directory."""
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())
