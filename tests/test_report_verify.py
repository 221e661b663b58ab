"""`cpimerge verify` on the command line: what it shows, and its exit code."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import reference
from checkpoints import write_case
from click.testing import CliRunner, Result
from test_semantics import fine_tunes
from verified import flip

import cpimerge
from cpimerge import api, cli
from cpimerge.report_verify import MAX_NOTES, verify_report
from cpimerge.verify_results import Failure, InputsVerification, Verification

FOUND = Verification("out", "plan", None, 7, 3, 1000, 200, 700, 100, 6, 12_000, 2000, ())
COLOUR = "\x1b[31m"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`plan` and `out` of two fine-tunes. Not to be changed."""
    root = tmp_path_factory.mktemp("made")
    cpimerge.plan(write_case(root, fine_tunes(["a", "b"]), reference.Settings()), root / "plan", threads=1)
    cpimerge.fuse(root / "plan", root / "out", threads=1)
    return root


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(cli.main, ["verify", *map(str, arguments)])


def test_a_report_says_what_was_proven() -> None:
    assert list(verify_report(FOUND)) == [
        "plan: plan",
        "files: 7 with the manifest's sha256",
        "elements: 1,000 of 3 tensors compared (200 in cores, 700 blended, 100 copied)",
        "cores: 6 compared with their definition",
        "read: 2.0 kB of the output, 12.0 kB of the inputs",
        "verified: nothing is wrong",
    ]


def test_a_sample_says_what_it_does_not_prove() -> None:
    lines = list(verify_report(replace(FOUND, sample=0.01)))
    assert lines[5].startswith(
        "sample: about 1% of each tensor. It does not prove the rest, nor the hashes of weights and"
    )


def test_failures_are_counted_and_notes_listed() -> None:
    some = tuple(f"note{COLOUR}{number}" for number in range(MAX_NOTES + 3))
    lines = list(verify_report(replace(FOUND, failures=(Failure("f", "p"),) * 2, notes=some)))
    assert lines[-1] == "NOT verified: 2 failures"
    assert lines[-2] == "note: and 3 more: --json has all"
    assert lines[-3] == f"note: note\\x1b[31m{MAX_NOTES - 1}"
    assert list(verify_report(replace(FOUND, failures=(Failure("f", "p"),))))[-1] == "NOT verified: 1 failure"


def test_a_report_of_inputs() -> None:
    found = InputsVerification("plan.json", ("base", f"a{COLOUR}"), 2, 8, 1500, ())
    assert list(verify_report(found)) == [
        "plan: plan.json",
        "inputs: base, a\\x1b[31m; 2 files, 8 tensors",
        "read: 1.5 kB",
        "verified: nothing is wrong",
    ]


def test_a_failure_is_one_line() -> None:
    assert str(Failure("f", "is wrong")) == "f: is wrong"
    full = Failure("f", "is wrong", "w", 7, "0.5 (0x3f00)", "0.25 (0x3e80)")
    assert str(full) == "f: tensor 'w': flat index 7: is wrong: expected 0.5 (0x3f00), found 0.25 (0x3e80)"


def test_the_command_says_yes(made: Path) -> None:
    result = run(made / "out")
    assert (result.exit_code, result.stdout.splitlines()[-1]) == (0, "verified: nothing is wrong")
    quiet = run(made / "out", "--plan", made / "plan", "--quiet", "--threads", "1", "--memory", "1GB")
    assert (quiet.exit_code, quiet.stdout, quiet.stderr) == (0, "", "")
    sampled = json.loads(run(made / "out", "--sample", "1%", "--json").stdout)
    assert (sampled["ok"], sampled["sample"], sampled["failures"]) == (True, 0.01, [])
    inputs = json.loads(run("--inputs", made / "plan", "--json").stdout)
    assert (inputs["ok"], inputs["inputs"]) == (True, ["base", "a", "b"])


def test_the_command_says_no(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "out", tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    flip(file, 8 * (file.stat().st_size - 2))
    for more in ((), ("--quiet",), ("--json",)):
        result = run(tmp_path / "out", "--plan", made / "plan", *more)
        assert result.exit_code == 1
        errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert len(errors) == 2
        assert errors[0].startswith(f"error: {file}: tensor 'model.scale': flat index 0: is not the ")
        assert errors[1] == f"error: {file}: its sha256 is not the manifest's"
    found = json.loads(result.stdout)
    assert found["ok"] is False
    assert [failure["tensor"] for failure in found["failures"]] == ["model.scale", None]


def test_inputs_that_changed(made: Path, tmp_path: Path) -> None:
    root = shutil.copytree(made, tmp_path / "made")
    cpimerge.plan(root / "recipe.yml", root / "plan", force=True, threads=1)
    file = root / "a" / "model.safetensors"
    flip(file, 8 * (file.stat().st_size - 2))
    result = run("--inputs", root / "plan")
    assert result.exit_code == 1
    assert result.stdout.splitlines()[-1] == "NOT verified: 1 failure"
    assert f"error: {root / 'a'}: tensor 'model.scale': changed since it was planned" in result.stderr.splitlines()


def test_a_hundred_failures_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    failures = tuple(Failure("f", f"is wrong{COLOUR}", f"t{number}") for number in range(123))
    monkeypatch.setattr(api, "verify", lambda *_, **__: replace(FOUND, failures=failures))
    result = run("out", "--json")
    lines = result.stderr.splitlines()
    assert (len(lines), lines[-1]) == (101, "error: and 23 more like these")
    assert lines[0] == "error: f: tensor 't0': is wrong\\x1b[31m"
    assert len(json.loads(result.stdout)["failures"]) == 123


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "Give OUT_DIR, or --inputs PLAN_DIR."),
        (("out", "--inputs", "plan"), "Give OUT_DIR, or --inputs PLAN_DIR."),
        (("--inputs", "plan", "--sample", "1%"), "--inputs reads all inputs of its plan"),
        (("--inputs", "plan", "--plan", "plan"), "--inputs reads all inputs of its plan"),
        (("out", "--sample", "200%"), "'200%' is not a share of the elements: write it like 1% or 0.01"),
    ],
)
def test_how_it_is_not_called(arguments: tuple[str, ...], said: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert said in result.stderr


def test_what_is_no_output(tmp_path: Path) -> None:
    result = run(tmp_path, "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout) == {
        "errors": [f"{tmp_path}: has no cpimerge_manifest.json. Give a directory that `cpimerge fuse` or `merge` wrote"]
    }
