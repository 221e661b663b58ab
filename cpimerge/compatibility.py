"""Whether a checkpoint can be merged onto a base, as far as headers and small files tell; and what is worth a note."""

from __future__ import annotations

import difflib
import filecmp
from collections import Counter
from collections.abc import Container, Iterator, Sequence

from .checkpoint import CONFIG, FLOAT_NAMES, HEADS, REFUSED_BYTES, Checkpoint, Tensor
from .layouts import compare_layouts
from .plan_file import Vocabulary

__all__ = ["differences", "notes"]

# Keys of config.json that may differ without any effect on what the weights mean.
COSMETIC_CONFIG = {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache", "architectures"}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json")
EMBEDDINGS = ("embed", "wte", *HEADS)
MAX_COMPARED_NAMES = 10_000  # pairs; beyond it a search for similar names takes too long


def differences(base: Checkpoint, other: Checkpoint, explained: Container[str] = ()) -> Iterator[str]:
    """Every tensor of `other` that does not fit the base in name, shape or kind of dtype; in the order of the names.

    `explained`: names of tensors whose shape another problem speaks of.
    """
    missing = [name for name in base.tensors if name not in other.tensors]
    extra = [name for name in other.tensors if name not in base.tensors]
    layouts = compare_layouts(base, other, missing, extra)
    yield from layouts.problems
    missing, extra = layouts.missing, layouts.extra
    similar = extra if len(missing) * len(extra) <= MAX_COMPARED_NAMES else []
    yield from (_missing(base, other, name, similar) for name in missing)
    yield from (_extra(base, other, name) for name in extra)
    for name, expected in base.tensors.items():
        if name in other.tensors and name not in explained and not _fit(expected, other.tensors[name]):
            yield _mismatch(base, other, name)


def _missing(base: Checkpoint, other: Checkpoint, name: str, similar: Sequence[str]) -> str:
    where = f"{other.where}: tensor {name!r}: missing, though {base.path} has it. "
    if not base.tensors[name].is_float:
        return where + "It is a buffer that newer transformers do not save: load the base with transformers and save it"
    close = difflib.get_close_matches(name, similar, 1, 0.8)
    return where + (f"It has {close[0]!r} instead" if close else "It is no fine-tune of this base as it stands")


def _extra(base: Checkpoint, other: Checkpoint, name: str) -> str:
    where = f"{other.where}: tensor {name!r}: not in {base.path}. "
    return where + "Remove it from the checkpoint, or merge onto a base that has it"


def _fit(expected: Tensor, got: Tensor) -> bool:
    same_kind = expected.dtype == got.dtype or (expected.is_float and got.is_float)
    refused = {expected.dtype, got.dtype} & REFUSED_BYTES.keys()  # a problem of its own
    return expected.shape == got.shape and bool(same_kind or refused)


def _mismatch(base: Checkpoint, other: Checkpoint, name: str) -> str:
    expected, got = base.tensors[name], other.tensors[name]
    where = f"{other.where}: tensor {name!r}: expected {_kind(expected)} (as in {base.path}), got {_kind(got)}. "
    if expected.shape == got.shape:
        return where + "Save it with the base's dtype"
    named = any(word in name for word in EMBEDDINGS) and "position" not in name
    if expected.shape[1:] == got.shape[1:] and named:
        return where + (
            "If rows are tokens: tokenizer.json, and vocab_size in config.json, tell which. Put them into both, or "
            f"give it {expected.shape[0]} rows again (transformers: resize_token_embeddings)"
        )
    return where + "It is no fine-tune of this base as it stands"


def _kind(info: Tensor) -> str:
    return f"{FLOAT_NAMES.get(info.dtype, info.dtype)} {list(info.shape)}"


def notes(base: Checkpoint, other: Checkpoint, vocabulary: Vocabulary | None = None) -> Iterator[str]:
    """What differs and can be merged all the same; `vocabulary` is that of both, where theirs differ.

    Raises OSError where a tokenizer file cannot be read.
    """
    pairs = ((info, other.tensors[name]) for name, info in base.tensors.items() if name in other.tensors)
    mixed = Counter((ours.dtype, theirs.dtype) for ours, theirs in pairs if ours.is_float and theirs.is_float)
    for (expected, got), count in mixed.items():
        if expected != got:
            yield f"{other.where}: {count} tensors are {FLOAT_NAMES[got]} where the base has {FLOAT_NAMES[expected]}"
    cosmetic = COSMETIC_CONFIG | ({"vocab_size"} if vocabulary else set())
    keys = sorted((base.config.keys() | other.config.keys()) - cosmetic)
    differing = [key for key in keys if base.config.get(key) != other.config.get(key)]
    if base.config and other.config and differing:
        yield f"{other.where}: {CONFIG} differs from the base's in {', '.join(differing)}; the output takes the base's"
    joined = " with the tokens joined to it" if vocabulary and vocabulary.joined else ""
    for name in TOKENIZER_FILES:
        ours, theirs = base.path / name, other.where / name
        if ours.is_file() and theirs.is_file() and not filecmp.cmp(ours, theirs, shallow=False):
            yield f"{other.where}: {name} differs from the base's; the output takes the base's{joined}"
