"""What `verify` found: what was proven and, one by one, what was refuted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from typing import Any

__all__ = ["Counts", "Failure", "Findings", "InputsVerification", "Verification", "parse_share"]


def parse_share(text: str | float) -> Fraction | None:
    """`1%` or 0.01 → the share of 1; all of it is None. Raises ValueError saying what is accepted."""
    written = str(text).strip()
    try:
        share = Fraction(written.removesuffix("%").strip()) / (100 if written.endswith("%") else 1)
    except (ValueError, ZeroDivisionError):
        share = Fraction(0)
    if not 0 < share <= 1:
        raise ValueError(f"{text!r} is not a share of the elements: write it like 1% or 0.01")
    return None if share == 1 else share


@dataclass(frozen=True)
class Failure:
    """One thing that is not as it should be.

    `file`: an output's, a plan's or an input's file or directory. `tensor` and `index`, its first flat index that
    fails, where it is about an element; `expected` and `found` then are its value and bits: "0.5 (0x3f00)".
    """

    file: str
    problem: str
    tensor: str | None = None
    index: int | None = None
    expected: str | None = None
    found: str | None = None

    def __str__(self) -> str:
        where = self.file
        where += "" if self.tensor is None else f": tensor {self.tensor!r}"
        where += "" if self.index is None else f": flat index {self.index}"
        values = "" if self.expected is None else f": expected {self.expected}, found {self.found}"
        return f"{where}: {self.problem}{values}"


@dataclass
class Counts:
    """What was read and compared: elements by why they are what they are, and bytes."""

    elements: int = 0
    core: int = 0
    blended: int = 0
    copied: int = 0
    input_bytes: int = 0
    output_bytes: int = 0


@dataclass(frozen=True)
class Verification:
    """What `verify` says of one output. It is as planned where `ok`.

    `sample` is the share that was asked for, None: all was read. `elements` of the output's tensors were compared:
    `core` ones with the tasks' values, `blended` ones, and `copied` ones of tensors that are the same everywhere.
    `files` were compared by their hash with the manifest. `cores`: tasks times pools whose core was checked.
    """

    out: str
    plan: str
    sample: float | None
    files: int
    tensors: int
    elements: int
    core: int
    blended: int
    copied: int
    cores: int
    input_bytes: int
    output_bytes: int
    failures: tuple[Failure, ...]
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether nothing was refuted."""
        return not self.failures

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"ok": self.ok} | asdict(self)


@dataclass(frozen=True)
class InputsVerification:
    """What `verify_inputs` says: of which `inputs` so many `tensors` were read, all of their bytes."""

    plan: str
    inputs: tuple[str, ...]
    files: int
    tensors: int
    input_bytes: int
    failures: tuple[Failure, ...]

    @property
    def ok(self) -> bool:
        """Whether every input is what was planned."""
        return not self.failures

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"ok": self.ok} | asdict(self)


@dataclass
class Findings:
    """Failures and notes while they are found."""

    failures: list[Failure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def fail(self, file: object, problem: str, tensor: str | None = None) -> None:
        """Add a failure that is about no single element."""
        self.failures.append(Failure(str(file), problem, tensor))

    def extend(self, failures: Sequence[Failure]) -> None:
        self.failures.extend(failures)
