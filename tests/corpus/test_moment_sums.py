"""The figures that compare the halves of a sum, where the truth is known."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from factsmith.corpus.moment_sums import HalvedSum, MomentSums, Until
from factsmith.corpus.scan import Coefficients


@pytest.mark.parametrize("per", [8, 32])
def test_excess_predicts_what_unseen_text_shows(per: int) -> None:
    """Coefficients are Gaussian, so the excess of C⁻¹ k over the best change can be measured."""
    d_ff, draw = 96, torch.Generator().manual_seed(per)
    mixing = torch.randn(d_ff, d_ff, generator=draw, dtype=torch.float64) * torch.logspace(
        0, -1.5, d_ff, dtype=torch.float64
    )
    truth, total = mixing @ mixing.T, HalvedSum(d_ff)
    counts = [per * d_ff // 2 - 40, per * d_ff // 2 + 40]
    for half, n in enumerate(counts):
        total.add(half, torch.randn(n, d_ff, generator=draw, dtype=torch.float64) @ mixing.T)
    matrix, _, split_half, excess, *_ = total.estimate(counts)
    keys = torch.randn(500, d_ff, generator=draw, dtype=torch.float64) @ mixing.T
    u = torch.linalg.solve(matrix, keys.T).T
    least = 1 / (keys * torch.linalg.solve(truth, keys.T).T).sum(1)
    measured = float(((u @ truth * u).sum(1) / (u * keys).sum(1) ** 2 / least - 1).mean())
    assert excess == pytest.approx(measured, rel=0.25)
    assert split_half is not None and split_half == pytest.approx(
        2 * float((matrix - truth).norm() / truth.norm()), rel=0.6
    )
    assert not torch.equal(matrix, truth) and torch.equal(matrix, matrix.T)


class Gaussian:
    """Coefficients of several layers, N(0, truth), that are given to sums window by window."""

    def __init__(self, sizes: dict[int, int]) -> None:
        self.draw = torch.Generator().manual_seed(0)
        self.mixing = {
            layer: torch.randn(n, n, generator=self.draw, dtype=torch.float64)
            * torch.logspace(0, -1, n, dtype=torch.float64)
            for layer, n in sizes.items()
        }

    def window(self, sums: MomentSums, n_tokens: int = 100) -> None:
        """Add as many tokens to each half."""
        for half in range(2):
            m = {
                (layer,): torch.randn(n_tokens, len(x), generator=self.draw, dtype=torch.float64)
                @ x.T
                for layer, x in self.mixing.items()
            }
            batch = SimpleNamespace(half=half, n_tokens=n_tokens)
            sums.add(batch, {k: Coefficients(x, x[:, 0], x[:, 0]) for k, x in m.items()})

    def measured_excess(self, layer: int, matrix: torch.Tensor) -> float:
        """Return how much more C⁻¹ k disturbs endless text than the best change, over keys."""
        x = self.mixing[layer]
        keys = torch.randn(500, len(x), generator=self.draw, dtype=torch.float64) @ x.T
        u = torch.linalg.solve(matrix, keys.T).T
        least = 1 / (keys * torch.linalg.solve(x @ x.T, keys.T).T).sum(1)
        return float(((u @ x @ x.T * u).sum(1) / (u * keys).sum(1) ** 2 / least - 1).mean())


def read_until(text: Gaussian, sums: MomentSums) -> list[int]:
    """Add windows until it is enough; return the numbers of tokens that were expected meanwhile."""
    expected = []
    for _ in range(2000):
        text.window(sums)
        if sums.is_enough():
            return expected
        expected.append(sums.expected)
    raise AssertionError("it was never enough")


@pytest.mark.parametrize("target", [0.125, 0.25])
def test_reading_ends_where_the_true_error_is_the_target(target: float) -> None:
    d_ff = 128
    text, sums = (
        Gaussian({0: d_ff}),
        MomentSums({0: d_ff}, Until(target, 4 * d_ff, 12 * d_ff, 10**6)),
    )
    expected = read_until(text, sums)
    n_tokens = sum(sums.counts)
    theory = d_ff * (1 + target) / target  # with Gaussian coefficients q is d_ff / n
    assert 0.8 * theory < n_tokens < 1.6 * theory
    assert expected[0] == 12 * d_ff and abs(expected[-1] - n_tokens) < 0.15 * n_tokens + 400
    estimate = sums.result(SimpleNamespace())[0]
    assert estimate.excess is not None and estimate.excess <= target
    assert text.measured_excess(0, estimate.mean) == pytest.approx(target, rel=0.35)
    # A control: a third of the text is not enough, by the estimate and by the truth.
    text, sums = Gaussian({0: d_ff}), MomentSums({0: d_ff}, Until(target, 1, 1, 10**6))
    for _ in range(n_tokens // 3 // 200):
        text.window(sums)
    assert not sums.is_enough() and sums.expected > 1.5 * sum(sums.counts)
    estimate = sums.result(SimpleNamespace())[0]
    assert text.measured_excess(0, estimate.mean) > 1.5 * target


def test_the_worst_layer_decides() -> None:
    until = Until(0.2, 256, 1000, 10**6)
    narrow = MomentSums({0: 32}, until)
    read_until(Gaussian({0: 32}), narrow)
    both = MomentSums({0: 32, 1: 160}, until)
    read_until(Gaussian({0: 32, 1: 160}), both)
    assert sum(both.counts) > 2 * sum(narrow.counts)
    assert all(e.excess is not None and e.excess <= 0.2 for e in both.result(None).values())


def test_it_is_enough_at_the_most_and_not_before_the_first() -> None:
    sums = MomentSums({0: 64}, Until(1e-9, 300, 300, 1000))
    read_until(Gaussian({0: 64}), sums)
    assert 1000 <= sum(sums.counts) <= 1200 and sums.expected == 1000
    sums = MomentSums({0: 4}, Until(0.9, 3000, 3000, 10**6))
    read_until(Gaussian({0: 4}), sums)
    assert 3000 <= sum(sums.counts) <= 3200


def test_halves_are_compared_only_where_it_may_be_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = HalvedSum.excess
    monkeypatch.setattr(HalvedSum, "excess", lambda s, counts: calls.append(1) or real(s, counts))
    sums = MomentSums({0: 64, 1: 64}, Until(0.05, 256, 256, 10**6))
    expected = read_until(Gaussian({0: 64, 1: 64}), sums)
    assert len(expected) > 5 and len(calls) < 10


def test_a_half_without_text_is_never_enough() -> None:
    sums = MomentSums({0: 8}, Until(0.5, 10, 10, 10**6))
    m = torch.randn(500, 8, dtype=torch.float64)
    sums.add(SimpleNamespace(half=0, n_tokens=500), {(0,): Coefficients(m, m[:, 0], m[:, 0])})
    assert not sums.is_enough() and sums.due > 500


def test_a_state_goes_on_as_the_run_would_have() -> None:
    until = Until(0.05, 300, 900, 10**6)
    text, sums = Gaussian({0: 64}), MomentSums({0: 64}, until)
    for _ in range(3):
        text.window(sums)
        assert not sums.is_enough()
    tensors, fields = sums.state()
    other = MomentSums({0: 64}, until)
    other.restore({name: tensor.clone() for name, tensor in tensors.items()}, fields)
    assert (other.due, other.expected, other.counts) == (sums.due, sums.expected, sums.counts)
    assert sums.due > until.first
