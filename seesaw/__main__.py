"""Runs the benchmark: `python -m seesaw [part ...]`. What is done is kept, and not done again."""

from __future__ import annotations

import argparse
import fcntl
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from . import prospects, relations, results, staging
from .bench import Bench
from .constants import constants
from .forgetting import forgetting
from .rates import rates
from .tables import write_pages
from .tasks import main_tasks, related_tasks
from .training import CAUSAL, ENCODER, Learner

PARTS = ("encoder", "causal", "constants", "rates", "relations", "prospects", "tables")
SEEDS = (0, 1, 2)
CAUSAL_TASKS = ("news", "movies", "scripture", "languages", "docstrings")


def main() -> None:
    """Everything, or the parts that are asked for."""
    options = parse()
    torch.set_num_threads(options.threads)
    options.folder.mkdir(parents=True, exist_ok=True)
    with (options.folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one run at a time: they share what they write
        run(options, options.parts)


def run(options: argparse.Namespace, parts: Sequence[str]) -> None:
    """These parts, in order."""
    encoders = partial(encoder_benches, options.folder)
    causals = partial(causal_benches, options.folder)
    if "encoder" in parts:
        benches = encoders(options.seeds)
        results.save([*results.measure(benches, benches, causals(options.seeds)), *results.ablate(benches)], "encoder")
        results.write("sweep", list(results.sweep(benches)))
        results.write("staging", list(staging.sweep(benches)))
        results.write("forgetting", [asdict(each) for each in forgetting(benches)])
    if "causal" in parts:
        lines = results.measure(causals(options.seeds), encoders(SEEDS), causals(SEEDS))
        results.save(list(lines), "causal")
    if "constants" in parts:
        results.write("constants", list(constants(encoders(options.seeds), causals(options.seeds))))
    if "rates" in parts:
        results.write("rates", [asdict(row) for row in rates(encoders(options.seeds), causals(options.seeds))])
    if "relations" in parts:
        train_related(options.folder)
        results.write("relations", relations.related(options.folder))
    if "prospects" in parts:
        trials = [trial for bench in encoders(sorted(prospects.ODD)) for trial in prospects.measured(bench)]
        results.write("prospects", [asdict(trial) for trial in trials])
    if "tables" in parts:
        write_pages()


def encoder_benches(folder: Path, seeds: Sequence[int]) -> list[Bench]:
    """A bench of the encoder for each seed."""
    from .encoder import Encoder

    tasks = main_tasks(folder)
    learner: Learner = Encoder(tasks)
    return [Bench(learner, tasks, ENCODER, seed, folder.resolve() / learner.name / str(seed)) for seed in seeds]


def train_related(folder: Path) -> None:
    """The experts whose relation to those of the main comparison is known, of the first seed."""
    from .encoder import Encoder

    tasks = related_tasks(main_tasks(folder), folder)
    bench = Bench(Encoder(tasks), tasks, ENCODER, 0, folder.resolve() / "encoder" / "0")
    for task in tasks.values():
        bench.expert(task)


def causal_benches(folder: Path, seeds: Sequence[int]) -> list[Bench]:
    """A bench of the causal language model for each seed."""
    from .causal import Causal

    tasks = {name: task for name, task in main_tasks(folder).items() if name in CAUSAL_TASKS}
    learner: Learner = Causal(tasks, folder.resolve())
    return [Bench(learner, tasks, CAUSAL, seed, folder.resolve() / learner.name / str(seed)) for seed in seeds]


def part(name: str) -> str:
    """`name`, if it is that of a part. argparse's own `choices` refuse that none is given (in Python 3.11)."""
    if name not in PARTS:
        raise argparse.ArgumentTypeError(f"no part is called {name!r}. The parts are: {', '.join(PARTS)}")
    return name


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line: that of the process unless `arguments` are given."""
    parser = argparse.ArgumentParser(prog="python -m seesaw", description=__doc__)
    parser.add_argument(
        "parts", nargs="*", type=part, default=PARTS, metavar="part", help=f"{', '.join(PARTS)}; default: all"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--folder", type=Path, default=Path(".seesaw"), help="keeps packages, models and scores")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
