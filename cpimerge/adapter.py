"""An adapter on a model, seen as a checkpoint: LoRA, rank-stabilised LoRA and DoRA in PEFT's format.

Every tensor of the adapter is either a part of an update W + scale · B·A, or it takes the place of one of the model's.
Nothing is computed here: the tensors that come out compute themselves as they are read.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from .adapted import CastTensor, Kept
from .adapter_config import ADAPTER_CONFIG, AdapterConfig, read_config
from .adapter_update import OTHER_MODEL, Orientation, Update
from .checkpoint import Checkpoint, Shard, Tensor, collect, layer_of, natural_key, read_header
from .directory import CHECKPOINT_FILES
from .errors import CheckpointError
from .pickled import read_pickled
from .ties import is_embedding, is_head

__all__ = ["is_adapter", "open_adapter"]

ADAPTER_FILES: dict[str, Callable[[Path], Shard]] = {
    "adapter_model.safetensors": read_header,
    "adapter_model.bin": read_pickled,
}
PREFIX = "base_model.model."  # what PEFT puts before every name
A, B, EMBEDDING_A, EMBEDDING_B = "lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B"
SHIFT, MAGNITUDE = "lora_B.bias", "lora_magnitude_vector"
PART = re.compile(rf"(?P<module>.+)\.(?P<part>{'|'.join((A, B, EMBEDDING_A, EMBEDDING_B, SHIFT, MAGNITUDE))})")
ORIGINAL = ".original_module."
WRAPPED = re.compile(r"\.(?:modules_to_save(?:\.default)?|original_module)\.(?=[^.]+$)")
UNKNOWN = re.compile(r"(?:^|\.)(?:lora_\w+|token_adapter|ranknum)(?:\.|$)")

Parts = Mapping[str, Tensor]  # of one module, by what PEFT calls them
Rename = Callable[[str], str]


def is_adapter(path: Path) -> bool:
    """Whether the directory holds an adapter alone."""
    isfile = os.path.isfile  # unlike Path.is_file, False also for paths that cannot be
    return isfile(path / ADAPTER_CONFIG) and not any(isfile(path / name) for name in CHECKPOINT_FILES)


def open_adapter(model: Checkpoint, directory: Path) -> Checkpoint:
    """`model` with the adapter in `directory` on it. Reads headers only.

    Tensors that the adapter does not touch are the model's own. Raises CheckpointError listing all that is wrong.
    """
    problems: list[str] = []
    with collect(directory, problems):
        config = read_config(directory)
    with collect(directory, problems):
        shard = _weights(directory)
    if problems:
        raise CheckpointError(problems)
    adapter = _Adapter(model, directory, config)
    tensors = adapter.tensors(shard)
    if adapter.problems:
        raise CheckpointError(adapter.problems)
    return replace(
        model,
        shards=(*model.shards, shard),
        tensors={name: tensors[name] for name in sorted(tensors, key=natural_key)},
        adapter=directory,
        notes=(*model.notes, *adapter.notes),
    )


def _weights(directory: Path) -> Shard:
    for name, read in ADAPTER_FILES.items():
        if (directory / name).is_file():
            return read(directory / name)
    if not directory.is_dir():
        raise CheckpointError([])  # the config says so
    raise CheckpointError(f"{directory}: no {next(iter(ADAPTER_FILES))} in it. Complete the download")


class _Adapter:
    """Fits the adapter's tensors to the model's; `problems` and `notes` grow meanwhile."""

    def __init__(self, model: Checkpoint, directory: Path, config: AdapterConfig) -> None:
        self.model = model
        self.directory = directory
        self.config = config
        self.problems: list[str] = []
        self.notes: list[str] = []

    def problem(self, name: str, what: str) -> None:
        self.problems.append(f"{self.directory}: tensor {name!r}: {what}")

    def tensors(self, shard: Shard) -> dict[str, Tensor]:
        """The tensors of the model with the adapter on it. Of no use where there are problems."""
        modules, replacements = self._sorted(shard.tensors)
        rename = self._renaming([f"{module}.weight" for module in modules] or list(replacements))
        tensors = dict(self.model.tensors)
        for name, tensor in replacements.items():
            target = rename(name) if rename(name) in self.model.tensors else name
            tensors[target] = self._replacement(target, tensor)
        updates = [
            update
            for module, parts in modules.items()
            if (update := self._update(module, parts, tensors.get(rename(f"{module}.weight"))))
        ]
        orientation, kept = Orientation(self.config, self.model, updates), Kept()
        for update in updates:
            transposed = orientation.of(update)
            if transposed is None:
                self.problem(*update.mismatch())
            else:
                tensors[update.weight.name] = update.adapted(self.config, transposed, kept)
            self._shift(update, rename(f"{update.module}.bias"), tensors)
        if self.model.ties_embeddings and not any(map(is_head, tensors)):
            self._note_head({name for name in tensors if tensors[name] is not self.model.tensors.get(name)}, updates)
        return tensors

    def _sorted(self, tensors: Iterable[Tensor]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
        """Parts of updates by module, and tensors that replace the model's by name; both without PEFT's prefix."""
        modules: dict[str, dict[str, Tensor]] = defaultdict(dict)
        replacements: dict[str, Tensor] = {}
        wrapped: list[tuple[str, Tensor]] = []
        for tensor in tensors:
            name = tensor.name.removeprefix(PREFIX).replace(f".{MAGNITUDE}.weight", f".{MAGNITUDE}")
            taken = tensor
            if found := PART.fullmatch(name):
                taken = modules[found["module"]].setdefault(found["part"], tensor)
            elif WRAPPED.search(name):
                wrapped.append((name, tensor))
            else:
                taken = replacements.setdefault(name.replace(".base_layer.", "."), tensor)
            if UNKNOWN.search(name) and not found:
                self.problem(tensor.name, "cannot be merged here. Merge the adapter into its base first (PEFT)")
            elif taken is not tensor:
                self.problem(tensor.name, f"says the same as {taken.name!r}. Remove one of them")
            elif not tensor.is_float:
                self.problem(tensor.name, f"{tensor.dtype} cannot be merged. Save the adapter as float32 or bfloat16")
        self._unwrap(wrapped, replacements)
        if not modules and not replacements:
            self.problems.append(f"{self.directory}: the adapter holds no tensors. Complete the download")
        return modules, replacements

    def _unwrap(self, wrapped: Iterable[tuple[str, Tensor]], replacements: dict[str, Tensor]) -> None:
        """Tensors of modules that were trained whole, under the names that they have within PEFT.

        With `bias: all`, PEFT saves their biases a second and a third time so, and does not load these.
        """
        ignored = 0
        for name, tensor in sorted(wrapped, key=lambda named: ORIGINAL in named[0]):
            whole = WRAPPED.sub(".", name)
            if whole in replacements:
                ignored += 1
            elif ORIGINAL in name:
                self.problem(tensor.name, "what replaces it is missing. Save the adapter again")
            else:
                replacements[whole] = tensor
        if ignored:
            self.notes.append(f"{self.directory}: {ignored} tensors that stand in it twice are ignored, as PEFT does")

    def _renaming(self, names: list[str]) -> Rename:
        """How the names of the trained model become those of the checkpoint, which may lack or have a prefix."""
        known = self.model.tensors
        if not names or any(name in known for name in names):
            return lambda name: name
        first = names[0]
        dots = [dot.end() for dot in re.finditer(r"\.", first)]
        shorter = [(first[:dot], "") for dot in dots if first[dot:] in known]
        longer = [("", name.removesuffix(first)) for name in known if name.endswith("." + first)]
        fitting = [pair for pair in shorter + longer if all(_renamed(name, pair) in known for name in names)]
        if len(fitting) > 1:
            candidates = " or ".join(repr(_renamed(first, pair)) for pair in fitting[:2])
            self.problem(first, f"may be {candidates} of {self.model.path}. Save the model from the class trained on")
        if not fitting:
            return lambda name: name
        strip, add = fitting[0]
        self.notes.append(f"{self.directory}: what it calls {strip + 'X'!r} is {add + 'X'!r} in {self.model.path}")
        return lambda name: _renamed(name, fitting[0])

    def _replacement(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor of the adapter in the place of the model's, in the model's dtype, as PEFT loads it."""
        there = self.model.tensors.get(name) or self._embeddings.get(tensor.shape[1:])
        if there is None or there.dtype == tensor.dtype or not (there.is_float and tensor.is_float):
            return replace(tensor, name=name)
        return CastTensor(name, there.dtype, tensor.shape, tensor.elements * there.item_bytes, tensor)

    @cached_property
    def _embeddings(self) -> Mapping[tuple[int, ...], Tensor]:
        """What the model has in the place of a head that is tied: by the size of a row, as rows may be more."""
        outside = (it for name, it in self.model.tensors.items() if is_embedding(name) and not layer_of(name))
        return {it.shape[1:]: it for it in outside if len(it.shape) > 1}

    def _update(self, module: str, parts: Parts, weight: Tensor | None) -> Update | None:
        """The module's update; None where there is a problem with it."""
        embedding = EMBEDDING_A in parts or EMBEDDING_B in parts
        names = (EMBEDDING_A, EMBEDDING_B) if embedding else (A, B)
        a, b = map(parts.get, names)
        if a is None or b is None:
            missing = names[0] if a is None else names[1]
            there = next(iter(parts.values())).name
            self.problem(there, f"has no {missing} beside it. Complete the adapter")
            return None
        if weight is None:
            self.problem(a.name, self._why_no_weight(module))
            return None
        for part in parts.keys() - {*names, MAGNITUDE} - ({SHIFT} if not embedding else set()):
            self.problem(parts[part].name, f"is no part of what {a.name!r} updates. Save the adapter again")
        update = Update(module, embedding, a, b, parts.get(MAGNITUDE), parts.get(SHIFT), weight)
        faults = list(update.faults(self.config))
        for fault in faults:
            self.problem(*fault)
        return None if faults else update

    def _note_head(self, changed: Collection[str], updates: Collection[Update]) -> None:
        """What becomes of a head that is tied to embeddings which the adapter changes, where it has no head itself."""
        if any(update.embedding for update in updates):
            self.notes.append(
                f"{self.directory}: updates the embeddings, to which {self.model.path} ties its head: "
                "the head changes with them, as where PEFT merges"
            )
        elif any(is_embedding(name) and not layer_of(name) for name in changed):
            self.notes.append(
                f"{self.directory}: has other embeddings but not the head, which {self.model.path} ties to them: "
                "it changes with them, though PEFT would keep the old one beside them"
            )

    def _why_no_weight(self, module: str) -> str:
        if is_head(module) and self.model.tied is not False:
            return (
                f"updates a head that {self.model.path} ties to its embeddings, and no tied model is equal to what was "
                "trained. Save the model untied (transformers: tie_word_embeddings=False)"
            )
        return f"updates '{module}.weight', which {self.model.path} does not have. {OTHER_MODEL}"

    def _shift(self, update: Update, name: str, tensors: dict[str, Tensor]) -> None:
        """The update's own bias, if it has one, goes into the model's."""
        shift, bias = update.shift, tensors.get(name)
        if shift is None:
            return
        if bias is None or bias.shape != shift.shape or not bias.is_float:
            self.problem(shift.name, f"needs a bias {name!r} {list(shift.shape)} in {self.model.path}. {OTHER_MODEL}")
        else:
            tensors[name] = update.shifted(self.config, bias, shift)


def _renamed(name: str, pair: tuple[str, str]) -> str:
    strip, add = pair
    return add + name.removeprefix(strip) if name.startswith(strip) else name
