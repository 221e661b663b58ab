"""The setting itself is sound, and its watch sees what it should."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from attacks.attack import COMMANDS, done, run, watched


@pytest.mark.parametrize("command", ["plan", "merge", "inspect"])
def test_without_an_attack_every_command_succeeds(home: Path, command: str) -> None:
    done(home, command)


def test_a_sound_plan_is_obeyed(planned: Path) -> None:
    done(planned, "fuse")
    assert (planned / "out/model.safetensors").is_file()


def misbehave(home: Path) -> None:
    import planted  # type: ignore[import-not-found] # noqa: F401

    (home / "elsewhere").mkdir()
    (home / "out").mkdir()
    os.system("true")
    subprocess.run(["true"], check=True)


def watched_misbehaviour(home: Path) -> None:
    with watched(home):
        misbehave(home)


def test_the_watch_sees_what_must_not_be(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(home))
    with pytest.raises(AssertionError) as caught:
        watched_misbehaviour(home)
    seen = str(caught.value)
    for what in ("import planted", f"open {home}/mark", f"os.mkdir {home}/elsewhere", "os.system", "subprocess.Popen"):
        assert what in seen
    assert f"{home}/out" not in seen
    sys.modules.pop("planted")


def test_a_command_that_succeeds_is_no_refusal(home: Path) -> None:
    assert run(home, *COMMANDS["inspect"]).exit_code == 0
