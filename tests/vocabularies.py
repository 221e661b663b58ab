"""Checkpoints with tokenizers for the tests, and their rows matched token by token: slowly, with dicts."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from checkpoints import save

from cpimerge.checkpoint import Handles, Tensor

CORE = ("a", "b", "c", "d", "e")  # the vocabulary that all tokenizers have, beside what is added to it
EMBEDDING = "model.embed_tokens.weight"
HEAD_BIAS = "final_logits_bias"  # its rows are its second dimension
BLOCK = "model.layers.0.mlp.weight"


@dataclass(frozen=True)
class Model:
    """`names`: id -> token. `tensors` have `rows` rows, some of which may be padding."""

    names: Mapping[int, str]
    tensors: Mapping[str, torch.Tensor]
    core: Sequence[str] = CORE
    flags: Mapping[str, Mapping[str, bool]] = field(default_factory=dict)  # of added tokens that are not special

    @property
    def rows(self) -> int:
        return self.tensors[EMBEDDING].shape[0]

    def row(self, token: str) -> int | None:
        """The row of a token, if it has one."""
        return next((row for row, name in self.names.items() if name == token and row < self.rows), None)


def model(
    names: Mapping[int, str], rows: int, seed: int, dtype: torch.dtype = torch.float32, *, width: int = 3, **more: Any
) -> Model:
    """Random numbers in all tensors."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {EMBEDDING: (rows, width), HEAD_BIAS: (1, rows), BLOCK: (2, 4)}
    tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    return Model(names, tensors, **more)


def added(*tokens: str) -> dict[int, str]:
    """CORE, with tokens added to it."""
    return dict(enumerate((*CORE, *tokens)))


def tokenizer(of: Model) -> dict[str, Any]:
    """What its tokenizer.json holds, of the kind that tokenizers calls WordLevel."""
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": row, "content": token, **plain, **of.flags.get(token, {})}
            for row, token in sorted(of.names.items())
            if token not in of.core
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "WordLevel",
            "vocab": {token: row for row, token in of.names.items() if token in of.core},
            "unk_token": "a",
        },
    }


def write(directory: Path, of: Model, config: Mapping[str, Any] | None = None) -> Path:
    """Save a model as transformers does; returns `directory`."""
    save(directory, of.tensors, config={"model_type": "test", "vocab_size": of.rows} if config is None else config)
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer(of), indent=2, ensure_ascii=False), encoding="utf-8")
    return directory


def read(tensor: Tensor, cuts: Sequence[int] = ()) -> bytes:
    """All bytes of a tensor, read in pieces that end at these elements."""
    handles = Handles(8)
    buffer = bytearray(tensor.nbytes)
    places = [0, *sorted({cut for cut in cuts if 0 < cut < tensor.elements}), tensor.elements]
    for begin, end in itertools.pairwise(places):
        view = memoryview(buffer)[begin * tensor.item_bytes : end * tensor.item_bytes]
        tensor.read_into(view, begin * tensor.item_bytes, handles)
    handles.close()
    return bytes(buffer)


# --- the slow way -----------------------------------------------------------------------------------


def by_row(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The rows of a tensor, whose first dimension may be 1."""
    return list(tensor if tensor.shape[0] != 1 else tensor[0])


def stacked(rows: Sequence[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    return torch.stack(list(rows)) if like.shape[0] != 1 else torch.stack(list(rows))[None]


def aligned(base: Model, experts: Mapping[str, Model], mode: str) -> dict[str, Model]:
    """Every model in the rows of the base's vocabulary, or of the union."""
    names = dict(base.names)
    wanted: dict[int, str] = {}  # tokens that need a row, by id
    for expert in experts.values() if mode == "union" else ():
        for row, token in sorted(expert.names.items()):
            if row < expert.rows and base.row(token) is None and token not in wanted.values():
                known = [number for number, name in names.items() if name == token]
                number = known[0] if known else max(names) + 1
                names[number] = wanted[number] = token
    rows = max([base.rows, *(number + 1 for number in wanted)])
    bases = {
        name: [_base_row(base, experts, name, number, wanted) for number in range(rows)]
        for name in (EMBEDDING, HEAD_BIAS)
    }
    result = {"base": _with(base, names, bases)}
    for task, expert in experts.items():
        own = {
            name: [
                _own_row(expert, name, number, names.get(number))
                if _has(expert, number, names.get(number))
                else bases[name][number].float().to(expert.tensors[name].dtype)
                for number in range(rows)
            ]
            for name in (EMBEDDING, HEAD_BIAS)
        }
        result[task] = _with(expert, names, own)
    return result


def _with(of: Model, names: Mapping[int, str], rows: Mapping[str, Sequence[torch.Tensor]]) -> Model:
    changed = {name: stacked(own, of.tensors[name]) for name, own in rows.items()}
    return Model(names, {**of.tensors, **changed})


def _base_row(
    base: Model, experts: Mapping[str, Model], name: str, number: int, wanted: Mapping[int, str]
) -> torch.Tensor:
    if number not in wanted:
        return by_row(base.tensors[name])[number]
    token = wanted[number]
    having = [(expert, row) for expert in experts.values() if (row := expert.row(token)) is not None]
    total = torch.zeros_like(by_row(base.tensors[name])[0], dtype=torch.float32)
    for expert, row in having:
        total = total + by_row(expert.tensors[name])[row].float()
    return (total / len(having)).to(base.tensors[name].dtype)


def _has(expert: Model, number: int, token: str | None) -> bool:
    if token is None:
        return number < expert.rows and number not in expert.names
    return expert.row(token) is not None


def _own_row(expert: Model, name: str, number: int, token: str | None) -> torch.Tensor:
    row = number if token is None else expert.row(token)
    assert row is not None
    return by_row(expert.tensors[name])[row]
