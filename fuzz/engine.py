"""One target under atheris: `python -m fuzz.engine TARGET FINDINGS SEEDS [libFuzzer's options and directories]`.

The target's seeds are written to the directory SEEDS, which should be one of libFuzzer's as well. What the parser must
not raise is written to the directory FINDINGS, once for each place that it comes from, and the search goes on. Only
what ends the process (a time limit, memory, a crash of native code) ends it. How many inputs were accepted stands in
the file `accepted` beside that directory.
"""

from __future__ import annotations

import hashlib
import os
import resource
import shlex
import sys
import tempfile
import traceback
from pathlib import Path
from random import Random

import atheris

from .guard import checked, run_checked, warmed
from .mutation import simple_havoc
from .target import Run, Target, load

INSTRUMENTED = ["cpimerge", "yaml", "zipfile", "pickletools"]
# What numba compiles is left as it is.
KERNELS = [
    ".".join(file.with_suffix("").parts)
    for file in Path("cpimerge").rglob("*.py")
    if file.parent.name == "kernels" or "@compiled" in file.read_text(encoding="utf-8")
]
MEASURED = 64  # one input of so many is looked at for the memory that it takes
MEMORY_BYTES = 4 << 30
MEMORY_DISK = "/dev/shm" if Path("/dev/shm").is_dir() else None


class _Engine:
    """Runs inputs, and keeps those that find something."""

    def __init__(self, target: Target, run: Run, scratch: Path, findings: Path) -> None:
        self.target = target
        self.run = run
        self.scratch = scratch
        self.findings = findings
        self.known: set[str] = set()
        self.accepted = 0
        self.count = (findings.parent / "accepted").open("wb", buffering=0)

    def one(self, data: bytes) -> None:
        """Called by libFuzzer for each input."""
        try:
            if hashlib.blake2b(data, digest_size=2).digest()[0] % MEASURED:
                self.accepted += checked(self.target, self.run, data, self.scratch)
            else:
                self.accepted += run_checked(self.target, self.run, data, self.scratch)
        except Exception as error:
            self._keep(data, error)
        os.pwrite(self.count.fileno(), b"%d" % self.accepted, 0)  # libFuzzer ends the process without a word to Python

    def _keep(self, data: bytes, error: Exception) -> None:
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if "/fuzz/" in frame.filename or "/cpimerge/" in frame.filename] or frames
        place = f"{type(error).__name__}-{Path(own[-1].filename).stem}-{own[-1].lineno}"
        if place in self.known:
            return
        self.known.add(place)
        (self.findings / place).write_bytes(data)
        text = "".join(traceback.format_exception(error))
        print(f"FINDING {place}\n{text}", file=sys.stderr, flush=True)

    def mutate(self, data: bytes, max_size: int, seed: int) -> bytes:
        """Called by libFuzzer for the next input."""
        random = Random(seed)

        def havoc(part: bytes) -> bytes:
            changed = atheris.Mutate(part, max(64, min(max_size, 2 * len(part) + 64)))
            return bytes(changed) or simple_havoc(random)(part)

        if self.target.mutate is None:
            return havoc(data)[:max_size]
        return self.target.mutate(bytes(data), random, havoc)[:max_size]


def _dictionary(target: Target, scratch: Path) -> list[str]:
    """The option that gives libFuzzer the target's words, if it has any."""
    file = scratch / "words.dict"
    words = (word.encode("utf-8", "surrogatepass")[:60] for word in target.words)
    file.write_text("".join('"' + "".join(f"\\x{byte:02x}" for byte in word) + '"\n' for word in words if word))
    return [f"-dict={file}"] if target.words else []


def main() -> None:
    """Never returns: libFuzzer ends the process."""
    name, findings, seeds, *options = sys.argv[1:]
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=MEMORY_DISK) as directory:
        scratch = Path(directory)
        with atheris.instrument_imports(include=INSTRUMENTED, exclude=KERNELS):
            target = load(name)
            engine = _Engine(target, warmed(target, scratch), scratch, Path(findings))
        for label, seed in target.seeds().items():
            Path(seeds, label).write_bytes(seed)
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
        options += [f"-max_len={target.max_bytes}", *_dictionary(target, scratch)]
        again = shlex.join([sys.executable, "-m", "fuzz.engine", name, findings, seeds])  # what a merge starts
        atheris.Setup([again, *options], engine.one, custom_mutator=engine.mutate)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
