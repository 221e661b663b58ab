"""One stage: transformers' Trainer over examples in a settled order, with the loss of every task told apart."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from ..budget import format_size
from ..errors import OutputError, ResourceError
from .settings import Settings
from .tokens import IGNORED, Encoded, padded
from .training_log import TrainingLog
from .weights import restore, save

__all__ = ["Course", "device", "enough_memory", "held_out_loss", "own_random_numbers", "place", "train_stage"]

MAX_GRADIENT_NORM = 1.0
MEMORY_BYTES = 16  # of an element: itself, its gradient and AdamW's two moments
WEIGHTS = "model.safetensors"
DIVERGED = "Train with a lower --learning-rate, or without --bf16"


@dataclass(frozen=True)
class Course:
    """What a stage needs beside its model: `examples` in the order in which they are trained on, in `steps` steps.

    `tasks` are all tasks' names, as `Encoded.task` counts them; `padding` is the id of the token that fills up a
    batch. `directory` holds the run's checkpoints; `saved` is told the step of each that is complete, `progress` every
    step.
    """

    number: int
    examples: Sequence[Encoded]
    steps: int
    tasks: Sequence[str]
    padding: int
    settings: Settings
    directory: Path
    log: TrainingLog
    saved: Callable[[int], None]
    progress: Callable[[int], None]


def train_stage(
    model: PreTrainedModel, course: Course, callbacks: Sequence[TrainerCallback], resume_from: Path | None
) -> None:
    """Train `model` in place, from the checkpoint `resume_from` of an earlier run on where there is one.

    Raises OutputError where the loss is no number any more.
    """
    trainer = _StageTrainer(model, course)
    for callback in (_Watcher(course, trainer.tally), *callbacks):
        trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=None if resume_from is None else str(resume_from))
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # what bf16 put around its forward


def device() -> torch.device:
    """Where the Trainer trains: the accelerator, where there is one."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")


def place(model: PreTrainedModel) -> None:
    """Move the model where the Trainer will want it."""
    torch.nn.Module.to(model, device())


@contextmanager
def enough_memory(elements: int) -> Iterator[None]:
    """Raises ResourceError where the device's memory does not suffice for a model of so many elements."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ResourceError(
            f"the memory of {device()} does not suffice: training takes {format_size(MEMORY_BYTES * elements)} for "
            "the model, and more for the examples of a batch. Lower --batch-size, and raise --gradient-accumulation "
            "for it; or lower --max-length"
        ) from error


@contextmanager
def own_random_numbers() -> Iterator[None]:
    """Whatever the block draws or seeds, the caller's random numbers go on where they were."""
    kind = device().type
    devices = [] if kind in ("cpu", "mps") else [torch.accelerator.current_device_index()]  # mps has one, unnumbered
    python, arrays = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices, device_type=kind):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)


def held_out_loss(
    model: PreTrainedModel, examples: Mapping[str, Sequence[Encoded]], padding: int, batch_size: int
) -> dict[str, float]:
    """The mean loss of a token by task, in float32 and without dropout. Raises OutputError where it is no number."""
    model.train(False)
    losses = {}
    for task, encoded in examples.items():
        total, tokens = 0.0, 0
        for begin in range(0, len(encoded), batch_size):
            on_cpu = _batch(padding, encoded[begin : begin + batch_size])
            batch = {key: value.to(model.device) for key, value in on_cpu.items()}
            with torch.no_grad():
                total += float(_token_losses(model, batch).cpu().double().sum())
            tokens += int((batch["labels"] != IGNORED).sum())
        if not math.isfinite(total):
            raise OutputError(f"the loss of {task!r} on held-out examples is no number any more. {DIVERGED}")
        losses[task] = total / tokens
    return losses


def _token_losses(model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Cross entropy float32 [rows, length − 1] of each token given those before it; 0 where none is asked for."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    labels = batch["labels"][:, 1:]
    flat = F.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return flat.view(labels.shape)


def _batch(padding: int, examples: Sequence[Encoded]) -> dict[str, torch.Tensor]:
    return {key: torch.tensor(value) for key, value in padded(examples, padding).items()}


class _Tally:
    """Loss and tokens of each task in the step at hand, float64 [tasks] each."""

    def __init__(self, tasks: Sequence[str]) -> None:
        self.tasks = tasks
        self.clear()

    def clear(self) -> None:
        self._sums = torch.zeros(len(self.tasks), dtype=torch.float64)
        self._tokens = torch.zeros(len(self.tasks), dtype=torch.float64)

    def add(self, task: torch.Tensor, losses: torch.Tensor, labels: torch.Tensor) -> None:
        """A batch: `task` int64 [rows, 1], `losses` float32 [rows, length − 1], `labels` int64 [rows, length]."""
        rows = task.flatten().cpu()
        self._sums.index_add_(0, rows, losses.detach().cpu().double().sum(1))
        self._tokens.index_add_(0, rows, (labels[:, 1:] != IGNORED).cpu().double().sum(1))

    def taken(self) -> dict[str, Any]:
        """What was added since the last time, as the log has it."""
        sums, tokens = self._sums.tolist(), self._tokens.tolist()
        self.clear()
        tasks = {
            task: {"loss": loss / count, "tokens": int(count)}
            for task, loss, count in zip(self.tasks, sums, tokens, strict=True)
            if count
        }
        return {"loss": math.fsum(sums) / sum(tokens), "tasks": tasks}


class _Examples(Dataset[Encoded]):
    """The examples as PyTorch wants them."""

    def __init__(self, examples: Sequence[Encoded]) -> None:
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, number: int) -> Encoded:
        return self._examples[number]


class _StageTrainer(Trainer):
    """Takes the examples as they come, computes the loss once for the step and for the log, saves without pickles."""

    def __init__(self, model: PreTrainedModel, course: Course) -> None:
        collate: Any = partial(_batch, course.padding)
        super().__init__(model, _arguments(course), collate, _Examples(course.examples))
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = True  # so that it counts the tokens of all batches of a step
        self.tally = _Tally(course.tasks)
        self._trained = model

    def _get_train_sampler(self, *_: Any, **__: Any) -> Sampler[int]:
        return SequentialSampler(self.train_dataset)  # type: ignore[arg-type] # the one given above

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The mean over all tokens of the step that are asked for."""
        losses = _token_losses(model, inputs)
        self.tally.add(inputs["task"], losses, inputs["labels"])
        return losses.sum() / num_items_in_batch

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        directory = Path(str(output_dir))
        directory.mkdir(parents=True, exist_ok=True)
        save(self._trained, directory / WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        restore(self._trained, Path(resume_from_checkpoint) / WEIGHTS)


class _Watcher(TrainerCallback):
    """Writes the log, tells of progress, and says when a checkpoint of the run is due, and when it is complete."""

    def __init__(self, course: Course, tally: _Tally) -> None:
        self.course = course
        self.tally = tally
        self._rate = 0.0

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **things: Any
    ) -> None:
        """The rate of the step to come."""
        self._rate = float(things["optimizer"].param_groups[0]["lr"])

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **things: Any
    ) -> TrainerControl:
        """A line in the log."""
        course, step, found = self.course, state.global_step, self.tally.taken()
        if not math.isfinite(found["loss"]):
            raise OutputError(f"stage {course.number}, step {step}: the loss is no number any more. {DIVERGED}")
        place = {"stage": course.number, "step": step, "steps": course.steps}
        course.log.append({**place, "learning_rate": self._rate, **found})
        control.should_save = step % course.settings.save_steps == 0 and step < course.steps
        course.progress(step)
        return control

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **things: Any) -> None:
        """The checkpoint is written."""
        self.course.saved(state.global_step)


def _arguments(course: Course) -> TrainingArguments:
    settings = course.settings
    arguments = TrainingArguments(
        output_dir=os.fspath(course.directory),
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        max_steps=course.steps,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        warmup_steps=settings.warmup_of(course.steps),
        lr_scheduler_type="linear",
        optim="adamw_torch",
        max_grad_norm=MAX_GRADIENT_NORM,
        bf16=settings.bf16,
        use_cpu=not torch.accelerator.is_available(),
        seed=settings.seed,
        logging_strategy="no",
        save_strategy="no",  # `_Watcher` says when
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # several would each take batches of this size, in no settled order
    return arguments
