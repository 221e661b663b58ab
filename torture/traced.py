"""The same by the system itself: `strace` kills a run, or makes it fail, at a call. It knows nothing of Python."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

from forks import POLL, Outcome
from trials import Trial

WRITES = ("write", "pwrite64", "sendfile")
CALLS = {
    **dict.fromkeys(WRITES, ("ENOSPC", "EIO", "EDQUOT")),
    **dict.fromkeys(("fsync", "fdatasync"), ("EIO", "ENOSPC")),
    **dict.fromkeys(("ftruncate", "pread64", "preadv", "preadv2", "read"), ("EIO",)),
    **dict.fromkeys(("rename", "mkdir", "rmdir", "unlink", "unlinkat"), ("EACCES", "EIO", "EROFS")),
    "fallocate": ("ENOSPC", "EOPNOTSUPP"),
    "flock": ("ENOLCK",),
    "openat": ("EACCES", "EMFILE", "EIO"),
}
READS = ("openat", "read", "pread64", "preadv", "preadv2")  # all that is wrong with the inputs is said at once
CALL = re.compile(r"^(\d+) +(\w+)\(")
SETTLING = 5  # seconds to attach


class Tracer:
    """Runs a trial's victim under strace."""

    def __init__(self, trial: Trial) -> None:
        self.trial = trial
        self.log = trial.scratch / "trace"
        self._strace: subprocess.Popen[bytes] | None = None

    def points(self) -> list[tuple[str, int]]:
        """Every call and its number among those of its name and thread, as strace counts them."""
        self.trial.begin()
        self._run()
        made: Counter[tuple[str, str]] = Counter()
        for line in self.log.read_text(errors="replace").splitlines():
            if found := CALL.match(line):
                made[found[2], found[1]] += 1
        most = {name: max(count for (made_name, _), count in made.items() if made_name == name) for name, _ in made}
        return [(name, number) for name in sorted(most.keys() & CALLS) for number in range(1, most[name] + 1)]

    def kill(self, name: str, number: int) -> None:
        """SIGKILL at the call, and a run that goes on."""
        how = f"traced, killed at {name} {number}"
        self.trial.begin()
        outcome = self._run(f"{name}:signal=KILL:when={number}")
        if outcome.killed:
            self.trial.tally.counts["points"] += 1
            self.trial.hurt(outcome, how)
            self.trial.finish(how)

    def refuse(self, name: str, number: int, error: str, ever_after: bool) -> None:
        """An error at the call, and perhaps from then on; and a run that goes on."""
        how = f"traced, {error} at {name} {number}{' and after' if ever_after else ''}"
        self.trial.begin()
        outcome = self._run(f"{name}:error={error}:when={number}{'+' if ever_after else ''}")
        self.trial.tally.counts["points"] += 1
        if self.trial.refused(outcome, how, 20 if name in READS else 1):
            self.trial.finish(how)

    def _run(self, inject: str | None = None) -> Outcome:
        options = ["-e", "trace=" + ",".join(CALLS), *(["-e", f"inject={inject}"] if inject else [])]
        outcome = self.trial.forks.run(
            self.trial.victim.arguments, prepare=_stop, started=lambda process: self._attach(process, options)
        )
        if self._strace is not None:
            self._strace.wait()
        return outcome

    def _attach(self, process: int, options: list[str]) -> None:
        """strace on a process that has stopped itself; then it may go on."""
        os.waitpid(process, os.WUNTRACED)
        command = ["strace", "-f", "-qq", "-o", str(self.log), *options, "-p", str(process)]
        self._strace = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        due = time.monotonic() + SETTLING
        while not _is_traced(process):
            if self._strace.poll() is not None or time.monotonic() > due:
                os.kill(process, signal.SIGKILL)
                raise RuntimeError("strace is there, and may not trace: leave `traced` out with --only")
            time.sleep(POLL)
        os.kill(process, signal.SIGCONT)


def is_installed() -> bool:
    return shutil.which("strace") is not None


def _stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _is_traced(process: int) -> bool:
    return "TracerPid:\t0\n" not in Path(f"/proc/{process}/status").read_text()
