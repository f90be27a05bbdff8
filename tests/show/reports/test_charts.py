"""The charts of a report: dots are where their numbers are."""

from __future__ import annotations

import pytest

from factsmith.show.reports.charts import Axes, _round_values, line_chart


def test_dots_are_on_the_scale_of_the_grid() -> None:
    dots = {"rome": [(100, 0.5, "half"), (1, 1.0, "all"), (10, 0.0, "none")], "memit": []}
    chart = line_chart("title", dots, Axes("records", logarithmic=True, top=1.0))
    (line,) = chart["lines"]
    assert [(y, text) for _, y, text in line["dots"]] == [
        (2, "rome: all (records: 1)"),
        (58, "rome: none (records: 10)"),
        (30, "rome: half (records: 100)"),
    ]
    first, middle, last = (x for x, *_ in line["dots"])
    assert middle == pytest.approx((first + last) / 2, abs=0.01), "powers of ten are equally far"
    assert chart["grid"][0] == (58, "0 %") and chart["grid"][-1] == (2, "100 %")
    assert (chart["first"], chart["last"]) == ("1", "100")


@pytest.mark.parametrize("top", [1e-4, 0.03, 1.0, 7.3, 250.0])
def test_a_grid_has_three_to_six_round_values(top: float) -> None:
    values = _round_values(top)
    assert 3 <= len(values) <= 6 and values[0] == 0 and 0.5 * top < values[-1] <= top * (1 + 1e-8)
