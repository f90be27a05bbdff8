"""The simulation of a cluster: its times where they are known, and each part counted once."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tools.simulate_cluster import Plan, Simulation, enough_tokens, scenarios

from factsmith.cluster.run import AHEAD

PLAN = Plan(parts=1000, seconds=10.0, workers=50)
HARD = replace(
    PLAN,
    result_bytes=1e6,
    link=1e7,
    store=2e7,
    spread=0.5,
    mtbf=100.0,
    repair=5.0,
    preempted=0.1,
    preempted_at=70.0,
    head_at=150.0,
    checkpoint=100,
)


def test_without_failures_and_transfers_the_time_is_the_analytic_one() -> None:
    outcome = Simulation(PLAN).run()
    assert outcome.wall == pytest.approx(1000 * 10 / 50)
    assert outcome.utilisation == pytest.approx(1) and outcome.lost == 0
    odd = Simulation(replace(PLAN, parts=1001)).run()
    assert odd.wall == pytest.approx(210)


def test_a_slow_link_decides_the_time() -> None:
    slow = Simulation(replace(PLAN, result_bytes=1e6, link=1e6)).run()
    assert slow.wall == pytest.approx(10 + 1000) and slow.link_busy > 0.98
    assert slow.received == 1e9
    assert enough_tokens(replace(PLAN, result_bytes=1e6, link=1e6), 10.0) == pytest.approx(50)


@pytest.mark.parametrize("seed", range(5))
def test_every_part_counts_once_whatever_fails(seed: int) -> None:
    outcome = Simulation(replace(HARD, seed=seed)).run()
    outcome.check()
    assert outcome.failures > 20 and outcome.lost > 0 and outcome.wall > 200
    assert outcome == Simulation(replace(HARD, seed=seed)).run()
    assert outcome.wall != Simulation(replace(HARD, seed=seed + 100)).run().wall


def test_few_results_wait_when_the_store_is_small() -> None:
    outcome = Simulation(replace(HARD, head_at=float("inf"))).run()
    wide = Simulation(replace(HARD, head_at=float("inf"), store=float("inf"))).run()
    assert outcome.peak_store <= 2e7 + 1e6 < wide.peak_store


class CountsTwice(Simulation):
    """A driver that also merges the results that a restart of the head has thrown away."""

    def _head(self, *_: int) -> None:
        merged = list(self.outcome.merged)
        super()._head()
        self.outcome.merged = merged


def test_a_driver_that_counts_twice_is_caught() -> None:
    with pytest.raises(ValueError, match="was merged 2 times, not once"):
        CountsTwice(replace(HARD, checkpoint=70)).run().check()


def test_no_scenario_has_more_parts_ahead_than_the_engine() -> None:
    for name, (plan, _) in scenarios().items():
        assert plan.store <= AHEAD * plan.workers * plan.result_bytes, name
