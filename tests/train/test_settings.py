"""Numbers that a training is told."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from cpimerge import RecipeError
from cpimerge.train import Settings


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"samples": 0}, "samples: expected a whole number of at least 1, got 0"),
        ({"batch_size": True}, "batch_size: expected a whole number of at least 1, got True"),
        ({"steps": 2.0}, "steps: expected a whole number of at least 1, got 2.0"),
        ({"holdout": -1}, "holdout: expected a whole number from 0 on, got -1"),
        ({"seed": 1 << 32}, "seed: expected a whole number from 0 on, got 4294967296"),
        ({"learning_rate": 0}, "learning_rate: expected a number above 0, got 0"),
        ({"learning_rate": float("nan")}, "learning_rate: expected a number above 0, got nan"),
        ({"weight_decay": -0.1}, "weight_decay: expected a number from 0 on, got -0.1"),
        ({"bf16": "no"}, "bf16: expected True or False, got 'no'"),
        ({"truncate": 1}, "truncate: expected True or False, got 1"),
        ({"warmup": 1}, "warmup: expected a share from 0 to less than 1, got 1"),
    ],
)
def test_what_cannot_be(given: dict[str, Any], problem: str) -> None:
    with pytest.raises(RecipeError) as raised:
        Settings(**given)
    assert raised.value.problems == (problem,)


def test_all_at_once() -> None:
    with pytest.raises(RecipeError) as raised:
        Settings(epochs=0, warmup=-1.0, learning_rate=-1.0)
    assert [problem.split(":")[0] for problem in raised.value.problems] == ["epochs", "learning_rate", "warmup"]


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        (Settings(batch_size=4), 3),
        (Settings(batch_size=5), 2),
        (Settings(batch_size=4, epochs=3), 8),  # 30 examples in batches of 4: the last one is short
        (Settings(batch_size=4, gradient_accumulation=2), 2),
        (Settings(batch_size=4, steps=7), 7),
    ],
)
def test_steps_of_ten_examples(settings: Settings, steps: int) -> None:
    assert settings.steps_of(10) == steps


def test_every_setting_decides_the_bytes() -> None:
    assert len(Settings().parts()) == len(fields(Settings))
    assert Settings().parts()["--learning-rate"] == "2e-05"
    assert Settings(batch_size=3).parts().items() - Settings().parts().items() == {("--batch-size", "3")}
