"""A training run from beginning to end: stage after stage, going on where an earlier one was cut off, to an output.

Beside what staging.py keeps there, `.out.partial/` has while it lasts

    training_log.jsonl              the log so far
    stage-2/checkpoint-50/          the Trainer's own checkpoint within the stage at hand
    after-1.safetensors             the weights in float32 after the last stage that is finished
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from ..disk import flush
from ..errors import CheckpointError, DataError
from ..journal import Record
from ..needs import check_disk
from ..places import keep_only, remove
from ..staging import Staging, Target, Work, staged_bytes, staged_directory
from .callback import FrozenCoresCallback
from .frozen import FrozenCores
from .job import Job, Observer, Outline, StageOutline, library_versions
from .loop import Course, device, enough_memory, held_out_loss, own_random_numbers, place, train_stage
from .output import read_record, write_output
from .sampling import ordered
from .tokens import Encoded, encode_all
from .training_log import LOG, TrainingLog
from .weights import load, load_config, load_tokenizer, restore, save

__all__ = ["run"]

CHECKPOINT_BYTES = 12  # of an element: itself in float32, and AdamW's two moments
STAGE_BYTES = 4  # of an element after a stage: itself in float32


class _Point(BaseModel):
    """What is on the disk: `stage` after its step `step`, or all of it where that is None; so many bytes of the log."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    stage: int = Field(ge=1)
    step: int | None = Field(ge=1)
    log: int = Field(ge=0)


@dataclass(frozen=True)
class _Encoded:
    """Examples by task, as tokens."""

    train: Mapping[str, list[Encoded]]
    held_out: Mapping[str, list[Encoded]]
    padding: int


def run(job: Job, target: Target, observer: Observer) -> dict[str, Any]:
    """Train, write the output to `target`, and return its record.

    Goes on where an earlier run of the same work was cut off. Raises DataError for examples that do not fit,
    CheckpointError where the model or its tokenizer cannot be loaded, ResourceError, OutputError, PlanError; nothing
    appears at the target then.
    """
    encoded = _encode(job, load_tokenizer(job.start), observer)
    elements = sum(tensor.elements for tensor in job.start.tensors.values())
    check_disk(_most_bytes(job) * elements - staged_bytes(target.directory), target.directory)
    parts = {**job.parts, **library_versions(), "the device": device().type}
    work = Work(job.kind, xxhash.xxh3_128_hexdigest(repr(sorted(parts.items())).encode()), parts)
    with staged_directory(target, job.inputs, work) as staging:
        if staging.is_published:
            return read_record(target.directory)
        with (
            closing(_Run(job, encoded, staging, observer)) as running,
            enough_memory(elements),
            own_random_numbers(),
        ):
            return running.finish(target.shard_bytes)


def _most_bytes(job: Job) -> int:
    """The most that lies on the disk of an element; the output comes when the checkpoints are gone."""
    after = STAGE_BYTES if len(job.stages) > 1 else 0
    return after + 2 * CHECKPOINT_BYTES  # an old checkpoint goes when the new one is there


def _encode(job: Job, tokenizer: PreTrainedTokenizerBase, observer: Observer) -> _Encoded:
    """Everything as tokens, and the outline told."""
    samples = job.samples
    all_examples = {task: [*samples[task].train, *samples[task].held_out] for task in job.tasks}
    encoded, cut = encode_all(tokenizer, all_examples, job.settings)
    _check_positions(job, max(len(example.ids) for examples in encoded.values() for example in examples))
    sizes = {task: len(samples[task].train) for task in job.tasks}
    stages = []
    for stage in job.stages:
        examples = sum(sizes[task] for task in stage)
        stages.append(StageOutline(tuple(stage), examples, job.settings.steps_of(examples)))
    notes = (*job.notes, *_repeated(job))
    observer.announce(Outline(tuple(stages), min(sizes.values()), job.settings.holdout, cut, notes))
    padding = next((int(i) for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    return _Encoded(
        {task: encoded[task][: sizes[task]] for task in job.tasks},
        {task: encoded[task][sizes[task] :] for task in job.tasks if job.settings.holdout},
        padding,
    )


def _repeated(job: Job) -> Iterator[str]:
    """A note for each task of which examples are not trained on, since they are held out."""
    for task, sample in job.samples.items():
        if count := sample.left_out:
            are = "examples are" if count > 1 else "example is"
            yield f"task {task!r}: {count:,} {are} the same as some held out, and left out"


def _check_positions(job: Job, longest: int) -> None:
    """Raise DataError where the model has no positions for its longest example."""
    positions = getattr(load_config(job.start), "max_position_embeddings", None)
    if isinstance(positions, int) and 0 < positions < longest:
        raise DataError(
            f"{job.start.path}: takes {positions} tokens at most, and an example has {longest}. "
            f"Give --max-length {positions}, with --truncate to cut the longer ones"
        )


class _Run:
    """The stages that are left, one after the other."""

    def __init__(self, job: Job, encoded: _Encoded, staging: Staging, observer: Observer) -> None:
        self.job = job
        self.encoded = encoded
        self.staging = staging
        self.observer = observer
        self.done = _last_point(staging.done)
        self.log = TrainingLog(staging.root / LOG, self.done.log if self.done else 0)

    def close(self) -> None:
        self.log.close()

    def finish(self, shard_bytes: int) -> dict[str, Any]:
        """Train what is left, and write the output; returns its record."""
        model = load(self.job.start)
        self._check_rows(model)
        place(model)
        first, step = self._begin(model)
        for number in range(first, len(self.job.stages) + 1):
            self._train(model, number, step if number == first else 0)
        frozen = [self._frozen(model, number) for number in range(1, len(self.job.stages) + 1)]
        keep_only(self.staging.files, ())
        return write_output(self.job, model, self.staging.files, self.log, frozen, shard_bytes)

    def _check_rows(self, model: PreTrainedModel) -> None:
        """Raise CheckpointError where the tokenizer has a token that the model has no embedding of."""
        groups = (*self.encoded.train.values(), *self.encoded.held_out.values())
        highest = max(max(example.ids) for examples in groups for example in examples)
        embeddings = model.get_input_embeddings().weight
        if isinstance(embeddings, torch.Tensor) and highest >= len(embeddings):
            raise CheckpointError(
                f"{self.job.start.path}: its tokenizer has a token {highest}, and the model {len(embeddings)} "
                "embeddings. Give the tokenizer that belongs to the model"
            )

    def _begin(self, model: PreTrainedModel) -> tuple[int, int]:
        """The stage and the step after which to go on; `model` holds what the stages before have trained."""
        done = self.done
        if done is None:
            self._look(model, 0)
            return 1, 0
        finished = done.stage if done.step is None else done.stage - 1
        first, step = finished + 1, done.step or 0
        is_trained = first > len(self.job.stages)
        self.observer.resumed(*((finished, self._steps(finished)) if is_trained else (first, step)))
        if finished:
            restore(model, self._after(finished))
        return first, step

    def _train(self, model: PreTrainedModel, number: int, step: int) -> None:
        """One stage, from behind the checkpoint at `step` on."""
        directory = self.staging.root / f"stage-{number}"
        checkpoint = directory / f"checkpoint-{step}" if step else None
        directory.mkdir(exist_ok=True)
        kept = [checkpoint.name] if checkpoint else []
        keep_only(directory, kept, kept)  # others are not known to be whole
        phase, steps = f"stage {number}", self._steps(number)
        train = [example for task in self.job.stages[number - 1] for example in self.encoded.train[task]]
        course = Course(
            number=number,
            examples=ordered(train, number, self.job.settings),
            steps=steps,
            tasks=self.job.tasks,
            padding=self.encoded.padding,
            settings=self.job.settings,
            directory=directory,
            log=self.log,
            saved=lambda at: self._saved(number, at),
            progress=lambda at: self.observer.progress(phase, at, steps),
        )
        train_stage(model, course, list(self._callbacks(number)), checkpoint)
        self._look(model, number)
        save(model, self._after(number))
        flush(self._after(number))
        self._record(_Point(stage=number, step=None, log=self.log.nbytes))
        remove(directory)
        remove(self._after(number - 1))

    def _saved(self, number: int, step: int) -> None:
        """A checkpoint within a stage is written: keep it, and none before it."""
        directory = self.staging.root / f"stage-{number}"
        checkpoint = directory / f"checkpoint-{step}"
        for written in (*checkpoint.iterdir(), checkpoint, directory):
            flush(written)
        self._record(_Point(stage=number, step=step, log=self.log.nbytes))
        keep_only(directory, [checkpoint.name], [checkpoint.name])

    def _record(self, point: _Point) -> None:
        self.log.flush()
        flush(self.staging.root)
        self.staging.journal.append(point.model_dump())

    def _look(self, model: PreTrainedModel, stage: int) -> None:
        """The loss of every task on what was held out of training."""
        if self.encoded.held_out:
            batch = self.job.settings.batch_size
            losses = held_out_loss(model, self.encoded.held_out, self.encoded.padding, batch)
            self.log.append({"stage": stage, "held_out": losses})

    def _steps(self, number: int) -> int:
        tasks = self.job.stages[number - 1]
        return self.job.settings.steps_of(sum(len(self.encoded.train[task]) for task in tasks))

    def _after(self, stage: int) -> Path:
        return self.staging.root / f"after-{stage}.safetensors"

    def _callbacks(self, number: int) -> Iterator[TrainerCallback]:
        if cores := self.job.cores:
            yield FrozenCoresCallback(cores.plan_dir, stage=number, freeze=cores.freeze)

    def _frozen(self, model: PreTrainedModel, number: int) -> int:
        """How many elements the stage froze."""
        if cores := self.job.cores:
            return FrozenCores(cores.plan_dir, model, stage=number, freeze=cores.freeze).elements
        return 0


def _last_point(done: Iterable[Record]) -> _Point | None:
    """How far an earlier run came; None where there was none."""
    last = None
    for record in done:
        try:
            last = _Point.model_validate(record)
        except ValidationError:
            break
    return last
