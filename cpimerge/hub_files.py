"""Which files of a model on the Hub a merge needs, by their names alone."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

from .adapter import ADAPTER_FILES
from .adapter_config import ADAPTER_CONFIG
from .checkpoint import CONFIG
from .companions import NOT_ENTERED, STATE, WEIGHTS_IN_ANY_FORM, matches_any
from .directory import CHECKPOINT_FILES, FORMATS

__all__ = ["INDEXES", "adapter_files", "companions", "is_below", "is_small", "is_tokenizer", "weights"]

# Single files and the indexes of sharded ones, in the order in which they are preferred.
FORMS = tuple((form.weights, form.index) for form in FORMATS)
INDEXES = tuple(index for _, index in FORMS)
TOKENIZER = ("tokenizer*", "vocab*", "merges.txt", "spiece.model", "sentencepiece*", "*.tiktoken")
# What tells whether two models speak of the same things: configuration, tokens, chat template.
DESCRIPTIONS = (CONFIG, *TOKENIZER, "added_tokens.json", "special_tokens_map.json", "chat_template*")


def weights(names: Collection[str], shards: Iterable[str] = ()) -> list[str]:
    """The weights among the file `names` of a model, with the index that leads to them.

    `shards` are those that the index names. Empty where there are none in a form that can be read.
    """
    for single, index in FORMS:
        if single in names:
            return [single]
        if index in names:
            return [index, *sorted(set(shards) & set(names))]
    return []


def adapter_files(names: Collection[str]) -> list[str]:
    """An adapter's configuration and weights; empty where `names` are not those of one."""
    if ADAPTER_CONFIG not in names:
        return []
    return [ADAPTER_CONFIG, *[name for name in ADAPTER_FILES if name in names][:1]]


def is_below(name: str) -> bool:
    """Whether a path from a list of files is that of a file below the directory that they go to."""
    return "\0" not in name and all(part not in ("", ".", "..") for part in name.split("/"))


def is_small(name: str) -> bool:
    """Whether the file describes an expert: it is compared with the base's."""
    return "/" not in name and matches_any(name, DESCRIPTIONS)


def is_tokenizer(name: str) -> bool:
    """Whether the file is one of those that a tokenizer is saved in."""
    return matches_any(name, TOKENIZER)


def companions(names: Collection[str], modules: Collection[str] = ()) -> Iterator[str]:
    """What the output takes over from a base that has these files: as `companions.companion_files`.

    `modules` are the folders that its modules.json names, which go along with their weights.
    """
    other_models = {
        folder
        for name in names
        for folder, _, file in [name.rpartition("/")]
        if folder and file in (*CHECKPOINT_FILES, ADAPTER_CONFIG)
    }
    for name in sorted(names):
        folder, _, file = name.rpartition("/")
        if _enters(folder, modules, other_models):
            denied = STATE if folder in modules else WEIGHTS_IN_ANY_FORM + STATE
            if not matches_any(file, denied):
                yield name


def _enters(folder: str, modules: Collection[str], other_models: Collection[str]) -> bool:
    """Whether files of a folder, and of those it lies in, go along."""
    while folder:
        above, _, own = folder.rpartition("/")
        if folder not in modules and (folder in other_models or matches_any(own, NOT_ENTERED)):
            return False
        folder = above
    return True
