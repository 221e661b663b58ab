"""A recipe's text.

Oracles: what is accepted, PyYAML without any guessing reads as well; written again by it, the recipe is the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from io import StringIO
from pathlib import Path
from typing import Any

import yaml
from yaml.emitter import Emitter
from yaml.representer import SafeRepresenter
from yaml.resolver import BaseResolver
from yaml.serializer import Serializer

from cpimerge.errors import RecipeError
from cpimerge.recipe import Recipe, load_recipe, parse_recipe
from cpimerge.recipe_schema import Document, Slice, Source, _Shared

from ..mutation import lines
from ..target import Run, Target, accepted_before

RECIPES = Path(__file__).parents[2] / "recipes"
WORDS = (
    *(f"{key}:" for schema in (Document, _Shared, Slice, Source) for key in schema.model_fields),
    *(
        "filter:",
        "value:",
        "seed:",
        "model:",
        "name:",
        "- ",
        "[0.1, 0.2]",
        "{filter: '*.w', value: 0.5}",
        "cpi",
        "1e-3",
    ),
    *("&a", "*a", "<<:", "!!python/name:os.system", "!!str", "---", "...", "|", ">", "%YAML 1.1", "? ", "\t", "#", "'"),
    *('"', "org/name@main", "base+adapter", "~/x", "\ufeff", "[[math, code], [chat]]", "{seed: 7}", "1e999", "union"),
)
SLICES = b"""merge_method: cpi
base_model: org/base
slices:
  - sources:
      - {model: a, layer_range: [0, 4], parameters: {density: 0.1}}
      - {model: b, layer_range: [0, 4]}
    parameters: {weight: [1, 0.5]}
  - sources:
      - {model: a, layer_range: [4, 8]}
      - {model: b, layer_range: [4, 8]}
tokenizer: {source: union}
chat_template: "{{ messages }}"
out_dtype: bfloat16
parameters: {normalize: true, int8_mask: true}
"""


def _prepare(scratch: Path) -> Run:
    file = scratch / "recipe.yml"

    def run(data: bytes) -> None:
        file.write_bytes(data)
        recipe = load_recipe(file)
        tree = yaml.load(recipe.text, yaml.BaseLoader)
        with accepted_before():
            again = parse_recipe(_dumped(tree), file, scratch)
        assert _content(again) == _content(recipe), "written again, it is another recipe"

    return run


class _Plain(Emitter, Serializer, SafeRepresenter, BaseResolver):
    """Writes text without quotes where it need not have any: whatever it looks like, it is text."""

    def __init__(self, stream: Any) -> None:
        Emitter.__init__(self, stream, allow_unicode=True, width=1_000_000)
        Serializer.__init__(self)
        SafeRepresenter.__init__(self, sort_keys=False)
        BaseResolver.__init__(self)

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _dumped(tree: Any) -> str:
    out = StringIO()
    dumper = _Plain(out)
    dumper.open()
    dumper.represent(tree)
    dumper.close()
    return out.getvalue()


def _content(recipe: Recipe) -> dict[str, Any]:
    """All but where it stands."""
    content = {key: value for key, value in asdict(recipe).items() if key not in ("lines", "text", "notes", "file")}
    _without_lines(content)
    return content


def _without_lines(value: Any) -> None:
    if isinstance(value, dict):
        value.pop("line", None)
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, tuple | list) else ():
        _without_lines(part)


def _seeds() -> Mapping[str, bytes]:
    return {file.stem: file.read_bytes() for file in sorted(RECIPES.glob("*.yml"))} | {"slices": SLICES}


TARGET = Target(_prepare, _seeds, RecipeError, lines(WORDS), WORDS, max_bytes=8192, memory_per_byte=2000)
