"""Four really different tasks from what every Python installation has, each as a training and a test table."""

from __future__ import annotations

import pydoc_data.topics
import random
import re
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch

from .tinylm import Table

__all__ = ["TASKS", "tables"]

WINDOW = 96  # bytes of a row of running text
Item = TypeVar("Item")


def tables(task: str, seed: int, test_rows: int) -> tuple[Table, Table]:
    """Training rows and at most `test_rows` test rows of a task; no item of one is in the other."""
    return TASKS[task](random.Random(f"{task} {seed}"), test_rows)


def _english(rng: random.Random, test_rows: int) -> tuple[Table, Table]:
    """The next byte of English prose: the paragraphs of Python's own help texts."""
    text = "\n\n".join(text for _, text in sorted(pydoc_data.topics.topics.items()))
    paragraphs = (re.sub(r"\s+", " ", part.strip()) for part in re.split(r"\n\s*\n", text))
    train, test = _split([p for p in paragraphs if re.match(r"[A-Z].{80,}\.$", p)], rng)
    return _text_tables("\n".join(train), "\n".join(test), rng, test_rows)


def _python(rng: random.Random, test_rows: int) -> tuple[Table, Table]:
    """The next byte of Python code: the modules of the standard library."""
    modules = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("[!_]*.py"))  # what is generated begins with _
    train, test = _split([module.read_text(encoding="utf-8") for module in modules], rng)
    return _text_tables("\n".join(train), "\n".join(test), rng, test_rows)


def _sums(rng: random.Random, test_rows: int) -> tuple[Table, Table]:
    """The digits of the sum of two numbers below 100."""
    train, test = _split([(f"{a}+{b}=", f"{a + b}\n") for a in range(100) for b in range(100)], rng)
    return _questions(train), _questions(test[:test_rows])


def _sorting(rng: random.Random, test_rows: int) -> tuple[Table, Table]:
    """The letters of a word in alphabetical order; the words are those of the help texts."""
    text = " ".join(pydoc_data.topics.topics.values())
    words = sorted(set(re.findall(r"\b[a-z]{3,7}\b", text)))
    train, test = _split([(f"sort {word}: ", "".join(sorted(word)) + "\n") for word in words], rng)
    return _questions(train), _questions(test[:test_rows])


TASKS: dict[str, Callable[[random.Random, int], tuple[Table, Table]]] = {
    "english": _english,
    "python": _python,
    "sums": _sums,
    "sorting": _sorting,
}


def _split(items: Sequence[Item], rng: random.Random) -> tuple[list[Item], list[Item]]:
    """Nine tenths to train on and one to test on, without duplicates."""
    shuffled = list(dict.fromkeys(items))
    rng.shuffle(shuffled)
    cut = len(shuffled) // 10
    return shuffled[cut:], shuffled[:cut]


def _text_tables(train: str, test: str, rng: random.Random, test_rows: int) -> tuple[Table, Table]:
    """Running text as rows that ask for every byte but the first; no test row stands anywhere in the training text."""
    seen = train.encode()
    unseen = [row for row in _windows(test.encode()) if row not in seen]
    return _text_table(_windows(seen)), _text_table(rng.sample(unseen, min(test_rows, len(unseen))))


def _windows(text: bytes) -> list[bytes]:
    return [text[start : start + WINDOW] for start in range(0, len(text) - WINDOW + 1, WINDOW)]


def _text_table(rows: Sequence[bytes]) -> Table:
    tokens = torch.frombuffer(bytearray(b"".join(rows)), dtype=torch.uint8).view(len(rows), WINDOW)
    asked = torch.ones_like(tokens, dtype=torch.bool)
    asked[:, 0] = False
    return Table(tokens, asked)


def _questions(pairs: Sequence[tuple[str, str]]) -> Table:
    """A question a row, which asks for the bytes of its answer; what follows is padded with line breaks."""
    length = max(len(question) + len(answer) for question, answer in pairs)
    tokens = torch.full((len(pairs), length), ord("\n"), dtype=torch.uint8)
    asked = torch.zeros((len(pairs), length), dtype=torch.bool)
    for row, (question, answer) in enumerate(pairs):
        text = (question + answer).encode()
        tokens[row, : len(text)] = torch.tensor(list(text), dtype=torch.uint8)
        asked[row, len(question) : len(text)] = True
    return Table(tokens, asked)
