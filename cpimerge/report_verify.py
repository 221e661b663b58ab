"""What `verify` proved, in a few lines, made from its result and nothing else."""

from __future__ import annotations

from collections.abc import Iterator

from .budget import format_size
from .report import printable
from .verify_results import InputsVerification, Verification

__all__ = ["verify_report"]

MAX_NOTES = 20


def verify_report(found: Verification | InputsVerification) -> Iterator[str]:
    """What was compared, and whether all of it is right."""
    if isinstance(found, InputsVerification):
        yield from _inputs(found)
    else:
        yield from _output(found)
    count = len(found.failures)
    yield "verified: nothing is wrong" if found.ok else f"NOT verified: {_counted(count, 'failure')}"


def _inputs(found: InputsVerification) -> Iterator[str]:
    yield printable(f"plan: {found.plan}")
    names = ", ".join(found.inputs) or "none"
    yield printable(f"inputs: {names}; {_counted(found.files, 'file')}, {_counted(found.tensors, 'tensor')}")
    yield f"read: {format_size(found.input_bytes)}"


def _output(found: Verification) -> Iterator[str]:
    yield printable(f"plan: {found.plan}")
    yield f"files: {found.files:,} with the manifest's sha256"
    parts = f"{found.core:,} in cores, {found.blended:,} blended, {found.copied:,} copied"
    yield f"elements: {found.elements:,} of {_counted(found.tensors, 'tensor')} compared ({parts})"
    yield f"cores: {found.cores:,} compared with their definition"
    yield f"read: {format_size(found.output_bytes)} of the output, {format_size(found.input_bytes)} of the inputs"
    if found.sample is not None:
        yield (
            f"sample: about {100 * found.sample:.3g}% of each tensor. It does not prove the rest, nor the hashes of "
            "weights and inputs, nor that nothing outside of it belongs into a core"
        )
    yield from (f"note: {printable(note)}" for note in found.notes[:MAX_NOTES])
    if len(found.notes) > MAX_NOTES:
        yield f"note: and {len(found.notes) - MAX_NOTES:,} more: --json has all"


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}" + ("" if count == 1 else "s")
