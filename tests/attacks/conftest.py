"""A place with sound models, for attacks to spoil; and what must stay as it is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import save, write_recipe

from attacks.attack import done

MARK = "open('mark', 'w').close()\n"


def model(shift: float = 0.0) -> dict[str, torch.Tensor]:
    """A small model; `shift` moves every floating-point element."""
    floats = {
        "embed.weight": torch.arange(12.0).reshape(6, 2),
        "layers.0.w": torch.arange(6.0).reshape(2, 3),
        "layers.1.w": torch.arange(6.0).reshape(2, 3) / 4,
    }
    return {name: tensor + shift for name, tensor in floats.items()} | {"ids": torch.arange(3)}


def furnish(home: Path, parameters: Mapping[str, Any] | None = None) -> Path:
    """A base, two experts and their recipe, all sound, and modules that nobody may import; returns `home`."""
    for name, shift in (("base", 0.0), ("math", 0.5), ("code", -0.25)):
        save(home / name, model(shift))
        (home / name / "planted.py").write_text(MARK)
        (home / name / "planted_model.py").write_text(MARK)
    (home / "planted.py").write_text(MARK)
    models = [{"model": home / "math"}, {"model": home / "code"}]
    extra = {"parameters": dict(parameters)} if parameters else {}
    write_recipe(home / "recipe.yml", base_model=home / "base", models=models, **extra)
    return home


@pytest.fixture(scope="session", autouse=True)
def _warm(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Everything that a run imports and compiles is there before anything is watched."""
    from cpimerge import merge

    home = furnish(tmp_path_factory.mktemp("warm"), {"granularity": "row", "density": 0.5})
    merge(home / "recipe.yml", home / "out", threads=1)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A sound place, which is the working directory, too; beside it, what is none of a command's business."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/secret.txt").write_text("a secret")
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path / "home")
    return furnish(tmp_path / "home")


@pytest.fixture
def planned(home: Path) -> Path:
    """The same with a plan that has a core in every chunk, and rows with coefficients of their own."""
    furnish(home, {"density": 0.5, "granularity": "row", "space": "weights"})
    done(home, "plan")
    return home
