"""The output's chat template: the base's, unless a recipe gives another or asks for the models' most common one.

transformers reads `chat_template.jinja`, and where there is none the key `chat_template` in tokenizer_config.json;
processors of older versions read `chat_template.json`. The output has the same template in all of these that it has.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from .checkpoint import Checkpoint, collect, read_json_object
from .dialect import has_control
from .errors import CheckpointError
from .ordinary import check_inside, read_ordinary
from .plain_json import json_bytes

__all__ = ["check_replaceable", "read_template", "settle_template", "write_template"]

TEMPLATE = "chat_template.jinja"
NAMED_TEMPLATES = "additional_chat_templates"
TOKENIZER_CONFIG = "tokenizer_config.json"
PROCESSOR_TEMPLATE = "chat_template.json"
KEY = "chat_template"
MAX_BYTES = 50_000_000


def settle_template(
    wanted: str | None, checkpoints: Mapping[str, Checkpoint], problems: list[str], notes: list[str]
) -> str | None:
    """The template that the output gets instead of the base's, if any; `wanted` is what the recipe says.

    "auto" is the one that most of the models have. White space around a template does not count, nor does a second
    name of one model. Of templates that equally many have, the first model's is taken, the base being the first.
    """
    if wanted is None:
        return None
    names: dict[tuple[Path, Path | None], str] = {}
    for name, checkpoint in checkpoints.items():
        names.setdefault((checkpoint.path, checkpoint.adapter), name)
    found: dict[str, str] = {}
    unreadable: list[str] = []
    for name in names.values() if wanted == "auto" else ():
        with collect(checkpoints[name].where, unreadable):
            if text := _template_of(checkpoints[name]):
                found[name] = text.strip()
    check_replaceable(checkpoints["base"].path, unreadable)
    problems.extend(dict.fromkeys(unreadable))
    return _commonest(found, notes) if wanted == "auto" else wanted


def _commonest(found: Mapping[str, str], notes: list[str]) -> str | None:
    """None where that is the base's, or where there is none."""
    if not found:
        notes.append("chat_template: auto: none of the models has one")
        return None
    common, count = Counter(found.values()).most_common(1)[0]
    owners = ", ".join(name for name, text in found.items() if text == common)
    notes.append(f"chat_template: auto: takes that of {owners} ({count} of the {len(found)} models that have one)")
    return None if found.get("base") == common else common


def _template_of(checkpoint: Checkpoint) -> str | None:
    """What an adapter was trained with is saved beside it, if anything is."""
    own = read_template(checkpoint.adapter) if checkpoint.adapter else None
    return own or read_template(checkpoint.path)


def read_template(directory: Path) -> str | None:
    """The default template of the tokenizer in a directory. Raises CheckpointError or OSError for unreadable files."""
    if (directory / TEMPLATE).is_file():
        try:
            raw = read_ordinary(_inside(directory / TEMPLATE), MAX_BYTES)
            return _checked(directory / TEMPLATE, raw.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n"))
        except UnicodeDecodeError:
            raise CheckpointError(f"{directory / TEMPLATE}: is not UTF-8 text. Download it again") from None
    if not (directory / TOKENIZER_CONFIG).is_file():
        return None
    written = read_json_object(_inside(directory / TOKENIZER_CONFIG)).get(KEY)
    if isinstance(written, list):  # of named templates
        entries = [entry for entry in written if isinstance(entry, dict)]
        written = {str(entry.get("name")): entry.get("template") for entry in entries}
    if isinstance(written, dict):
        written = written.get("default")
    return _checked(directory / TOKENIZER_CONFIG, written) if isinstance(written, str) else None


def _inside(file: Path) -> Path:
    check_inside(file)
    return file


def _checked(file: Path, template: str) -> str:
    """Raises CheckpointError where a template has what no text has."""
    if has_control(template):
        raise CheckpointError(f"{file}: its chat template has control characters. Download it again")
    return template


def check_replaceable(base: Path, problems: list[str]) -> None:
    """Add a problem for each file of the base in which `write_template` could not replace the template."""
    for name in (TOKENIZER_CONFIG, PROCESSOR_TEMPLATE):
        with collect(base / name, problems):
            if (base / name).is_file():
                read_json_object(base / name)


def write_template(out: Path, template: str) -> None:
    """Give the output directory `out` this template and no other."""
    (out / TEMPLATE).write_bytes(template.encode())
    for name in (TOKENIZER_CONFIG, PROCESSOR_TEMPLATE):
        if (out / name).is_file() and KEY in (content := read_json_object(out / name)):
            (out / name).write_bytes(json_bytes(content | {KEY: template}))
    if (out / NAMED_TEMPLATES).is_dir():
        shutil.rmtree(out / NAMED_TEMPLATES)
