"""The tasks: texts of a known class, split by document into rows to train on, to choose by and to report on."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from . import sources

TRAIN, VALIDATION, TEST = 2000, 300, 1000  # rows of a task, at most
SPLIT_SEED = 20250821


@dataclass(frozen=True, slots=True)
class Row:
    """A text and the number of its class."""

    text: str
    label: int


@dataclass(frozen=True, slots=True)
class Task:
    """A task: its classes in alphabetical order and its three kinds of rows; no document is in two of them."""

    name: str
    classes: tuple[str, ...]
    train: tuple[Row, ...]
    validation: tuple[Row, ...]
    test: tuple[Row, ...]


def main_tasks(folder: Path) -> dict[str, Task]:
    """The six tasks of the main comparison, in the order of its recipes. `folder` keeps what is downloaded and read."""
    packages = folder / "packages"
    texts = {
        "news": lambda: sources.news(packages),
        "movies": lambda: sources.sentiments(packages, "movieReviewSnippets"),
        "tweets": lambda: sources.sentiments(packages, "tweets"),
        "scripture": lambda: sources.scripture(packages),
        "languages": lambda: sources.talk(packages),
        "docstrings": sources.docstrings,
    }
    return {name: kept(name, read, folder) for name, read in texts.items()}


def related_tasks(tasks: dict[str, Task], folder: Path) -> dict[str, Task]:
    """Tasks whose relation to those of the main comparison is known: a sister of two, and halves of three."""
    halves = (half(tasks[name], part) for name in ("movies", "scripture", "docstrings") for part in (0, 1))
    sister = kept("products", lambda: sources.sentiments(folder / "packages", "amazonReviewSnippets"), folder)
    return {task.name: task for task in (sister, *halves)}


def kept(name: str, read: Callable[[], Iterable[tuple[str, str, str]]], folder: Path) -> Task:
    """The task of the texts that `read` gives, from the file where an earlier run left it, if there is one."""
    path = folder / "tasks" / f"{name}.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(asdict(split(name, read()))))
        partial.rename(path)
    content = json.loads(path.read_text())
    parts = {part: tuple(Row(**row) for row in content[part]) for part in ("train", "validation", "test")}
    return Task(name, tuple(content["classes"]), **parts)


def half(task: Task, part: int) -> Task:
    """Every second row to train on, from the first (`part` 0) or the second on."""
    return replace(task, name=f"{task.name}-{'ab'[part]}", train=task.train[part::2])


def split(name: str, texts: Iterable[tuple[str, str, str]]) -> Task:
    """A task of (document, class, text): shuffled, balanced over the classes as far as they reach."""
    unique = {text: (document, label) for document, label, text in texts}
    order = random.Random(f"{SPLIT_SEED} {name}")
    classes = tuple(sorted({label for _, label in unique.values()}))
    documents = sorted({document for document, _ in unique.values()})
    order.shuffle(documents)
    parts = _parts(documents)
    pools: tuple[dict[str, list[Row]], ...] = tuple({label: [] for label in classes} for _ in range(3))
    for text, (document, label) in unique.items():
        pools[parts[document]][label].append(Row(text, classes.index(label)))
    rows = [balanced(pool, limit, order) for pool, limit in zip(pools, (TRAIN, VALIDATION, TEST), strict=True)]
    return Task(name, classes, *rows)


def _parts(documents: list[str]) -> dict[str, int]:
    """Documents to train on (half), to choose by (a fifth), to report on (the rest): 0, 1, 2."""
    first, second = len(documents) // 2, len(documents) * 7 // 10
    return {document: (place >= first) + (place >= second) for place, document in enumerate(documents)}


def balanced(pool: dict[str, list[Row]], limit: int, order: random.Random) -> tuple[Row, ...]:
    """At most `limit` rows, the same number of every class unless one runs out, in shuffled order."""
    share = limit // len(pool)
    rows = [row for label in sorted(pool) for row in order.sample(pool[label], min(share, len(pool[label])))]
    order.shuffle(rows)
    return tuple(rows)
