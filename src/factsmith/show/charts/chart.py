"""A chart: a Vega-Lite specification without data, and the rows that it draws.

    chart = heat_map(trace)
    chart                   # in a notebook: the picture
    chart.rows              # one row for each mark, with names and units
    chart.to_csv()          # the same as a sheet
    chart.to_dict()         # a complete specification: any Vega-Lite 6 viewer draws it

The notebook needs no library for it: JupyterLab and VS Code draw Vega-Lite themselves.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...core.tables import visible

SCHEMA = "https://vega.github.io/schema/vega-lite/v6.json"

_MIME = "application/vnd.vegalite.v6+json"

LINK = "href"
"""The field of a row that says where a click on its mark leads."""

_FORMULA = ("=", "+", "-", "@")
"""A cell that starts with one of these is a formula in a spreadsheet."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Chart:
    """A specification without data, and its rows.

    Attributes:
        title: What the chart shows, as a headline.
        spec: A Vega-Lite 6 specification without `data`. It names no colour.
        rows: One mapping for each mark: {name: text or number}. The field "href" holds the address
            that a click on the mark opens.
        name: A short name for files, such as "trace".
        description: One sentence for those who cannot see the chart.
    """

    title: str
    spec: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    name: str
    description: str = ""

    def linked(self, address: Callable[[Mapping[str, Any]], str]) -> Chart:
        """Return the chart with an address on each row; a click on the mark opens it."""
        return replace(self, rows=[{**row, LINK: address(row)} for row in self.rows])

    def to_dict(self) -> dict[str, Any]:
        """Return a complete Vega-Lite specification, with title, description and data."""
        return {
            "$schema": SCHEMA,
            "title": {"text": self.title, "anchor": "start"},
            "description": self.description or self.title,
            **self.spec,
            "data": {"values": [dict(row) for row in self.rows]},
        }

    def to_csv(self) -> str:
        """Return the rows as CSV with a line of names; addresses are left out.

        A text that a spreadsheet would read as a formula gets an apostrophe before it.
        """
        names = list(dict.fromkeys(name for row in self.rows for name in row if name != LINK))
        lines = io.StringIO()
        sheet = csv.writer(lines, lineterminator="\n")
        sheet.writerow(names)
        sheet.writerows([_cell(row.get(name)) for name in names] for row in self.rows)
        return lines.getvalue()

    def __repr__(self) -> str:
        """Return the title and the number of rows as text."""
        return f"{visible(self.title)} ({len(self.rows):,} rows)"

    def _repr_mimebundle_(self, **options: Any) -> dict[str, Any]:
        return {_MIME: self.to_dict(), "text/plain": repr(self)}


def _cell(value: Any) -> Any:
    """Return a value for a sheet: lists as text, formulas as text."""
    if value is None:
        return ""
    if isinstance(value, (list, tuple)):
        value = " | ".join(map(str, value))
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value
