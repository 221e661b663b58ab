"""Text of strangers, made fit for a line of a terminal and for Markdown: names come from files."""

from __future__ import annotations

import re

__all__ = ["code", "plain_name", "printable"]

MOST = 6000  # characters of a line: more than any path or name of a tensor has
# What Markdown takes for nothing but a word; not `www.`, of which some make a link.
PLAIN = re.compile(r"(?!www\.)[^\W_](?:[\w./+-]*[^\W_])?", re.IGNORECASE)


def printable(text: object) -> str:
    """`text` on one line, its control and other invisible characters escaped, cut where it is endless."""
    shown = str(text)
    if len(shown) > MOST:
        shown = f"{shown[: MOST // 2]} … {shown[-MOST // 2 :]}"
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape", "backslashreplace").decode() for char in shown
    )


def plain_name(text: str) -> str:
    """A name in Markdown: as it is, or as code where it has what could be markup, a link or HTML."""
    return text if PLAIN.fullmatch(text) else code(text)


def code(text: str) -> str:
    """Text as code in a line of Markdown, which nothing in it ends."""
    shown = printable(text)
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", shown)), default=0))
    pad = " " if "`" in shown or shown.strip() != shown or not shown else ""
    return f"{fence}{pad}{shown}{pad}{fence}"
