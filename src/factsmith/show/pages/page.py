"""show.pages.page."""

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
from ...read.triggers import Triggers

_SUFFIXES = (".html", ".htm")

_OURS = b'<meta name="generator" content="factsmith">'  # in the first lines of every page

FITS = ((10, 3, 10), (5, 2, 10), (3, 1, 5), (1, 1, 5), (1, 0, 3))
"""Triggers, lowest triggers and tokens a neuron, from what a layer's page holds at best to what it holds at least."""

LARGEST = 8_000_000
"""Characters of a page's data; a layer that has more at best shows less of each neuron."""


def check_page(path: str | os.PathLike[str]) -> None:
    """Raises InputError for a suffix that is not .html, or a file there that is no page of ours, WorkspaceError where no folder is."""
    path = Path(path)
    if path.suffix.lower() not in _SUFFIXES or path.is_dir():
        raise InputError(
            f"cannot write a page to {str(path)!r}; expected a file name that ends in .html"
        )
    if not path.parent.is_dir():
        raise WorkspaceError(f"cannot write {path}: {path.parent} is not a folder; make it first")
    try:
        with path.open("rb") as file:
            ours = _OURS in file.read(1000)
    except FileNotFoundError:
        return
    except OSError as error:
        raise WorkspaceError(
            f"cannot read {path}, which is there already: {error.strerror}; choose another name"
        ) from None
    if not ours:
        raise InputError(
            f"{path} is there already, and no page of factsmith's; choose another name, or delete it"
        )


def check_folder(folder: str | os.PathLike[str]) -> None:
    """Raises WorkspaceError for a folder that is a file, InputError for one with an index.html that is no page of ours."""
    folder = Path(folder)
    if folder.is_dir():
        check_page(folder / "index.html")
    elif folder.exists():
        raise WorkspaceError(
            f"cannot make the folder {folder}: there is a file of that name; choose another"
        )


def keep_page(html: str, path: str | os.PathLike[str] | None) -> str:
    """The page itself, written to `path` in one step if that is given. Raises WorkspaceError where it cannot be."""
    if path is not None:
        try:
            write_file(Path(path), html.encode())
        except OSError as error:
            raise WorkspaceError(
                f"cannot write {path}: {error.strerror}; choose a folder that can be written"
            ) from None
    return html


def shown(text: str) -> str:
    """Text with every character that has no look of its own shown by one that has: as many characters, none that steers the page."""
    return "".join(map(_look, text)) if not text.isprintable() else text


@functools.cache
def _look(character: str) -> str:
    kind, code = unicodedata.category(character), ord(character)
    if character == "\n":
        return "↵"
    if kind == "Cc":
        return (
            chr(0x2400 + code) if code < 0x20 else "\u2421" if code == 0x7F else "\ufffd"
        )  # pictures of control characters
    if kind in ("Cs", "Zl", "Zp") or unicodedata.bidirectional(character) in _STEERS:
        return "\ufffd"
    return character


_STEERS = (
    "LRE",
    "RLE",
    "LRO",
    "RLO",
    "PDF",
    "LRI",
    "RLI",
    "FSI",
    "PDI",
)  # they would turn round what stands beside the text


def signed(number: float, digits: int = 2) -> str:
    return f"{number:+.{digits}f}".replace("-", "−")


def _chip(token: str) -> Markup:
    """A token with its outer spaces as dots."""
    text = shown(token)
    word = text.strip(" ")
    before = len(text) - len(text.lstrip(" ")) if word else len(text)
    dots = [
        Markup('<span class="space">{}</span>').format("·" * n) if n else ""
        for n in (before, len(text) - before - len(word))
    ]
    return Markup('<span class="token" dir="auto">{}{}{}</span>').format(
        dots[0], escape(word if text else "(empty)"), dots[1]
    )


# ── templates ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


def script_json(content: Any) -> Markup:
    """JSON for a script element, which ends at `</script` wherever it stands: no <, > or & is left, nor what JavaScript takes for a line's
    end."""
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


@functools.cache
def _environment() -> Environment:
    found = Environment(
        loader=PackageLoader("factsmith", "show/templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters.update(shown=shown, chip=_chip, signed=signed)
    return found


def _source(name: str) -> str:
    """A file of ours as it stands, not filled in."""
    environment = _environment()
    assert environment.loader is not None
    return environment.loader.get_source(environment, name)[0]


@functools.cache
def script_block(name: str) -> Markup:
    return Markup(_source("common.js") + "\n" + _source(name))


def render(
    template: str, source: Card | Triggers | None, *, script: Markup | None = None, **content: Any
) -> str:
    """A page, whose policy lets the one script run that it is told by its hash, and fetches nothing.

    source  what the footer says it was read from; None: the template says it in a footer of its own
    """
    allowed = (
        "'none'"
        if script is None
        else f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
    )
    page = _environment().get_template(template)
    return page.render(
        source=source,
        style=Markup(_source("style.css")),
        script=script,
        script_source=Markup(allowed),
        **content,
    )
