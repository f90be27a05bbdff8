"""Text files as a corpus: their paragraphs, read as they are needed.

    for text in Paragraphs([Path("news.txt"), Path("books.txt")]): ...

Blank lines separate paragraphs. This module imports no model, so a command can check its files
before it loads one.
"""

from __future__ import annotations

import codecs
import functools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO

from ..core.errors import InputError
from ..core.filetext import encoding_of

_LONGEST = 1_000_000
"""Characters of a paragraph that are read at a time."""

_CHECKED = 10_000_000
"""Bytes at the start of a file that are checked before any is used."""


class Paragraphs:
    """The paragraphs of text files, one after another.

    It can be iterated any number of times. Very long paragraphs come in parts.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        """Take the files.

        Raises:
            InputError: A file cannot be opened, or its first part is not in UTF-8, or in UTF-16
                with its byte order mark.
        """
        self.files = files
        for file in files:
            try:
                with file.open("rb") as stream:
                    start = stream.read(_CHECKED)
                # The last character may be cut off, which is no error for this decoder.
                codecs.getincrementaldecoder(encoding_of(start))().decode(start)
            except (OSError, UnicodeDecodeError) as error:
                raise _unreadable(file, error) from None

    def __iter__(self) -> Iterator[str]:
        """Yield the paragraphs, without white space around them.

        Raises:
            InputError: A file cannot be read, or is not in UTF-8.
        """
        for file in self.files:
            try:
                with file.open("rb") as stream:
                    encoding = encoding_of(stream.read(4))
                with file.open(encoding=encoding) as stream:
                    yield from paragraphs_of(stream)
            except (OSError, UnicodeDecodeError) as error:
                raise _unreadable(file, error) from None


def _unreadable(file: Path, error: Exception) -> InputError:
    return InputError(f"cannot read {file}: {error}; expected plain text in UTF-8")


def paragraphs_of(stream: IO[str]) -> Iterator[str]:
    """Yield the paragraphs of an open file, without white space around them."""
    lines = iter(functools.partial(stream.readline, _LONGEST), "")
    for text in _paragraphs(lines):
        if text := text.strip():
            yield text


def _paragraphs(lines: Iterable[str]) -> Iterator[str]:
    """Join lines up to a blank one. Cut at white space what grows too long."""
    paragraph = ""
    for line in lines:
        if not line.strip():
            yield paragraph
            paragraph = ""
            continue
        paragraph += line
        if len(paragraph) >= _LONGEST:
            space = max(paragraph.rfind(c) for c in " \n\t")
            cut = space if space > 0 else len(paragraph)
            yield paragraph[:cut]
            paragraph = paragraph[cut:]
    yield paragraph
