"""The section of `bench.py` that the README carries: cpimerge beside the floor and mergekit, predicted and measured."""

from __future__ import annotations

import json
import statistics
import subprocess
from collections.abc import Sequence
from pathlib import Path

from contenders import BIN, CPIMERGE, DENSITY, LEVELLED, OFFLINE, Contender, Merge, in_turn, merge, remove, size_of
from floor import Bench, copying, reading
from tables import megabytes, seconds, table, times

PREDICTED = ("plan_seconds", "fuse_seconds", "memory_bytes", "plan_bytes", "output_bytes")


def main_section(bench: Bench) -> str:
    """The four experts and their base, in the page cache."""
    paths, startup = bench.checkpoints("half"), bench.startup()
    merged = merge(bench.work, "main", paths, startup)
    levelled = merge(bench.work, "levelled", paths, startup, LEVELLED).both
    levelled.name = "cpimerge merge, defaults"
    floors = [reading(paths), copying(bench.work, paths[0])]
    usage = Contender("cpimerge --help", [CPIMERGE, "--help"])
    starts = [startup.plan, startup.fuse, startup.verify, startup.both]
    ours = [*starts, usage, merged.plan, merged.fuse, merged.verify, merged.both, levelled]
    theirs = mergekit(bench.work, paths) if bench.mergekit else []
    predict(merged)  # a first time, which compiles kernels and brings the inputs into the page cache
    prediction = predict(merged)
    in_turn([*floors, *ours, *theirs], bench.rounds)
    against = _against(floors, merged, levelled, theirs)
    rows = [_row(contender, against.get(contender.name, "")) for contender in (*floors, *ours, *theirs)]
    head = ["command", "seconds", "without start-up", "peak memory", "against"]
    return table(head, rows) + "\n" + _predicted(prediction, merged)


def mergekit(work: Path, paths: Sequence[Path]) -> list[Contender]:
    """mergekit's linear, multislerp and ties on the same files."""
    models = "".join(f"  - model: {path}\n    parameters: {{weight: 1, density: {DENSITY}}}\n" for path in paths[1:])
    return [
        _mergekit(work, method, f"{base}models:\n{models}")
        for method, base in (("linear", ""), ("multislerp", ""), ("ties", f"base_model: {paths[0]}\n"))
    ]


def _mergekit(work: Path, method: str, text: str) -> Contender:
    config, out = work / f"{method}.yml", work / f"mergekit-{method}"
    config.write_text(f"merge_method: {method}\n{text}dtype: bfloat16\n")
    command = [str(BIN / "mergekit-yaml"), str(config), str(out), "--no-write-model-card", "--no-copy-tokenizer"]
    return Contender(f"mergekit {method}", command, lambda: remove(out))


def _row(contender: Contender, against: str) -> list[str]:
    work = seconds(contender.work) if contender.startup else ""
    return [contender.name, seconds(contender.seconds), work, megabytes(contender.peak), against]


def _against(
    floors: Sequence[Contender], merged: Merge, levelled: Contender, theirs: Sequence[Contender]
) -> dict[str, str]:
    """Ours without start-up against the floor; others against `cpimerge merge`, whole commands both."""
    read, copy = floors
    plan, fuse, verify = merged.plan, merged.fuse, merged.verify
    return {
        plan.name: f"{times(plan.work, read.work)} cat of all inputs",
        fuse.name: f"{times(fuse.work, read.work, copy.work)} cat and flushed copy",
        verify.name: f"{times(verify.work, plan.work, fuse.work)} cpimerge plan and fuse",
        levelled.name: f"{times(levelled.seconds, merged.both.seconds)} cpimerge merge",
    } | {
        one.name: f"{times(one.seconds, merged.both.seconds)} cpimerge merge, "
        f"{times(one.seconds, levelled.seconds)} with defaults"
        for one in theirs
    }


def predict(merged: Merge) -> dict[str, float]:
    """What `cpimerge plan --estimate` says before anything has run."""
    command = [CPIMERGE, "plan", str(merged.recipe), "--estimate", "--json"]
    found = subprocess.run(command, env=OFFLINE, capture_output=True, text=True)
    if found.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{found.stderr}")
    prediction = json.loads(found.stdout)
    return {key: float(prediction[key]) for key in PREDICTED}


def _predicted(prediction: dict[str, float], merged: Merge) -> str:
    """A line for each number that was predicted."""
    plan, fuse = merged.plan, merged.fuse
    took = {"plan_seconds": statistics.median(plan.work), "fuse_seconds": statistics.median(fuse.work)}
    nbytes = {
        "memory_bytes": max(plan.peak, fuse.peak),
        "plan_bytes": size_of(merged.plan_dir),
        "output_bytes": size_of(merged.out_dir),
    }
    lines = [f"{key}: {prediction[key]:.2f} s predicted, {value:.2f} s measured" for key, value in took.items()]
    lines += [
        f"{key}: {megabytes(prediction[key])} predicted, {megabytes(value)} measured" for key, value in nbytes.items()
    ]
    return "".join(f"- {line}\n" for line in lines)
