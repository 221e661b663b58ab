"""What a user may set of a training run, checked where they are given."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from ..errors import RecipeError

__all__ = ["Settings"]

COUNTS = ("samples", "epochs", "steps", "batch_size", "gradient_accumulation", "max_length", "save_steps")
SWITCHES = ("truncate", "bf16")


@dataclass(frozen=True)
class Settings:
    """How a model is trained, the same in every stage. Raises RecipeError naming every value that cannot be.

    `samples`: examples of each task; None: as many as the task with the fewest has, at most 1,000. `holdout`: further
    examples of each task, never trained on, whose loss is taken before the training and after every stage; 0: none.
    `epochs`: passes over a stage's examples; `steps`: optimizer steps of a stage, instead of them. A step takes
    `gradient_accumulation` batches of `batch_size` examples. `learning_rate` is reached after the share `warmup` of
    the steps, rounded up but never all, and falls linearly to 0. `weight_decay` is AdamW's. `max_length`: tokens of an
    example; longer ones are an error, or lose their beginning with `truncate`. `bf16`: compute in bfloat16; the
    weights stay in float32. `save_steps`: steps between checkpoints of the run, from which it goes on where it is cut
    off. `seed` decides which examples are drawn, their order, and dropout.
    """

    samples: int | None = None
    holdout: int = 32
    epochs: int = 1
    steps: int | None = None
    batch_size: int = 8
    gradient_accumulation: int = 1
    learning_rate: float = 2e-5
    weight_decay: float = 0.0
    warmup: float = 0.03
    max_length: int = 1024
    truncate: bool = False
    bf16: bool = False
    save_steps: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        if problems := list(self._problems()):
            raise RecipeError(problems)

    def _problems(self) -> Iterator[str]:
        for name in COUNTS:
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                yield f"{name}: expected a whole number of at least 1, got {value!r}"
        for name, limit in (("holdout", math.inf), ("seed", 1 << 32)):
            value = getattr(self, name)
            if type(value) is not int or not 0 <= value < limit:
                yield f"{name}: expected a whole number from 0 on, got {value!r}"
        for name in SWITCHES:
            value = getattr(self, name)
            if not isinstance(value, bool):
                yield f"{name}: expected True or False, got {value!r}"
        if not (_is_number(self.learning_rate) and self.learning_rate > 0):
            yield f"learning_rate: expected a number above 0, got {self.learning_rate!r}"
        if not (_is_number(self.weight_decay) and self.weight_decay >= 0):
            yield f"weight_decay: expected a number from 0 on, got {self.weight_decay!r}"
        if not (_is_number(self.warmup) and 0 <= self.warmup < 1):
            yield f"warmup: expected a share from 0 to less than 1, got {self.warmup!r}"

    def parts(self) -> dict[str, str]:
        """Each setting as text, by the name of its option: what decides the bytes of a result."""
        return {f"--{name.replace('_', '-')}": repr(value) for name, value in asdict(self).items()}

    def steps_of(self, examples: int) -> int:
        """Optimizer steps of a stage that trains on so many examples."""
        return self.steps or math.ceil(self.epochs * examples / self.step_examples)

    def warmup_of(self, steps: int) -> int:
        """How many of a stage's steps come before the one at the full rate: as transformers counts, but never all."""
        return min(math.ceil(self.warmup * steps), steps - 1)

    @property
    def step_examples(self) -> int:
        """Examples of one optimizer step."""
        return self.batch_size * self.gradient_accumulation


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
