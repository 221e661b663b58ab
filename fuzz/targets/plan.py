"""plan.json, as `fuse` reads it, with the seal that a stranger would compute, and its inputs beside it.

Oracles: what is accepted is the same after it was saved and loaded; so are its card's metadata as YAML.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import yaml

from cpimerge.card import model_card
from cpimerge.companions import companion_edits, config_with_dtype
from cpimerge.errors import CpimergeError
from cpimerge.plan_file import PLAN_FILE, Plan
from cpimerge.planned_inputs import open_inputs
from cpimerge.writer import MAX_SHARD_BYTES, index_json, shard_layouts

from ..mutation import json_text
from ..target import Run, Target, accepted_before
from .files import as_bytes
from .plan_files import CONFIG, WORDS, inputs, made, resealed


def _prepare(scratch: Path) -> Run:
    inputs(scratch)
    first, second = scratch / "plan", scratch / "again"
    first.mkdir()
    second.mkdir()

    def run(data: bytes) -> None:
        (first / PLAN_FILE).write_bytes(data)
        with suppress(CpimergeError):
            Plan.load(first)
        (first / PLAN_FILE).write_bytes(resealed({PLAN_FILE: data}, scratch)[PLAN_FILE])
        plan = Plan.load(first)
        plan.save(second)
        with accepted_before():
            assert Plan.load(second) == plan
        _use(plan)

    return run


def _use(plan: Plan) -> None:
    """What `fuse` does with a plan, but for the tensors."""
    card = model_card(plan, "transformers")
    metadata = yaml.safe_load(card.split("\n---\n")[0])
    assert metadata.keys() <= {"base_model", "base_model_relation", "library_name", "tags"}
    assert metadata["tags"] == ["merge", "cpimerge"]
    open_inputs(plan)
    layouts = shard_layouts((tensor.output for tensor in plan.tensors), MAX_SHARD_BYTES)
    index_json(layouts)
    for layout in layouts:
        layout.header()
    for edit in companion_edits(plan).values():
        edit(as_bytes(CONFIG))
    config_with_dtype(as_bytes(CONFIG), ["float32"])


def _seeds() -> Mapping[str, bytes]:
    return {"tensor": made("tensor")[PLAN_FILE], "row": made("row")[PLAN_FILE]}


TARGET = Target(_prepare, _seeds, CpimergeError, json_text(WORDS), WORDS, max_bytes=32768, memory=20_000_000)
