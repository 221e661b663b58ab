"""Times cpimerge beside reading the files, copying one, and mergekit, all in turn on the same inputs.

    python benchmarks/bench.py                      # about five minutes; 0.25 B parameters, four experts
    python benchmarks/bench.py --no-mergekit -n 5

Every command is a process of its own, so start-up counts. Prints medians, and ratios to what the disk would do.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

BIN = Path(sys.executable).parent
DENSITY = 0.01


@dataclass
class Contender:
    """A command with its times in seconds and its peak resident memory in bytes."""

    name: str
    command: list[str]
    before: Callable[[], None]
    seconds: list[float] = field(default_factory=list)
    peak: int = 0

    def run(self) -> None:
        self.before()
        start = time.perf_counter()
        process = subprocess.Popen(self.command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=OFFLINE)
        assert process.stderr is not None
        errors = process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        self.seconds.append(time.perf_counter() - start)
        self.peak = max(self.peak, usage.ru_maxrss * 1024)
        if status:
            raise SystemExit(f"{self.name} failed:\n{errors.decode(errors='replace')}")

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


OFFLINE = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-n", "--rounds", type=int, default=3)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=32_000, help="words; 1024 parameters each, and 0.22 B beside")
    parser.add_argument("--directory", type=Path, help="where inputs are kept; default: a temporary directory")
    parser.add_argument("--no-mergekit", action="store_true")
    options = parser.parse_args()
    directory = options.directory or Path(tempfile.mkdtemp(prefix="cpimerge-bench-"))
    try:
        paths = inputs(directory, options.vocabulary, options.experts)
        contenders = ours(directory, paths) + ([] if options.no_mergekit else mergekit(directory, paths))
        for _ in range(options.rounds):
            for contender in contenders:
                contender.run()
        report(paths, contenders)
    finally:
        if options.directory is None:
            shutil.rmtree(directory)


def inputs(directory: Path, vocabulary: int, experts: int) -> list[Path]:
    """The checkpoints, made by a process of its own: a child's peak memory begins with that of its parent."""
    script = Path(__file__).with_name("inputs.py")
    sizes = ["--vocabulary", str(vocabulary), "--experts", str(experts)]
    subprocess.run([sys.executable, str(script), str(directory), *sizes], check=True)
    return [directory / name for name in ("base", *(f"expert{n}" for n in range(1, experts + 1)))]


def ours(directory: Path, paths: list[Path]) -> list[Contender]:
    """The floor (reading all, a flushed copy of one) and cpimerge; the first `plan` has compiled the kernels."""
    files = [str(path / "model.safetensors") for path in paths]
    models = "".join(f"  - model: {path}\n" for path in paths[1:])
    text = f"merge_method: cpi\nbase_model: {paths[0]}\nmodels:\n{models}parameters: {{density: {DENSITY}}}\n"
    recipe = directory / "recipe.yml"
    recipe.write_text(text)
    plan, out, copy = directory / "plan", directory / "out", directory / "copy"
    tool = str(BIN / "cpimerge")
    subprocess.run([tool, "plan", str(recipe), "-o", str(plan), "--quiet", "--force"], check=True)
    return [
        Contender("cat of all inputs", ["cat", *files], nothing),
        Contender("flushed copy of one", ["dd", f"if={files[0]}", f"of={copy}", "bs=4M", "conv=fsync"], remove(copy)),
        Contender("cpimerge --help", [tool, "--help"], nothing),
        Contender("cpimerge plan", [tool, "plan", str(recipe), "-o", str(plan)], remove(plan)),
        Contender("cpimerge fuse", [tool, "fuse", str(plan), "-o", str(out)], remove(out)),
    ]


def mergekit(directory: Path, paths: list[Path]) -> list[Contender]:
    """mergekit's linear, multislerp and ties on the same files."""
    models = "".join(f"  - model: {path}\n    parameters: {{weight: 1, density: {DENSITY}}}\n" for path in paths[1:])
    result = []
    for method, base in (("linear", ""), ("multislerp", ""), ("ties", f"base_model: {paths[0]}\n")):
        config = directory / f"{method}.yml"
        config.write_text(f"merge_method: {method}\n{base}models:\n{models}dtype: bfloat16\n")
        out = directory / f"mergekit-{method}"
        command = [str(BIN / "mergekit-yaml"), str(config), str(out), "--no-write-model-card", "--no-copy-tokenizer"]
        result.append(Contender(f"mergekit {method}", command, remove(out)))
    return result


def nothing() -> None:
    """Nothing to tidy up."""


def remove(path: Path) -> Callable[[], None]:
    """What a command is about to write must not be there; nor may earlier writes still be on their way."""

    def tidy() -> None:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        os.sync()

    return tidy


def report(paths: list[Path], contenders: list[Contender]) -> None:
    size = sum((path / "model.safetensors").stat().st_size for path in paths)
    by_name = {contender.name: contender for contender in contenders}
    read, copy = by_name["cat of all inputs"].median, by_name["flushed copy of one"].median
    both = by_name["cpimerge plan"].median + by_name["cpimerge fuse"].median
    print(
        f"{len(paths) - 1} experts and a base of {size / len(paths) / 1e9:.2f} GB each, {os.cpu_count()} processors, ",
        end="",
    )
    print(f"files in the page cache, medians of {len(contenders[0].seconds)} runs in turn\n")
    print("| command | seconds | peak memory | against |")
    print("|---|---|---|---|")
    for contender in contenders:
        against = ""
        if contender.name == "cpimerge plan":
            against = f"{contender.median / read:.1f} × cat of all inputs"
        elif contender.name == "cpimerge fuse":
            against = f"{contender.median / (read + copy):.1f} × cat and flushed copy"
        elif contender.name.startswith("mergekit"):
            against = f"{contender.median / both:.1f} × cpimerge plan and fuse"
        print(f"| {contender.name} | {contender.median:.2f} | {contender.peak / 1e6:.0f} MB | {against} |")


if __name__ == "__main__":
    main()
