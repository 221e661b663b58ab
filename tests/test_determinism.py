"""The same bytes for every number of threads and every memory budget; and the budget is kept."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from checkpoints import save, write_recipe
from trees import files

import cpimerge
from cpimerge import examination, needs, preflight
from cpimerge.budget import RUNTIME_BYTES, Budget
from cpimerge.examination import SMALL
from cpimerge.plan_file import Plan
from cpimerge.stream import BLOCK_CHUNKS, CHUNK, chunks

LARGE = (2200, 2048)  # more than one block of chunks
SHAPES: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
    "model.embed.weight": (LARGE, torch.bfloat16),
    "model.layers.0.mlp.weight": ((600, 500), torch.float32),
    "model.layers.0.wide": ((2, 300_000), torch.float16),  # rows longer than a chunk
    "model.layers.0.bias": ((77,), torch.float16),
    "model.layers.1.mlp.weight": ((600, 500), torch.bfloat16),
    "model.layers.1.scale": ((), torch.float32),
    "model.layers.1.empty": ((0, 4), torch.float32),
}
TASKS = ("math", "code", "chat")
SHARED = 4 * LARGE[0] * LARGE[1] - 1  # elements in all checkpoints: too few to examine the largest tensor in memory
MB = 1_000_000
CASES: list[dict[str, Any]] = [
    {"scope": "tensor", "granularity": "tensor", "space": "weights", "conflict": "last"},
    {"scope": "tensor", "granularity": "row", "space": "delta", "conflict": "mean", "rest": 0.5},
    {"scope": "layer", "granularity": "row", "space": "weights", "conflict": "first", "backbone": "base"},
    {"scope": "layer", "granularity": "tensor", "space": "delta", "conflict": "elect"},
    {"scope": "global", "granularity": "tensor", "space": "weights", "conflict": "largest", "density": 0.3},
    {"scope": "global", "granularity": "row", "space": "delta", "conflict": "last", "t": 0.4},
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A base and three experts, mixed dtypes, two shards. On a coarse grid, so that ties are everywhere."""
    root = tmp_path_factory.mktemp("models")
    generator = torch.Generator().manual_seed(0)
    constants = {"model.position_ids": torch.arange(512)[None], "model.mask": torch.arange(9) > 4}
    base = {name: torch.randn(shape, generator=generator).to(dtype) for name, (shape, dtype) in SHAPES.items()}
    save(root / "base", base | constants, shards=2)
    for number, task in enumerate(TASKS):
        expert = {name: tuned(tensor, generator) for name, tensor in base.items()}
        if number == 1:
            expert["model.embed.weight"] = expert["model.embed.weight"].float()
        save(root / task, expert | constants, shards=2)
    yield root
    shutil.rmtree(root)


def tuned(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    steps = torch.randint(-3, 4, tensor.shape, generator=generator)
    return (tensor.float() + steps / 128).to(tensor.dtype)


def recipe(models: Path, **parameters: Any) -> Path:
    number = len(list(models.glob("recipe*.yml")))
    return write_recipe(
        models / f"recipe{number}.yml",
        base_model=models / "base",
        models=[{"model": models / task} for task in TASKS if (models / task).exists()],
        parameters={"density": 0.02} | parameters,
    )


def least(recipe: Path, threads: int) -> int:
    """The smallest budget that `plan` accepts, in bytes."""
    inputs = preflight.check(cpimerge.load_recipe(recipe))
    return least_for(needs.worker_bytes(inputs), threads, needs.matrix_bytes(inputs))


def least_fuse(plan_dir: Path, threads: int) -> int:
    """The smallest budget that `fuse` accepts, in bytes."""
    plan = Plan.load(plan_dir)
    return least_for(needs.fuse_worker_bytes(plan), threads, needs.fuse_matrix_bytes(plan))


def least_for(worker: int, threads: int, matrix: int) -> int:
    nbytes = RUNTIME_BYTES + threads * worker + matrix
    assert Budget.divide(worker, threads, nbytes, matrix).peak_bytes == nbytes
    with pytest.raises(cpimerge.ResourceError):
        Budget.divide(worker, threads, nbytes - 1, matrix)
    return nbytes


def assert_same(first: Path, second: Path) -> None:
    """Without showing megabytes of difference."""
    one, other = files(first), files(second)
    assert one.keys() == other.keys()
    assert [name for name in one if one[name] != other[name]] == []


def test_the_models_are_large_and_tied_enough(models: Path, tmp_path: Path) -> None:
    """Otherwise the tests below show little."""
    assert len(chunks(LARGE, "tensor")) > BLOCK_CHUNKS
    assert any(not chunk.opens_row for chunk in chunks((2, 300_000), "row"))
    inputs = preflight.check(cpimerge.load_recipe(recipe(models)))
    assert needs.plan_room(inputs).shelf == 0
    with mock.patch.object(examination, "SMALL", SHARED):
        assert needs.plan_room(inputs).shelf > 0
    plan = cpimerge.plan(recipe(models), tmp_path / "plan", threads=2)
    assert {tensor.action for tensor in plan.tensors} == {"copy", "identical", "blend"}
    embed = next(tensor for tensor in plan.tensors if tensor.name == "model.embed.weight").tasks["code"]
    assert embed.core == 2200 * 2048 // 50
    assert embed.changed > 10 * embed.core  # of at most a few hundred magnitudes: the k-th is one of many


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(str(x) for x in list(case.values())[:3]))
def test_same_bytes_for_every_thread_count_and_budget(models: Path, tmp_path: Path, case: dict[str, Any]) -> None:
    path = recipe(models, **case)
    cpimerge.plan(path, tmp_path / "plan", threads=1)
    cpimerge.fuse(tmp_path / "plan", tmp_path / "out", threads=1)
    for threads, extra, small in ((1, 0, SHARED), (2, 3 * MB, SHARED), (7, 0, SHARED), (7, 100 * MB, SMALL)):
        budget = least(path, threads) + threads * extra
        with mock.patch.object(examination, "SMALL", small):
            cpimerge.plan(path, tmp_path / "plan2", threads=threads, memory=budget, force=True)
        assert_same(tmp_path / "plan", tmp_path / "plan2")
    for threads in (2, 7):
        budget = least_fuse(tmp_path / "plan", threads)
        cpimerge.fuse(tmp_path / "plan2", tmp_path / "out2", threads=threads, memory=budget, force=True)
        assert_same(tmp_path / "out", tmp_path / "out2")


# --- the budget is kept -----------------------------------------------------------------------------

HUGE = (1 << 14, 1 << 11)  # 64 MiB in bfloat16: holding it whole once would break the budget


@pytest.fixture
def huge(tmp_path: Path) -> Iterator[Path]:
    """A base and two experts of one tensor each that is far larger than what the smallest budget has for tensors."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(HUGE, generator=generator)
    save(tmp_path / "base", {"model.embed.weight": base.bfloat16()})
    for task in TASKS[:2]:
        update = torch.randn(HUGE, generator=generator).mul_(1e-3)
        save(tmp_path / task, {"model.embed.weight": update.add_(base).bfloat16()})
    yield tmp_path
    shutil.rmtree(tmp_path)


def peak_of(*arguments: object, threads: int = 1) -> int:
    """Run cpimerge in a process of its own; its largest anonymous memory, in bytes."""
    environment = os.environ | {"PYTHONPATH": str(Path(cpimerge.__file__).parents[1]), "PYTHONHASHSEED": "7"}
    command = [sys.executable, "-m", "cpimerge", *map(str, arguments), "--threads", str(threads), "--quiet"]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        samples = [0]
        poll = threading.Thread(target=sample, args=(process, samples))
        poll.start()
        errors = process.communicate()[1]
        poll.join()
    assert (process.returncode, errors) == (0, "")
    assert len(samples) > 100
    return max(samples)


def sample(process: subprocess.Popen[str], samples: list[int]) -> None:
    """Append RssAnon, in bytes, every few milliseconds while the process lives."""
    status = Path(f"/proc/{process.pid}/status")
    with suppress(FileNotFoundError, ProcessLookupError):  # it has ended
        while process.returncode is None:
            for line in status.read_text(encoding="utf-8").splitlines():
                if line.startswith("RssAnon:"):
                    samples.append(1024 * int(line.split()[1]))
            time.sleep(0.002)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("case", [CASES[0], CASES[5]], ids=["whole tensors", "rows"])
def test_the_smallest_budget_is_kept(huge: Path, case: dict[str, Any]) -> None:
    path = recipe(huge, **case)
    for_plan = least(path, threads=1)
    assert peak_of("plan", path, "-o", huge / "plan", "--memory", for_plan) <= for_plan
    for_fuse = least_fuse(huge / "plan", threads=1)
    assert peak_of("fuse", huge / "plan", "-o", huge / "out", "--memory", for_fuse) <= for_fuse
    assert huge.joinpath("out", "model.safetensors").stat().st_size > for_fuse - RUNTIME_BYTES > 8 * CHUNK
    cpimerge.merge(path, huge / "merged", threads=2)
    assert_same(huge / "merged", huge / "out")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere the limit means something else")
def test_a_process_that_may_not_allocate_more(huge: Path) -> None:
    """The default budget as the system's own limit, on all private memory that is mapped, used or not."""
    path, limit = recipe(huge), (400 + 2 * 64) * MB
    for arguments in (["plan", path, "-o", huge / "plan"], ["fuse", huge / "plan", "-o", huge / "out"]):
        limited = f"import resource; resource.setrlimit(resource.RLIMIT_DATA, ({limit}, {limit}))"
        code = f"{limited}; from cpimerge.cli import main; main(prog_name='cpimerge')"
        command = [sys.executable, "-c", code, *map(str, arguments), "--threads", "2", "--quiet"]
        environment = os.environ | {"PYTHONPATH": str(Path(cpimerge.__file__).parents[1])}
        assert subprocess.run(command, env=environment, check=False).returncode == 0


def many_experts(root: Path, count: int, shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """A base and `count` experts in float16; returns the recipe's keys that name them."""
    generator = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    for number in range(count + 1):
        update = 0.05 if number else 0.0
        tensors = {name: (x + update * torch.randn(x.shape, generator=generator)).half() for name, x in base.items()}
        save(root / f"model{number}", tensors)
    return {"base_model": "./model0", "models": [{"model": f"./model{number + 1}"} for number in range(count)]}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_budget_is_kept_where_results_outgrow_what_they_come_from(tmp_path: Path) -> None:
    """Rows of three elements: their Gram matrices take ten times the bytes of the tensors in a worker's cache."""
    models = many_experts(tmp_path, 4, {f"conv{number}.weight": (400_000, 3) for number in range(6)})
    path = write_recipe(tmp_path / "recipe.yml", **models, parameters={"granularity": "row"})
    assert peak_of("plan", path, "-o", tmp_path / "plan", "--memory", "400MB", threads=2) <= 400 * MB


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_default_budget_is_kept_with_eight_experts_and_rows_of_three(tmp_path: Path) -> None:
    """A pool of few elements, whose Gram matrices would take 230 MB at once."""
    models = many_experts(tmp_path, 8, {"conv.weight": (512, 512, 3, 3)})
    path = write_recipe(tmp_path / "recipe.yml", **models, parameters={"granularity": "row"})
    assert peak_of("plan", path, "-o", tmp_path / "plan", threads=2) <= (400 + 2 * 64) * MB


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_smallest_budget_is_kept_with_the_largest_pools_in_memory(tmp_path: Path) -> None:
    """Each of two workers has all of one, and large cores of it; others wait to be written."""
    shape = (SMALL // 3 // 4096, 4096)
    models = many_experts(tmp_path, 2, {f"weight{number}": shape for number in range(5)})
    parameters = {"density": 0.3, "space": "weights"}
    path = write_recipe(tmp_path / "recipe.yml", **models, parameters=parameters)
    assert needs.plan_room(preflight.check(cpimerge.load_recipe(path))).shelf == 0
    budget = least(path, threads=2)
    assert peak_of("plan", path, "-o", tmp_path / "plan", "--memory", budget, threads=2) <= budget


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_budget_is_kept_where_every_element_is_elected(tmp_path: Path) -> None:
    """Ten experts claim all elements, on four threads: what the conflict rule needs beside the chunks counts."""
    models = many_experts(tmp_path, 10, {"weight": (8, CHUNK)})
    parameters = {"density": 1, "conflict": "elect", "space": "delta", "rest": 0}
    path = write_recipe(tmp_path / "recipe.yml", **models, parameters=parameters, dtype="float32")
    cpimerge.plan(path, tmp_path / "plan", threads=2)
    budget = least_fuse(tmp_path / "plan", threads=4)
    assert peak_of("fuse", tmp_path / "plan", "-o", tmp_path / "out", "--memory", budget, threads=4) <= budget
