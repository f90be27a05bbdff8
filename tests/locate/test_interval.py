"""Means and their intervals against printed tables and numbers computed by hand."""

from __future__ import annotations

import math

import pytest
import torch

from factsmith.locate.interval import margin, mean_interval, t_quantile

# Two-sided 95 % points of Student's t from printed tables, by the number of facts. The degrees of
# freedom are one fewer.
T = {
    2: 12.7062,
    3: 4.30265,
    4: 3.18245,
    5: 2.77645,
    6: 2.57058,
    7: 2.44691,
    9: 2.306,
    11: 2.22814,
    31: 2.04227,
    61: 2.0003,
    121: 1.97993,
}


def test_quantiles_are_those_of_the_tables() -> None:
    assert {n: round(t_quantile(n - 1), 5) for n in T} == T
    assert t_quantile(3, 0.99) == pytest.approx(5.841, abs=1e-3) and t_quantile(
        3000
    ) == pytest.approx(1.9608, abs=1e-4)


def test_a_nan_is_not_counted() -> None:
    values = torch.tensor([[1.0, 2.0, math.nan], [3.0, math.nan, math.nan], [5.0, math.nan, 4.0]])
    mean, low, high = mean_interval(values)
    assert mean.tolist() == [3.0, 2.0, 4.0]
    error = T[3] * 2 / 3**0.5  # the standard deviation of 1, 3 and 5 is 2
    assert float(low[0]) == pytest.approx(3 - error, rel=1e-5)
    assert float(high[0]) == pytest.approx(3 + error, rel=1e-5)
    assert low[1:].isnan().all() and high[1:].isnan().all()  # one number has no interval


def test_a_margin_is_half_of_the_interval() -> None:
    assert margin(0.25, 0.75) == " ± 0.250" and margin(math.nan, math.nan) == ""
