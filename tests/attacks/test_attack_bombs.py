"""Files that would take all memory or all time: refused in a real process, in bounds that go with the file's size.

What is measured is what a file takes beside what a process takes that refuses something small.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from attacks.attack import COMMANDS, Spoil, both, folder, link, removed, snapshot, sparse, text
from attacks.conftest import furnish
from attacks.sealing import edited
from cpimerge import plan

MB = 1_000_000
TIMES = 40  # bytes of memory for a byte of JSON: a list of nothing takes three there, and 64 in memory
SPARE = 120 * MB  # for the numeric libraries, which an early refusal does not load
SECONDS = 60  # of the processor
WEIGHTS = "math/model.safetensors"


@dataclass(frozen=True)
class Cost:
    """What a process took: its exit code, what it said, the memory that it had at most, its processor's time."""

    code: int
    said: str
    nbytes: int
    seconds: float


MEASURED = """
import atexit, sys
from pathlib import Path
from cpimerge.cli import main

def report():
    status = Path("/proc/self/status").read_text()
    print("peak", status.partition("VmHWM:")[2].split()[0], file=sys.stderr)

atexit.register(report)
main()
"""


def cost(home: Path, command: str) -> Cost:
    """Of a command in a process of its own; its memory by its own account, as a child's begins with its parent's."""
    arguments = [argument.format(home=home) for argument in COMMANDS[command]]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = subprocess.run(
        [sys.executable, "-c", MEASURED, *arguments], capture_output=True, text=True, cwd=home, check=False
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    said, _, peak = process.stderr.rpartition("peak ")
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Cost(process.returncode, said, int(peak) * 1024, seconds)


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Cost]:
    """Of refusals that read next to nothing, by command."""
    home = furnish(tmp_path_factory.mktemp("usual"))
    plan(home / "recipe.yml", home / "plan", threads=1)
    (home / "plan/plan.json").write_text("{}")
    (home / WEIGHTS).write_bytes(b"")
    found = {command: cost(home, command) for command in ("plan", "fuse")}
    assert {one.code for one in found.values()} == {1}
    return found


def header(content: bytes) -> Spoil:
    """A header and no data."""
    return text(WEIGHTS, len(content).to_bytes(8, "little") + content)


def tensors(count: int) -> bytes:
    """So many empty tensors with short names."""
    entry = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    return ("{" + ",".join(f'"{number:x}":{entry}' for number in range(count)) + "}").encode()


def hollow(home: Path) -> None:
    """A header of the most that is allowed, which is a hole."""
    with open(home / WEIGHTS, "wb") as file:
        file.write((100_000_000).to_bytes(8, "little"))
        file.truncate(1 << 40)


def shards(home: Path) -> None:
    """An index of a hundred thousand files, none of which is there."""
    (home / WEIGHTS).unlink()
    weight_map = {f"t{number}": f"s{number}" for number in range(100_000)}
    (home / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": weight_map}))


def notes(plan: dict[str, object]) -> None:
    plan["notes"] = [[]] * 2_000_000


def entries(plan: dict[str, object]) -> None:
    plan["tensors"] = [{}] * 1_000_000


def keys(plan: dict[str, object]) -> None:
    plan.update({f"{number:x}": 0 for number in range(500_000)})


EMPTY = b"[" + b"[]," * 4_000_000 + b"[]]"
BOMBS: dict[str, tuple[str, Spoil, str]] = {
    "a header like a hole": ("plan", hollow, "its JSON is nested too deeply|not valid JSON"),
    "a header of lists": ("plan", header(b'{"a":' + EMPTY + b"}"), "its header entry must have exactly"),
    "a header that opens only": ("plan", header(b'{"a":' + b"[" * 20 * MB), "its JSON is nested too deeply"),
    "a hundred thousand tensors": ("plan", header(tensors(100_000)), "math: tensor '0': not in"),
    "a hundred thousand faults": (
        "plan",
        header(tensors(100_000).replace(b"F32", b"F3")),
        "tensor '0': unsupported dtype 'F3'",
    ),
    "one shape": (
        "plan",
        header(b'{"w":{"dtype":"F32","shape":[' + b"9," * 5 * MB + b'1],"data_offsets":[0,8]}}'),
        "larger",
    ),
    "a hundred thousand shards": ("plan", shards, "s0: missing"),
    "a config of lists": (
        "plan",
        both(text("math/config.json", b'{"a":' + EMPTY + b"}"), text(WEIGHTS, b"")),
        "math/model.safetensors: incomplete",
    ),
    "a config like a hole": ("plan", sparse("math/config.json"), "is larger than 64 MB"),
    "keys of a recipe": ("plan", text("recipe.yml", "".join(f"k{n}: 1\n" for n in range(30_000))), "k0: unknown key"),
    "brackets of a recipe": ("plan", text("recipe.yml", "? " + "[" * 999_000), "nested more than 20 deep"),
    "anchors of a recipe": ("plan", text("recipe.yml", "a:\n" + "- &a x\n" * 50_000), "anchors such as '&a'"),
    "models of a recipe": (
        "plan",
        text(
            "recipe.yml",
            "merge_method: cpi\nbase_model: ./base\nmodels:\n" + "".join(f"- model: ./m{n}\n" for n in range(8_000)),
        ),
        "m0: no such directory",
    ),
    "a folder that leads everywhere": ("plan", link("base/more", "/"), "is a link out of its directory"),
    "modules without end": (
        "plan",
        both(
            removed(WEIGHTS),
            text("base/modules.json", json.dumps([{"path": "../" * 10 + str(n)} for n in range(20_000)])),
        ),
        "neither model.safetensors",
    ),
    "a plan of lists": ("fuse", edited(notes), "notes.0: Input should be a valid string"),
    "a plan of tensors that are none": ("fuse", edited(entries), "tensors.0."),
    "a plan of keys": ("fuse", edited(keys), "has an object of more than 10000 keys"),
    "a plan like a hole": ("fuse", sparse("plan/plan.json"), "is larger than 512 MB"),
    "a core like a hole": ("fuse", sparse("plan/cores/00.roaring"), "1099511627776 bytes for"),
    "offsets like a hole": ("fuse", sparse("plan/cores/00.npy"), "00.npy: is not uint64"),
    "a folder for a core": ("fuse", folder("plan/cores/00.roaring"), "is no ordinary file"),
}


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells how much memory a process had")
@pytest.mark.parametrize("case", BOMBS)
def test_bombs(home: Path, usual: dict[str, Cost], case: str) -> None:
    command, spoil, message = BOMBS[case]
    if command == "fuse":
        plan(home / "recipe.yml", home / "plan", threads=1)
    spoil(home)
    before = snapshot(home)
    files = [path.lstat() for path in home.rglob("*")]
    stored = sum(min(file.st_size, 512 * file.st_blocks) for file in files)
    found = cost(home, command)
    assert found.code == 1
    assert snapshot(home) == before
    assert any(part in found.said for part in message.split("|"))
    assert not {"Traceback", "unexpected"} & set(found.said.split())
    hole = 3 * 100 * MB if case == "a header like a hole" else 0  # which the format allows to be read
    assert found.nbytes - usual[command].nbytes < TIMES * stored + hole + SPARE
    assert found.seconds - usual[command].seconds < SECONDS
