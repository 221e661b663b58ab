"""The embedded demo: trains a small base and its fine-tunes, fuses them, and scores everything it made.

All of it is real and measured on the spot: the training, the checkpoints, the fusion, the scores. Nothing is
downloaded, and nothing is printed that was not measured, also when plain averaging wins.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from . import api, tinylm
from .demo_data import TASKS, tables
from .tinylm import Schedule, Shape, Table

__all__ = ["DemoResult", "Effort", "run_demo"]

BASE_TASKS = ("english", "python")  # the base reads text; sums and sorting are new skills to its experts
RECIPE = """\
merge_method: cpi
base_model: ./base
models:
{models}{parameters}"""
# What is made of the same experts: the tool's defaults, and points to compare them with.
MERGES = {
    "plain average": {"density": "0", "space": "weights"},
    "fused": {},
    "fused, paper": {"density": "0.01", "scope": "global", "tau": "0.1", "space": "weights", "conflict": "last"},
}


@dataclass(frozen=True)
class Effort:
    """How large the models are and how long they train; the defaults end within two minutes on two cores."""

    shape: Shape = field(default_factory=Shape)
    base: Schedule = field(default_factory=lambda: Schedule(steps=400, rate=4e-3, tokens=2048))
    expert: Schedule = field(default_factory=lambda: Schedule(steps=250, rate=1e-3, tokens=1024))
    test_rows: int = 256


@dataclass(frozen=True)
class DemoResult:
    """Scores, 0 to 1, by model and then by task; `seconds` for training, merging and scoring."""

    directory: Path
    tasks: list[str]
    scores: dict[str, dict[str, float]]
    seconds: dict[str, float]

    def relative(self, model: str) -> float:
        """Mean over the tasks of the model's score as a share of that task's own expert's."""
        return sum(self.scores[model][task] / self.scores[task][task] for task in self.tasks) / len(self.tasks)

    def verdict(self) -> str:
        """What the numbers say of fusion with the tool's defaults beside plain averaging."""
        difference = self.relative("fused") - self.relative("plain average")
        fused, average = self.scores["fused"], self.scores["plain average"]
        lost = [task for task in self.tasks if fused[task] < average[task]]
        points = round(100 * abs(difference), 1)
        how = f"{points} points " + ("ahead of" if difference > 0 else "behind") if points else "level with"
        where = f"; plain averaging is better on {', '.join(lost)}" if lost else ""
        return f"fused is {how} plain averaging in the mean{where}"


def run_demo(
    directory: Path, *, seed: int = 0, effort: Effort | None = None, log: Callable[[str], None] = lambda line: None
) -> DemoResult:
    """Train, plan, fuse and score below `directory` (made if missing); `log` gets a line for each thing done.

    Leaves `base`, a checkpoint directory for each task, and for each merge its recipe, plan and fused checkpoint.
    Raises OutputError where a merge's directory is there already.
    """
    effort = effort or Effort()
    with _one_thread():
        return _run(directory, seed, effort, log)


def _run(directory: Path, seed: int, effort: Effort, log: Callable[[str], None]) -> DemoResult:
    started = time.perf_counter()
    data = {task: tables(task, seed, effort.test_rows) for task in TASKS}
    _train_all(directory, {task: train for task, (train, _) in data.items()}, seed, effort, log)
    trained = time.perf_counter()
    for name, parameters in MERGES.items():
        log(f"fusing: {name}")
        _merge(directory, name, parameters)
    merged = time.perf_counter()
    scores = {}
    for name in ("base", *TASKS, *MERGES):
        log(f"scoring: {name}")
        model = tinylm.load(directory / _slug(name))
        scores[name] = {task: tinylm.score(model, test) for task, (_, test) in data.items()}
    seconds = {"training": trained - started, "merging": merged - trained, "scoring": time.perf_counter() - merged}
    return DemoResult(directory, list(TASKS), scores, seconds)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Within it, torch uses one thread an operation: at these sizes more of them mostly wait for each other.

    Nor do the scores depend on the number of processors then.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _train_all(directory: Path, train: dict[str, Table], seed: int, effort: Effort, log: Callable[[str], None]) -> None:
    """The base on running text alone, then from it an expert on each task."""
    generator = torch.Generator().manual_seed(seed)
    base = tinylm.new(effort.shape, generator)
    log(f"training the base: {sum(p.numel() for p in base.parameters()):,} parameters, {effort.base.steps} steps")
    tinylm.train(base, [train[task] for task in BASE_TASKS], effort.base, generator)
    tinylm.save(base, directory / "base", torch.bfloat16)

    def train_expert(task: str) -> None:
        log(f"training an expert: {task}, {effort.expert.steps} steps")
        expert = tinylm.load(directory / "base")
        tinylm.train(expert, [train[task]], effort.expert, torch.Generator().manual_seed(seed))
        tinylm.save(expert, directory / task, torch.bfloat16)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(train_expert, train))


def _merge(directory: Path, name: str, parameters: dict[str, str]) -> None:
    models = "".join(f"  - model: ./{task}\n" for task in TASKS)
    text = "".join(f"  {key}: {value}\n" for key, value in parameters.items())
    recipe = directory / f"{_slug(name)}.yml"
    recipe.write_text(RECIPE.format(models=models, parameters=f"parameters:\n{text}" if text else ""), encoding="utf-8")
    plan = directory / f"{_slug(name)}-plan"
    api.plan(recipe, plan)
    api.fuse(plan, directory / _slug(name))


def _slug(name: str) -> str:
    """A model's name as a directory's: `fused, paper` → `fused-paper`."""
    return name.replace(",", "").replace(" ", "-")
