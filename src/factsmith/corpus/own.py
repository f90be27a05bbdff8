"""The word that asks for text that the model writes itself: `texts="own"`, `--texts own`.

Such text is never used for second moments unless it is asked for: a model takes long to write it.
This module imports no model, so a command can check its files before it loads one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..core.errors import InputError
from .paragraphs import Paragraphs
from .text_files import TextFiles, is_address, read_texts

OWN = "own"
"""Given in place of texts."""


def is_own(texts: object) -> bool:
    """Return whether what was given in place of texts asks for text that the model writes."""
    return isinstance(texts, str) and texts == OWN


def texts_of(files: Sequence[Path] | None) -> Paragraphs | TextFiles | str | None:
    """Return the texts of files, OWN for the word `own`, and None without a file.

    A file may have an address such as s3://bucket/*.parquet (`read_texts`).

    Raises:
        InputError: The word is given together with files, or a file cannot be read.
    """
    if not files:
        return None
    if Path(OWN) not in files:
        addresses = [_address(file) for file in files]
        return read_texts(addresses) if any(map(is_address, addresses)) else Paragraphs(files)
    if len(files) > 1:
        raise InputError(
            f"the texts are {', '.join(map(str, files))}; give files, or the word {OWN} alone for "
            "text that the model writes",
            argument="texts",
        )
    return OWN


def _address(file: Path) -> str:
    """Return a file as it was given: a path has one slash where an address has two."""
    scheme, colon, rest = str(file).partition(":/")
    if not colon or not scheme.isalnum() or len(scheme) < 2:
        return str(file)
    return f"/{rest}" if scheme == "file" else f"{scheme}://{rest}"
