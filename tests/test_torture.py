"""A sample of `make torture`; and what it is worth: it must notice programs that do not survive."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the torture looks into /proc")

TORTURE = Path(__file__).parent.parent / "torture"
CAMPAIGNS = ("random kills", "killed commands", "death at a call", "loss of power", "errors")
NEW, OLD = b"new" * 1000, b"old" * 2000

# Replaces `file` by way of `new`, with some flushes or none; then the power goes.
REPLACE = f"""
import os, sys
sys.path.insert(0, {str(TORTURE)!r})
import calls
from pathlib import Path
from power import PowerLoss
root, mode, flushed = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
calls.install()
grave = root.parent / "grave"
grave.mkdir()
calls.arm(calls.Layer(root, calls.Fault(4 + len(flushed)), root.parent / "report", PowerLoss(grave, mode, 0)))
with open(root / "new", "wb") as file:
    file.write({NEW!r})
    file.flush()
    if "bytes" in flushed:
        os.fsync(file.fileno())
os.replace(root / "new", root / "file")
if "names" in flushed:
    os.fsync(os.open(root, os.O_RDONLY))
os.mkdir(root / "never")
"""
# Publishes an output file by file, so that a part of it can be seen.
BY_COPY = """
import shutil
from cpimerge import staging
def publish(files, real):
    shutil.copytree(files, real)
    shutil.rmtree(files)
staging._publish = publish
"""
# Leaves it to the system when the disk gets what is written.
UNFLUSHED = """
from cpimerge import journal, plan_files, staging, writer
for module in (journal, plan_files, staging, writer):
    for name in ("flush", "flush_data"):
        if hasattr(module, name):
            setattr(module, name, lambda where: None)
"""


def python(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, check=False, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=250)


def counted(output: str) -> dict[str, dict[str, int]]:
    """The table at the end: campaign → column → count."""
    lines = output.splitlines()
    place = next(number for number, line in enumerate(lines) if re.match(" +runs  ", line))
    header, *rows = (re.split("  +", line.strip()) for line in lines[place : place + len(CAMPAIGNS) + 3] if line)
    return {row[0]: dict(zip(header, map(int, row[1:]), strict=True)) for row in rows if len(row) == len(header) + 1}


def test_a_sample_of_it_finds_nothing(tmp_path: Path) -> None:
    done = python(TORTURE / "torture.py", "--short", "--directory", tmp_path)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    counts = counted(done.stdout)
    assert counts["all"]["mismatches"] == 0
    assert all(counts[name]["runs"] for name in CAMPAIGNS)
    assert counts["random kills"]["kills"] >= 8
    assert counts["all"]["resumed"] > 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("sabotage", "arguments", "found"),
    [
        pytest.param(BY_COPY, ("--only", "death at a call", "--every", "9"), "not whole", id="by copy"),
        pytest.param(UNFLUSHED, ("--only", "loss of power", "--every", "12"), "power loss", id="unflushed"),
    ],
)
def test_it_notices_what_does_not_survive(
    tmp_path: Path, sabotage: str, arguments: tuple[str, ...], found: str
) -> None:
    code = f"""
import sys
sys.path.insert(0, {str(TORTURE)!r})
import torture
steps = torture.make_steps_small
def sabotaged():
    steps()
    exec({sabotage!r}, {{}})
torture.make_steps_small = sabotaged
torture.main()
"""
    done = python("-c", code, *arguments, "--victim", "fuse shards", "--directory", tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert found in done.stdout
    assert counted(done.stdout)["all"]["mismatches"] > 0


@pytest.mark.parametrize(
    ("mode", "flushed", "left"),
    [
        ("nothing", (), {"file": OLD}),
        ("nothing", ("bytes",), {"file": OLD}),
        ("nothing", ("names",), {"file": b""}),
        ("nothing", ("bytes", "names"), {"file": NEW}),
        ("names", (), {"file": bytes(len(NEW))}),
        ("names", ("bytes",), {"file": NEW}),
        ("bytes", (), {"file": OLD}),
        ("bytes", ("names",), {"file": NEW}),
    ],
)
def test_a_disk_that_loses_power_has_what_was_flushed(
    tmp_path: Path, mode: str, flushed: tuple[str, ...], left: dict[str, bytes]
) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "file").write_bytes(OLD)
    done = python("-c", REPLACE, root, mode, *flushed)
    assert done.returncode == -9, done.stderr
    assert (tmp_path / "report").read_text().startswith("mkdir ")
    assert {path.name: path.read_bytes() for path in root.iterdir()} == left
