"""Times cpimerge beside reading the files, copying one, and mergekit, all in turn on the same inputs.

    python benchmarks/bench.py -n 5                       # the table of the README
    python benchmarks/bench.py --sections scopes,small
    python benchmarks/bench.py --sections all --directory /data/bench

Every command is a process of its own. Prints medians of the rounds, and ratios: the median of those of the rounds, and
the least and the largest.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import sections
from floor import Bench
from main_section import main_section


@dataclass(frozen=True)
class Section:
    """Something to measure. `minutes`: about how long, on two cores, its inputs made anew."""

    run: Callable[[Bench], str]
    rounds: int
    minutes: int
    what: str


SECTIONS = {
    "main": Section(main_section, 3, 13, "cpimerge beside cat, a flushed copy and mergekit; start-up; predictions"),
    "scopes": Section(
        sections.scopes,
        3,
        6,
        "scope global, scope layer, granularity row, space delta, levelling beside the usual settings",
    ),
    "experts": Section(sections.experts, 3, 5, "seconds for each GB with 2, 4, 8 and 16 experts"),
    "sizes": Section(sections.sizes, 3, 2, "seconds for each GB at 0.1 and 0.55 GB a checkpoint"),
    "small": Section(sections.small, 3, 3, "the same bytes in 300 and in 20,100 tensors"),
    "mixture": Section(
        sections.mixture, 3, 3, "the same bytes in 6 tensors and in 375, as large as experts of a mixture"
    ),
    "cold": Section(
        sections.cold, 3, 3, "plan and fuse of files that are not in the page cache, most memory being held (Linux)"
    ),
    "large": Section(sections.large, 1, 15, "the same of three checkpoints of 8 GB; 43 GB of disk (Linux)"),
    "memory": Section(sections.memory, 1, 3, "what plan and fuse of one tensor of 1 GiB allocate (Linux)"),
}


def main() -> None:
    options = parse()
    directory = options.directory or Path(tempfile.mkdtemp(prefix="cpimerge-bench-"))
    print(f"{os.cpu_count()} processors; medians of rounds in which all commands run in turn")
    try:
        for name in options.sections:
            print(f"\n{name}: {SECTIONS[name].what}\n", flush=True)
            print(measure(SECTIONS[name], directory, options), end="", flush=True)
    finally:
        if options.directory is None:
            shutil.rmtree(directory)


def parse() -> argparse.Namespace:
    lines = (f"  {name:8} about {one.minutes} minutes: {one.what}" for name, one in SECTIONS.items())
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="\n".join(("sections:", *lines)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--sections", type=chosen, default=["main"], help="with commas between, or all; default: main")
    parser.add_argument("-n", "--rounds", type=int, help="default: each section's own, 3 but for large and memory")
    parser.add_argument("--directory", type=Path, help="where inputs are kept; default: a temporary directory")
    parser.add_argument("--no-mergekit", action="store_true")
    parser.add_argument("--scale", type=float, default=1, help="shortens every tensor, to try the benchmark itself")
    return parser.parse_args()


def chosen(text: str) -> list[str]:
    names = list(SECTIONS) if text == "all" else text.split(",")
    if unknown := [name for name in names if name not in SECTIONS]:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: not among {', '.join(SECTIONS)}, all")
    return names


def measure(section: Section, directory: Path, options: argparse.Namespace) -> str:
    """Run a section in an empty directory of its own, which goes when it ends."""
    rounds = options.rounds or section.rounds
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="work-", dir=directory) as work:
        return section.run(Bench(directory, Path(work), rounds, options.scale, not options.no_mergekit))


if __name__ == "__main__":
    main()
