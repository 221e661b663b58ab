"""`cpimerge sft` and `cpimerge probe`, as commands."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from trees import files
from worlds import TASKS, lines, write_base, write_data, write_lines, write_world

from cpimerge import cli
from cpimerge.train import Settings
from cpimerge.train.examples import read_data

SMALL = ("--holdout", "2", "--samples", "6", "--batch-size", "2", "--learning-rate", "0.01", "--max-length", "32")
REPORT_MODULES = """
import sys
from cpimerge import cli
try:
    cli.main(sys.argv[1:])
finally:
    heavy = {"torch", "transformers", "accelerate", "numba", "tokenizers", "huggingface_hub", "pydantic", "rich"}
    print(sorted(heavy & sys.modules.keys()), file=sys.stderr)
"""
INTERRUPT_SELF = """
import os, signal, sys
import torch
torch.set_num_threads(1)
from cpimerge import cli, screen
signal.signal(signal.SIGINT, signal.default_int_handler)  # a test runner in the background ignores it
def interrupt(phase, done, total):
    if (phase, done) == ("stage 2", 3):
        os.kill(os.getpid(), signal.SIGINT)
screen._tenths = lambda show: interrupt
cli.main(sys.argv[1:])
"""


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be changed."""
    return write_world(tmp_path_factory.mktemp("world"))


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.main, [str(argument) for argument in arguments])


def sft(world: Path, out: Path, *more: object, data: Path | None = None) -> Result:
    start = () if "--from-base" in more else ("--model", world / "fused")
    return run("sft", world / "plan", *start, "--data", data or world / "data.jsonl", "-o", out, *SMALL, *more)


def test_sft_shows_what_it_will_do_and_what_came_of_it(world: Path, tmp_path: Path) -> None:
    result = sft(world, tmp_path / "out")
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "out" / "cpimerge_training.json").read_bytes())
    shown = result.stdout.splitlines()
    assert shown[:3] == [
        "6 examples of each task, 2 more held out",
        " 1  math: 6 examples, 3 steps",
        " 2  code, chat: 12 examples, 6 steps",
    ]
    rows = [line.split() for line in shown]
    loss = record["stages"][1]["loss"]["chat"]
    frozen = record["stages"][1]["frozen"]
    assert ["2", "chat", f"{loss['first']:.4f}", f"{loss['last']:.4f}", f"{frozen:,}"] in rows
    looks = [record["held_out_before"], *(stage["held_out"] for stage in record["stages"])]
    assert ["math", f"{looks[0]['math']:.4f}", f"{looks[1]['math']:.4f}*", f"{looks[2]['math']:.4f}"] in rows
    assert ["code", f"{looks[0]['code']:.4f}", f"{looks[1]['code']:.4f}", f"{looks[2]['code']:.4f}*"] in rows
    assert shown[-1] == f"trained: {tmp_path / 'out'}"
    assert result.stderr.splitlines()[-1] == "stage 2: 100% of 6 steps"


def test_json_is_the_record_alone(world: Path, tmp_path: Path) -> None:
    result = sft(world, tmp_path / "out", "--from-base", "--json", "--steps", "1", "--freeze", "all")
    assert json.loads(result.stdout) == json.loads((tmp_path / "out" / "cpimerge_training.json").read_bytes())
    assert json.loads(result.stdout)["start"]["is_base"] is True
    assert json.loads(result.stdout)["freeze"] == "all"


def test_every_option_reaches_the_training(world: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {
        "samples": 5,
        "holdout": 1,
        "steps": 2,
        "batch_size": 3,
        "gradient_accumulation": 2,
        "learning_rate": 0.005,
        "weight_decay": 0.1,
        "warmup": 0.5,
        "max_length": 20,
        "save_steps": 1,
        "seed": 7,
    }
    options = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    result = run(
        *("probe", "--task", "code", "--model", world / "base", "--data", world / "data.jsonl", "--truncate", "--bf16"),
        *("-o", tmp_path / "out", "-q", *options),
    )
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")
    settings = json.loads((tmp_path / "out" / "cpimerge_training.json").read_bytes())["settings"]
    assert settings == asdict(Settings(**given, truncate=True, bf16=True))


def test_the_defaults_are_those_of_the_library(world: Path, tmp_path: Path) -> None:
    write_data(tmp_path / "data.jsonl", {"code": 34})
    result = run(
        "probe", "--task", "code", "--model", world / "base", "--data", tmp_path / "data.jsonl", "-o", tmp_path / "out"
    )
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "out" / "cpimerge_training.json").read_bytes())
    assert record["settings"] == asdict(Settings())
    assert record["samples"] == {"code": 2}


def test_problems_of_the_data_are_lines(world: Path, tmp_path: Path) -> None:
    found = [{**line, "task": "cod"} if line["task"] == "code" else line for task in TASKS for line in lines(task, 8)]
    result = sft(world, tmp_path / "out", data=write_lines(tmp_path / "d.jsonl", [*found, {"task": "math"}]))
    assert result.exit_code == 1
    assert result.stderr.splitlines() == [
        f"error: {tmp_path}/d.jsonl:25: has no 'prompt'. An example has 'prompt' and 'completion', or 'messages'",
        f"error: {tmp_path}/d.jsonl:9: 'cod' is no task of the plan; did you mean 'code'?; 8 lines name it",
    ]
    assert os.listdir(tmp_path) == ["d.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("sft", "plan", "--data", "d", "-o", "out"), "Give --model DIR, or --from-base."),
        (
            ("sft", "plan", "--data", "d", "-o", "out", "--from-base", "--model", "m"),
            "Give --model DIR, or --from-base.",
        ),
        (("sft", "plan", "--data", "d", "-o", "out", "--from-base", "--epochs", "1", "--steps", "1"), "not both"),
        (("sft", "plan", "--data", "d", "-o", "out", "--from-base", "--warmup", "1"), "not in the range 0<=x<1"),
        (("sft", "plan", "--data", "d", "-o", "out", "--from-base", "--learning-rate", "0"), "not in the range x>0"),
        (("probe", "--data", "d", "-o", "out", "--model", "m"), "Missing option '--task'"),
    ],
)
def test_wrong_options(arguments: tuple[str, ...], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "modules"),
    [
        (("sft", "--help"), 0, []),
        (("probe", "--help"), 0, []),
        (("sft", "plan", "--data", "data.jsonl", "-o", "out", "--epochs", "0"), 2, []),
        (("sft", "plan", "--from-base", "--data", "data.jsonl", "-o", "out"), 1, ["pydantic", "rich"]),
        (
            ("sft", "plan", "--model", "nowhere", "--data", "data.jsonl", "--holdout=2", "-o", "out"),
            1,
            ["pydantic", "rich"],
        ),
        (("sft", "nowhere", "--from-base", "--data", "data.jsonl", "-o", "out"), 1, ["pydantic", "rich"]),
        (("probe", "--task", "x", "--model", "base", "--data", "data.jsonl", "-o", "out"), 1, ["pydantic", "rich"]),
    ],
)
def test_what_is_wrong_is_said_before_pytorch_is_imported(
    world: Path, arguments: tuple[str, ...], code: int, modules: list[str]
) -> None:
    result = subprocess.run(
        [sys.executable, "-c", REPORT_MODULES, *arguments], cwd=world, capture_output=True, text=True, check=False
    )
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1] == str(modules)


def test_ctrl_c_keeps_what_is_done(world: Path, tmp_path: Path) -> None:
    command = [
        *("sft", str(world / "plan"), "--model", str(world / "fused"), "--data", str(world / "data.jsonl")),
        *("-o", str(tmp_path / "out"), "--save-steps", "2", *SMALL),
    ]
    interrupted = subprocess.run(
        [sys.executable, "-c", INTERRUPT_SELF, *command], capture_output=True, text=True, check=False
    )
    assert interrupted.returncode == 128 + signal.SIGINT
    assert interrupted.stderr.splitlines() == [
        "error: interrupted",
        "note: what is done so far is kept: the same command goes on from there, --restart begins anew",
    ]
    again = run(*command)
    assert again.exit_code == 0, again.output
    assert again.stderr.splitlines()[0] == "going on where an earlier run was cut off: stage 2, after step 2"
    whole = run(*command[: command.index("-o")], "-o", tmp_path / "whole", "--save-steps", "2", *SMALL)
    assert whole.exit_code == 0, whole.output
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_the_document_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command and the Python of docs/training.md, in their order."""
    write_base(tmp_path / "base")
    write_data(tmp_path / "data.jsonl", dict.fromkeys(TASKS, 36))
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert [kind for kind, _ in blocks] == ["text", "sh", "yaml", "sh", "sh", "json", "python"]
    for kind, block in blocks:
        if kind == "yaml":
            Path("recipe.yml").write_text(block, encoding="utf-8")
        elif kind == "python":
            exec(compile(block, "docs/training.md", "exec"), {})
        elif kind == "json":
            Path("shown.jsonl").write_text(block, encoding="utf-8")
            assert len(read_data(Path("shown.jsonl"), ["math", "chat"]).examples["chat"]) == 1
        for line in block.splitlines() if kind == "sh" else ():
            program, *arguments = shlex.split(line)
            assert program == "cpimerge"
            result = run(*arguments)
            assert result.exit_code == 0, result.output
    made = ("math", "code", "chat", "fused", "trained", "dpi", "again")
    assert all((tmp_path / name / "model.safetensors").is_file() for name in made)


def test_every_option_is_in_the_document() -> None:
    text = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    for command in (cli.main.commands["sft"], cli.main.commands["probe"]):
        for option in (name for param in command.params for name in param.opts if name.startswith("--")):
            assert re.search(rf"{option}[` ]", text) or option == "--output", option
