"""Chat templates, wherever they stand. Oracle: one that was written is the one that is read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from cpimerge.chat_template import check_replaceable, read_template, write_template
from cpimerge.errors import CheckpointError

from ..bundles import join, split, write
from ..mutation import bundle, json_text, lines
from ..target import Run, Target, accepted_before
from .files import as_bytes

FILES = ("chat_template.jinja", "tokenizer_config.json", "chat_template.json")
WORDS = ("chat_template", "name", "default", "template", "{{ messages }}", "{% for m in messages %}", "tool_use")
TEMPLATE = "{{ messages[0]['content'] }} é\n"


def _prepare(scratch: Path) -> Run:
    def run(data: bytes) -> None:
        write(split(data, FILES[0]), scratch, FILES)
        assert isinstance(read_template(scratch), str | None)
        problems: list[str] = []
        check_replaceable(scratch, problems)
        if problems:
            raise CheckpointError(problems)
        with accepted_before():
            write_template(scratch, TEMPLATE)
            assert read_template(scratch) == TEMPLATE

    return run


def _seeds() -> Mapping[str, bytes]:
    named = {"chat_template": [{"name": "default", "template": "{{ a }}"}, {"name": "tool_use", "template": "b"}]}
    return {
        "file": join({FILES[0]: b"{{ messages }}\n", FILES[1]: as_bytes({"chat_template": "{{ old }}"})}),
        "named": join({FILES[1]: as_bytes(named)}),
        "processor": join({FILES[2]: as_bytes({"chat_template": "{{ a }}"})}),
        "half": join({FILES[1]: b'{"chat_template": "a", "x": "\\ud800"}'}),
    }


_JSON = json_text(WORDS)
TARGET = Target(
    _prepare,
    _seeds,
    CheckpointError,
    bundle(FILES[1], {FILES[0]: lines(WORDS), FILES[1]: _JSON, FILES[2]: _JSON}),
    WORDS,
)
