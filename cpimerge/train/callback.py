"""Frozen cores in transformers' Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .frozen import FrozenCores
from .stage_cores import Freeze

__all__ = ["FrozenCoresCallback"]


class FrozenCoresCallback(TrainerCallback):
    """Freezes one stage's cores from the beginning to the end of `Trainer.train`, as often as that is called."""

    def __init__(self, plan: str | Path, *, stage: int, freeze: Freeze = "prior") -> None:
        """As `FrozenCores`; what that raises comes when the training begins."""
        self.frozen: FrozenCores | None = None  # during the training
        self._plan = plan
        self._stage = stage
        self._freeze: Freeze = freeze

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Freeze them in `model`, for `optimizer`, both as the Trainer passes them."""
        self._release()  # where an earlier training ended in an error
        model: torch.nn.Module = kwargs["model"]
        self.frozen = FrozenCores(self._plan, model, stage=self._stage, freeze=self._freeze)
        self.frozen.attach(kwargs["optimizer"])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let go of them."""
        self._release()

    def _release(self) -> None:
        if self.frozen is not None:
            self.frozen.detach()
        self.frozen = None
