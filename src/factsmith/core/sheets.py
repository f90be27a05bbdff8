"""CSV for spreadsheets, in which no text is a formula.

    csv_text([{"token": "=1+1", "p": -0.5}])      "token,p\\n'=1+1,-0.5\\n"
    plain_cell("'=1+1")                           "=1+1"

A spreadsheet computes a cell that begins with =, +, - or @. A text that begins like this, after
spaces or not, therefore gets an apostrophe in front; so does one that begins with a tab, a line
break or an apostrophe. Numbers stay as they are. Without its first apostrophe each text is again
what it was.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

_STARTS = "=+-@＝＋－＠'"  # spreadsheets take the full-width forms for the same
_BREAKS = "\t\r\n"


def csv_text(rows: Sequence[Mapping[str, Any]], names: Sequence[str] = ()) -> str:
    """Return rows as CSV with a line of names; all rows have the keys of the first.

    Args:
        rows: The rows.
        names: The names of the columns, needed where there may be no row.
    """
    names = list(names or rows[0])
    lines = [_line(names), *(_line([row[name] for name in names]) for row in rows)]
    return "".join(f"{line}\n" for line in lines)


def safe_cell(value: Any) -> Any:
    """Return a cell that no spreadsheet computes; numbers are returned as they are."""
    if not isinstance(value, str):
        return value
    is_formula = value.lstrip()[:1] in tuple(_STARTS) or value[:1] in tuple(_BREAKS)
    return f"'{value}" if is_formula else value


def plain_cell(text: str) -> str:
    """Return the text that `safe_cell` was given."""
    return text.removeprefix("'")


def _line(cells: Sequence[Any]) -> str:
    """Return one line of CSV without its end."""
    text = io.StringIO(newline="")
    # With this end the writer also quotes a cell that holds a lone carriage return.
    csv.writer(text, lineterminator="\r\n").writerow(map(safe_cell, cells))
    return text.getvalue().removesuffix("\r\n")
