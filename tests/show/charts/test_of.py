"""One function draws every kind of record that has a chart."""

from __future__ import annotations

from typing import Any

import pytest

import factsmith as fs
from factsmith.core.errors import InputError
from factsmith.show.charts.traces import heat_map

LEV = "The currency of Bulgaria is the"


@pytest.fixture(scope="module")
def lm() -> Any:
    return fs.load("atlas")


def test_a_trace_is_drawn_as_studio_draws_it(lm: Any) -> None:
    trace = fs.causal_trace(lm, LEV, "Bulgaria", samples=2)
    drawn = fs.chart(trace)
    assert drawn.to_dict() == heat_map(trace).to_dict()
    assert len(drawn.rows) == len(trace.tokens) * lm.n_layers
    bundle = drawn._repr_mimebundle_()
    assert bundle["application/vnd.vegalite.v6+json"]["data"]["values"]


def test_other_records(lm: Any) -> None:
    assert fs.chart(fs.lens(lm, LEV)).rows
    assert fs.chart(fs.compose(lm, LEV)).rows
    assert fs.chart(fs.token_neurons(lm, LEV, 3, 1)).rows


def test_what_has_no_chart_is_refused() -> None:
    with pytest.raises(InputError, match="no chart of a str; give one of CausalTrace"):
        fs.chart("a trace")
