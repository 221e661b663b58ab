"""Frozen cores in transformers' Trainer."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from staged import Small, World, make_world
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from cpimerge.errors import PlanError
from cpimerge.train import FrozenCoresCallback


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("staged"))


class Scored(torch.nn.Module):
    """`Small` with a loss, as the Trainer wants it; its parameters are called as in the checkpoint but for a prefix."""

    base_model_prefix = "inner"

    def __init__(self) -> None:
        super().__init__()
        self.inner = Small()

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        scores = self.inner(tokens)
        return {"loss": (scores.float() - labels).square().mean(), "scores": scores}


class Rows(Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = torch.randint(0, 11, (5,), generator=torch.Generator().manual_seed(index))
        return {"tokens": tokens, "labels": tokens[:1].float()}


def trainer(directory: Path, model: torch.nn.Module, callback: TrainerCallback | None, **settings: Any) -> Trainer:
    usual: dict[str, Any] = {
        "learning_rate": 0.05, "weight_decay": 0.1, "per_device_train_batch_size": 2, "max_steps": 4, "use_cpu": True,
        "report_to": [], "disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no",
        "dataloader_pin_memory": False,
    }  # fmt: skip
    arguments = TrainingArguments(output_dir=str(directory), **usual | settings)
    return Trainer(model, arguments, train_dataset=Rows(), callbacks=[callback] if callback else [])


def unmoved(world: World, model: Scored, start: Scored) -> dict[str, list[bool]]:
    """For each tensor with frozen elements: whether all of those are as they were, and whether any other one is."""
    masks = world.masks(3, "prior")
    result = {}
    for (name, value), before in zip(model.inner.named_parameters(), start.inner.parameters(), strict=True):
        same = value == before
        if masks[name].any():
            result[name] = [bool(same[masks[name]].all()), bool(same[~masks[name]].any())]
    return result


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_accumulation_steps": 3},
        {"bf16": True},
        {"max_grad_norm": 0.1, "lr_scheduler_type": "cosine"},
        {"optim": "adafactor"},
        {"optim": "sgd", "warmup_steps": 2},
    ],
    ids=lambda settings: "-".join(settings) or "plain",
)
def test_training_leaves_them(world: World, tmp_path: Path, settings: dict[str, Any]) -> None:
    model = Scored()
    start = copy.deepcopy(model)
    callback = FrozenCoresCallback(world.plan, stage=3)
    trainer(tmp_path, model, callback, **settings).train()
    states = unmoved(world, model, start)
    assert all(frozen for frozen, _ in states.values())
    assert not states["hidden.weight"][1]
    assert callback.frozen is None


def test_without_it_they_move(world: World, tmp_path: Path) -> None:
    model = Scored()
    start = copy.deepcopy(model)
    trainer(tmp_path, model, None).train()
    assert not any(frozen for frozen, _ in unmoved(world, model, start).values())


def test_as_in_a_plain_loop(world: World, tmp_path: Path) -> None:
    """The same values as a Trainer without it gives that masks gradients and puts values back by hand."""
    model, slow = Scored(), Scored()
    masks = {f"inner.{name}": mask for name, mask in world.masks(2, "all").items()}
    start = copy.deepcopy(slow)

    class ByHand(TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, **kwargs: Any) -> None:
            for name, parameter in kwargs["model"].named_parameters():
                parameter.grad[masks[name]] = 0

        def on_optimizer_step(self, *_: Any, **kwargs: Any) -> None:
            with torch.no_grad():
                for (name, value), before in zip(kwargs["model"].named_parameters(), start.parameters(), strict=True):
                    value.copy_(torch.where(masks[name], before, value))

    trainer(tmp_path, model, FrozenCoresCallback(world.plan, stage=2, freeze="all")).train()
    trainer(tmp_path, slow, ByHand()).train()
    assert all(torch.equal(x, y) for x, y in zip(model.parameters(), slow.parameters(), strict=True))
    assert not torch.equal(model.inner.hidden.weight, start.inner.hidden.weight)


def test_a_training_that_goes_on(world: World, tmp_path: Path) -> None:
    """From a checkpoint of the Trainer: the same as without the interruption."""
    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}
    whole, start = Scored(), Scored()
    trainer(tmp_path, whole, FrozenCoresCallback(world.plan, stage=3), **saving).train()
    again = Scored()
    trainer(tmp_path, again, FrozenCoresCallback(world.plan, stage=3), **saving).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-2")
    )
    assert all(frozen for frozen, _ in unmoved(world, again, start).values())
    assert all(torch.equal(x, y) for x, y in zip(whole.parameters(), again.parameters(), strict=True))


def test_several_trainings(world: World, tmp_path: Path) -> None:
    """One after the other, also after one that ended in an error."""
    model, start = Scored(), Scored()

    class Failing(TrainerCallback):
        fails = True

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if self.fails:
                raise ArithmeticError

    failing = Failing()
    callback = FrozenCoresCallback(world.plan, stage=3)
    training = trainer(tmp_path, model, callback)
    training.add_callback(failing)
    with pytest.raises(ArithmeticError):
        training.train()
    left = callback.frozen
    assert left is not None
    failing.fails = False
    training.train()
    training.train()
    assert left._attached == []
    states = unmoved(world, model, start)
    assert all(frozen for frozen, _ in states.values())
    assert not states["hidden.weight"][1]


def test_what_is_wrong_comes_before_the_first_step(world: World, tmp_path: Path) -> None:
    model, start = Scored(), Scored()
    with pytest.raises(PlanError, match="stage 7"):
        trainer(tmp_path, model, FrozenCoresCallback(world.plan, stage=7)).train()
    assert all(torch.equal(x, y) for x, y in zip(model.parameters(), start.parameters(), strict=True))
