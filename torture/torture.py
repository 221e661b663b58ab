"""Kills real runs of cpimerge, at random moments and at every call that changes the disk, and compares what is left.

    python torture/torture.py                        # all of it: some minutes
    python torture/torture.py --kills 1000 --seed 7  # more blows, others
    python torture/torture.py --short                # a sample, in seconds: what the test suite runs

After each blow the same command runs again, and must end with the bytes of an undisturbed run, nothing beside them,
and the inputs untouched; whatever is under the target's name at any moment must be whole. Exit code 1 where it is not.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import calls
from campaigns import CAMPAIGNS, Extent
from forks import Forks, run_here, settle
from trials import Tally, Trial
from victims import fingerprint, make_victims

COLUMNS = ("runs", "kills", "points", "errors", "resumed", "started over", "were complete", "went well", "mismatches")
SHORT = Extent(kills=8, commands=1, every=80, traced=0)


def main() -> None:
    options = parse()
    if sys.platform != "linux":
        sys.exit("the torture needs Linux: it looks into /proc")
    calls.install()  # before cpimerge is imported, and keeps functions of the system's
    scratch = Path(tempfile.mkdtemp(prefix="cpimerge-torture-", dir=options.directory))
    try:
        extent = SHORT if options.short else Extent(options.kills, options.commands, options.every, options.traced)
        tallies = torture(scratch, extent, options)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    print(table(tallies))
    wrong = [line for tally in tallies.values() for line in tally.wrong]
    if wrong:
        print(f"\nseed {options.seed}; what lay there is kept in {scratch / 'evidence'}", *wrong, sep="\n")
        sys.exit(1)
    shutil.rmtree(scratch)


def torture(scratch: Path, extent: Extent, options: argparse.Namespace) -> Mapping[str, Tally]:
    """Campaigns by name against victims; what each has counted."""
    root = scratch / "models"
    for directory in (root, scratch / "evidence"):
        directory.mkdir()
    victims = [
        victim
        for victim in make_victims(root, options.seed, must_run)
        if not options.victim or victim.name in options.victim
    ]
    make_steps_small()
    for victim in victims:
        victim.prepare()
        must_run(victim.arguments)
    calls.watch_fallocate()
    settle()
    forks = Forks(scratch / "forks")
    tallies = {name: Tally() for name in options.only or CAMPAIGNS}
    for place, victim in enumerate(victims):
        trial = Trial(victim, forks, scratch, lambda: fingerprint(root))
        for name, tally in tallies.items():
            begin = time.monotonic()
            trial.tally = Tally()
            rng = random.Random(f"{options.seed} {name} {victim.name}")
            CAMPAIGNS[name](trial, extent.share(place, len(victims)), rng)
            tally.add(trial.tally)
            print(f"{victim.name}: {name}: {counted(trial.tally)} in {time.monotonic() - begin:.0f} s", flush=True)
    return tallies


def make_steps_small() -> None:
    """Of a small model, too, parts are worked on apart and recorded as done. The bytes are the same."""
    from cpimerge import examination, plan_journal, writer

    for module, name, value in (
        (writer, "FLUSH_BYTES", 200_000),
        (plan_journal, "CHECKPOINT_SECONDS", 0.002),
        (examination, "SMALL", 1_200_000),
    ):
        assert hasattr(module, name)
        setattr(module, name, value)


def must_run(arguments: Sequence[str]) -> None:
    """A command in this process, so that its forks find everything compiled."""
    if run_here((*arguments, "--quiet")):
        raise RuntimeError(f"{' '.join(arguments)} failed undisturbed")


def counted(tally: Tally) -> str:
    return ", ".join(f"{tally.counts[column]} {column}" for column in COLUMNS if tally.counts[column])


def table(tallies: Mapping[str, Tally]) -> str:
    """A row for each campaign, and one for all."""
    total = Tally()
    for tally in tallies.values():
        total.add(tally)
    rows: list[tuple[str, ...]] = [("", *COLUMNS)]
    for name, tally in {**tallies, "all": total}.items():
        rows.append((name, *(str(tally.counts[column]) for column in COLUMNS)))
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    return "\n".join(
        "  ".join(f"{cell:<{width}}" if not place else f"{cell:>{width}}" for place, (cell, width) in enumerate(cells))
        for cells in (tuple(zip(row, widths, strict=True)) for row in rows)
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=300, help="at random moments (default: 300)")
    parser.add_argument("--commands", type=int, default=36, help="kills of processes of their own (default: 36)")
    parser.add_argument("--every", type=int, default=1, help="of so many calls one is a point (default: 1)")
    parser.add_argument("--traced", type=int, default=300, help="points that strace hits (default: 300)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", choices=CAMPAIGNS, help="this campaign; may be given again")
    parser.add_argument("--victim", action="append", help="this command, as the output calls it; may be given again")
    parser.add_argument("--short", action="store_true", help="a sample of everything, in seconds")
    parser.add_argument("--directory", type=Path, help="where to work; default: the system's temporary directory")
    return parser.parse_args()


if __name__ == "__main__":
    main()
