"""Where plan's and fuse's time goes: seconds in their parts, on one thread, in this process.

    python benchmarks/breakdown.py RECIPE

The parts are timed from outside, so each counts the few microseconds of its own timing. `fuse` hashes its output on
another thread than it works on, so its parts overlap.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import xxhash

import cpimerge
from cpimerge import examination, fusion, passes, plan_files, planning, shelf, stream, writer
from cpimerge.kernels import bitsets, scanning

PLAN_PARTS: list[tuple[Any, str, str]] = [
    (stream, "read_runs", "reading"),
    (passes, "_digests", "hashing"),
    (scanning, "scan", "one look: decode, count, Σ|Δ|, bits, Gram matrices"),
    (passes, "_detached", "keeping what is open"),
    (shelf.Shelf, "put", "keeping what is open, in a file"),
    (shelf.Shelf, "get", "reading it back"),
    (shelf.Shelf, "get_one", "reading it back"),
    (examination, "around", "brackets from the sample"),
    (scanning, "magnitudes", "|Δ| of the sample"),
    (examination, "pick", "thresholds"),
    (scanning, "gather", "thresholds: gathering candidates"),
    (scanning, "resolve", "deciding what was open"),
    (bitsets, "overlaps", "overlaps and signs in them"),
    (bitsets, "serialize", "serialising cores"),
    (plan_files.PlanFiles, "add", "writing cores"),
    (planning, "_conclude", "coefficients and plan.json"),
]
FUSE_PARTS: list[tuple[Any, str, str]] = [
    (stream, "read_runs", "reading"),
    (xxhash, "xxh3_64_intdigest", "hashing inputs"),
    (fusion, "blend", "decode, blend, encode"),
    (fusion, "transplant", "transplanting cores"),
    (fusion._Fusion, "_claim", "reading cores"),
    (writer.ShardWriter, "write", "writing"),
    (writer.ShardWriter, "hash", "sha256 of the output"),
    (writer.ShardWriter, "finish", "flushing what is left"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", type=Path)
    recipe = parser.parse_args().recipe
    with tempfile.TemporaryDirectory(prefix="cpimerge-profile-", dir=recipe.parent) as directory:
        plan, out = Path(directory, "plan"), Path(directory, "out")
        report("plan", lambda: cpimerge.plan(recipe, plan, threads=1, force=True), PLAN_PARTS)
        report("fuse", lambda: cpimerge.fuse(plan, out, threads=1, force=True), FUSE_PARTS)


def report(name: str, work: Callable[[], object], parts: list[tuple[Any, str, str]]) -> None:
    """Run once to compile and to fill the page cache, then once for each part's share."""
    work()
    seconds: dict[str, float] = {label: 0.0 for _, _, label in parts}
    for owner, function, label in parts:
        setattr(owner, function, timed(getattr(owner, function), seconds, label))
    start = time.perf_counter()
    work()
    total = time.perf_counter() - start
    print(f"| {name}, {total:.2f} s on one thread | share |\n|---|---|")
    for label, spent in sorted(seconds.items(), key=lambda part: -part[1]):
        print(f"| {label} | {spent / total:.0%} |")
    print(f"| the rest: the interpreter between them | {max(0.0, 1 - sum(seconds.values()) / total):.0%} |\n")


def timed(function: Callable[..., Any], seconds: dict[str, float], label: str) -> Callable[..., Any]:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            seconds[label] += time.perf_counter() - start

    return wrapper


if __name__ == "__main__":
    main()
