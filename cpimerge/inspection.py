"""What is in a checkpoint, by its headers, its config and its tokenizer files; no tensor is read.

Layers are found by name patterns alone. A layer is all that shares a name up to its first all-digit component
(`model.layers.3.`), a stack the layers whose names differ in that number only (`model.layers.*`), and a kind of tensor
all whose names differ in their all-digit components only (`model.layers.*.mlp.up_proj.weight`).
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from .adapter import is_adapter
from .checkpoint import Checkpoint, Tensor, collect, layer_of
from .errors import CheckpointError
from .models import Located, finding, open_model
from .quantized import quantization, refused, stale_config
from .references import parse_reference
from .ties import is_head
from .tokenizer_files import TokenizerFiles, added_entries, find_tokenizer, read_json, read_tokens

__all__ = [
    "Contents",
    "File",
    "Kind",
    "Model",
    "Stack",
    "TensorInfo",
    "Tokenizer",
    "Total",
    "contents",
    "kind_of",
    "opened",
    "stack_of",
]

# What models call the embedding of their tokens.
TOKEN_EMBEDDINGS = (
    *("embed_tokens", "embed_in", "wte", "word_embeddings", "word_embedding", "tok_embeddings"),
    *("token_embedding", "token_embd", "shared"),
)
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "added_tokens.json"),
    *("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "chat_template.json"),
)
Progress = Callable[[str, int, int], None]
Value = TypeVar("Value")


@dataclass(frozen=True)
class Total:
    """Tensors counted together."""

    tensors: int
    elements: int
    bytes: int


@dataclass(frozen=True)
class File:
    """A file with weights: its name, its size in bytes, and how many tensors lie in it."""

    name: str
    bytes: int
    tensors: int


@dataclass(frozen=True)
class TensorInfo:
    """One tensor; `dtype` as safetensors spells it."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Stack:
    """Layers whose names differ in one number only, such as `model.layers.*`; the numbers ascend."""

    pattern: str
    numbers: tuple[int, ...]
    total: Total


@dataclass(frozen=True)
class Kind:
    """Tensors whose names differ in numbers only; `stack` is the pattern of theirs, '' outside the layers."""

    name: str
    stack: str
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]
    total: Total


@dataclass(frozen=True)
class Tokenizer:
    """`kind` is "BPE", "Unigram" and so on; None, and `tokens` too, where its files do not tell."""

    kind: str | None
    tokens: int | None
    files: tuple[str, ...]


@dataclass(frozen=True)
class Contents:
    """What is in a checkpoint.

    `name` is what the caller calls it, `path` and `adapter` are where it lies. `tied` is what its config says of the
    output head being the input embedding, None where it says nothing; `heads` are the heads that are stored.
    `vocabulary` are the tensors with a row for every token, each with its rows; `vocab_size` is what the config says of
    these. `notes` say what is odd.
    """

    name: str
    path: str
    adapter: str | None
    format: str  # "safetensors" or "pytorch"
    files: tuple[File, ...]
    total: Total
    dtypes: Mapping[str, Total]
    stacks: tuple[Stack, ...]
    outside: Total  # of the layers
    kinds: tuple[Kind, ...]
    tensors: tuple[TensorInfo, ...]
    model_type: str | None
    architectures: tuple[str, ...]
    quantization: str | None  # the scheme, "" for one without a name
    tied: bool | None
    heads: tuple[str, ...]
    vocab_size: int | None
    vocabulary: Mapping[str, int]
    tokenizer: Tokenizer | None
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        return asdict(replace(self, tensors=())) | {"tensors": [vars(tensor) for tensor in self.tensors]}


@dataclass(frozen=True)
class Model:
    """A checkpoint and what the caller calls it."""

    name: str
    checkpoint: Checkpoint


@contextmanager
def opened(names: Sequence[str], download: str | None, progress: Progress) -> Iterator[list[Model]]:
    """The models that a recipe in the working directory might call so; adapters alone lie on the first.

    `download` as for `plan`: what is streamed can be read within the block. Raises CheckpointError with all that is
    wrong with all of them.
    """
    references = {name: parse_reference(name, Path.cwd()) for name in names}
    target = Path(tempfile.gettempdir(), f"cpimerge-{os.getpid()}")
    with finding(references.items(), target, download, progress) as find:
        problems: list[str] = []
        models: list[Model] = []
        for name in names:
            with collect(Path(name), problems):
                models.append(Model(name, _open(find(references[name], False), models)))
        if problems:
            raise CheckpointError(problems)
        yield models


def _open(located: Located, models: Sequence[Model]) -> Checkpoint:
    """As it is saved: only an adapter alone is opened as a model on the first."""
    alone = located.adapter is None and is_adapter(located.path)
    return open_model(located, models[0].checkpoint if alone and models else None)


def contents(model: Model) -> Contents:
    """What is in a checkpoint. Reads the files of its tokenizer; a damaged one is a note."""
    checkpoint = model.checkpoint
    config, tensors = checkpoint.config, checkpoint.tensors
    notes = [*checkpoint.notes, *refused(checkpoint), *stale_config(checkpoint)]
    vocab_size = _setting(config, "vocab_size", int)
    heads = tuple(name for name in tensors if _is_head(name))
    vocabulary = {name: info.shape[0] for name, info in tensors.items() if _is_vocabulary(info, vocab_size)}
    tokenizer = _tokenizer(checkpoint.path, notes)
    if checkpoint.tied:
        notes += [f"the config ties the output head to the embeddings, but {name} is stored too" for name in heads]
    notes += _vocabulary_oddities(vocabulary, vocab_size, tokenizer)
    return Contents(
        name=model.name,
        path=str(checkpoint.path),
        adapter=None if checkpoint.adapter is None else str(checkpoint.adapter),
        format="pytorch" if any(shard.file.suffix == ".bin" for shard in checkpoint.shards) else "safetensors",
        files=tuple(File(shard.file.name, shard.size, len(shard.tensors)) for shard in checkpoint.shards),
        total=_total(tensors.values()),
        dtypes={
            dtype: _total(some) for dtype, some in sorted(_grouped((t.dtype, t) for t in tensors.values()).items())
        },
        stacks=tuple(_stacks(tensors)),
        outside=_total(info for name, info in tensors.items() if not layer_of(name)),
        kinds=tuple(_kinds(tensors)),
        tensors=tuple(TensorInfo(info.name, info.dtype, info.shape) for info in tensors.values()),
        model_type=_setting(config, "model_type", str),
        architectures=_texts(config.get("architectures")),
        quantization=quantization(checkpoint),
        tied=checkpoint.tied,
        heads=heads,
        vocab_size=vocab_size,
        vocabulary=vocabulary,
        tokenizer=tokenizer,
        notes=tuple(notes),
    )


def stack_of(name: str) -> str:
    """The pattern of the stack that a tensor's layer is in: `model.layers.*`; '' outside the layers."""
    layer = layer_of(name)
    return ".".join([*layer.split(".")[:-2], "*"]) if layer else ""


def kind_of(name: str) -> str:
    """The name with a `*` for each all-digit component."""
    return ".".join("*" if part.isdigit() and part.isascii() else part for part in name.split("."))


def _grouped(pairs: Iterable[tuple[str, Tensor]]) -> dict[str, list[Tensor]]:
    groups: dict[str, list[Tensor]] = {}
    for key, info in pairs:
        groups.setdefault(key, []).append(info)
    return groups


def _by_dtype(tensors: Iterable[Tensor]) -> dict[str, list[Tensor]]:
    return _grouped((info.dtype, info) for info in tensors)


def _total(tensors: Iterable[Tensor]) -> Total:
    every = list(tensors)
    return Total(len(every), sum(info.elements for info in every), sum(info.nbytes for info in every))


def _stacks(tensors: Mapping[str, Tensor]) -> Iterator[Stack]:
    for pattern, some in _grouped((stack_of(name), info) for name, info in tensors.items()).items():
        if pattern:
            numbers = sorted({int(layer_of(info.name).split(".")[-2]) for info in some})
            yield Stack(pattern, tuple(numbers), _total(some))


def _kinds(tensors: Mapping[str, Tensor]) -> Iterator[Kind]:
    for name, some in _grouped((kind_of(name), info) for name, info in tensors.items()).items():
        shapes, dtypes = dict.fromkeys(info.shape for info in some), dict.fromkeys(info.dtype for info in some)
        yield Kind(name, stack_of(some[0].name), tuple(shapes), tuple(dtypes), _total(some))


def _setting(config: Mapping[str, Any], key: str, kind: type[Value]) -> Value | None:
    """What the config says, at its top or else in the config of a part (`text_config`); None where it says nothing."""
    for place in (config, *(part for part in config.values() if isinstance(part, dict))):
        if type(place.get(key)) is kind:
            value: Value = place[key]
            return value
    return None


def _texts(value: Any) -> tuple[str, ...]:
    return tuple(text for text in value if isinstance(text, str)) if isinstance(value, list) else ()


def _last(name: str) -> str:
    return name.removesuffix(".weight").rpartition(".")[2]


def _is_head(name: str) -> bool:
    return is_head(name) and not layer_of(name)


def _is_vocabulary(info: Tensor, vocab_size: int | None) -> bool:
    """Whether its rows are the tokens': by its name, or by their number."""
    if len(info.shape) != 2 or layer_of(info.name):
        return False
    return _last(info.name) in TOKEN_EMBEDDINGS or is_head(info.name) or info.shape[0] == vocab_size


def _tokenizer(directory: Path, notes: list[str]) -> Tokenizer | None:
    files = tuple(name for name in TOKENIZER_FILES if (directory / name).is_file())
    try:
        found = find_tokenizer([directory])
        if found is not None:
            return Tokenizer(*_tokens(found), files)
    except CheckpointError as error:
        notes += error.problems
    except OSError as error:
        notes.append(f"{directory}: its tokenizer cannot be read: {error.strerror}")
    if "tokenizer.model" in files:
        return Tokenizer("SentencePiece", None, files)
    return Tokenizer(None, None, files) if files else None


def _tokens(found: TokenizerFiles) -> tuple[str | None, int]:
    """The kind of a tokenizer, and how many tokens it has."""
    file = found.core[0]
    if file.name != "tokenizer.json":
        return {"vocab.json": "BPE", "vocab.txt": "WordPiece"}.get(file.name), len(read_tokens(found).names)
    raw = read_json(file)
    model = raw.get("model")
    model = model if isinstance(model, dict) else {}
    vocab = model.get("vocab")
    if not isinstance(vocab, dict | list):
        raise CheckpointError(f"{file}: has no vocabulary where tokenizers puts it (model.vocab)")
    names = set(vocab) if isinstance(vocab, dict) else {str(entry[0]) for entry in vocab if isinstance(entry, list)}
    names |= found.extras.keys() | {token for _, token, _ in added_entries(file, raw.get("added_tokens"))}
    kind = model.get("type")
    return kind if isinstance(kind, str) else None, len(names)


def _vocabulary_oddities(rows: Mapping[str, int], said: int | None, tokenizer: Tokenizer | None) -> Iterator[str]:
    """Where rows, config and tokenizer contradict each other."""
    for name, count in rows.items():
        if said is not None and count != said:
            yield f"{name} has {count:,} rows, the config's vocab_size is {said:,}"
    least = min(rows.values(), default=None)
    if least is not None and tokenizer is not None and (tokenizer.tokens or 0) > least:
        yield f"the tokenizer has {tokenizer.tokens:,} tokens, more than the {least:,} rows of the vocabulary"
