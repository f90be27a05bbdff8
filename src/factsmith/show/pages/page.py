"""What all pages share: how they show text, how templates become HTML, and where pages go.

    check_page("card.html")                                    before anything is computed
    html = render("card.html", card, title="A card", ...)
    write_page(html, "card.html")

Tokens and texts come from models and corpora, so no page trusts them. Templates escape them. Data
is in a JSON block without a `<`, and scripts put it into text nodes only. A content security policy
lets one script run, named by its hash, and lets the browser fetch nothing.

A new page is a module next to this one and a template in `show/templates/`.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import os
import unicodedata
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from ...core.errors import InputError, WorkspaceError
from ...core.files import write_file
from ...read.cards import Card
from ...read.triggers import Trigger, Triggers

_SUFFIXES = (".html", ".htm")

_MARK = b'<meta name="generator" content="factsmith">'
"""A line near the top of every page, by which factsmith knows its pages."""

# ── files ─────────────────────────────────────────────────────────────────────────────────────────


def check_page(path: str | os.PathLike[str]) -> None:
    """Check that a page can be written under this name.

    Raises:
        InputError: for a suffix other than .html, or if a file exists that factsmith did not make.
        WorkspaceError: when the folder does not exist, or the file there cannot be read.
    """
    path = Path(path)
    if path.suffix.lower() not in _SUFFIXES or path.is_dir():
        raise InputError(
            f"cannot write a page to {str(path)!r}; expected a file name that ends in .html"
        )
    if not path.parent.is_dir():
        raise WorkspaceError(f"cannot write {path}: {path.parent} is not a folder; make it first")
    try:
        with path.open("rb") as file:
            is_page = _MARK in file.read(1000)
    except FileNotFoundError:
        return
    except OSError as error:
        raise WorkspaceError(
            f"{path} exists and cannot be read: {error.strerror}; choose another name"
        ) from None
    if not is_page:
        raise InputError(
            f"{path} exists, and factsmith did not write it; choose another name, or delete it"
        )


def check_folder(folder: str | os.PathLike[str]) -> None:
    """Check that pages can be written into this folder.

    Raises:
        InputError: if its index.html exists, and factsmith did not make it.
        WorkspaceError: when the folder is a file.
    """
    folder = Path(folder)
    if folder.is_dir():
        check_page(folder / "index.html")
    elif folder.exists():
        raise WorkspaceError(
            f"cannot make the folder {folder}: a file of that name exists; choose another name"
        )


def write_page(html: str, path: str | os.PathLike[str] | None) -> str:
    """Write the page in one step if there is a path, and return it.

    Raises:
        WorkspaceError: when the file cannot be written.
    """
    if path is not None:
        try:
            write_file(Path(path), html.encode())
        except OSError as error:
            raise WorkspaceError(
                f"cannot write {path}: {error.strerror}; choose a folder that can be written"
            ) from None
    return html


# ── text ──────────────────────────────────────────────────────────────────────────────────────────


def printable(text: str) -> str:
    """Return a text of the same length, with marks for characters that are invisible or steer."""
    return text if text.isprintable() else "".join(map(_symbol, text))


# These would turn round the text next to them.
_DIRECTIONS = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")


@functools.cache
def _symbol(character: str) -> str:
    kind, code = unicodedata.category(character), ord(character)
    if character == "\n":
        return "↵"
    if kind == "Cc":  # Unicode has pictures of most control characters
        return chr(0x2400 + code) if code < 0x20 else "\u2421" if code == 0x7F else "\ufffd"
    if kind in ("Cs", "Zl", "Zp") or unicodedata.bidirectional(character) in _DIRECTIONS:
        return "\ufffd"
    return character


def signed(number: float, digits: int = 2) -> str:
    """Return a number with its sign."""
    return f"{number:+z.{digits}f}".replace("-", "−")


def _chip(token: str) -> Markup:
    """Return a token as HTML, with its outer spaces as dots."""
    text = printable(token)
    word = text.strip(" ")
    before = len(text) - len(text.lstrip(" ")) if word else len(text)
    dots = [
        Markup('<span class="space">{}</span>').format("·" * n) if n else ""
        for n in (before, len(text) - before - len(word))
    ]
    return Markup('<span class="token" dir="auto">{}{}{}</span>').format(
        dots[0], escape(word if text else "(empty)"), dots[1]
    )


def excerpt(trigger: Trigger, before: int, after: int) -> tuple[str, str, str]:
    """Return the text of a trigger as three parts: before its token, the token, after it.

    A long text is cut at a space, if there is one.

    Args:
        trigger: The trigger.
        before: About how many characters to keep before the token of a long text.
        after: About how many to keep after it.
    """
    text, start, stop = trigger.text, trigger.start, trigger.stop
    first, last = 0, len(text)
    if len(text) > 1.5 * (before + after):
        first, last = max(0, start - before), min(len(text), stop + after)
        if first and (space := text.find(" ", first, start)) >= 0:
            first = space
        if last < len(text) and (space := text.rfind(" ", stop, last)) >= 0:
            last = space
    head = "…" + text[first:start] if first else text[:start].lstrip(" ")
    tail = text[stop:last] + ("…" if last < len(text) else "")
    return printable(head), printable(text[start:stop]), printable(tail)


# ── templates ─────────────────────────────────────────────────────────────────────────────────────


def script_json(content: Any) -> Markup:
    """Return JSON for a script element.

    The element ends at the first `</script`, so the JSON has no <, > or &. It has no character
    either that ends a line in JavaScript.
    """
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


@functools.cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("factsmith", "show/templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(printable=printable, chip=_chip, signed=signed)
    return environment


def _source(name: str) -> str:
    """Return a file of the templates as it is, not filled in."""
    environment = _environment()
    assert environment.loader is not None
    return environment.loader.get_source(environment, name)[0]


@functools.cache
def script_block(name: str) -> Markup:
    """Return the script of a page, after the functions that all scripts share."""
    return Markup(_source("common.js") + "\n" + _source(name))


def render(
    template: str, source: Card | Triggers | None, *, script: Markup | None = None, **content: Any
) -> str:
    """Return a page. Its policy lets only this script run, and lets the browser fetch nothing.

    Args:
        template: The file name of the template.
        source: What the footer describes: the model, and the texts that were read. None: the
            template has a footer of its own.
        script: The script, if the page has one.
        **content: The variables of the template.
    """
    allowed = "'none'"
    if script is not None:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        allowed = f"'sha256-{digest}'"
    page = _environment().get_template(template)
    return page.render(
        source=source,
        style=Markup(_source("style.css")),
        script=script,
        script_source=Markup(allowed),
        **content,
    )
