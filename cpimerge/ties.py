"""Tensors that are another one's copy: output heads tied to embeddings, and whatever else was saved twice.

The base's list of tensors is the authority. A copy that the base does not have is left out, and a tensor that another
model saved only under its twin's name is read from there. Which are twins follows from their places in the file, or
from names and shapes; that they are equal, only their bytes can tell, and `check` has them compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from .checkpoint import HEADS, Checkpoint, Handles, StoredTensor, Tensor, layer_of, natural_key

__all__ = ["Twins", "copies_in", "first_difference", "is_embedding", "is_head", "judge", "onto"]

EMBEDDINGS = ("embed", "wte", "shared")
PIECE_BYTES = 1 << 22  # compared at a time
OPEN_FILES = 2


@dataclass(frozen=True)
class Twins:
    """Two tensors of one checkpoint that should be equal, and what hangs on it.

    extra: `copy` is not in the base, and is left out. missing: both are the base's, and another model has only
    `original`. tied: the config ties them.
    """

    kind: Literal["extra", "missing", "tied"]
    copy: Tensor
    original: Tensor
    of: Checkpoint  # that was opened, with all that its files hold


def is_head(name: str) -> bool:
    """Whether it is called like the layer that gives a model's output."""
    return name.removesuffix(".weight").rsplit(".", 1)[-1] in HEADS


def is_embedding(name: str) -> bool:
    """Whether it is called like what heads are tied to."""
    return name.endswith("weight") and any(word in name for word in EMBEDDINGS) and "position" not in name


def onto(base: Checkpoint, other: Checkpoint) -> Checkpoint:
    """`other` with the tensors that the base has, where twins allow it; its `twins` say what that relies on."""
    tensors = dict(other.tensors)
    twins: list[Twins] = []
    bases, others = _Originals(base.tensors), _Originals(other.tensors)
    for name in [name for name in base.tensors if name not in other.tensors]:
        original = bases.of(name, other.tensors)
        if original is not None and other.tied is not False:
            tensors[name] = replace(other.tensors[original], name=name)
            twins.append(Twins("missing", base.tensors[name], base.tensors[original], other))
    for name in [name for name in other.tensors if name not in base.tensors]:
        original = others.of(name, base.tensors)
        if original is not None and (base.tied is not False or _same_place(tensors[name], other.tensors[original])):
            twins.append(Twins("extra", tensors.pop(name), other.tensors[original], other))
    if not twins:
        return other
    ordered = {name: tensors[name] for name in sorted(tensors, key=natural_key)}
    return replace(other, tensors=ordered, twins=tuple(twins))


def copies_in(checkpoint: Checkpoint) -> Iterator[Twins]:
    """What a checkpoint has beside its original: at the same place of a file, or a head that its config ties."""
    originals = _Originals(checkpoint.tensors)
    shares = not all(shard.file.suffix == ".safetensors" for shard in checkpoint.shards)  # whose places never overlap
    for name in checkpoint.tensors if shares or checkpoint.tied else ():
        original = originals.at_place_of(name) if shares else None
        if original is None and checkpoint.tied and is_head(name):
            original = originals.of(name, checkpoint.tensors)
        if original is not None:
            yield Twins("tied", checkpoint.tensors[name], checkpoint.tensors[original], checkpoint)


class _Originals:
    """Finds, in one checkpoint, what a tensor may be a copy of."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    @cached_property
    def _at(self) -> dict[object, list[str]]:
        """Names by place."""
        names: dict[object, list[str]] = {}
        for name, tensor in self._tensors.items():
            if isinstance(tensor, StoredTensor) and tensor.nbytes:
                names.setdefault(replace(tensor, name=""), []).append(name)
        return names

    @cached_property
    def _outside(self) -> list[str]:
        """What others may be copies of, by its name."""
        return [name for name in self._tensors if _is_original(name) and not layer_of(name)]

    def at_place_of(self, name: str) -> str | None:
        """The first of several names of one place that is no head's, or the first; None for itself."""
        names = self._at.get(replace(self._tensors[name], name=""), [name])
        first = next((other for other in names if not is_head(other)), names[0])
        return None if first == name else first

    def of(self, name: str, among: Mapping[str, Tensor]) -> str | None:
        """A name in `among`: at the same place of a file, else as far as names and shapes tell."""
        copy = self._tensors[name]
        for other in self._at.get(replace(copy, name=""), ()):
            if other != name and other in among:
                return other
        if _is_bias(name):  # only with its weight: zeros are equal to each other wherever they are
            weight = name.removesuffix("bias") + "weight"
            if weight in among or weight not in self._tensors:
                return None
        for other in self._outside if _is_copy(name) and not layer_of(name) else ():
            alike = (copy.dtype, copy.shape) == (self._tensors[other].dtype, self._tensors[other].shape)
            if alike and other != name and other in among and _is_bias(name) == _is_bias(other):
                return other
        return None


def _same_place(a: Tensor, b: Tensor) -> bool:
    """Whether both are the same bytes of a file, as PyTorch saves tensors that share memory."""
    return isinstance(a, StoredTensor) and replace(a, name=b.name) == b


def _is_bias(name: str) -> bool:
    return name.endswith("bias")


def _is_original(name: str) -> bool:
    """Whether heads are tied to what is called like this."""
    return _is_bias(name) or (is_embedding(name) and not is_head(name))


def _is_copy(name: str) -> bool:
    return is_head(name.removesuffix(".bias")) or is_embedding(name)


def judge(base: Checkpoint, others: Iterable[Checkpoint]) -> tuple[list[str], list[str]]:
    """Compare all twins that the merge relies on; problems and notes, in the order of the checkpoints.

    Reads tensors, up to the first difference of two. Raises CheckpointError where that fails.
    """
    problems: list[str] = []
    notes: list[str] = []
    own = list(copies_in(base))
    seen: dict[tuple[Tensor, Tensor], int | None] = {}
    for twins in [*own, *(twins for other in others for twins in (*other.twins, *copies_in(other)))]:
        pair = (twins.copy, twins.original)
        if pair not in seen:
            seen[pair] = first_difference(*pair)
        if seen[pair] is not None:
            if twins.kind != "missing" or not any((tied.copy, tied.original) == pair for tied in own):
                problems.append(_problem(twins, base, seen[pair]))  # unless it is the base's own, and said already
        elif twins.kind != "tied":
            notes.append(_note(twins))
    return [*dict.fromkeys(problems)], [*dict.fromkeys(notes)]


def first_difference(a: Tensor, b: Tensor) -> int | None:
    """The first flat index at which the bytes of two tensors of one dtype and shape differ; None: they are equal."""
    if _same_place(a, b):
        return None
    handles = Handles(OPEN_FILES)
    try:
        for start in range(0, a.nbytes, PIECE_BYTES):
            pieces = [bytearray(min(PIECE_BYTES, a.nbytes - start)) for _ in (a, b)]
            for tensor, piece in zip((a, b), pieces, strict=True):
                tensor.read_into(memoryview(piece), start, handles)
            if pieces[0] != pieces[1]:
                place = next(i for i, (x, y) in enumerate(zip(*pieces, strict=True)) if x != y)
                return (start + place) // a.item_bytes
    finally:
        handles.close()
    return None


def _problem(twins: Twins, base: Checkpoint, place: int | None) -> str:
    where = f"{twins.of.where}: tensor {twins.copy.name!r}: "
    original = repr(twins.original.name)
    if twins.kind == "extra":
        return (
            f"{where}not in {base.path}, and no copy of {original} (first at flat index {place}). "
            "It was trained apart: merge onto a base that was saved untied, or tie the model again"
        )
    if twins.kind == "missing":
        return (
            f"{where}missing, though {base.path} has it, and there it is no copy of {original} (first at flat index "
            f"{place}). If {original} shall serve as both, save the model untied; or merge onto a tied base"
        )
    return (
        f"{where}its config ties it to {original}, but they differ (first at flat index {place}). Write "
        "tie_word_embeddings: false into its config.json if both are in use, or remove the one that is not"
    )


def _note(twins: Twins) -> str:
    copy, original = twins.copy.name, twins.original.name
    if twins.kind == "extra":
        return f"{twins.of.where}: {copy} is a copy of {original}; the base has no such copy, and the output has none"
    return f"{twins.of.where}: has no {copy}; {original} serves, of which it is a copy in the base"
