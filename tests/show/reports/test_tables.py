"""The tables of a run: long sequences are thinned out evenly."""

from __future__ import annotations

import pytest

from factsmith.show.reports.tables import _spread, other_tables, run_tables
from show.runs import evaluation


@pytest.mark.parametrize(
    ("rounds", "n", "shown"),
    [
        (range(3), 8, [0, 1, 2]),
        (range(8), 8, list(range(8))),
        (range(15), 8, [0, 2, 4, 6, 8, 10, 12, 14]),
        (range(100), 2, [0, 99]),
        ([], 8, []),
    ],
)
def test_rounds_are_spread_evenly(rounds: range, n: int, shown: list[int]) -> None:
    assert _spread(set(rounds), n) == shown


def test_tables_without_rows_are_left_out() -> None:
    titles = [table.title for table in run_tables(evaluation(1))]
    assert titles == [
        "1 record at a time; base: the model before any edit",
        "what it cost",
        "what it did to the rest",
    ]
    assert other_tables(evaluation(2))[0].title == "general ability"
    assert "what is left" in [table.title for table in run_tables(evaluation(2, sequence=True))]
