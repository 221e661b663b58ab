"""The ways to hurt a run."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import calls
import traced
from calls import Fault, Layer
from forks import POLL
from power import PowerLoss
from traced import Tracer
from trials import Trial
from victims import neighbours

NOWHERE = subprocess.DEVNULL
ERRORS = {
    **dict.fromkeys(("write", "pwrite", "sendfile", "copy_file_range"), (errno.ENOSPC, errno.EIO, errno.EDQUOT)),
    **dict.fromkeys(("open", "mkdir"), (errno.ENOSPC, errno.EACCES, errno.EROFS)),
    **dict.fromkeys(("fsync", "fdatasync"), (errno.EIO, errno.ENOSPC)),
    **dict.fromkeys(("unlink", "remove", "rmdir", "rename", "replace"), (errno.EACCES, errno.EIO)),
    **dict.fromkeys(("ftruncate", "truncate"), (errno.EIO,)),
    **dict.fromkeys(("fallocate", "posix_fallocate"), (errno.ENOSPC, errno.EOPNOTSUPP)),
}


@dataclass(frozen=True)
class Extent:
    """How much of everything: kills at random moments, those of processes of their own, and every how many-th call.

    `traced` are the points that strace hits.
    """

    kills: int
    commands: int
    every: int
    traced: int

    def share(self, place: int, count: int) -> Extent:
        """One victim's, of so many."""
        kills, commands, traced = ((given + place) // count for given in (self.kills, self.commands, self.traced))
        return Extent(kills, commands, self.every, traced)


class Faults:
    """Runs a trial's victim with a fault at one of its calls."""

    def __init__(self, trial: Trial) -> None:
        self.trial = trial
        self.report = trial.scratch / "report"
        self.grave = trial.scratch / "grave"

    def hit(self, fault: Fault, disk: str | None = None, seed: int = 0) -> None:
        """A run from the beginning that meets the fault, and one that goes on."""
        trial = self.trial
        trial.begin()
        self.report.unlink(missing_ok=True)
        outcome = trial.forks.run(trial.victim.arguments, prepare=partial(self._arm, fault, disk, seed))
        if not self.report.exists():
            return  # it had fewer calls this time
        trial.tally.counts["points"] += 1
        where = f"{fault.moment} {fault.number}: {self.report.read_text()}"
        if fault.moment != "error":
            where = f"power loss ({disk}, seed {seed}) {where}" if disk else f"killed {where}"
            trial.hurt(outcome, where)
            trial.finish(where)
        elif trial.refused(outcome, where := f"{os.strerror(fault.code)} at {where}"):
            trial.finish(where)

    @property
    def names(self) -> list[str]:
        """The calls of an undisturbed run, in order."""
        if not self.trial.calls:
            self.trial.begin()
            unharmed = partial(self._arm, Fault(), None, 0)
            self.trial.forks.run(self.trial.victim.arguments, prepare=unharmed, finish=self._list)
            self.trial.calls = json.loads(self.report.read_text())
        return self.trial.calls

    def _arm(self, fault: Fault, disk: str | None, seed: int) -> None:
        shutil.rmtree(self.grave, ignore_errors=True)
        self.grave.mkdir(parents=True)
        loss = None if disk is None else PowerLoss(self.grave, disk, seed)
        calls.arm(Layer(self.trial.victim.target.parent, fault, self.report, loss))

    def _list(self) -> None:
        names = calls.disarm().names
        self.report.write_text(json.dumps(names))


def random_kills(trial: Trial, extent: Extent, rng: random.Random) -> None:
    """Kill at random moments, and now and then the run that goes on, too."""
    while trial.tally.counts["kills"] < extent.kills:
        trial.begin()
        blows = 0
        while True:
            late = rng.uniform(0, 1.05 * trial.seconds)
            outcome = trial.forks.run(trial.victim.arguments, kill_after=late, watch=trial.watch)
            how = f"killed {blows + outcome.killed} times, the last after {late:.3f} s"
            trial.hurt(outcome, how)
            blows += outcome.killed
            if not outcome.killed or rng.random() < 0.6:
                break
        if blows:
            trial.finish(how)


def command_kills(trial: Trial, extent: Extent, rng: random.Random) -> None:
    """As above, with processes that start from nothing, as a user's do; once they have begun to write."""
    for _ in range(extent.commands):
        trial.begin()
        command = [sys.executable, "-m", "cpimerge", *trial.victim.arguments]
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while process.poll() is None and not neighbours(trial.victim.target):
            time.sleep(POLL)
        time.sleep(rng.uniform(0, trial.seconds))
        process.kill()
        trial.tally.counts["kills"] += process.wait() < 0
        trial.tally.counts["runs"] += 1
        trial.check_between("the command killed")
        trial.finish("the command killed")


def points(trial: Trial, extent: Extent, rng: random.Random) -> None:
    """Die before, half through and after each call."""
    faults = Faults(trial)
    for number, name in _sample(faults.names, extent, rng):
        for moment in ("before", "half", "after") if name in calls.WRITES else ("before", "after"):
            faults.hit(Fault(number, moment))


def power_losses(trial: Trial, extent: Extent, rng: random.Random) -> None:
    """Lose the power before each call, or half through it, and after the last; of a sample, in one way each."""
    faults = Faults(trial)
    last = len(faults.names)
    for number, _ in [*_sample(faults.names, extent, rng), (last, "")]:
        for mode in PowerLoss.MODES if extent.every == 1 else [rng.choice(PowerLoss.MODES)]:
            moment = "after" if number == last else rng.choice(("before", "half"))
            faults.hit(Fault(number, moment), mode, rng.randrange(1 << 30))


def errors(trial: Trial, extent: Extent, rng: random.Random) -> None:
    """Let each call fail, once or, as on a full disk, from then on; of a sample, with one error each."""
    faults = Faults(trial)
    for number, name in _sample(faults.names, extent, rng):
        for code in ERRORS[name] if extent.every == 1 else [rng.choice(ERRORS[name])]:
            faults.hit(Fault(number, "error", code, code in calls.FULL or rng.random() < 0.3))


def traced_points(trial: Trial, extent: Extent, rng: random.Random) -> None:
    """Half of them deaths, half of them errors; none where there is no strace."""
    if not extent.traced or not traced.is_installed():
        return
    tracer = Tracer(trial)
    every = tracer.points()
    for place, (name, number) in enumerate(rng.sample(every, min(extent.traced, len(every)))):
        if place % 2:
            tracer.kill(name, number)
        else:
            tracer.refuse(name, number, rng.choice(traced.CALLS[name]), rng.random() < 0.3)


def _sample(names: Sequence[str], extent: Extent, rng: random.Random) -> list[tuple[int, str]]:
    """Calls with their numbers: all, or from a random one on every so many."""
    return list(enumerate(names, 1))[rng.randrange(extent.every) :: extent.every]


CAMPAIGNS: Mapping[str, Callable[[Trial, Extent, random.Random], None]] = {
    "random kills": random_kills,
    "killed commands": command_kills,
    "death at a call": points,
    "loss of power": power_losses,
    "errors": errors,
    "traced": traced_points,
}
