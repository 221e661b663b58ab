"""The commands, run in this process with click's runner, and as real processes where that is the point."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import resource
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from checkpoints import save, write_recipe
from click.testing import CliRunner, Result
from trees import files

import cpimerge
from cpimerge import api, cli, screen
from cpimerge.needs import Needs
from cpimerge.plan_file import Plan
from cpimerge.report import plan_report, plan_summary, render

TASKS = ("math", "code", "chat")
INTERRUPT_SELF = """
import os, signal, sys
from cpimerge import cli, screen
signal.signal(signal.SIGINT, signal.default_int_handler)  # a test runner in the background ignores it
def interrupt(phase, done, total):
    if phase == sys.argv[1]:
        os.kill(os.getpid(), signal.SIGINT)
screen._lines = lambda: interrupt
cli.main(sys.argv[2:])
"""
INTERRUPT_TWICE = """
import os, signal, sys
from contextlib import suppress
from cpimerge import cli, screen
signal.signal(signal.SIGINT, signal.default_int_handler)
def interrupt(phase, done, total):
    with suppress(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)
screen._lines = lambda: interrupt
cli.main(sys.argv[1:])
"""
REPORT_MODULES = """
import sys
from cpimerge import cli
try:
    cli.main(sys.argv[1:])
finally:
    print(sorted({"torch", "numba", "numpy", "pydantic", "rich"} & sys.modules.keys()), file=sys.stderr)
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and three experts, `recipe.yml` for them, and `plan`, their plan. Not to be changed."""
    root = tmp_path_factory.mktemp("models")
    generator = torch.Generator().manual_seed(0)
    base = {
        "model.layers.0.weight": torch.randn(40, 30, generator=generator),
        "model.layers.0.bias": torch.randn(30, generator=generator).bfloat16(),
        "model.layers.1.weight": torch.randn(40, 30, generator=generator),
        "model.position_ids": torch.arange(7),
    }
    save(root / "base", base)
    for task in TASKS:
        save(root / task, {name: tuned(tensor, generator) for name, tensor in base.items()})
    recipe = write_recipe(root / "recipe.yml", **recipe_keys(root))
    api.plan(recipe, root / "plan")
    return root


def tuned(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    if not tensor.is_floating_point():
        return tensor
    return tensor + (torch.randn(tensor.shape, generator=generator) / 100).to(tensor.dtype)


def recipe_keys(models: Path, **parameters: Any) -> dict[str, Any]:
    return {
        "base_model": models / "base",
        "models": [{"model": models / task} for task in TASKS],
        "parameters": {"density": 0.1} | parameters,
    }


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli.main, list(map(str, arguments)), prog_name="cpimerge")


def process(
    *arguments: str | Path,
    code: str | None = None,
    stdout: int = subprocess.PIPE,
    encoding: str = "utf-8",
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """A real run."""
    how = ["-m", "cpimerge"] if code is None else ["-c", code]
    command = [sys.executable, *how, *map(str, arguments)]
    everything = environment() | dict(env or {})
    return subprocess.run(
        command, env=everything, cwd=cwd, check=False, encoding=encoding, stdout=stdout, stderr=subprocess.PIPE
    )


def environment() -> dict[str, str]:
    forgiving = ("COLUMNS", "LINES", "NO_COLOR", "PYTHONIOENCODING")
    kept = {name: x for name, x in os.environ.items() if name not in forgiving}
    return kept | {"PYTHONPATH": str(Path(cpimerge.__file__).parents[1]), "TERM": "xterm"}


# --- what the commands do and print -----------------------------------------------------------------


def test_plan_prints_what_it_needs_and_what_it_found(models: Path, tmp_path: Path) -> None:
    result = run("plan", models / "recipe.yml", "-o", tmp_path / "my plan", "--threads", "2")
    assert (result.exit_code, result.exception) == (0, None)
    plan = Plan.load(tmp_path / "my plan")
    needs, report = result.stdout.split("\n\n", 1)
    assert [line.split(":")[0] for line in needs.splitlines()] == ["plan", "fuse", "both"]
    assert needs.splitlines()[1].startswith("fuse: reads 38.9 kB, writes 9.7 kB")
    assert needs.splitlines()[2].startswith("both: on 2 threads, in at most ")
    footer = f"\nplan: '{tmp_path}/my plan'   next: cpimerge fuse '{tmp_path}/my plan' -o OUT_DIR\n"
    assert report == render(plan_report(plan), None, color=False) + footer
    assert files(tmp_path / "my plan") == files(models / "plan")


def test_estimate_says_what_is_needed_and_leaves_nothing(models: Path, tmp_path: Path) -> None:
    before = files(models)
    shown = run("plan", models / "recipe.yml", "-o", tmp_path / "new" / "plan", "--estimate", "--threads", "1")
    assert (shown.exit_code, shown.exception) == (0, None)
    lines = shown.stdout.splitlines()
    assert lines[0].startswith("plan: reads 38.9 kB, writes at most ")
    assert lines[0].endswith(", takes less than 1 s")
    assert lines[1] == "fuse: reads 38.9 kB, writes 9.7 kB, takes less than 1 s"
    assert lines[2:] == ["both: on 1 thread, in at most 464.0 MB of memory"]
    data = json.loads(run("plan", models / "recipe.yml", "--estimate", "--json").stdout)
    assert data["output_bytes"] == 2 * 40 * 30 * 4 + 30 * 2 + 7 * 8
    assert 0 < data["plan_seconds"] < 60
    assert 0 < data["fuse_seconds"] < 60
    assert (files(models), list(tmp_path.iterdir())) == (before, [])


def test_plan_needs_somewhere_to_write(models: Path) -> None:
    result = run("plan", models / "recipe.yml")
    assert result.exit_code == 2
    assert "Missing option '--output' / '-o'" in result.stderr


def test_the_demo_says_what_it_needs(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    for name in ("demo", "demo_data", "tinylm"):
        monkeypatch.delitem(sys.modules, f"cpimerge.{name}", raising=False)
    result = run("demo")
    assert result.exit_code == 1
    assert result.stderr == "error: the demo trains models with PyTorch: pip install 'cpimerge[demo]'\n"


def test_fuse_prints_where_the_model_is_and_what_was_done(models: Path, tmp_path: Path) -> None:
    result = run("fuse", models / "plan", "--output", tmp_path / "out")
    assert (result.exit_code, result.exception) == (0, None)
    assert result.stdout == f"fused: {tmp_path}/out   1 file; tensors: 3 slerp, 1 not floating-point\n"
    assert files(tmp_path / "out").keys() == {
        "README.md",
        "config.json",
        "cpimerge_manifest.json",
        "model.safetensors",
    }


def test_merge_is_plan_and_fuse(models: Path, tmp_path: Path) -> None:
    fused = run("fuse", models / "plan", "-o", tmp_path / "fused")
    merged = run("merge", models / "recipe.yml", "-o", tmp_path / "merged")
    assert merged.exit_code == 0
    assert files(tmp_path / "merged") == files(tmp_path / "fused")
    plan = Plan.load(models / "plan")
    last = fused.stdout.replace("/fused ", "/merged ")
    assert merged.stdout.split("\n\n", 1)[1] == render(plan_report(plan), None, color=False) + "\n" + last
    assert {path.name for path in tmp_path.iterdir()} == {"fused", "merged"}


def test_shards_of_a_chosen_size(models: Path, tmp_path: Path) -> None:
    """The same tensors in more files, whichever command writes them; the plan knows nothing of it."""
    for command, source in (("fuse", models / "plan"), ("merge", models / "recipe.yml")):
        out = tmp_path / command
        assert run(command, source, "-o", out, "--shard-size", "5kB").exit_code == 0
        shards = sorted(path.name for path in out.glob("*.safetensors"))
        assert shards == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
        assert (out / "model.safetensors.index.json").is_file()
    assert files(tmp_path / "fuse") == files(tmp_path / "merge")


@pytest.mark.parametrize(
    ("size", "code", "problem"),
    [
        ("5 gigs", 2, "Error: Invalid value for '--shard-size': '5 gigs' is not a size: write it like 512MB or 2GiB"),
        ("0GB", 1, "error: shard_size: a file of 0 bytes holds nothing: write it like 5GB"),
    ],
)
def test_shard_sizes_that_are_none(models: Path, tmp_path: Path, size: str, code: int, problem: str) -> None:
    for command in ("fuse", "merge"):  # neither comes so far as to find that there is nothing to read
        result = run(command, tmp_path / "nowhere", "-o", tmp_path / "out", "--shard-size", size)
        assert (result.exit_code, result.stderr.splitlines()[-1]) == (code, problem)


def test_json_is_one_document_on_stdout(models: Path, tmp_path: Path) -> None:
    planned = run("plan", models / "recipe.yml", "-o", tmp_path / "plan", "--json")
    summary = json.loads(planned.stdout)
    assert summary["needs"]["output_bytes"] == 2 * 40 * 30 * 4 + 30 * 2 + 7 * 8
    assert summary == plan_summary(Plan.load(tmp_path / "plan"), Needs(**summary["needs"]))
    fused = run("fuse", tmp_path / "plan", "-o", tmp_path / "fused", "--json")
    merged = run("merge", models / "recipe.yml", "-o", tmp_path / "merged", "--json")
    for result, out in ((fused, "fused"), (merged, "merged")):
        assert json.loads(result.stdout) == json.loads((tmp_path / out / "cpimerge_manifest.json").read_bytes())


def test_quiet_says_nothing(models: Path, tmp_path: Path) -> None:
    for command in (
        ("plan", models / "recipe.yml", "-o", tmp_path / "plan"),
        ("fuse", tmp_path / "plan", "-o", tmp_path / "fused"),
        ("merge", models / "recipe.yml", "-o", tmp_path / "merged"),
    ):
        result = run(*command, "--quiet")
        assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")


def test_force_replaces_what_is_there(models: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    refused = f"error: {tmp_path}/out: not empty. Give another output directory, or --force to replace all of it\n"
    for command in (("plan", models / "recipe.yml"), ("fuse", models / "plan"), ("merge", models / "recipe.yml")):
        result = run(*command, "-o", tmp_path / "out")
        assert (result.exit_code, result.stdout, result.stderr) == (1, "", refused)
    assert files(tmp_path / "out") == {"old": b""}
    for command in (("plan", models / "recipe.yml"), ("fuse", models / "plan"), ("merge", models / "recipe.yml")):
        assert run(*command, "-o", tmp_path / "out", "--force").exit_code == 0
        assert "old" not in files(tmp_path / "out")
    assert "model.safetensors" in files(tmp_path / "out")


# --- errors -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["plan", "merge"])
def test_all_mistakes_in_a_recipe_are_listed_a_line_each(models: Path, tmp_path: Path, command: str) -> None:
    recipe = write_recipe(tmp_path / "r.yml", **recipe_keys(models, densty=1, tau=2))
    result = run(command, recipe, "-o", tmp_path / "out" / "deep")
    assert (result.exit_code, result.stdout) == (1, "")
    lines = result.stderr.splitlines()
    assert lines[0] == f"error: {recipe}:9: parameters.densty: unknown key; did you mean 'density'?"
    assert lines[1].startswith(f"error: {recipe}:10: parameters.tau: ")
    assert len(lines) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["r.yml"]


def test_errors_as_json(models: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "r.yml", **recipe_keys(models, densty=1, tau=2))
    result = run("plan", recipe, "-o", tmp_path / "out", "--json")
    assert result.exit_code == 1
    errors = json.loads(result.stdout)
    assert list(errors) == ["errors"]
    assert [f"error: {problem}" for problem in errors["errors"]] == result.stderr.splitlines()


def test_debug_adds_the_traceback(tmp_path: Path) -> None:
    expected = f"error: {tmp_path}/plan.json: not found. Make a plan with `cpimerge plan RECIPE -o {tmp_path}`"
    plain = run("fuse", tmp_path, "-o", tmp_path / "out")
    debug = run("fuse", tmp_path, "-o", tmp_path / "out", "--debug")
    assert (plain.exit_code, debug.exit_code) == (1, 1)
    assert plain.stderr.splitlines() == [expected]
    lines = debug.stderr.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1] == expected
    assert any("in load" in line for line in lines)


def test_no_more_than_a_hundred_problems_on_a_screen(models: Path, tmp_path: Path) -> None:
    wrong = {f"wrong{number}": 1 for number in range(123)}
    recipe = write_recipe(tmp_path / "r.yml", **recipe_keys(models, **wrong))
    result = run("plan", recipe, "-o", tmp_path / "out", "--json")
    lines = result.stderr.splitlines()
    assert len(lines) == 101
    assert lines[-1] == "error: and 23 more like these"
    assert len(json.loads(result.stdout)["errors"]) == 123


def test_control_characters_in_a_message_are_escaped(tmp_path: Path) -> None:
    result = run("plan", "no\x1b[31m\nsuch\udcff.yml", "-o", tmp_path / "out")
    assert result.stderr == "error: no\\x1b[31m\\nsuch\\udcff.yml: cannot be read: No such file or directory\n"


@pytest.mark.parametrize(
    ("raised", "line"),
    [
        (ValueError("a\nb"), "error: unexpected ValueError: a\\nb. Please report this, with what --debug shows"),
        (MemoryError(), "error: unexpected MemoryError. Please report this, with what --debug shows"),
    ],
)
def test_what_nobody_foresaw(monkeypatch: pytest.MonkeyPatch, raised: Exception, line: str) -> None:
    monkeypatch.setattr(api, "fuse", raises(raised))
    result = run("fuse", "plan", "-o", "out", "--json")
    assert (result.exit_code, result.stderr.splitlines()) == (1, [line])
    assert len(json.loads(result.stdout)["errors"]) == 1


def raises(error: BaseException) -> Callable[..., Any]:
    def function(*arguments: Any, **options: Any) -> Any:
        raise error

    return function


def test_too_little_memory_is_an_error_and_not_a_usage_error(models: Path, tmp_path: Path) -> None:
    result = run("plan", models / "recipe.yml", "-o", tmp_path / "out", "--memory", "1MB", "--threads", "1")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: memory: 1.0 MB is too little for 1 thread")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "Missing argument 'RECIPE'."),
        (("r.yml",), "Missing option '--output' / '-o'."),
        (("r.yml", "-o", "out", "--threads", "0"), "Invalid value for '--threads': 0 is not in the range x>=1."),
        (
            ("r.yml", "-o", "out", "--memory", "lots"),
            "Invalid value for '--memory': 'lots' is not a size: write it like 512MB or 2GiB",
        ),
        (("r.yml", "-o", "out", "--thread", "1"), "No such option '--thread'. Did you mean '--threads'?"),
    ],
)
def test_usage_errors_exit_with_2(arguments: tuple[str, ...], message: str) -> None:
    result = run("plan", *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.splitlines()[0] == "Usage: cpimerge plan [OPTIONS] RECIPE"
    assert result.stderr.splitlines()[-1] == f"Error: {message}"


@pytest.mark.parametrize("command", ["plan", "fuse", "merge"])
def test_every_command_has_the_common_options(command: str) -> None:
    options = {name for option in cli.main.commands[command].params for name in option.opts}
    common = {"--output", "-o", "--threads", "--memory", "--force", "--quiet", "-q", "--json", "--debug"}
    assert options >= {option for option in common if option != "as_json"}
    result = run(command, "-h")
    assert result.exit_code == 0
    assert all(f"{option} " in result.stdout for option in common if option.startswith("--"))


# --- progress ---------------------------------------------------------------------------------------


def test_progress_is_a_line_for_every_tenth_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    update = screen._lines()
    for done in (0, 5, 10, 11, 29, 30, 99, 100, 100):
        update("plan", done * 10, 1000)
    update("fuse", 0, 0)
    lines = [f"plan: {tenth}% of 1.0 kB" for tenth in (10, 20, 30, 90, 100)] + ["fuse: 100% of 0 B"]
    assert capsys.readouterr() == ("", "\n".join(lines) + "\n")


def test_progress_goes_to_stderr_and_ends(models: Path, tmp_path: Path) -> None:
    result = run("merge", models / "recipe.yml", "-o", tmp_path / "out", "--json")
    phases = [line.split(":")[0] for line in result.stderr.splitlines()]
    assert phases == sorted(phases, reverse=True)
    assert [line for line in result.stderr.splitlines() if "100%" in line] == [
        "plan: 100% of 38.9 kB",
        "fuse: 100% of 9.7 kB",
    ]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_a_bar_with_rate_and_time_left_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with screen.Screen(quiet=False, as_json=False, debug=False).progress() as update:
        update("plan", 0, 2000)
        update("plan", 1000, 2000)
        update("plan", 2000, 2000)
        cleared = terminal.getvalue()
        update("fuse", 1, 10)
    assert "plan:   0%|" in cleared
    assert "B/s]" in cleared
    assert "<" in cleared  # elapsed<left
    assert cleared.endswith("\r")
    assert cleared.split("\r")[-2].strip() == ""
    assert "fuse:   0%|" in terminal.getvalue().removeprefix(cleared)
    assert terminal.getvalue().split("\r")[-2].strip() == ""
    assert "\n" not in terminal.getvalue()


@pytest.mark.parametrize(("columns", "width"), [(120, 120), (0, 80)])
def test_a_real_terminal(models: Path, tmp_path: Path, columns: int, width: int) -> None:
    """Bars as wide as it is, the report in bold; also where it does not know its size."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 0, columns, 0, 0))
    paths = map(str, (models / "recipe.yml", "-o", tmp_path / "out"))
    command = [sys.executable, "-m", "cpimerge", "merge", *paths]
    with subprocess.Popen(command, env=environment(), stdout=theirs, stderr=theirs) as running:
        os.close(theirs)
        shown = b"".join(iter(partial(read_terminal, ours), b"")).decode()
    os.close(ours)
    assert running.returncode == 0
    bars = [line for line in shown.split("\r") if line.startswith(("plan:   ", "fuse:   "))]
    assert {line[:4] for line in bars} == {"plan", "fuse"}
    assert {len(line) for line in bars} == {width}
    assert "\x1b[1mTasks: 2,430 elements, mean update |Δ|\x1b[0m\r\n" in shown
    assert shown.endswith("   1 file; tensors: 3 slerp, 1 not floating-point\r\n")


def read_terminal(terminal: int) -> bytes:
    """What is shown next; nothing where everybody else has closed it."""
    try:
        return os.read(terminal, 1 << 16)
    except OSError:
        return b""


# --- processes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "modules"),
    [
        (("--help",), 0, []),
        (("plan", "--help"), 0, []),
        (("--version",), 0, []),
        (("plan", "nowhere.yml", "-o", "out"), 1, ["pydantic", "rich"]),
        (("plan", "damaged.yml", "-o", "out"), 1, ["pydantic", "rich"]),
        (("merge", "misspelt.yml", "-o", "out"), 1, ["pydantic", "rich"]),
        (("merge", "absent.yml", "-o", "out"), 1, ["pydantic", "rich"]),
        (("plan", "right.yml", "-o", "full"), 1, ["pydantic", "rich"]),
        (("fuse", "full", "-o", "out", "--memory", "x"), 2, []),
    ],
)
def test_what_needs_no_numbers_imports_no_numeric_library(
    models: Path, tmp_path: Path, arguments: tuple[str, ...], code: int, modules: list[str]
) -> None:
    (tmp_path / "damaged.yml").write_text("models: [", encoding="utf-8")
    write_recipe(tmp_path / "misspelt.yml", **recipe_keys(models, densty=1))
    write_recipe(tmp_path / "absent.yml", **recipe_keys(tmp_path))
    write_recipe(tmp_path / "right.yml", **recipe_keys(models))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    result = process(*arguments, code=REPORT_MODULES, cwd=tmp_path)
    assert result.returncode == code
    assert result.stderr.splitlines()[-1] == str(modules)
    assert "Traceback" not in result.stderr


def test_help_takes_less_than_a_third_of_a_second() -> None:
    """Of processor time: this machine may be busy."""

    def seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert "plan" in process("--help").stdout
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(seconds() for _ in range(3)) < 0.3


def test_version_as_a_module() -> None:
    result = process("--version")
    assert (result.returncode, result.stdout) == (0, f"cpimerge, version {cpimerge.__version__}\n")


@pytest.mark.parametrize(("phase", "command"), [("plan", "plan"), ("plan", "merge")])
def test_an_interrupt_is_one_line_and_leaves_nothing(models: Path, tmp_path: Path, phase: str, command: str) -> None:
    arguments = (phase, command, models / "recipe.yml", "-o", tmp_path / "out", "--json")
    result = process(*arguments, code=INTERRUPT_SELF)
    assert (result.returncode, result.stderr) == (130, "error: interrupted\n")
    assert json.loads(result.stdout) == {"errors": ["interrupted"]}
    assert not list(tmp_path.iterdir())


def test_an_interrupt_keeps_what_is_done(models: Path, tmp_path: Path) -> None:
    arguments = ("merge", models / "recipe.yml", "-o", tmp_path / "out")
    whole = process(*arguments[:-1], tmp_path / "whole", "--json")
    result = process("fuse", *arguments, "--json", code=INTERRUPT_SELF)
    kept = "what is done so far is kept: the same command goes on from there, --restart begins anew"
    assert (result.returncode, result.stderr) == (130, f"error: interrupted\nnote: {kept}\n")
    assert json.loads(result.stdout) == {"errors": ["interrupted"], "notes": [kept]}
    assert not (tmp_path / "out").exists()
    result = process(*arguments, "--json")
    assert (result.returncode, result.stdout) == (0, whole.stdout)
    assert "going on where an earlier run was cut off: " in result.stderr
    assert "plan: " not in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]
    process("fuse", *arguments, "--force", code=INTERRUPT_SELF)
    result = process(*arguments, "--force", "--restart")
    assert result.returncode == 0
    assert "going on" not in result.stderr
    assert "plan: 100%" in result.stderr


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGHUP", 129)])
def test_other_requests_to_end(models: Path, tmp_path: Path, name: str, code: int) -> None:
    asking = INTERRUPT_SELF.replace("signal.SIGINT)", f"signal.{name})")
    result = process("plan", "plan", models / "recipe.yml", "-o", tmp_path / "out", code=asking)
    assert (result.returncode, result.stderr) == (code, "error: interrupted\n")
    assert not list(tmp_path.iterdir())


def test_a_second_interrupt_ends_at_once(models: Path, tmp_path: Path) -> None:
    """Although the work does not stop for the first."""
    result = process("plan", models / "recipe.yml", "-o", tmp_path / "out", code=INTERRUPT_TWICE)
    assert (result.returncode, result.stderr) == (130, "")


def test_a_signal_that_is_ignored_stays_so(models: Path, tmp_path: Path) -> None:
    """As nohup wants it."""
    ignoring = INTERRUPT_SELF.replace("signal.default_int_handler", "signal.SIG_IGN")
    result = process("plan", "plan", models / "recipe.yml", "-o", tmp_path / "out", code=ignoring)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_a_reader_that_has_gone_does_not_stop_the_work(models: Path, tmp_path: Path, options: tuple[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        result = process("merge", models / "recipe.yml", "-o", tmp_path / "out", "-q", *options, stdout=writer)
        shown = process("merge", models / "recipe.yml", "-o", tmp_path / "shown", *options, stdout=writer)
    finally:
        os.close(writer)
    assert (result.returncode, result.stderr) == (0, "")
    assert shown.returncode == 0
    assert shown.stderr.splitlines()[-1] == "fuse: 100% of 9.7 kB"
    assert files(tmp_path / "shown") == files(tmp_path / "out")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("options", [(), ("--json",)])
def test_a_full_disk_behind_stdout_is_one_line(models: Path, tmp_path: Path, options: tuple[str]) -> None:
    with open("/dev/full", "w", encoding="utf-8") as full:
        result = process("fuse", models / "plan", "-o", tmp_path / "out", *options, stdout=full.fileno())
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == "error: stdout: cannot be written: No space left on device"
    assert result.stderr.count("error") == 1
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize("where", ["/dev/full", "closed pipe"])
@pytest.mark.parametrize("recipe", ["recipe.yml", "nowhere.yml"])
def test_stderr_that_cannot_be_written_does_not_stop_the_work(
    models: Path, tmp_path: Path, where: str, recipe: str
) -> None:
    if where == "closed pipe":
        reader, writer = os.pipe()
        os.close(reader)
    else:
        writer = os.open(where, os.O_WRONLY)
    command = [sys.executable, "-m", "cpimerge", "plan", str(models / recipe), "-o", str(tmp_path / "out")]
    result = subprocess.run(command, env=environment(), stdout=subprocess.PIPE, stderr=writer, text=True, check=False)
    os.close(writer)
    assert result.returncode == (0 if recipe == "recipe.yml" else 1)
    assert (tmp_path / "out" / "plan.json").exists() == (recipe == "recipe.yml")


def test_a_locale_without_the_characters_is_no_reason_to_fail(models: Path, tmp_path: Path) -> None:
    arguments = ("plan", models / "recipe.yml", "-o", tmp_path / "out")
    result = process(*arguments, env={"PYTHONIOENCODING": "latin-1"}, encoding="latin-1")
    assert result.returncode == 0
    assert "Tasks: 2,430 elements, mean update |?|" in result.stdout
    assert "? ½ ulp" in result.stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_request_to_end_that_python_passes_over_is_made_again(number: int) -> None:
    """It raises nothing out of the callbacks of objects that go away."""

    class Thing:
        def __del__(self) -> None:
            os.kill(os.getpid(), number)

    def work() -> None:
        thing = Thing()
        del thing
        time.sleep(20)

    begin = time.monotonic()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a test runner in the background ignores it
    try:
        with pytest.raises(screen.Stopped) as raised, screen._signals():
            work()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert raised.value.number == number
    assert time.monotonic() - begin < 10


def test_only_cli_screen_and_report_know_of_terminals() -> None:
    """DESIGN: the library is silent; a callback tells of progress."""
    package = Path(cpimerge.__file__).parent
    found = {
        path.stem
        for path in package.glob("*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        if line.split()[:1] in (["import"], ["from"]) and line.split()[1].split(".")[0] in ("click", "rich", "tqdm")
    }
    assert found <= {"cli", "cli_training", "report", "report_inspect", "report_training", "screen"}
    assert isinstance(cli.main, click.Group)
