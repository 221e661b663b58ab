"""Whole runs on a tiny model: what moves, what does not, and what becomes of a run that is cut off."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import write_recipe
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel
from trees import files
from worlds import SMALL, TASKS, WORDS, lines, tokenizer, write_base, write_data, write_lines, write_world

from cpimerge import (
    CheckpointError,
    DataError,
    IncompatibleError,
    OutputError,
    PlanError,
    ResourceError,
    analysis,
    api,
    passes,
    stream,
)
from cpimerge.cores import CoreReader
from cpimerge.plan_arrays import chunks_of
from cpimerge.plan_file import Plan
from cpimerge.stream import chunks
from cpimerge.train import Settings, loop, output, probe, runs, sft
from cpimerge.train import weights as weights_module
from cpimerge.train.examples import read_data
from cpimerge.train.output import RECORD
from cpimerge.train.sampling import draw
from cpimerge.train.training_log import LOG

Tensors = Mapping[str, torch.Tensor]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be changed. Three tasks in two stages, in bfloat16, with dropout."""
    return write_world(tmp_path_factory.mktemp("world"), dropout=0.2)


@pytest.fixture(scope="module")
def trained(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an undisturbed run leaves. Not to be changed."""
    out = tmp_path_factory.mktemp("trained") / "out"
    train(world, out)
    return out


def train(world: Path, out: Path, **options: Any) -> dict[str, Any]:
    """Its three stages from the fused model, unless `options` say otherwise."""
    given = {"model": world / "fused", "settings": SMALL, **options}
    return sft(given.pop("plan", world / "plan"), given.pop("data", world / "data.jsonl"), out, **given)


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def logged(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / LOG).read_text(encoding="utf-8").splitlines()]


def core(world: Path, tasks: Sequence[str]) -> dict[str, torch.Tensor]:
    """A mask of the elements in the cores of the tasks, for each tensor, as the plan has them."""
    plan = Plan.load(world / "plan")
    masks = {tensor.name: np.zeros(int(np.prod(tensor.shape)), bool) for tensor in plan.tensors}
    for task in plan.tasks:
        if task.name in tasks:
            reader = CoreReader(world / "plan" / task.core_file, task.core_xxh3, chunks_of(plan))
            for tensor in plan.tensors:
                for number, chunk in enumerate(chunks(tuple(tensor.shape), "tensor"), tensor.first_chunk):
                    masks[tensor.name][chunk.start + reader.positions(number, chunk.size)] = True
            reader.close()
    return {tensor.name: torch.from_numpy(masks[tensor.name]).reshape(tensor.shape) for tensor in plan.tensors}


def moved(before: Tensors, after: Tensors, mask: Tensors | None = None) -> int:
    """How many elements have other bits, of all or of those in the mask."""
    different = {name: before[name].view(torch.int16) != after[name].view(torch.int16) for name in before}
    return sum(int((d if mask is None else d & mask[name]).sum()) for name, d in different.items())


# --- what a run does --------------------------------------------------------------------------------


def test_the_output_is_a_checkpoint_like_its_start(world: Path, trained: Path) -> None:
    before, after = weights(world / "fused"), weights(trained)
    assert {name: (t.dtype, t.shape) for name, t in after.items()} == {n: (t.dtype, t.shape) for n, t in before.items()}
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (trained / name).read_bytes() == (world / "fused" / name).read_bytes()
    assert sorted(os.listdir(trained)) == sorted(
        [*(set(os.listdir(world / "fused")) - {"cpimerge_manifest.json"}), RECORD, LOG]
    )
    assert os.listdir(trained.parent) == ["out"]
    AutoModelForCausalLM.from_pretrained(trained)


def test_stages_come_in_the_plans_order_with_as_many_examples_of_each_task(trained: Path) -> None:
    steps = [line for line in logged(trained) if "step" in line]
    assert [(line["stage"], line["step"], line["steps"]) for line in steps] == [
        *((1, step, 3) for step in (1, 2, 3)),
        *((2, step, 6) for step in (1, 2, 3, 4, 5, 6)),
    ]
    assert {task for line in steps if line["stage"] == 1 for task in line["tasks"]} == {"math"}
    assert {task for line in steps if line["stage"] == 2 for task in line["tasks"]} == {"code", "chat"}
    record = json.loads((trained / RECORD).read_bytes())
    assert record["samples"] == dict.fromkeys(TASKS, 6)
    assert [(stage["tasks"], stage["steps"]) for stage in record["stages"]] == [(["math"], 3), (["code", "chat"], 6)]
    assert [line["learning_rate"] for line in steps if line["stage"] == 2] == pytest.approx(
        [0, *(0.01 * (6 - step) / 5 for step in range(1, 6))]
    )


def test_every_task_is_looked_at_before_and_after_every_stage(trained: Path) -> None:
    looks = [line for line in logged(trained) if "held_out" in line]
    assert [line["stage"] for line in looks] == [0, 1, 2]
    assert all(list(line["held_out"]) == list(TASKS) for line in looks)
    record = json.loads((trained / RECORD).read_bytes())
    assert [record["held_out_before"], *(stage["held_out"] for stage in record["stages"])] == [
        line["held_out"] for line in looks
    ]


def test_prior_cores_stay_bit_for_bit_and_the_rest_moves(
    world: Path, trained: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Stage 2 leaves what stage 1 made of its core, which is what a run of stage 1 alone gives."""
    before, after = weights(world / "fused"), weights(trained)
    frozen = core(world, ["math"])
    assert json.loads((trained / RECORD).read_bytes())["stages"][1]["frozen"] == sum(
        int(m.sum()) for m in frozen.values()
    )
    kept: dict[str, torch.Tensor] = {}
    write = weights_module.save

    def keep(model: Any, file: Path) -> None:
        write(model, file)
        if file.name == "after-1.safetensors":
            kept.update({name: value.clone() for name, value in model.state_dict().items()})

    monkeypatch.setattr(runs, "save", keep)
    train(world, tmp_path / "out")
    first = {name: value.to(after[name].dtype) for name, value in kept.items()}
    everything = sum(tensor.numel() for tensor in before.values())
    assert moved(before, first, frozen) > 0.9 * sum(int(m.sum()) for m in frozen.values())  # stage 1 trains its core
    assert moved(first, after, frozen) == 0
    assert moved(first, after) > 0.8 * everything


def test_all_other_cores_stay(world: Path, tmp_path: Path) -> None:
    """With `all`, a core that no stage trains is in every stage's way: here none, so each stage is looked at alone."""
    record = train(world, tmp_path / "out", freeze="all", settings=replace(SMALL, steps=2))
    others = core(world, ["code", "chat"])
    assert record["stages"][0]["frozen"] == sum(int(mask.sum()) for mask in others.values())
    seen: list[Tensors] = []
    with pytest.raises(KeyboardInterrupt):
        train(world, tmp_path / "cut", freeze="all", progress=_stops(2, 1), settings=replace(SMALL, steps=2))
    after_first = load_file(tmp_path / ".cut.partial" / "after-1.safetensors")
    before = weights(world / "fused")
    seen.append({name: value.to(before[name].dtype) for name, value in after_first.items()})
    assert moved(before, seen[0], others) == 0
    assert moved(before, seen[0]) > 0


def test_without_the_freezing_the_core_would_move(world: Path, trained: Path, tmp_path: Path) -> None:
    """What the tests above would see if nothing were frozen."""
    plain = write_world(tmp_path, stages=[[*TASKS]])
    record = train(world, tmp_path / "out", plan=plain / "plan", model=plain / "fused")
    assert record["stages"][0]["frozen"] == 0
    assert moved(weights(plain / "fused"), weights(tmp_path / "out"), core(world, ["math"])) > 0


def test_dpi_begins_at_the_base(world: Path, tmp_path: Path) -> None:
    base = train(world, tmp_path / "dpi", model=None)
    assert base["start"] == {"model": "base", "is_base": True, "content_xxh3": base["start"]["content_xxh3"]}
    given = train(world, tmp_path / "given", model=world / "base")
    assert weights(tmp_path / "dpi").keys() == weights(world / "base").keys()
    assert moved(weights(tmp_path / "dpi"), weights(tmp_path / "given")) == 0
    assert given["stages"] == base["stages"]
    first = replace(SMALL, learning_rate=1e-30)  # so small that bfloat16 cannot hold what it does
    train(world, tmp_path / "still", model=None, settings=first)
    assert moved(weights(world / "base"), weights(tmp_path / "still")) == 0


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_a_stage_is_a_plain_loop_of_adamw(tmp_path: Path, weight_decay: float) -> None:
    """Against a loop written by hand: same batches, loss, clipping, schedule, decay; bit by bit."""
    base = write_base(tmp_path / "base", dtype=torch.float32)
    settings = Settings(
        epochs=2,
        samples=7,
        holdout=0,
        batch_size=2,
        gradient_accumulation=2,
        learning_rate=1e-2,
        warmup=0.3,  # of 4 steps: 2, rounded up
        weight_decay=weight_decay,
    )
    write_data(tmp_path / "data.jsonl", {"code": 7})
    probe(base, "code", tmp_path / "data.jsonl", tmp_path / "out", settings=settings)
    batches = _batches_of(tmp_path / "out", base, settings)
    model = _by_hand(base, batches, weight_decay)
    found = weights(tmp_path / "out")
    assert all(torch.equal(found[name], value) for name, value in model.items())
    assert not torch.equal(found["lm_head.weight"], weights(base)["lm_head.weight"])


def _batches_of(out: Path, base: Path, settings: Settings) -> list[list[tuple[list[int], list[int]]]]:
    """14 examples (7, twice over) as ids and how many of them are the prompt's, in steps of two batches of two."""
    from cpimerge.train.sampling import ordered

    tokenizer = AutoTokenizer.from_pretrained(base)
    every = []
    for line in lines("code", 7):
        prompt = tokenizer(line["prompt"])["input_ids"]
        ids = tokenizer(line["prompt"] + line["completion"])["input_ids"] + [2]
        every.append((ids, [-100] * len(prompt) + ids[len(prompt) :]))
    found = ordered(every, 1, settings)
    return [found[begin : begin + 2] for begin in range(0, 14, 2)]


def _by_hand(base: Path, batches: Any, weight_decay: float) -> Tensors:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.train()
    decayed = [p for n, p in model.named_parameters() if not n.endswith("norm.weight")]
    others = [p for n, p in model.named_parameters() if n.endswith("norm.weight")]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    )
    steps = [batches[begin : begin + 2] for begin in range(0, len(batches), 2)]
    for number, step in enumerate(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (number / 2 if number < 2 else (4 - number) / 2)
        asked = sum(label != -100 for batch in step for _, labels in batch for label in labels)
        for batch in step:
            length = max(len(ids) for ids, _ in batch)
            ids = torch.tensor([row + [0] * (length - len(row)) for row, _ in batch])
            labels = torch.tensor([row + [-100] * (length - len(row)) for _, row in batch])
            mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row, _ in batch])
            logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
            loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum") / asked
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return {name: value.detach() for name, value in model.state_dict().items()}


def test_the_losses_are_those_of_transformers(world: Path, trained: Path) -> None:
    """The first step's of a stage, and those on held-out examples, before anything is trained."""
    from cpimerge.train.tokens import encode

    model = AutoModelForCausalLM.from_pretrained(world / "fused", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(world / "fused")
    held_out = draw(read_data(world / "data.jsonl", TASKS).examples, SMALL)
    before = logged(trained)[0]["held_out"]
    for task in TASKS:
        total, count = 0.0, 0
        for example in held_out[task].held_out:
            ids, labels = encode(tokenizer, example)
            asked = sum(label != -100 for label in labels)
            with torch.no_grad():
                total += asked * float(model(torch.tensor([ids]), labels=torch.tensor([labels])).loss)
            count += asked
        assert before[task] == pytest.approx(total / count, rel=1e-5)


def test_examples_like_those_held_out_are_not_trained_on(world: Path, tmp_path: Path) -> None:
    """Nor where another task has them; the screen is told."""
    found = [line for task in TASKS for line in lines(task, 10)]
    shared = [{**line, "task": "math"} for line in lines("code", 10)]
    data = write_lines(tmp_path / "data.jsonl", [*found, *lines("code", 10), *shared])
    outlines: list[Any] = []
    settings = replace(SMALL, steps=1)
    train(world, tmp_path / "out", data=data, settings=settings, announce=outlines.append)
    drawn = draw(read_data(data, TASKS).examples, settings)
    assert (drawn["math"].left_out, drawn["code"].left_out, drawn["chat"].left_out) == (1, 4, 0)
    assert outlines[0].notes == (
        "task 'math': 1 example is the same as some held out, and left out",
        "task 'code': 4 examples are the same as some held out, and left out",
    )


def test_nothing_held_out(world: Path, tmp_path: Path) -> None:
    record = train(world, tmp_path / "out", settings=replace(SMALL, holdout=0, samples=10))
    assert record["held_out_before"] is None
    assert not [line for line in logged(tmp_path / "out") if "held_out" in line]


def test_bf16_trains_the_same_weights_a_little_differently(world: Path, trained: Path, tmp_path: Path) -> None:
    train(world, tmp_path / "out", settings=replace(SMALL, bf16=True))
    exact, coarse = ([line["loss"] for line in logged(out) if "step" in line] for out in (trained, tmp_path / "out"))
    assert coarse != exact
    assert coarse == pytest.approx(exact, rel=0.05)
    assert moved(weights(trained), weights(tmp_path / "out")) > 0


def test_tied_heads_stay_tied(tmp_path: Path) -> None:
    world = write_world(tmp_path, tied=True)
    assert "lm_head.weight" not in weights(world / "fused")
    train(world, tmp_path / "out")
    assert weights(tmp_path / "out").keys() == weights(world / "fused").keys()
    assert moved(weights(world / "fused"), weights(tmp_path / "out")) > 0


def test_what_the_model_does_not_hold_is_copied(tmp_path: Path) -> None:
    """A tensor that transformers passes over comes out as it was, and several files go in and out."""
    base = write_base(tmp_path / "base")
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.rand(4), "counts": torch.arange(5)}
    save_file(weights(base) | extra, base / "model.safetensors", {"format": "pt"})
    write_data(tmp_path / "data.jsonl", {"code": 10})
    probe(base, "code", tmp_path / "data.jsonl", tmp_path / "out", settings=SMALL, shard_size=5000)
    pieces = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(pieces) > 2
    found = {name: value for piece in pieces for name, value in load_file(piece).items()}
    assert found.keys() == weights(base).keys()
    assert all(torch.equal(found[name], value) for name, value in extra.items())
    assert not torch.equal(found["lm_head.weight"], weights(base)["lm_head.weight"])
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    probe(tmp_path / "out", "code", tmp_path / "data.jsonl", tmp_path / "again", settings=SMALL)
    assert load_file(tmp_path / "again" / "model.safetensors").keys() == found.keys()


# --- runs that are cut off --------------------------------------------------------------------------


def _stops(stage: int, step: int) -> Any:
    def progress(phase: str, done: int, total: int) -> None:
        if (phase, done) == (f"stage {stage}", step):
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize(
    ("stage", "step", "resumed"),
    [(1, 1, None), (1, 3, (1, 2)), (2, 1, (2, 0)), (2, 3, (2, 2)), (2, 6, (2, 4))],
)
def test_a_run_that_is_interrupted_goes_on_and_ends_in_the_same_bytes(
    world: Path, trained: Path, tmp_path: Path, stage: int, step: int, resumed: tuple[int, int] | None
) -> None:
    with pytest.raises(KeyboardInterrupt) as raised:
        train(world, tmp_path / "out", progress=_stops(stage, step))
    assert not (tmp_path / "out").exists()
    assert (tmp_path / ".out.partial").exists() == (resumed is not None)
    assert bool(getattr(raised.value, "__notes__", [])) == (resumed is not None)
    told: list[tuple[int, int]] = []
    train(world, tmp_path / "out", resumed=lambda *place: told.append(place))
    assert told == ([] if resumed is None else [resumed])
    assert files(tmp_path / "out") == files(trained)
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize(
    ("what", "calls", "resumed"),
    [
        ("flush", 5, []),
        ("flush", 20, [(2, 2)]),
        ("save", 1, [(1, 2)]),
        ("held_out_loss", 3, [(2, 4)]),
        ("write_output", 1, [(2, 6)]),
    ],
)
def test_a_failure_between_the_steps(
    world: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, calls: int, resumed: Any
) -> None:
    """Also where a checkpoint is written and not yet noted, and after the last stage."""
    real, left = getattr(runs, what), [calls]

    def fail(*arguments: Any) -> Any:
        left[0] -= 1
        if not left[0]:
            raise OSError(28, "No space left on device")
        return real(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(runs, what, fail)
        with pytest.raises(OutputError, match="No space left on device"):
            train(world, tmp_path / "out")
    told: list[tuple[int, int]] = []
    train(world, tmp_path / "out", resumed=lambda *place: told.append(place))
    assert told == resumed
    assert files(tmp_path / "out") == files(trained)
    assert os.listdir(tmp_path) == ["out"]


KILLED = """
import os, signal, sys
sys.path[:0] = sys.argv[3:]
import torch
torch.set_num_threads(1)
from pathlib import Path
from test_runs import train
def progress(phase, done, total):
    if (phase, done) == ("stage 2", 5):
        os.kill(os.getpid(), signal.SIGKILL)
train(Path(sys.argv[1]), Path(sys.argv[2]), progress=progress)
"""


def test_a_process_that_is_killed(world: Path, trained: Path, tmp_path: Path) -> None:
    here = Path(__file__).parent
    command = [sys.executable, "-c", KILLED, str(world), str(tmp_path / "out"), str(here), str(here.parent)]
    result = subprocess.run(command, capture_output=True, cwd=here.parent.parent, text=True, check=False)
    assert result.returncode == -signal.SIGKILL, result.stderr
    told: list[tuple[int, int]] = []
    train(world, tmp_path / "out", resumed=lambda *place: told.append(place))
    assert told == [(2, 4)]
    assert files(tmp_path / "out") == files(trained)


def test_a_run_of_other_settings_does_not_go_on(world: Path, trained: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(world, tmp_path / "out", progress=_stops(2, 3))
    with pytest.raises(OutputError, match=r"the beginning of another sft: --learning-rate changed since"):
        train(world, tmp_path / "out", settings=replace(SMALL, learning_rate=1.0))
    data = write_data(tmp_path / "data.jsonl", {task: 11 for task in TASKS})
    with pytest.raises(OutputError, match=r"another sft: the data and 1 more changed since"):
        train(world, tmp_path / "out", data=data, freeze="all")
    with pytest.raises(OutputError, match=r"another sft: the model changed since"):
        train(world, tmp_path / "out", model=world / "base")
    told: list[tuple[int, int]] = []
    train(world, tmp_path / "out", restart=True, resumed=lambda *place: told.append(place))
    assert not told
    assert files(tmp_path / "out") == files(trained)


def test_a_damaged_checkpoint_of_the_run_is_an_error(world: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(world, tmp_path / "out", progress=_stops(2, 3))
    file = tmp_path / ".out.partial" / "stage-2" / "checkpoint-2" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(OutputError, match=r"cannot be read: .*Begin anew with --restart"):
        train(world, tmp_path / "out")


def test_a_training_that_diverges(world: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"stage 1, step \d: the loss is no number any more. Train with a lower"):
        train(world, tmp_path / "out", settings=replace(SMALL, learning_rate=1e30, warmup=0.0))
    assert not (tmp_path / "out").exists()


def test_a_last_step_that_diverges(world: Path, tmp_path: Path) -> None:
    """Its loss was a number before it."""
    settings = replace(SMALL, learning_rate=1e37, warmup=0.0, steps=1)
    with pytest.raises(OutputError, match="the loss of 'math' on held-out examples is no number any more"):
        probe(world / "base", "math", world / "data.jsonl", tmp_path / "out", settings=settings)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    ("place", "name"),
    [(loop, "_token_losses"), (runs, "place"), (runs, "held_out_loss"), (loop._StageTrainer, "compute_loss")],
)
@pytest.mark.parametrize("holdout", [0, 2])
def test_a_device_without_the_memory(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: Any, name: str, holdout: int
) -> None:
    """Wherever it ends: as the model goes there, looking at what is held out, or in a step."""

    def refuse(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    if (name, holdout) == ("held_out_loss", 0):
        return  # is not called
    monkeypatch.setattr(place, name, refuse)
    with pytest.raises(ResourceError, match=r"the memory of cpu does not suffice.* Lower --batch-size"):
        train(world, tmp_path / "out", settings=replace(SMALL, holdout=holdout))


def test_a_run_of_other_libraries_does_not_go_on(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(world, tmp_path / "out", progress=_stops(2, 3))
    monkeypatch.setattr(runs, "library_versions", lambda: {"torch": "1.0", "transformers": "5", "accelerate": "1"})
    with pytest.raises(OutputError, match=r"another sft: torch and 2 more changed since"):
        train(world, tmp_path / "out")


def test_a_run_of_another_device_does_not_go_on(
    world: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(world, tmp_path / "out", progress=_stops(2, 3))
    with monkeypatch.context() as patched:
        patched.setattr(runs, "device", lambda: torch.device("meta"))
        with pytest.raises(OutputError, match=r"another sft: the device changed since"):
            train(world, tmp_path / "out")
    train(world, tmp_path / "out")
    assert files(tmp_path / "out") == files(trained)


def test_the_disk_that_a_run_takes(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it asks for beforehand is what lies there of tensors at its height."""
    elements = sum(tensor.numel() for tensor in weights(world / "fused").values())
    asked: list[int] = []
    found: list[int] = []

    def look(*_: object) -> None:
        values = [value for file in tmp_path.glob(".*/**/*.safetensors") for value in load_file(file).values()]
        for file in tmp_path.glob(".*/**/optimizer.pt"):
            for moments in torch.load(file)["state"].values():
                values += [moments["exp_avg"], moments["exp_avg_sq"]]
        found.append(sum(value.nbytes for value in values))

    def write(*given: Any) -> Any:
        record = output.write_output(*given)
        look()
        return record

    monkeypatch.setattr(runs, "check_disk", lambda needed, _: asked.append(needed))
    monkeypatch.setattr(runs, "flush", look)
    monkeypatch.setattr(runs, "write_output", write)
    train(world, tmp_path / "out")
    assert asked == [max(found)] == [28 * elements]
    asked.clear()
    found.clear()
    probe(world / "base", "code", world / "data.jsonl", tmp_path / "expert", settings=replace(SMALL, epochs=3))
    assert asked == [max(found)] == [24 * elements]


def test_an_output_that_is_there_stays(world: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(OutputError, match="not empty"):
        train(world, tmp_path / "out")
    train(world, tmp_path / "out", force=True, settings=replace(SMALL, steps=1))
    assert not (tmp_path / "out" / "mine").exists()
    with pytest.raises(OutputError, match="which would be lost"):
        train(world, world, force=True)


# --- what is refused --------------------------------------------------------------------------------


def test_a_model_that_is_not_the_plans(world: Path, tmp_path: Path) -> None:
    other = write_base(tmp_path / "other", tied=True)
    with pytest.raises(IncompatibleError, match=r"tensor 'lm_head.weight': missing, and the plan has it"):
        train(world, tmp_path / "out", model=other)
    with pytest.raises(CheckpointError, match="no such directory"):
        train(world, tmp_path / "out", model=tmp_path / "nowhere")
    with pytest.raises(PlanError, match="not found"):
        train(world, tmp_path / "out", plan=tmp_path / "nowhere")


def test_cores_that_were_damaged_are_found_before_any_training(tmp_path: Path) -> None:
    world = write_world(tmp_path)
    file = world / "plan" / "cores" / "00.roaring"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    told: list[object] = []
    with pytest.raises(PlanError, match=r"00\.roaring: is not the core that the plan was saved with"):
        train(world, tmp_path / "out", announce=told.append)
    assert not told


def test_a_base_that_changed_since(tmp_path: Path) -> None:
    world = write_world(tmp_path)
    write_base(world / "base", dtype=torch.float32)
    with pytest.raises(PlanError, match="the base is not what was planned"):
        train(world, tmp_path / "out", model=None)


def test_a_base_whose_values_changed_since(tmp_path: Path) -> None:
    """Under the same headers: `fuse` refuses it, too, and in the same words."""
    world = write_world(tmp_path)
    planned = weights(world / "base")
    middle = "model.layers.1.mlp.up_proj.weight"
    for names in (list(planned), [middle]):
        save_file(
            {name: value * 1.5 if name in names else value for name, value in planned.items()},
            world / "base" / "model.safetensors",
            {"format": "pt"},
        )
        told: list[object] = []
        with pytest.raises(PlanError) as raised:
            train(world, tmp_path / "out", model=None, announce=told.append)
        assert not told
        with pytest.raises(PlanError) as refused:
            api.fuse(world / "plan", tmp_path / "refused")
        assert raised.value.problems == refused.value.problems
        assert f"tensor {names[0]!r}: changed since planned" in str(raised.value) or len(names) > 1
    save_file(planned, world / "base" / "model.safetensors", {"format": "pt"})
    train(world, tmp_path / "out", model=None, settings=replace(SMALL, steps=1))


def test_a_base_that_lacks_tokens_of_its_plan(tmp_path: Path) -> None:
    """In rows that it has to spare, so that shapes are the same."""
    world = write_world(tmp_path)
    file = world / "base" / "tokenizer.json"
    file.write_text(re.sub(r',\s*"<system>": 50', "", file.read_text(encoding="utf-8")), encoding="utf-8")
    more = AutoTokenizer.from_pretrained(world / "base")
    more.save_pretrained(world / "code")
    more.save_pretrained(world / "chat")
    assert more.add_tokens(["<more>"]) == 1
    more.save_pretrained(world / "math")
    recipe = write_recipe(
        tmp_path / "union.yml",
        base_model=world / "base",
        models=[{"model": world / task} for task in TASKS],
        parameters={"density": 0.1},
        vocabulary="union",
    )
    plan = api.plan(recipe, tmp_path / "union")
    assert plan.vocabulary is not None
    assert plan.vocabulary.rows == plan.vocabulary.base_rows
    with pytest.raises(PlanError, match="`vocabulary: union` joined tokens that its base does not have"):
        train(world, tmp_path / "out", plan=tmp_path / "union", model=None)


@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_a_base_is_compared_in_the_plans_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, granularity: str
) -> None:
    """Of which a tensor has several, divided differently by rows and over tensors."""
    for module in (stream, analysis, passes):
        monkeypatch.setattr(module, "CHUNK", 100)
    monkeypatch.setattr(stream, "CHUNK_ROWS", 3)
    world = write_world(tmp_path, granularity=granularity)
    train(world, tmp_path / "out", model=None, settings=replace(SMALL, steps=1))


def test_a_model_that_was_fused_from_another_plan_is_noted(world: Path, tmp_path: Path) -> None:
    other = write_world(tmp_path, stages=[["code"], ["math"], ["chat"]])
    outlines: list[Any] = []
    settings = replace(SMALL, steps=1)
    train(world, tmp_path / "out", model=other / "fused", announce=outlines.append, settings=settings)
    train(world, tmp_path / "out2", announce=outlines.append, settings=settings)
    assert outlines[0].notes == (
        f"{other / 'fused'}: was fused from another plan than {world / 'plan'}, whose cores are frozen",
    )
    assert outlines[1].notes == ()
    assert [(stage.tasks, stage.examples, stage.steps) for stage in outlines[1].stages] == [
        (("math",), 6, 1),
        (("code", "chat"), 12, 1),
    ]


def test_examples_that_the_model_cannot_take(world: Path, tmp_path: Path) -> None:
    long = [{"task": "math", "prompt": f"w{number} " * 70, "completion": "w2"} for number in range(8)]
    data = write_lines(tmp_path / "data.jsonl", long + [line for task in TASKS[1:] for line in lines(task, 8)])
    with pytest.raises(DataError, match=r"data.jsonl:\d: has 73 tokens, more than --max-length 32"):
        train(world, tmp_path / "out", data=data)
    with pytest.raises(DataError, match=r"takes 64 tokens at most, and an example has 73. Give --max-length 64"):
        train(world, tmp_path / "out", data=data, settings=replace(SMALL, max_length=100))
    outlines: list[Any] = []
    settings = replace(SMALL, max_length=40, truncate=True, steps=1)
    train(world, tmp_path / "out", data=data, settings=settings, announce=outlines.append)
    assert outlines[0].cut == {"math": 8}


def test_positions_of_another_name(tmp_path: Path) -> None:
    """GPT-2's `n_positions`."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(WORDS) + 3, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    example = {"prompt": "w1 " * 20, "completion": "w2"}
    write_lines(tmp_path / "data.jsonl", [{**example, "prompt": f"w{number} " * 20} for number in range(10)])
    with pytest.raises(DataError, match=r"takes 16 tokens at most, and an example has 23. Give --max-length 16"):
        probe(tmp_path / "base", "code", tmp_path / "data.jsonl", tmp_path / "out", settings=SMALL)
    settings = replace(SMALL, max_length=16, truncate=True, steps=1)
    probe(tmp_path / "base", "code", tmp_path / "data.jsonl", tmp_path / "out", settings=settings)


def test_a_base_without_a_tokenizer(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (base / file).unlink()
    write_data(tmp_path / "data.jsonl", {"code": 10})
    with pytest.raises(CheckpointError, match="transformers cannot load its tokenizer"):
        probe(base, "code", tmp_path / "data.jsonl", tmp_path / "out", settings=SMALL)


def test_a_tokenizer_of_another_model(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    text = (base / "tokenizer.json").read_text(encoding="utf-8")
    (base / "tokenizer.json").write_text(text.replace('"w1": 5,', '"w1": 99,'), encoding="utf-8")
    write_data(tmp_path / "data.jsonl", {"code": 10})
    with pytest.raises(CheckpointError, match="its tokenizer has a token 99, and the model 51 embeddings"):
        probe(base, "code", tmp_path / "data.jsonl", tmp_path / "out", settings=SMALL)


def test_a_model_that_is_held_in_another_form(tmp_path: Path) -> None:
    """A parameter that no tensor of the files is would be trained, and lost."""
    base = write_base(tmp_path / "base")
    renamed = {name.replace("norm.weight", "norm.gamma"): value for name, value in weights(base).items()}
    save_file(renamed, base / "model.safetensors", {"format": "pt"})
    write_data(tmp_path / "data.jsonl", {"code": 10})
    with pytest.raises(
        CheckpointError, match=r"the model's parameter 'model.norm.weight' \[16\] is no tensor of its files"
    ):
        probe(base, "code", tmp_path / "data.jsonl", tmp_path / "out", settings=SMALL)


def test_what_is_not_installed(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torch", "accelerate"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ResourceError, match=r"training needs torch and accelerate: pip install 'cpimerge\[train\]'"):
        train(world, tmp_path / "out")


def test_one_process_alone(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ResourceError, match="this trains in one process"):
        train(world, tmp_path / "out")


def test_variables_that_would_change_what_is_computed(
    world: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a run goes on that began without them."""
    with pytest.raises(KeyboardInterrupt):
        train(world, tmp_path / "out", progress=_stops(2, 3))
    for name, value in (
        ("ACCELERATE_MIXED_PRECISION", "bf16"),
        ("ACCELERATE_MIXED_PRECISION", "fp16"),
        ("ACCELERATE_DYNAMO_BACKEND", "EAGER"),
        ("ACCELERATE_USE_DEEPSPEED", "True"),
        ("ACCELERATE_USE_FSDP", "true"),
        ("ACCELERATE_USE_MEGATRON_LM", "1"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "yes"),
        ("ACCELERATE_USE_CPU", "1"),
        ("ACCELERATE_TORCH_DEVICE", "meta"),
    ):
        with monkeypatch.context() as patched:
            patched.setenv(name, value)
            with pytest.raises(ResourceError, match=rf"^{name}={value}: would change what is computed.* Unset it"):
                train(world, tmp_path / "out")
            with pytest.raises(ResourceError, match=name):
                probe(world / "base", "math", world / "data.jsonl", tmp_path / "expert", settings=SMALL)
    for name in ("MIXED_PRECISION", "DYNAMO_BACKEND"):
        monkeypatch.setenv(f"ACCELERATE_{name}", "no")  # what `accelerate launch` says where there is nothing to say
    for name in ("USE_CPU", "USE_FSDP", "USE_DEEPSPEED"):
        monkeypatch.setenv(f"ACCELERATE_{name}", "False")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")  # which the Trainer sees to itself
    train(world, tmp_path / "out")
    assert files(tmp_path / "out") == files(trained)


@pytest.mark.parametrize("value", ["bf16", "no"])
def test_variables_that_say_what_the_settings_say(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    settings = replace(SMALL, bf16=True)
    train(world, tmp_path / "out", settings=settings)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", value)
    train(world, tmp_path / "again", settings=settings)
    assert files(tmp_path / "out") == files(tmp_path / "again")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(ResourceError, match="ACCELERATE_MIXED_PRECISION=fp16"):
        train(world, tmp_path / "other", settings=settings)


def test_the_callers_random_numbers_go_on(world: Path, tmp_path: Path) -> None:
    """As if nothing had been trained, also after one that fails."""

    def drawn() -> list[float]:
        return [random.random(), float(np.random.rand()), float(torch.rand(()))]

    def seed() -> None:
        random.seed(5)
        np.random.seed(5)
        torch.manual_seed(5)

    seed()
    expected = drawn()
    seed()
    train(world, tmp_path / "out", settings=replace(SMALL, steps=1))
    assert drawn() == expected
    seed()
    with pytest.raises(KeyboardInterrupt):
        train(world, tmp_path / "cut", progress=_stops(1, 1))
    assert drawn() == expected


# --- probe ------------------------------------------------------------------------------------------


def test_a_probe_is_an_expert_that_plan_takes(world: Path, tmp_path: Path) -> None:
    for task in ("code", "chat"):
        record = probe(world / "base", task, world / "data.jsonl", tmp_path / task, settings=SMALL)
        assert record["kind"] == "probe"
        assert record["freeze"] is None
        assert record["samples"] == {task: 6}
    recipe = write_recipe(
        tmp_path / "recipe.yml",
        base_model=world / "base",
        models=[{"model": tmp_path / task} for task in ("code", "chat")],
        parameters={"density": 0.1},
    )
    plan = api.plan(recipe, tmp_path / "plan")
    # Two steps at this rate move a tiny model far, which plan notices; of what was written it has nothing to say.
    assert all(note.startswith(("tau = ", "the update of ")) for note in plan.notes)
    changed = {task.name: task.changed / task.elements for task in plan.tasks}
    assert min(changed.values()) > 0.5
    assert weights(tmp_path / "code").keys() == weights(world / "base").keys()
    assert all(t.dtype == torch.bfloat16 for t in weights(tmp_path / "code").values())


def test_a_probe_learns(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    write_lines(tmp_path / "data.jsonl", [{"prompt": f"w{n} w{n} ", "completion": "w30 w31"} for n in range(10)])
    settings = Settings(samples=8, holdout=2, batch_size=8, steps=60, learning_rate=1e-2)
    record = probe(base, "any", tmp_path / "data.jsonl", tmp_path / "out", settings=settings)
    assert record["held_out_before"]["any"] > 3
    assert record["stages"][0]["held_out"]["any"] < 0.5
    assert record["stages"][0]["loss"]["any"]["last"] < 0.5 < record["stages"][0]["loss"]["any"]["first"]


def test_a_stage_of_one_step_is_trained(world: Path, tmp_path: Path) -> None:
    """The rate rises from 0 in the first of several."""
    for steps, rates in ((1, [0.01]), (2, [0, 0.01]), (3, [0, 0.01, 0.005])):
        out = tmp_path / str(steps)
        probe(world / "base", "math", world / "data.jsonl", out, settings=replace(SMALL, steps=steps))
        assert [line["learning_rate"] for line in logged(out) if "step" in line] == pytest.approx(rates)


def test_the_loop_is_told_of_every_step(world: Path, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    train(world, tmp_path / "out", progress=lambda *place: told.append(place))
    assert told == [*(("stage 1", n, 3) for n in (1, 2, 3)), *(("stage 2", n, 6) for n in range(1, 7))]
    assert loop.MAX_GRADIENT_NORM == 1.0
