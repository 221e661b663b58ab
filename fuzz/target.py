"""What a fuzz target is: a parser, what may come of any bytes given to it, and what its inputs look like."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from random import Random

__all__ = ["CORPUS", "NAMES", "Havoc", "Mutate", "Run", "Target", "accepted_before", "corpus_of", "load"]

CORPUS = Path(__file__).parent / "corpus"
# Each is a module of `targets` of the same name.
NAMES = (
    *("header", "index", "archive", "pickle", "recipe", "reference", "size", "plan", "fuse", "cores", "coefficients"),
    *("adapter", "tokenizer", "vocabulary", "models", "companions", "template", "manifest", "journal", "verify", "hub"),
    "examples",
)

Havoc = Callable[[bytes], bytes]  # bytes -> bytes changed at random, without regard to their structure
Mutate = Callable[[bytes, Random, Havoc], bytes]
Run = Callable[[bytes], object]


@dataclass(frozen=True)
class Target:
    """`prepare(scratch)` makes what runs one input; it may write below the directory `scratch`, and nowhere else.

    What runs an input returns where the parser accepts it, and raises `refusal` where it refuses it. All else that it
    raises is a finding.
    `seeds` are inputs by name, sound ones and others; `words` what may stand in them. Of memory that Python knows of,
    an input of n bytes may take `memory` + `memory_per_byte` * n at most.
    """

    prepare: Callable[[Path], Run]
    seeds: Callable[[], Mapping[str, bytes]]
    refusal: type[Exception] | tuple[()]
    mutate: Mutate | None = None
    words: tuple[str, ...] = ()
    max_bytes: int = 4096
    memory: int = 4_000_000
    memory_per_byte: int = 500


@contextmanager
def accepted_before() -> Iterator[None]:
    """The block gets what was accepted, perhaps as it was written again: a refusal is a finding."""
    try:
        yield
    except Exception as error:
        raise AssertionError("what was accepted is refused") from error


def load(name: str) -> Target:
    """The target of that name; imports what it needs."""
    target = import_module(f"fuzz.targets.{name}").TARGET
    assert isinstance(target, Target)
    return target


def corpus_of(name: str) -> list[Path]:
    """The kept inputs of a target, past findings among them."""
    return sorted(file for file in (CORPUS / name).glob("*") if file.is_file())
