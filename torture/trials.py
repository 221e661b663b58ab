"""One victim: tried again and again, and looked at after every blow."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from forks import Forks, Outcome
from victims import Tree, Victim, neighbours, tree

RESUMED = re.compile(r"^going on where an earlier run was cut off: (.*) of .* were done$", re.MULTILINE)
TRACES = ("Traceback", "unexpected", "Exception")


@dataclass
class Tally:
    """What a campaign has counted, and what went wrong, a line each."""

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        self.counts += other.counts
        self.wrong += other.wrong


class Trial:
    """A victim, what its target may look like, and what an undisturbed run costs."""

    def __init__(self, victim: Victim, forks: Forks, scratch: Path, inputs: Callable[[], str]) -> None:
        """Runs it undisturbed, twice. `inputs` identifies what must not change; `scratch`/evidence keeps failures."""
        self.victim = victim
        self.forks = forks
        self.scratch = scratch
        self.evidence = scratch / "evidence"
        self.inputs = inputs
        self.untouched = inputs()
        self.tally = Tally()
        self.calls: list[str] = []  # of an undisturbed run, once somebody has looked
        self.before = None if victim.before is None else tree(victim.before)
        self.after: Tree = {}
        self.seconds = 0.0
        self.moved = 0
        for _ in range(2):
            victim.prepare()
            outcome = forks.run(victim.arguments)
            made = tree(victim.target)
            if outcome.code or (self.after and made != self.after) or neighbours(victim.target):
                raise RuntimeError(f"{victim.name}: undisturbed, it ends with {outcome.code}: {outcome.said}")
            self.after, self.seconds, self.moved = made, outcome.seconds, outcome.moved
        self._sizes = [_sizes(state) for state in (self.before, self.after) if state is not None]

    def begin(self) -> None:
        """The state before the first run."""
        self.victim.prepare()

    def hurt(self, outcome: Outcome, how: str) -> None:
        """Look at what a run left that was killed."""
        self.tally.counts["runs"] += 1
        self.tally.counts["kills"] += outcome.killed
        self.check_between(how)

    def finish(self, how: str) -> None:
        """The same command again, undisturbed: it must end with the right bytes, and with nothing beside them."""
        there = self._state()
        outcome = self.forks.run(self.victim.arguments)
        self._count(outcome, how)
        if there == self.after and "--force" not in self.victim.arguments and "not empty" in outcome.said:
            self.tally.counts["were complete"] += 1  # and say so
            outcome = self.forks.run((*self.victim.arguments, "--force"))
        if outcome.code:
            self.fail(f"{how}: the next run ends with {outcome.code}: {outcome.said}")
        elif self._state() != self.after:
            self.fail(f"{how}: other bytes: {self._difference()}")
        elif neighbours(self.victim.target):
            self.fail(f"{how}: beside the target lies {neighbours(self.victim.target)}")
        elif self.inputs() != self.untouched:
            self.fail(f"{how}: the inputs were touched")
            self.untouched = self.inputs()

    def refused(self, outcome: Outcome, how: str, lines_at_most: int = 1) -> bool:
        """Look at a run whose disk refused something; False where it went well nevertheless."""
        self.tally.counts["runs"] += 1
        if outcome.code == 0 and self._state() == self.after:
            self.tally.counts["went well"] += 1
            return False
        self.tally.counts["errors"] += 1
        lines = [line for line in outcome.said.splitlines() if line.startswith("error: ")]
        if outcome.code != 1 or not 0 < len(lines) <= lines_at_most or any(trace in outcome.said for trace in TRACES):
            self.fail(f"{how}: no clear error, but {outcome.code}: {outcome.said}")
        self.check_between(how)
        return True

    def check_between(self, how: str) -> None:
        """The target is not there, or what it was, or complete."""
        state = self._state()
        allowed = (None, self.before, self.after)
        if not any(state == known for known in allowed):
            self.fail(f"{how}: the target is there, and not whole: {self._difference()}")

    def watch(self) -> None:
        """While a run is at work: what is under the target's name must be whole at any moment."""
        try:
            handle = os.open(self.victim.target, os.O_RDONLY | os.O_DIRECTORY)
        except OSError:
            return
        try:
            sizes = _sizes_in(handle)
            if sizes is not None and sizes not in self._sizes and _is_still(self.victim.target, handle):
                self.fail(f"there for all to see, and not whole: {sizes}")
        finally:
            os.close(handle)

    def fail(self, what: str) -> None:
        """Note what went wrong, and keep what lies there."""
        self.tally.counts["mismatches"] += 1
        kept = self.evidence / str(len(os.listdir(self.evidence)))
        with suppress(OSError):
            shutil.copytree(self.victim.target.parent, kept, symlinks=True)
        self.tally.wrong.append(f"{self.victim.name}: {what.strip()} [{kept.name}]")

    def _count(self, outcome: Outcome, how: str) -> None:
        """Whether the run went on where another was cut off; if it says so, it must have had less to do."""
        from cpimerge.budget import parse_size  # not before the calls are seen

        self.tally.counts["runs"] += 1
        found = RESUMED.findall(outcome.said)
        self.tally.counts["resumed" if found else "started over"] += 1
        done = sum(parse_size(size.replace(" ", "")) for size in found)
        if found and outcome.moved > 1.05 * self.moved - 0.8 * done:
            self.fail(f"{how}: going on took {outcome.moved} of {self.moved} bytes: {outcome.said}")

    def _state(self) -> Tree | None:
        return tree(self.victim.target) if self.victim.target.exists() else None

    def _difference(self) -> str:
        state = self._state() or {}
        return ", ".join(sorted(name for name in state.keys() | self.after if state.get(name) != self.after.get(name)))


def _sizes(state: Tree) -> dict[str, int]:
    return {name: len(content) for name, content in state.items()}


def _sizes_in(directory: int, below: str = "") -> dict[str, int] | None:
    """Of all files below an open directory; None where it changed meanwhile."""
    found: dict[str, int] = {}
    try:
        for name in os.listdir(directory):
            status = os.stat(name, dir_fd=directory, follow_symlinks=False)
            if not os.path.isdir(f"/proc/self/fd/{directory}/{name}"):
                found[below + name] = status.st_size
                continue
            inner = os.open(name, os.O_RDONLY, dir_fd=directory)
            try:
                found |= _sizes_in(inner, f"{below}{name}/") or {}
            finally:
                os.close(inner)
    except OSError as error:
        if error.errno == errno.ENOENT:
            return None
        raise
    return found


def _is_still(path: Path, handle: int) -> bool:
    """Whether an open directory is the one of this name."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except OSError:
        return False
