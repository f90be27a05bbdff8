"""Files from other programs as text: their encoding, lines of JSON, and tables.

    decoded(raw)                  UTF-8 with or without a byte order mark, UTF-16, UTF-32
    json_lines(text)              the value of each line, or its error
    table(text)                   a header and rows; commas, semicolons or tabs

Editors and spreadsheets on Windows write byte order marks, UTF-16, and semicolons in place of
commas.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections.abc import Callable
from typing import Any, NamedTuple

_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
"""Byte order marks, the longer ones first: that of UTF-32 begins like that of UTF-16."""

_DELIMITERS = ",;\t"


class Line(NamedTuple):
    """A line of a file.

    Attributes:
        number: Its number, from 1.
        value: What it holds. An exception: why it cannot be read.
    """

    number: int
    value: Any


class Table(NamedTuple):
    """A table of texts.

    Attributes:
        header: The names of the columns.
        rows: The rows that are not blank; each value is the list of its cells.
    """

    header: list[str]
    rows: list[Line]


def encoding_of(start: bytes) -> str:
    """Return the encoding that the first bytes of a file show."""
    return next((name for mark, name in _MARKS if start.startswith(mark)), "utf-8-sig")


def decoded(raw: bytes) -> str:
    """Return the bytes of a file as text, without a byte order mark.

    Raises:
        ValueError: when they are in no encoding of Unicode that can be told.
    """
    encoding = encoding_of(raw)
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError as error:
        name = encoding.removesuffix("-sig").upper()
        raise ValueError(
            f"byte {error.start:,} is not {name} ({error.reason}); save the file as UTF-8"
        ) from None
    if "\0" in text:
        raise ValueError(
            "it holds NUL characters, as UTF-16 without a byte order mark does; "
            "save the file as UTF-8"
        )
    return text


def json_lines(text: str, load: Callable[[str], Any] = json.loads) -> list[Line]:
    """Return the values of lines of JSON, and the error of each line that is not JSON."""
    lines: list[Line] = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                lines.append(Line(number, load(line)))
            except (ValueError, RecursionError) as error:
                lines.append(Line(number, error))
    return lines


def fault_in_line(error: Exception) -> str:
    """Return what is wrong with a line of JSON, by its column: the caller names the line."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg.removesuffix(' at')} at column {error.colno}"
    return str(error)


def table(text: str) -> Table:
    """Return a table: the delimiter is the one that gives the first line the most cells.

    Raises:
        ValueError: when the text is no table, or has no row.
    """
    first, _, rest = text.partition("\n")
    named = re.fullmatch("sep=(.)\r?", first, re.IGNORECASE)  # as Excel names its delimiter
    delimiter = named[1] if named else max(_DELIMITERS, key=lambda d: len(_first_row(text, d)))
    above = 1 if named else 0
    reader = csv.reader(
        io.StringIO(rest if named else text, newline=""), delimiter=delimiter, strict=True
    )
    try:
        header = [name.strip() for name in next(reader, [])]
        rows = [
            Line(reader.line_num + above, cells) for cells in reader if any(map(str.strip, cells))
        ]
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num + above}: {error}") from None
    return Table(header, rows)


def _first_row(text: str, delimiter: str) -> list[str]:
    """The cells of the first line, by one delimiter; [] where it cannot be read so."""
    try:
        return next(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter), [])
    except csv.Error:
        return []
