"""Names are escaped for the terminal and for Markdown, and left alone where they are harmless."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from cpimerge.plain_text import MOST, code, plain_name, printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("gsm8k", "gsm8k"),
        ("a\x1b[31mb", r"a\x1b[31mb"),
        ("a\u202eb\u200b", r"a\u202eb\u200b"),
        ("a\nb\u2028c\x85", r"a\nb\u2028c\x85"),
        ("\ud800", r"\ud800"),
        ("日本 語é", "日本 語é"),
    ],
)
def test_what_cannot_be_seen_is_escaped(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_what_is_endless_is_cut_in_its_middle() -> None:
    assert printable("a" * MOST) == "a" * MOST
    assert printable("a" * MOST + "b" * MOST) == "a" * (MOST // 2) + " … " + "b" * (MOST // 2)


@pytest.mark.parametrize("name", ["math", "gsm8k_v1.5", "org/name", "a+b", "数学", "x", "Llama-3.2-1B"])
def test_plain_names_stay_as_they_are(name: str) -> None:
    assert plain_name(name) == name


@pytest.mark.parametrize(
    "name",
    ["_x_", "*x*", "<img src=x>", "[a](b)", "![a](b)", "www.evil.com", "a@b.c", "https://x", "a|b", "`", "", "a b"],
)
def test_names_that_could_be_markup_are_code(name: str) -> None:
    assert plain_name(name) == code(name)


@given(st.text())
def test_nothing_ends_code(text: str) -> None:
    """As a reader of Markdown sees it: one span of code with the text, and nothing else."""
    (paragraph,) = [token for token in MarkdownIt("commonmark").parse(f"a {code(text)} b") if token.type == "inline"]
    before, span, after = paragraph.children or []
    assert (before.content, span.type, after.content) == ("a ", "code_inline", " b")
    assert span.content.strip() == printable(text).strip()


@given(st.text(st.characters(codec="ascii"), max_size=20))
def test_no_name_is_markup(name: str) -> None:
    (paragraph,) = [
        token for token in MarkdownIt("commonmark").parse(f"a {plain_name(name)} b") if token.type == "inline"
    ]
    kinds = [token.type for token in paragraph.children or []]
    assert kinds in (["text"], ["text", "code_inline", "text"])
