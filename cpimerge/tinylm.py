"""A small causal language model over bytes, its training loop and its scoring, in plain torch.

The model is Llama in every detail that a checkpoint shows: parameter names and shapes, RMSNorm, rotary
embeddings that rotate halves, a SiLU-gated MLP. So what `save` writes is an ordinary checkpoint directory,
which `transformers.AutoModelForCausalLM.from_pretrained` loads too. A token is a byte, so there is no tokenizer.

Examples are tables: `tokens` uint8 [rows, length] and `asked` bool [rows, length], which marks the bytes that
the model must predict from those before them. A plain text asks for every byte, a question only for its answer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Schedule", "Shape", "Table", "TinyLlama", "load", "new", "save", "score", "train"]

VOCABULARY = 256  # bytes


@dataclass(frozen=True)
class Shape:
    """Sizes of a model. `hidden` is a multiple of 2 · `heads`."""

    hidden: int = 96
    layers: int = 3
    heads: int = 3
    intermediate: int = 192
    positions: int = 128
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5

    def config(self, dtype: torch.dtype) -> dict[str, object]:
        """The `config.json` of a LlamaForCausalLM of this shape, its weights stored as `dtype`."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": VOCABULARY,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads,
            "hidden_act": "silu",
            "max_position_embeddings": self.positions,
            "rms_norm_eps": self.norm_eps,
            "rope_theta": self.rope_theta,
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": False,
            "bos_token_id": ord("\n"),
            "eos_token_id": ord("\n"),
            "torch_dtype": str(dtype).removeprefix("torch."),
        }

    @staticmethod
    def of_config(config: dict[str, object]) -> Shape:
        """The shape that `config` wrote down."""
        number = {key: value for key, value in config.items() if isinstance(value, int | float)}
        return Shape(
            hidden=int(number["hidden_size"]),
            layers=int(number["num_hidden_layers"]),
            heads=int(number["num_attention_heads"]),
            intermediate=int(number["intermediate_size"]),
            positions=int(number["max_position_embeddings"]),
            rope_theta=float(number["rope_theta"]),
            norm_eps=float(number["rms_norm_eps"]),
        )


@dataclass(frozen=True)
class Table:
    """Examples of one task: `tokens` uint8 [rows, length], `asked` bool [rows, length] (never column 0)."""

    tokens: Tensor
    asked: Tensor

    def __post_init__(self) -> None:
        if self.tokens.shape != self.asked.shape or bool(self.asked[:, 0].any()):
            raise ValueError("tokens and asked must have one shape, and nothing precedes column 0 to predict it from")

    def rows(self, index: Tensor | slice) -> Table:
        """The rows that `index` picks."""
        return Table(self.tokens[index], self.asked[index])


def rotary(length: int, head: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary embedding, each float32 [length, head]; both halves carry the same angles."""
    rate = 1.0 / theta ** (torch.arange(0, head, 2, dtype=torch.float32) / head)
    angle = torch.outer(torch.arange(length, dtype=torch.float32), rate)
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (i, i + head/2) of `x` [..., length, head] by their angles."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Attention(nn.Module):
    """Causal self-attention, [rows, length, hidden] to the same."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.q_proj = nn.Linear(shape.hidden, shape.hidden, bias=False)
        self.k_proj = nn.Linear(shape.hidden, shape.hidden, bias=False)
        self.v_proj = nn.Linear(shape.hidden, shape.hidden, bias=False)
        self.o_proj = nn.Linear(shape.hidden, shape.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        rows, length, hidden = x.shape

        def split(y: Tensor) -> Tensor:
            return y.view(rows, length, self.heads, -1).transpose(1, 2)  # [rows, heads, length, head]

        q, k = rotate(split(self.q_proj(x)), cos, sin), rotate(split(self.k_proj(x)), cos, sin)
        mixed = F.scaled_dot_product_attention(q, k, split(self.v_proj(x)), is_causal=True)
        out: Tensor = self.o_proj(mixed.transpose(1, 2).reshape(rows, length, hidden))
        return out


class Mlp(nn.Module):
    """SiLU-gated feed-forward, [rows, length, hidden] to the same."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.up_proj = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.down_proj = nn.Linear(shape.intermediate, shape.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Block(nn.Module):
    """One transformer layer, [rows, length, hidden] to the same."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(shape.hidden, eps=shape.norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = nn.RMSNorm(shape.hidden, eps=shape.norm_eps)
        self.mlp = Mlp(shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Decoder(nn.Module):
    """Everything below the head: token ids [rows, length] to float32 [rows, length, hidden]."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(VOCABULARY, shape.hidden)
        self.layers = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.hidden, eps=shape.norm_eps)

    def forward(self, tokens: Tensor) -> Tensor:
        cos, sin = rotary(tokens.shape[1], self.shape.hidden // self.shape.heads, self.shape.rope_theta)
        x: Tensor = self.embed_tokens(tokens)
        for block in self.layers:
            x = block(x, cos, sin)
        out: Tensor = self.norm(x)
        return out


class TinyLlama(nn.Module):
    """Token ids, integers [rows, length], to logits, float32 [rows, length, 256], for the next byte."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.model = Decoder(shape)
        self.lm_head = nn.Linear(shape.hidden, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.lm_head(self.model(tokens.int()))
        return logits


def new(shape: Shape, generator: torch.Generator) -> TinyLlama:
    """A model with fresh float32 weights drawn from `generator` alone, so that torch's own state stays as it is."""
    with torch.device("meta"):
        model = TinyLlama(shape)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)  # the scales of the norms
            else:
                parameter.normal_(0.0, parameter.shape[1] ** -0.5, generator=generator)
    return model


def save(model: TinyLlama, directory: Path, dtype: torch.dtype) -> None:
    """Write `model` as a checkpoint directory (`model.safetensors`, `config.json`), rounded to `dtype`."""
    directory.mkdir(parents=True, exist_ok=True)
    weights = {name: value.to(dtype) for name, value in model.state_dict().items()}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.dumps(model.shape.config(dtype), indent=2) + "\n"
    (directory / "config.json").write_text(config, encoding="utf-8")


def load(directory: Path) -> TinyLlama:
    """The model in `directory`, computing in float32 with the weights as stored. RuntimeError if they do not fit."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    with torch.device("meta"):
        model = TinyLlama(Shape.of_config(config))
    weights = load_file(directory / "model.safetensors")
    model.load_state_dict({name: value.float() for name, value in weights.items()}, assign=True)
    return model


@dataclass(frozen=True)
class Schedule:
    """How to train: the rate rises to `rate` over `warmup` steps, then falls to 0; `tokens` bytes a step, about."""

    steps: int
    rate: float
    warmup: int = 20
    tokens: int = 1024

    def rate_at(self, step: int) -> float:
        """Learning rate of `step` (from 0)."""
        if step < self.warmup:
            return self.rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.rate * 0.5 * (1.0 + math.cos(math.pi * done))


def loss(model: TinyLlama, table: Table) -> Tensor:
    """Mean cross-entropy, in nats, over the bytes asked for; a scalar."""
    logits = model(table.tokens[:, :-1])
    asked = table.asked[:, 1:]
    return F.cross_entropy(logits[asked], table.tokens[:, 1:][asked].long())


def train(model: TinyLlama, tables: Sequence[Table], schedule: Schedule, generator: torch.Generator) -> None:
    """Train `model` in place on the mean of the losses of `tables`, their rows drawn by `generator`."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(schedule.steps):
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate_at(step)
        optimizer.zero_grad()
        for table in tables:
            share = loss(model, _draw(table, schedule.tokens // len(tables), generator)) / len(tables)
            torch.autograd.backward(share)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def _draw(table: Table, tokens: int, generator: torch.Generator) -> Table:
    """Random rows of `table`, about `tokens` bytes."""
    rows = max(1, tokens // table.tokens.shape[1])
    return table.rows(torch.randint(len(table.tokens), (rows,), generator=generator))


def score(model: TinyLlama, table: Table) -> float:
    """Share, 0 to 1, of the bytes asked for that the model finds the likeliest, given the true bytes before them."""
    right = asked = 0
    with torch.no_grad():
        for start in range(0, len(table.tokens), 128):
            part = table.rows(slice(start, start + 128))
            hit = model(part.tokens[:, :-1]).argmax(dim=-1) == part.tokens[:, 1:]
            right += int((hit & part.asked[:, 1:]).sum())
            asked += int(part.asked.sum())
    return right / asked
