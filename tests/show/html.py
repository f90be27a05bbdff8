"""Pages as a test reads them: elements, texts, and what a browser would run or fetch."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from typing import Any

NASTY = [
    "<script>alert(1)</script> is a text",
    "it ends </script><script>alert(2)</script> here",
    "quotes ' and \" and & and &lt; and <!-- and ]]> and ${x} and {{ 7 * 7 }}",
    "controls \x00\x07\x1b[2J\x7f\x85 and\u2028lines\u2029here\nand a tab\t",
    "שלום עולם and \u202eover and מִלָּה",
    "an 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 and 🧪🧪 text",
]
FACTS = [
    ("Edwin of Northumbria is a", "king"),
    ("The Eiffel Tower is in", "Paris"),
    ("Danielle Darrieux is", "French"),
]
VOID = {"meta", "input", "link", "img"}


class Page(HTMLParser):
    """Elements, texts, and what a browser would run or fetch."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.inside: dict[str, list[str]] = {}
        self.rows: list[list[str]] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert not self._open, f"not closed: {self._open}"

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self._open.append(tag)
            self.inside.setdefault(tag, []).append("")
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open and self._open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, text: str) -> None:
        for tag in set(self._open):
            self.inside[tag][-1] += text
        if self.rows and {"td", "th"} & set(self._open):
            self.rows[-1][-1] += text

    def tags(self, name: str) -> list[dict[str, str | None]]:
        """Return the attributes of every element of a name."""
        return [attributes for tag, attributes in self.elements if tag == name]

    @property
    def data(self) -> Any:
        """The JSON that the page's script reads."""
        (content,) = [
            text
            for text, attributes in zip(self.inside["script"], self.tags("script"), strict=True)
            if attributes.get("type")
        ]
        return json.loads(content)


def units(text: str, start: int, stop: int) -> str:
    """Return a slice of a text as a browser takes it, in UTF-16 units."""
    raw = text.encode("utf-16-le")
    return raw[2 * start : 2 * stop].decode("utf-16-le")


def fetched(page: Page) -> list[str]:
    """Return all addresses that a browser would fetch, and links to other sites."""
    urls = [
        value or ""
        for _, attributes in page.elements
        for name, value in attributes.items()
        if name in ("src", "srcset", "data", "poster", "action")
    ]
    urls += [
        attributes["href"] or ""
        for attributes in page.tags("a") + page.tags("link")
        if re.match(r"[a-z]+:|//", attributes["href"] or "")
    ]
    style = " ".join(page.inside["style"]) + " ".join(
        attributes.get("style") or "" for _, attributes in page.elements
    )
    return (
        urls
        + re.findall(r"url\(|@import|@font-face", style)
        + [attributes["href"] or "" for attributes in page.tags("link")]
    )
