"""Text from anywhere stays text. A renderer of Markdown is the reference."""

from __future__ import annotations

import html
import re

import pytest
from markdown_it import MarkdownIt

from factsmith.keep.export.markdown import as_text, table

HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "**bold** _italic_ ~~gone~~ `code` [link](http://x.y) ![image](x.png)",
    "a | b |",
    "\\| escaped \\` \\\\",
    "&lt;b&gt; &#42; &amp;",
    "```\nfence\n```",
    "# heading\n\n- item\n1. item\n> quote\n---",
    "---\nlicense: mit\n---",
    "https://evil.example www.evil.example <http://evil.example> me@evil.example",
    "$x^2$ :smile: @somebody #12",
    "\u202egnp.exe \u2066x\u2069 \u200b\ufeff \x00\x07\x1b[31m",
    "half \ud800 a character",
    "line\u2028and\u2029paragraph\r\n\tend",
    "{{ 7 * 7 }} {% raw %} {} {{}}",
    "<!-- comment",
    "[reference]: http://x.y\n[x][reference] [^1]",
]


def shown(text: str) -> str:
    """Return a text as a card must show it: what is not seen is spelled out."""
    spelled = "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode()
        for c in text.strip()
    )
    return " ".join(spelled.split())


def cells_of(markdown: str) -> list[str]:
    """Return the texts of the cells that a renderer makes, and check that all else is plain."""
    rendered = MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(markdown)
    tags = set(re.findall(r"<(/?[a-z0-9]+)", rendered))
    assert tags <= {f"{end}{name}" for end in ("", "/") for name in (
        "table", "thead", "tbody", "tr", "th", "td",
    )}, rendered  # fmt: skip
    return [html.unescape(cell) for cell in re.findall(r"<td>(.*?)</td>", rendered)]


@pytest.mark.parametrize("text", HOSTILE)
def test_a_hostile_text_is_one_cell_of_plain_text(text: str) -> None:
    lines = table(["fact", "after"], [(as_text(text), "next")])
    assert all(line.isprintable() for line in lines), "one line, in which all is seen"
    cells = cells_of("\n".join(lines))
    assert [" ".join(cell.split()) for cell in cells] == [shown(text), "next"]


def test_the_reference_sees_text_that_is_not_escaped() -> None:
    seen = 0
    for text in HOSTILE:
        try:
            plain = cells_of("\n".join(table(["fact", "after"], [(text, "next")])))
        except (AssertionError, UnicodeEncodeError):
            seen += 1
            continue
        seen += plain != [shown(text), "next"]
    assert seen > len(HOSTILE) / 2


def test_a_long_text_is_cut_and_plain_text_stays() -> None:
    assert as_text('The mother tongue of Léon Blum is (12:30): "it\'s" – 中文') == (
        'The mother tongue of Léon Blum is (12&#58;30): "it\'s" – 中文'
    )
    assert len(as_text("x" * 5000)) == 300 and as_text("x" * 5000).endswith("…")
    assert as_text("می\u200cخواهم") == "می\u200cخواهم", "joiners are letters' parts"
