"""The forecast of a loss follows its formula and agrees with the published measurements."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from factsmith.patch import capacity as capacities
from factsmith.patch.forecast import FITTED, Forecast

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks/results/capacity.json"


def wide(facts: int, disturbance: float, neurons: int = 3072) -> Forecast:
    """Return a forecast for one layer as wide as GPT-2's."""
    return Forecast(neurons, facts, disturbance)


def test_the_loss_follows_the_stated_formula() -> None:
    forecast = wide(100, 0.2)
    load = 100 / 3072
    expected = 100 * (1 - np.exp(-((0.2 / FITTED.scale) ** FITTED.power) * load**FITTED.crowding))
    assert forecast.loss(100) == pytest.approx(expected)
    later = 0.2 * 2**FITTED.growth
    expected = 100 * (
        1 - np.exp(-((later / FITTED.scale) ** FITTED.power) * (2 * load) ** FITTED.crowding)
    )
    assert forecast.loss(200) == pytest.approx(expected)
    assert forecast.loss(0) == 0
    losses = [forecast.loss(n) or 0.0 for n in range(0, 400, 20)]
    assert losses == sorted(losses) and len(set(losses)) == len(losses)


@pytest.mark.parametrize(("facts", "disturbance"), [(0, 0.0), (3, 0.1), (60, 0.2), (200, 0.4)])
def test_the_breaking_point_is_where_the_limit_is_reached(facts: int, disturbance: float) -> None:
    forecast = wide(facts, disturbance)
    for limit in (2.0, 10.0):
        at = forecast.breaking(limit)
        assert at is not None
        before, after = forecast.loss(at - 1), forecast.loss(at)
        assert before is not None and after is not None and before <= limit < after


def test_a_forecast_ends_where_measurements_end() -> None:
    most = int(FITTED.load * 3072)
    assert wide(0, 0.0).loss(most) is not None and wide(0, 0.0).loss(most + 1) is None
    assert wide(10, FITTED.disturbance * 1.01).loss(10) is None
    assert wide(100, 0.01).breaking(50.0) is None, (
        "so small a change needs more facts than were measured"
    )


def test_few_facts_say_little_about_the_next() -> None:
    usual = wide(0, 0.0).disturbance_of(400)
    # One fact disturbs five times as much as usual.
    wild = 5 * FITTED.usual * (1 / 3072) ** FITTED.growth
    assert wide(1, wild).disturbance_of(400) < 1.5 * usual
    steady = wide(40, 5 * FITTED.usual * (40 / 3072) ** FITTED.growth)
    assert steady.disturbance_of(400) == pytest.approx(5 * usual)
    assert wide(1, wild).disturbance_of(1) == wild, (
        "the measured disturbance counts for the stored facts"
    )


def test_the_constants_are_the_fitted_ones() -> None:
    assert vars(FITTED) == json.loads(RESULTS.read_text())["fit"]


def test_predictions_agree_with_the_measurements() -> None:
    """The predictions explain the losses of all measured points.

    The controls are the mean loss and shuffled predictions.
    """
    points = [p for p in json.loads(RESULTS.read_text())["points"].values() if p["efficacy"] >= 70]
    measured = np.array([p["loss"] for p in points])
    predicted = np.array([FITTED.loss(p["disturbance"], p["load"]) for p in points])
    spread = np.square(measured - measured.mean()).sum()
    assert len(points) > 60 and 1 - np.square(measured - predicted).sum() / spread > 0.9
    shuffled = np.random.default_rng(0).permutation(predicted)
    assert 1 - np.square(measured - shuffled).sum() / spread < 0
    assert all(FITTED.covers(p["disturbance"], p["load"]) for p in points)
    assert {p["model"] for p in points} == {"atlas", "atlas-llama"} and min(
        p["others"] for p in points
    ) >= 500


def test_every_warning_came_before_the_limit() -> None:
    """In every series, the point before the limit was reached gives a warning."""
    points = json.loads(RESULTS.read_text())["points"].values()
    series: dict[tuple[str, str], list[dict[str, float]]] = {}
    for point in sorted((p for p in points if p["efficacy"] >= 70), key=lambda p: p["facts"]):
        series.setdefault((point["model"], point["job"]), []).append(point)
    reached = 0
    for row in series.values():
        over = next((i for i, p in enumerate(row) if p["loss"] > capacities.LIMIT), None)
        if over is None:
            continue
        reached += 1
        before, after = row[over - 1], row[over]
        neurons = before["facts"] / before["load"]
        forecast = Forecast(round(neurons), int(before["facts"]), before["disturbance"])
        facts = int(after["facts"])
        text = capacities._warning(0, facts, forecast.loss(facts), capacities.LIMIT, None)
        assert text is not None, (before, after)
    assert reached == 7
