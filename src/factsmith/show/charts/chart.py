"""A chart: a Vega-Lite specification without data, and the rows that it draws.

    chart = heat_map(trace)
    chart                   # in a notebook: the picture
    chart.rows              # one row for each mark, with names and units
    chart.to_csv()          # the same as a sheet
    chart.to_dict()         # a complete specification: any Vega-Lite 6 viewer draws it

A notebook needs no library for it. JupyterLab and VS Code draw Vega-Lite 5 themselves, so the
chart says both versions: its specification is the same in both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...core.sheets import csv_text
from ...core.tables import visible

SCHEMA = "https://vega.github.io/schema/vega-lite/v{}.json"

_MIME = "application/vnd.vegalite.v{}+json"

VERSION = 6
"""The version of Vega-Lite that studio serves."""

LINK = "href"
"""The field of a row that says where a click on its mark leads."""


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

    def to_dict(self, version: int = VERSION) -> dict[str, Any]:
        """Return a complete Vega-Lite specification, with title, description and data.

        Args:
            version: The version of Vega-Lite that it names: 5 or 6.
        """
        return {
            "$schema": SCHEMA.format(version),
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
        rows = [{name: _plain(row.get(name)) for name in names} for row in self.rows]
        return csv_text(rows) if rows else ""

    def __repr__(self) -> str:
        """Return the title and the number of rows as text."""
        return f"{visible(self.title)} ({len(self.rows):,} rows)"

    def _repr_mimebundle_(self, **options: Any) -> dict[str, Any]:
        pictures = {_MIME.format(version): self.to_dict(version) for version in (5, VERSION)}
        return {**pictures, "text/plain": repr(self)}


def _plain(value: Any) -> Any:
    """Return a value for a cell of a sheet: a list becomes one text."""
    return " | ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
