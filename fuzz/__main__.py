"""`python -m fuzz`: every target for a while, or those that are named; `python -m fuzz TARGET FILE` runs one input."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path

from .campaign import ROOT, Outcome, Settings, keep, run_all, table
from .guard import run_checked, warmed
from .target import NAMES, corpus_of, load

NO_ATHERIS = (
    "atheris is not installed; it has wheels for CPython 3.11 to 3.13 on Linux, x86_64, and no others. "
    "The kept inputs are run once each, and no new ones are looked for."
)


def main() -> int:
    """Returns the exit status: 1 where there are findings."""
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"default: all of {', '.join(NAMES)}")
    parser.add_argument("--seconds", type=int, default=20, help="for each target (default: %(default)s)")
    parser.add_argument(
        "--runs", type=int, default=-1, help="for each target, at most (default: as many as there is time)"
    )
    parser.add_argument("--jobs", type=int, default=2, help="targets at a time (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of what is random; 0 (the default): another each time")
    parser.add_argument("--state", type=Path, default=ROOT / ".fuzz", help="where new inputs stay between runs")
    parser.add_argument("--keep", action="store_true", help="then merge new inputs into fuzz/corpus")
    given = parser.parse_args()
    if len(given.targets) == 2 and given.targets[0] in NAMES and Path(given.targets[1]).is_file():
        return _reproduce(given.targets[0], Path(given.targets[1]))
    if unknown := [name for name in given.targets if name not in NAMES]:
        parser.error(f"no target {unknown[0]!r}; there are {', '.join(NAMES)}")
    names = given.targets or list(NAMES)
    if find_spec("atheris") is None:
        print(NO_ATHERIS)
        return max(map(_replay, names))
    outcomes: list[Outcome] = []
    settings = Settings(given.seconds, given.runs, given.jobs, given.state, given.seed)
    for line in table(_kept(run_all(names, settings), outcomes)):
        print(line, flush=True)
    for line in keep(names, given.state) if given.keep else ():
        print(line)
    return _told(outcomes)


def _kept(coming: Iterable[Outcome], outcomes: list[Outcome]) -> Iterator[Outcome]:
    """What comes, put into `outcomes` too."""
    for outcome in coming:
        outcomes.append(outcome)
        yield outcome


def _told(outcomes: list[Outcome]) -> int:
    """Print each finding with the command that repeats it."""
    for outcome in outcomes:
        if outcome.failed:
            print(f"\n{outcome.name}: did not run:\n{outcome.failed}", file=sys.stderr)
        for file in outcome.findings:
            print(
                f"\nFINDING {outcome.name}: {file}\n  {sys.executable} -m fuzz {outcome.name} {file}", file=sys.stderr
            )
    return int(any(outcome.failed or outcome.findings for outcome in outcomes))


def _reproduce(name: str, file: Path) -> int:
    """Run one input; what it finds comes as a traceback."""
    target = load(name)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
        run_checked(target, warmed(target, Path(scratch)), file.read_bytes(), Path(scratch))
    print("nothing is found")
    return 0


def _replay(name: str) -> int:
    """Run what is kept, without an engine."""
    for file in corpus_of(name):
        print(f"{name}: {file.name}: ", end="")
        _reproduce(name, file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
