"""The numbers of an answer as a sheet: CSV with the names of its columns.

csv_of(answer)              # the rows of its first chart, or its first table
csv_of(answer, "norms")     # the rows of one chart, by its name
"""

from __future__ import annotations

from ..core.errors import InputError
from ..core.sheets import csv_text
from .verb import Answer


def csv_of(answer: Answer, chart: str | None = None) -> str:
    """Return the numbers of an answer as CSV.

    Args:
        answer: The answer.
        chart: The name of a chart. None: the first one, or the first table where there is none.

    Raises:
        InputError: when the answer has no such chart.
    """
    names = [each.name for each in answer.charts]
    if chart is not None and chart not in names:
        raise InputError(
            f"chart is {chart[:40]!r}; this view has {', '.join(names) or 'no chart'}",
            argument="chart",
        )
    if answer.charts:
        return answer.charts[names.index(chart) if chart is not None else 0].to_csv()
    for table in answer.tables:
        if table.columns:
            rows = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
            return csv_text(rows, list(table.columns))
    return ""
