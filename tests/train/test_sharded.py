"""Frozen cores where two processes have a part of every parameter each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from staged import Masks, Small, World, make_world
from train_loop import rows, train

from cpimerge.train import FrozenCores

HERE = Path(__file__).parent
PROCESSES = 2
SECONDS = 240


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("staged"))


@pytest.fixture(scope="module")
def results(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the processes wrote."""
    directory = tmp_path_factory.mktemp("sharded")
    paths = os.pathsep.join(map(str, [HERE.parent.parent, HERE.parent, HERE]))
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    arguments = [str(PROCESSES), str(directory), str(world.plan)]
    files = [open(directory / f"output{rank}", "w+") for rank in range(PROCESSES)]  # noqa: SIM115 - closed below
    processes = [
        subprocess.Popen(
            [sys.executable, str(HERE / "sharded.py"), str(rank), *arguments],
            env=environment, stdout=file, stderr=subprocess.STDOUT,
        )
        for rank, file in enumerate(files)
    ]  # fmt: skip
    try:
        codes = [process.wait(SECONDS) for process in processes]
    finally:
        for process, file in zip(processes, files, strict=True):
            process.kill()
            process.wait()
            file.close()
    assert codes == [0] * PROCESSES, "\n".join((directory / f"output{rank}").read_text() for rank in range(PROCESSES))
    return directory


@pytest.fixture(scope="module")
def masks(world: World) -> Masks:
    return world.masks(3, "prior")


@pytest.fixture(scope="module")
def whole(world: World) -> dict[str, torch.Tensor]:
    """What one process comes to, without shards."""
    model = Small()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    FrozenCores(world.plan, model, stage=3).attach(optimizer)
    train(model, optimizer, rows())
    return dict(model.state_dict())


@pytest.mark.parametrize("way", ["late", "early", "plain", "ddp"])
def test_trained_as_by_one_process(way: str, results: Path, masks: Masks, whole: dict[str, torch.Tensor]) -> None:
    start = Small().state_dict()
    found = load_file(results / f"{way}.safetensors")
    assert found.keys() == whole.keys()
    for name, value in found.items():
        mask = masks[name]
        assert torch.equal(value[mask], start[name][mask]), name
        torch.testing.assert_close(value[~mask], whole[name][~mask], rtol=1e-4, atol=1e-5)
        assert (value != start[name])[~mask].all(), name


def test_without_it_they_move(results: Path, masks: Masks) -> None:
    start = Small().state_dict()
    for name, value in load_file(results / "control.safetensors").items():
        assert (value != start[name])[masks[name]].all(), name


def test_shards_by_columns_and_copies(results: Path, masks: Masks) -> None:
    start = Small().state_dict()
    for name, value in load_file(results / "columns.safetensors").items():
        assert torch.equal(value == start[name], masks[name]), name
        stepped = start[name] - 0.5 * (1 + 0.1 * start[name])
        torch.testing.assert_close(value[~masks[name]], stepped[~masks[name]])


def held(results: Path, way: str) -> list[Any]:
    """What each process said."""
    return [json.loads((results / f"held{rank}.json").read_text())[way] for rank in range(PROCESSES)]


@pytest.mark.parametrize("way", ["late", "early", "plain", "columns"])
def test_each_process_holds_its_part(way: str, results: Path, masks: Masks) -> None:
    first, second = held(results, way)
    for name, mask in masks.items():
        if not mask.any():
            continue
        if way != "columns":
            pieces = [*mask.chunk(PROCESSES), mask[:0]][:PROCESSES]  # a row has one piece
        elif mask.dim() == 2:
            pieces = list(mask.chunk(PROCESSES, dim=1))
        else:
            pieces = [mask, mask]
        assert [each["tensors"][name] for each in (first, second)] == [int(piece.sum()) for piece in pieces], name
    assert all(each["elements"] == sum(each["tensors"].values()) == each["nbytes"] for each in (first, second))


def test_a_sum_over_processes_is_refused(results: Path) -> None:
    assert all(
        message.startswith("parameter 'x': is sharded as ") and message.endswith("only Shard and Replicate are known")
        for message in held(results, "refused")
    )
