"""Words that a shell completes: models, methods, formats and the revisions of a workspace.

A function returns words, or (word, help). Without a word the shell completes file names. None of
them imports torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from .. import atlas
from ..core.errors import FactsmithError
from ..core.tables import visible

METHODS = ("rome", "r-rome", "memit", "emmet", "alphaedit", "append")
"""The methods of `patch`, as the help of --method lists them."""

JUDGED = (*METHODS, "ft-l", "lora")
"""The methods of `evaluate`."""

FORMATS = {
    "checkpoint": "the patched model",
    "adapter": "a PEFT LoRA for the base model",
    "patch": "for another workspace",
    "gguf": "the base GGUF file, patched",
    "gguf-adapter": "a LoRA for llama.cpp",
}
"""The formats of `export`."""

Words = list[str | tuple[str, str]]


def models(context: typer.Context, incomplete: str) -> Words:
    """Complete the names of the bundled models, as the first word of a command."""
    given = context.params.get("words") or ()
    return [] if given else [name for name in atlas.names() if name.startswith(incomplete)]


def methods(incomplete: str) -> Words:
    """Complete a method of `patch`."""
    return [name for name in METHODS if name.startswith(incomplete)]


def judged(incomplete: str) -> Words:
    """Complete the last of several methods, separated by commas."""
    before, comma, last = incomplete.rpartition(",")
    used = before.split(",")
    return [
        f"{before}{comma}{name}" for name in JUDGED if name.startswith(last) and name not in used
    ]


def formats(incomplete: str) -> Words:
    """Complete a format of `export`."""
    return [(name, help_) for name, help_ in FORMATS.items() if name.startswith(incomplete)]


def suites(incomplete: str) -> Words:
    """Complete the bundled suite; other suites are files."""
    return ["atlas"] if incomplete and "atlas".startswith(incomplete) else []


def revisions(context: typer.Context, incomplete: str) -> Words:
    """Complete the revisions of the workspace: `latest`, and the first digits of ids."""
    return _revisions(context, incomplete, ["latest"])


def any_revisions(context: typer.Context, incomplete: str) -> Words:
    """Complete the revisions of the workspace, and `base`."""
    return _revisions(context, incomplete, ["latest", "base"])


def _revisions(context: typer.Context, incomplete: str, names: list[str]) -> Words:
    words: Words = [name for name in names if name.startswith(incomplete)]
    given: Any = context.params.get("workspace")
    try:
        from ..keep.ledger import Ledger

        with Ledger(Path(given) if given else Path()) as ledger:
            log = ledger.log()
    except (FactsmithError, OSError):  # no workspace, or one in use: there is nothing to complete
        return words
    # A shell that is told to complete all of forty hex digits would print nothing else.
    ids = [(r.id[: max(10, len(incomplete))], visible(r.message)) for r in log]
    return [*words, *(pair for pair in ids if pair[0].startswith(incomplete))]
