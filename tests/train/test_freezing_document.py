"""What docs/freezing.md shows works as it stands there."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from staged import World, make_world
from test_callback import Rows, Scored, unmoved
from torch.utils.data import DataLoader
from transformers import TrainingArguments

DOCUMENT = Path(__file__).parent.parent.parent / "docs" / "freezing.md"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("staged"))


def block(title: str) -> str:
    """The code in a section."""
    section = DOCUMENT.read_text(encoding="utf-8").split(f"\n## {title}\n")[1].split("\n## ")[0]
    (text,) = re.findall(r"^```python\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)
    return str(text).replace("stage=2", "stage=3")


@pytest.mark.parametrize("title", ["In a loop", "In a Trainer"])
def test_it_works(title: str, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world.plan.parent)
    model = Scored()
    start = copy.deepcopy(model)
    arguments = TrainingArguments(
        str(tmp_path), max_steps=3, use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no",
        dataloader_pin_memory=False, learning_rate=0.05,
    )  # fmt: skip
    names: dict[str, Any] = {
        "model": model,
        "optimizer": torch.optim.AdamW(model.parameters(), lr=0.05),
        "loader": DataLoader(Rows(), batch_size=4),
        "dataset": Rows(),
        "arguments": arguments,
    }
    exec(compile(block(title), DOCUMENT.name, "exec"), names)
    states = unmoved(world, model, start)
    assert all(frozen for frozen, _ in states.values())
    assert not states["hidden.weight"][1]
    if "frozen" in names:
        frozen = names["frozen"]
        masks = world.masks(3, "prior")
        assert (frozen.tasks, frozen.elements) == (("c", "a", "d"), sum(int(mask.sum()) for mask in masks.values()))
        assert sum(frozen.tensors.values()) == frozen.elements == frozen.nbytes
