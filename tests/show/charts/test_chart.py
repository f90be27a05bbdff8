"""A chart: its specification, its rows, and what leaves it."""

from __future__ import annotations

import csv
import io

from factsmith.show.charts.chart import Chart

ROWS = [
    {"token": " lev", "p": 0.5, "href": "/ask"},
    {"token": "=1+1", "p": None, "over": [1, 2]},
]
CHART = Chart(
    name="sample", title="A sample", spec={"mark": "bar"}, rows=ROWS, description="Two bars."
)


def test_the_complete_specification_holds_the_rows() -> None:
    """The dictionary has title, description and data; the specification alone has none."""
    whole = CHART.to_dict()
    assert whole["data"] == {"values": ROWS}
    assert whole["description"] == "Two bars."
    assert whole["title"]["text"] == "A sample"
    assert "data" not in CHART.spec


def test_a_notebook_gets_the_same_specification() -> None:
    """The mime bundle has the dictionary for viewers of Vega-Lite 5 and of 6."""
    bundle = CHART._repr_mimebundle_(include=None, exclude=None)
    assert bundle["application/vnd.vegalite.v6+json"] == CHART.to_dict()
    older = bundle["application/vnd.vegalite.v5+json"]
    assert older["$schema"].endswith("/v5.json")
    assert {**older, "$schema": CHART.to_dict()["$schema"]} == CHART.to_dict()
    assert bundle["text/plain"] == "A sample (2 rows)"


def test_the_sheet_has_every_name_and_no_formula() -> None:
    """Each row is a line, addresses are left out, and a formula is text."""
    lines = list(csv.reader(io.StringIO(CHART.to_csv())))
    assert lines == [["token", "p", "over"], [" lev", "0.5", ""], ["'=1+1", "", "1 | 2"]]


def test_links_are_a_field_of_each_row_of_a_copy() -> None:
    """`linked` leaves the chart as it was."""
    linked = CHART.linked(lambda row: f"/at?token={row['token']}")
    assert [row["href"] for row in linked.rows] == ["/at?token= lev", "/at?token==1+1"]
    assert "href" not in CHART.rows[1]
