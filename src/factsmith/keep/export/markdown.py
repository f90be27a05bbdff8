"""Text from anywhere, as text in a Markdown file: no part of it becomes markup.

    as_text("<b> | `x`\\n# y")      # "&#60;b&#62; &#124; &#96;x&#96;&#92;n&#35; y"

Facts and messages may come from anyone. Characters with a meaning in Markdown, HTML or the
extensions of GitHub become numeric entities, which every renderer shows as the character. Control
characters, and those that turn the direction of the text, are spelled out.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence

_MARKUP = re.compile(r"[\\`*_\[\]<>|~&$@#]|:(?=\S)|w(?=ww)", re.IGNORECASE)
"""A colon begins a link or an emoji if something follows it, and "www." begins a link."""

_SPELLED = {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}
"""Categories of characters that are not seen, or that change how others are shown."""

_JOINERS = "\u200c\u200d"
"""Invisible characters that Persian, Indic scripts and emoji are written with."""

_LONGEST = 300
"""Characters of a text that are shown."""


def as_text(text: str) -> str:
    """Return a text as one line of Markdown that shows the text itself."""
    shown = text.strip()
    if len(shown) > _LONGEST:
        shown = f"{shown[: _LONGEST - 1]}…"
    spelled = "".join(map(_spelled, shown))
    return _MARKUP.sub(lambda match: f"&#{ord(match[0])};", spelled)


def _spelled(character: str) -> str:
    if unicodedata.category(character) not in _SPELLED or character in _JOINERS:
        return character
    return character.encode("unicode_escape", "surrogatepass").decode()


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a table; the cells are Markdown already."""
    lines = [columns, ["---"] * len(columns), *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]
