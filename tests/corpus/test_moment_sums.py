"""The figures that compare the halves of a sum, where the truth is known."""

from __future__ import annotations

import pytest
import torch

from factsmith.corpus.moment_sums import HalvedSum


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
    matrix, _, split_half, excess = total.estimate(counts)
    keys = torch.randn(500, d_ff, generator=draw, dtype=torch.float64) @ mixing.T
    u = torch.linalg.solve(matrix, keys.T).T
    least = 1 / (keys * torch.linalg.solve(truth, keys.T).T).sum(1)
    measured = float(((u @ truth * u).sum(1) / (u * keys).sum(1) ** 2 / least - 1).mean())
    assert excess == pytest.approx(measured, rel=0.25)
    assert split_half is not None and split_half == pytest.approx(
        2 * float((matrix - truth).norm() / truth.norm()), rel=0.6
    )
    assert not torch.equal(matrix, truth) and torch.equal(matrix, matrix.T)
