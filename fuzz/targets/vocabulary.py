"""Two models whose tokenizers differ, brought together: `vocabulary: base` and `union`.

Oracles: the tensors then have the same shapes, and can be read; the base's files as the output gets them say what the
plan says of the tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

from cpimerge.checkpoint import Checkpoint, Handles
from cpimerge.directory import open_checkpoint
from cpimerge.errors import CheckpointError
from cpimerge.plan_file import Mode, Vocabulary
from cpimerge.tokenizer_files import find_tokenizer, read_tokens
from cpimerge.union_tokenizer import union_edits
from cpimerge.vocabulary import settle

from ..bundles import join, split, write
from ..mutation import bundle, json_text
from ..target import Run, Target, accepted_before
from .files import as_bytes, model, save_model
from .tokenizer import WORDS, tokenizer

NAMES = ("tokenizer.json", "tokenizer_config.json", "added_tokens.json", "config.json")
FILES = tuple(f"{place}/{name}" for place in ("base", "other") for name in NAMES)
MODES: tuple[Mode, ...] = ("base", "union")
ROWS = {"base": 7, "other": 9}


def _prepare(scratch: Path) -> Run:
    for place, rows in ROWS.items():
        arrays = model()
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            arrays[name] = arrays[name].repeat(2, axis=0)[:rows]
        save_model(scratch / place, arrays, {})
    out = scratch / "out"
    out.mkdir()

    def run(data: bytes) -> None:
        write(split(data, FILES[0]), scratch, FILES)
        models = {place: open_checkpoint(scratch / place) for place in ROWS}
        settle(models, None)
        for mode in MODES:
            settled = settle(models, mode)
            if settled.vocabulary is not None:
                _check(settled.vocabulary, settled.checkpoints)
                _check_files(settled.vocabulary, models["base"], out)

    return run


def _check(vocabulary: Vocabulary, checkpoints: Mapping[str, Checkpoint]) -> None:
    with closing(Handles(4)) as handles:
        for name in vocabulary.tensors:
            tensors = [it.tensors[name] for it in checkpoints.values() if name in it.tensors]
            assert len({tensor.shape for tensor in tensors}) == 1
            assert vocabulary.rows in tensors[0].shape
            for tensor in tensors:
                tensor.read_into(memoryview(bytearray(tensor.nbytes)), 0, handles)


def _check_files(vocabulary: Vocabulary, base: Checkpoint, out: Path) -> None:
    """The tokenizer of the output has the base's tokens and those that joined them."""
    edits = union_edits(vocabulary)
    for name in NAMES:
        (out / name).unlink(missing_ok=True)
        if (base.path / name).is_file():
            raw = (base.path / name).read_bytes()
            (out / name).write_bytes(edits[name](raw) if name in edits else raw)
    with accepted_before():
        before, after = find_tokenizer([base.path]), find_tokenizer([out])
        assert before is not None
        assert after is not None
        joined = {token.id: token.content for token in vocabulary.joined}
        assert read_tokens(after).names == {**read_tokens(before).names, **joined}


def _seeds() -> Mapping[str, bytes]:
    config = as_bytes({"model_type": "test", "vocab_size": 7})
    base = {"base/tokenizer.json": as_bytes(tokenizer("<s>", "</s>")), "base/config.json": config}
    decoder = as_bytes({"added_tokens_decoder": {"5": {"content": "<s>"}}})
    other = tokenizer("<s>", "</s>", "<pad>", "<img>")
    moved = tokenizer("<img>", "<s>", "</s>", "<x>")
    return {
        "more": join(base | {"other/tokenizer.json": as_bytes(other), "other/config.json": b'{"vocab_size": 9}'}),
        "moved": join(base | {"other/tokenizer.json": as_bytes(moved), "base/tokenizer_config.json": decoder}),
        "added": join(base | {"other/tokenizer.json": as_bytes(tokenizer()), "other/added_tokens.json": b'{"<x>": 8}'}),
    }


_JSON = json_text((*WORDS, "vocab_size", "text_config", "7", "9"))
TARGET = Target(
    _prepare,
    _seeds,
    CheckpointError,
    bundle(FILES[0], dict.fromkeys(FILES, _JSON)),
    WORDS,
    max_bytes=8192,
    memory=30_000_000,
)
