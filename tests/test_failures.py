"""What an operating system can do to a run: each is one clear error, the inputs are untouched, and it goes on later."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from checkpoints import save, write_recipe
from command_server import Ended, Server, wait_for
from trees import files

import cpimerge

TASKS = ("math", "code")
LAYERS, SHAPE = 11, (600, 500)
NOBODY = 65534
GO_ON = "note: what is done so far is kept: the same command goes on from there, --restart begins anew"
PLAN_AGAIN = "The inputs are not those that were planned: run `cpimerge plan` again"
PHASES = {"plan": "plan", "fuse": "fuse", "merge": "plan"}  # of a command, where it is hurt
COMMANDS = tuple(PHASES)
AS_NOBODY = f"import os; os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})"
ALWAYS_RECORD = "from cpimerge import plan_journal, writer; plan_journal.CHECKPOINT_SECONDS = 0; writer.FLUSH_BYTES = 1"

needs_root = pytest.mark.skipif(os.getuid() != 0, reason="only root may mount, and become somebody else")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and its experts, in three files each. Not to be changed."""
    root = tmp_path_factory.mktemp("models")
    generator = torch.Generator().manual_seed(0)
    names = ["model.embed.weight", *(f"model.layers.{layer}.weight" for layer in range(LAYERS))]
    base = {name: torch.randn(SHAPE, generator=generator).bfloat16() for name in names}
    save(root / "base", base, shards=3)
    for task in TASKS:
        update = {name: torch.randn(SHAPE, generator=generator) / 100 for name in names}
        save(root / task, {name: (base[name].float() + update[name]).bfloat16() for name in names}, shards=3)
    write_recipe(root / "recipe.yml", base_model=root / "base", models=[{"model": root / task} for task in TASKS])
    return root


@pytest.fixture(scope="module")
def server(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    sources = {command: models / ("plan" if command == "fuse" else "recipe.yml") for command in COMMANDS}
    first = [[command, str(source), "-o", str(models / command)] for command, source in sources.items()]
    first.append(["inspect", str(models / "none")])  # errors have imports of their own
    started = Server(tmp_path_factory.mktemp("said"), first)
    yield started
    started.close()


class Work:
    """A directory that everybody may enter, with models, `recipe.yml` for them, and `plan`, their plan."""

    def __init__(self, root: Path, server: Server) -> None:
        self.root = root
        self.server = server
        self.out = root / "outputs" / "out"
        self.out.parent.mkdir()
        self.inputs = {name: root / name for name in ("base", *TASKS)}
        models = [{"model": self.inputs[task]} for task in TASKS]
        self.recipe = write_recipe(root / "recipe.yml", base_model=self.inputs["base"], models=models)
        self.plan = root / "plan"
        assert server.run("plan", self.recipe, "-o", self.plan).code == 0
        self.before = self.contents()

    def line(self, command: str, out: Path | None = None) -> list[str | Path]:
        """A command that writes `out`, in several files if it is a model."""
        source = self.plan if command == "fuse" else self.recipe
        shards = [] if command == "plan" else ["--shard-size", "900KB"]
        return [command, source, "-o", self.out if out is None else out, *shards]

    def is_recorded(self) -> bool:
        """Whether a journal says that something is done."""
        return any(journal.read_bytes().count(b"\n") > 1 for journal in self.out.parent.rglob("journal"))

    def contents(self) -> dict[str, dict[str, bytes]]:
        return {name: files(path) for name, path in self.inputs.items()} | {"plan": files(self.plan)}

    def run(self, command: str, before: str = "") -> Ended:
        return self.server.run(*self.line(command), before=before)

    def check_refused(self, ended: Ended, *says: str, code: int = 1) -> None:
        """One line of error with these words, and nothing changed: neither the inputs nor what is seen of outputs."""
        assert ended.code == code, ended
        assert len([line for line in ended.errors if line != PLAN_AGAIN]) == 1, ended
        assert all(word in ended.errors[0] for word in says), ended
        assert "Traceback" not in ended.stderr
        assert "unexpected" not in ended.stderr
        assert not self.out.exists()
        assert self.contents() == self.before

    def check_done_again(self, command: str, *, goes_on: bool = False) -> None:
        """The same command, where nothing stands in its way, has the right bytes, and leaves nothing else."""
        ended = self.run(command)
        assert ended.code == 0, ended
        assert ("going on" in ended.stderr) == goes_on, ended
        assert self.server.run(*self.line(command, self.root / "whole")).code == 0
        assert files(self.out) == files(self.root / "whole")
        assert os.listdir(self.out.parent) == ["out"]
        assert self.contents() == self.before


@pytest.fixture
def work(models: Path, server: Server) -> Iterator[Work]:
    with tempfile.TemporaryDirectory(prefix="cpimerge-test-") as directory:
        root = Path(directory)
        for model in (models / name for name in ("base", *TASKS)):
            for file in Path(shutil.copytree(model, root / model.name)).iterdir():
                file.chmod(0o644)
        root.chmod(0o755)
        yield Work(root, server)


@contextmanager
def mounted(directory: Path, *options: str) -> Iterator[None]:
    """A file system in memory, of this size or kind."""
    directory.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", directory], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", directory], check=True)


# --- signals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "number"),
    [("plan", signal.SIGINT), ("fuse", signal.SIGINT), ("fuse", signal.SIGTERM), ("merge", signal.SIGHUP)],
)
def test_one_signal_stops_cleanly(work: Work, command: str, number: signal.Signals) -> None:
    with work.server.paused(*work.line(command), phase=PHASES[command]) as running:
        running.send(number)
        ended = running.wait()
    work.check_refused(ended, "interrupted", code=128 + number)
    assert ended.stderr.splitlines()[-1] == GO_ON
    work.check_done_again(command, goes_on=True)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_killed_run_goes_on(work: Work, command: str) -> None:
    with work.server.paused(*work.line(command), phase=PHASES[command], before=ALWAYS_RECORD) as running:
        wait_for(work.is_recorded)
        running.send(signal.SIGKILL)
        assert running.wait().code == -signal.SIGKILL
    assert not work.out.exists()
    work.check_done_again(command, goes_on=True)


def test_a_second_signal_ends_it_at_once(work: Work) -> None:
    """The first is answered by an orderly end, which here would take forever."""
    stuck = "import time; from cpimerge import stream; stream.Workers.close = lambda self: time.sleep(1000)"
    with work.server.paused(*work.line("fuse"), phase="fuse", before=stuck) as running:
        running.send(signal.SIGINT)
        with pytest.raises(TimeoutError):
            running.wait(0.3)
        running.send(signal.SIGINT)
        ended = running.wait()
    assert (ended.code, ended.errors) == (130, [])
    assert not work.out.exists()
    work.check_done_again("fuse", goes_on=True)


# --- two at a time ----------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_a_second_run_leaves_the_first_alone(work: Work, command: str) -> None:
    with work.server.paused(*work.line(command), phase=PHASES[command]) as running:
        work.check_refused(work.run(command), "another run is writing it")
    assert running.wait().code == 0
    assert work.server.run(*work.line(command, work.root / "whole")).code == 0
    assert files(work.out) == files(work.root / "whole")
    assert os.listdir(work.out.parent) == ["out"]


# --- disks ------------------------------------------------------------------------------------------


@needs_root
@pytest.mark.parametrize("command", COMMANDS)
def test_a_disk_that_is_too_small_is_told_before_the_start(work: Work, command: str) -> None:
    with mounted(work.out.parent, "size=64k"):
        work.check_refused(work.run(command), str(work.out.parent), "needs", "free", "another disk")
        assert not os.listdir(work.out.parent)


@needs_root
@pytest.mark.parametrize("command", COMMANDS)
def test_a_disk_that_somebody_else_fills_meanwhile(work: Work, command: str) -> None:
    """Space for the weights was set aside; what else does not fit is one error."""
    with mounted(work.out.parent, "size=16m"):
        with work.server.paused(*work.line(command), phase=PHASES[command]) as running:
            other = fill(work.out.parent)
        ended = running.wait()
        work.check_refused(ended, str(work.out.parent), "No space left on device")
        if command == "fuse":
            assert "fuse: 100%" in ended.stderr
        other.unlink()
        work.check_done_again(command, goes_on=GO_ON in ended.stderr)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_file_that_may_not_grow(work: Work, command: str) -> None:
    """The system's own limit on files: what a full disk is to those who may not mount one."""
    limit = 10_000
    before = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))"
    work.check_refused(work.run(command, before), str(work.out.parent), "File too large")
    work.check_done_again(command)


@needs_root
@pytest.mark.parametrize("command", COMMANDS)
def test_a_file_system_that_may_only_be_read(work: Work, command: str) -> None:
    with mounted(work.out.parent, "size=16m", "ro"):
        work.check_refused(work.run(command), str(work.out.parent), "Read-only file system")
    work.check_done_again(command)


@needs_root
@pytest.mark.parametrize("command", COMMANDS)
def test_a_directory_without_permission_to_write(work: Work, command: str) -> None:
    work.check_refused(work.run(command, AS_NOBODY), str(work.out.parent), "Permission denied")
    assert not os.listdir(work.out.parent)
    work.check_done_again(command)


@pytest.mark.parametrize(("command", "error"), [("plan", "EROFS"), ("fuse", "EACCES"), ("merge", "ENOSPC")])
def test_a_directory_that_cannot_be_made(work: Work, command: str, error: str) -> None:
    """For those who are not root, and for root: the first directory is refused."""
    before = f"""
import errno, os
def mkdir(path, *more, **named):
    raise OSError(errno.{error}, os.strerror(errno.{error}), path)
os.mkdir = mkdir
"""
    work.check_refused(work.run(command, before), str(work.out.parent), os.strerror(getattr(errno, error)))
    work.check_done_again(command)


@pytest.mark.parametrize("command", COMMANDS)
def test_an_output_on_another_file_system_than_everything_else(work: Work, command: str) -> None:
    elsewhere = Path("/dev/shm")
    if not elsewhere.is_dir() or elsewhere.stat().st_dev == work.root.stat().st_dev:
        pytest.skip("there is only one file system")
    with tempfile.TemporaryDirectory(dir=elsewhere) as directory:
        assert work.server.run(*work.line(command, Path(directory, "out"))).code == 0
        assert work.server.run(*work.line(command)).code == 0
        assert files(Path(directory)) == files(work.out.parent)


def fill(directory: Path) -> Path:
    """A file that takes all that is left of a file system."""
    with (directory / "other").open("wb", buffering=0) as other, suppress(OSError):
        while True:
            other.write(bytes(1 << 12))
    return directory / "other"


# --- names and places -------------------------------------------------------------------------------


@pytest.mark.parametrize(("command", "letter", "most"), [("plan", "x", 231), ("fuse", "é", 115), ("merge", "x", 231)])
def test_the_longest_name(work: Work, command: str, letter: str, most: int) -> None:
    work.out = work.out.with_name(letter * (most + 1))
    work.check_refused(work.run(command), "its name is too long: 231 bytes at most. Give another output directory")
    work.out = work.out.with_name(letter * most)
    assert work.run(command).code == 0
    assert os.listdir(work.out.parent) == [letter * most]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_path_that_is_too_long(work: Work, command: str) -> None:
    out = work.out
    work.out = out.joinpath(*["deep" * 50] * 21, "out")
    with pytest.raises(OSError, match="too long"):
        work.out.exists()
    ended = work.run(command)
    work.out = out
    work.check_refused(ended, "File name too long")
    assert not os.listdir(out.parent)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_working_directory_that_is_gone(work: Work, command: str) -> None:
    """Paths that are absolute need none."""
    gone = work.root / "gone"
    before = f"import os; os.mkdir({str(gone)!r}); os.chdir({str(gone)!r}); os.rmdir({str(gone)!r})"
    assert work.run(command, before).code == 0
    work.out = Path("out")
    ended = work.run(command, before)
    assert (ended.code, len(ended.errors)) == (1, 1), ended
    assert "unexpected" not in ended.stderr


# --- inputs -----------------------------------------------------------------------------------------


@needs_root
def test_inputs_without_permission_to_read(work: Work) -> None:
    """All of them are named, with the files of the models that are fine left out."""
    closed = [work.inputs["base"] / "model-00002-of-00003.safetensors", work.inputs["math"] / "config.json"]
    for file in closed:
        file.chmod(0o600)
    work.out.parent.chmod(0o777)
    ended = work.run("plan", AS_NOBODY)
    assert ended.code == 1
    assert all(any(str(file) in line and "Permission denied" in line for line in ended.errors) for file in closed)
    assert not os.listdir(work.out.parent)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_disk_that_cannot_be_read(work: Work, command: str) -> None:
    """From the middle of the run on."""
    number = errno.EIO
    before = f"""
import os
from cpimerge import stream, singles
from cpimerge.kernels import reading
real, calls = os.preadv, []
def preadv(handle, buffers, offset):
    calls.append(handle)
    if len(calls) > 20:
        raise OSError({number}, os.strerror({number}))
    return real(handle, buffers, offset)
os.preadv = preadv
stream._read_fast = lambda *given: False
singles.read_tensors = lambda *given: False
"""
    ended = work.run(command, before)
    work.check_refused(ended, ".safetensors: tensor 'model.", "cannot be read", os.strerror(number))
    work.check_done_again(command, goes_on=GO_ON in ended.stderr)


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace lets the system itself fail")
@pytest.mark.parametrize("command", COMMANDS)
def test_a_disk_that_really_cannot_be_read(work: Work, command: str) -> None:
    file = work.inputs["code"] / "model-00003-of-00003.safetensors"
    calls = "pread64,preadv,preadv2"
    fails: list[str | Path] = ["-e", f"trace={calls}", "-e", f"inject={calls}:error=EIO", "-P", file]
    with work.server.paused(*work.line(command), phase=PHASES[command], share=0) as running:
        process = str(running.process)
        trace = subprocess.Popen(["strace", "-f", "-qq", "-o", work.root / "trace", *fails, "-p", process])
        threads = Path(f"/proc/{process}/task")
        wait_for(lambda: all("TracerPid:\t0\n" not in (one / "status").read_text() for one in threads.iterdir()))
    ended = running.wait()
    trace.wait()
    work.check_refused(ended, f"{file}: tensor 'model.", "cannot be read: Input/output error")
    work.check_done_again(command, goes_on=GO_ON in ended.stderr)


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def rewrite(file: Path) -> None:
    """Other weights under the same header."""
    content = bytearray(file.read_bytes())
    for place in range(len(content) - 600_000, len(content), 7):
        content[place] ^= 1
    file.write_bytes(content)


def replace(file: Path) -> None:
    """By another file of the same name and header: what is open stays what it was."""
    other = file.with_suffix(".new")
    shutil.copyfile(file, other)
    rewrite(other)
    other.replace(file)


@pytest.mark.parametrize("change", [truncate, rewrite, replace, Path.unlink])
@pytest.mark.parametrize("command", ["plan", "fuse"])
def test_inputs_that_change_meanwhile(work: Work, command: str, change: Callable[[Path], None]) -> None:
    """It is told; or, where all that was needed had been opened or read, the result is what it would have been."""
    file = work.inputs["code"] / "model-00003-of-00003.safetensors"
    kept = file.read_bytes()
    with work.server.paused(*work.line(command), phase=PHASES[command], share=0) as running:
        change(file)
    ended = running.wait()
    status = file.stat() if file.exists() else None
    file.write_bytes(kept)
    if ended.code == 0:
        assert change in (replace, Path.unlink)
        assert status is None or change is replace
        work.server.run(*work.line(command, work.root / "whole"))
        assert files(work.out) == files(work.root / "whole")
        return
    assert str(file) in ended.errors[0] or "code" in ended.errors[0], ended
    work.check_refused(ended)
    work.check_done_again(command, goes_on=GO_ON in ended.stderr)


# --- the rest of the machine ------------------------------------------------------------------------


@needs_root
def test_no_temporary_directory_is_needed(work: Work) -> None:
    """One that is full, one that nobody may write to, and none at all: everything happens beside the output."""
    with mounted(work.root / "full", "size=64k"):
        fill(work.root / "full")
        for directory in (work.root / "full", Path("/proc/nothing")):
            before = f"import os, tempfile; os.environ['TMPDIR'] = tempfile.tempdir = {str(directory)!r}"
            for command in COMMANDS:
                work.out = work.root / f"{directory.name}-{command}" / "out"
                ended = work.run(command, before)
                assert ended.code == 0, ended


@needs_root
def test_kernels_that_cannot_be_kept(work: Work) -> None:
    """Where the installation cannot be written to, and there is no home, each run compiles what it needs."""
    package = Path(cpimerge.__file__).parent
    installed, nowhere = work.root / "installed", "/proc/nothing"
    models = [str(work.inputs[name]) for name in ("base", "math")]
    command = [sys.executable, "-m", "cpimerge", "inspect", *models, "--quiet"]
    environment = os.environ | {"PYTHONPATH": str(installed), "HOME": nowhere, "XDG_CACHE_HOME": nowhere}
    with mounted(installed, "size=16m"):
        shutil.copytree(package, installed / package.name, ignore=shutil.ignore_patterns("__pycache__"))
        subprocess.run(["mount", "-o", "remount,ro", installed], check=True)
        done = subprocess.run(command, env=environment, cwd="/", check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("command", COMMANDS)
def test_clocks_and_times_decide_nothing(work: Work, command: str) -> None:
    for number, directory in enumerate(work.inputs.values()):
        for file in directory.iterdir():
            os.utime(file, (0, 0) if number else (1 << 34, 1 << 34))
    back = "import itertools, time; hours = itertools.count(); time.time = lambda: 4e9 - 3600 * next(hours)"
    with work.server.paused(*work.line(command), phase=PHASES[command], before=f"{ALWAYS_RECORD}; {back}") as running:
        wait_for(work.is_recorded)
        running.send(signal.SIGKILL)
        running.wait()
    for path in work.out.parent.rglob(".*"):
        os.utime(path, (0, 0))
    work.check_done_again(command, goes_on=True)


@pytest.mark.parametrize("command", COMMANDS)
def test_few_open_files(work: Work, command: str) -> None:
    """As many as a process has at the start, and some for its work."""
    before = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))"
    assert work.run(command, before).code == 0


@pytest.mark.parametrize(("command", "where"), [("plan", "full"), ("fuse", "closed"), ("merge", "unread")])
def test_stderr_that_cannot_be_written(work: Work, command: str, where: str) -> None:
    """Nobody learns how far it is, and the work goes on."""
    before = {
        "full": "import os; os.dup2(os.open('/dev/full', os.O_WRONLY), 2)",
        "closed": "import os; os.close(2)",
        "unread": "import os; ends = os.pipe(); os.dup2(ends[1], 2); os.close(ends[0]); os.close(ends[1])",
    }[where]
    assert work.run(command, before).code == 0
    assert work.server.run(*work.line(command, work.root / "whole")).code == 0
    assert files(work.out) == files(work.root / "whole")
