"""The squared hinge, against a general minimiser."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from factsmith.edit.hinge import hinge


def slow_hinge(gram: Tensor, wanted: Tensor, slack: Tensor) -> Tensor:
    """Minimise the same objective in u by gradient descent with tiny steps."""
    values, vectors = torch.linalg.eigh(gram)
    rows = vectors * values.clamp_min(0).sqrt()  # rows @ rows.T is the Gram matrix
    u = torch.zeros(rows.shape[1], dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS([u], max_iter=2000, tolerance_grad=1e-12, tolerance_change=1e-16)

    def loss() -> Tensor:
        reads = rows @ u
        short = torch.where(wanted > 0.5, (1 - reads).clamp_min(0), reads.clamp_min(0))
        total = u.square().sum() + (short.square() / slack).sum()
        (u.grad,) = torch.autograd.grad(total, u)
        return total

    search.step(loss)  # type: ignore[no-untyped-call]
    reads: Tensor = rows @ u.detach()
    return reads


@pytest.mark.parametrize("size", [0.1, 3.0])
def test_the_hinge_is_minimised(size: float) -> None:
    draw = torch.Generator().manual_seed(3)
    slack = size * (0.5 + torch.rand(4, 20, generator=draw, dtype=torch.float64))
    rows = torch.randn(4, 20, 8, generator=draw, dtype=torch.float64)
    gram = rows @ rows.transpose(1, 2)
    wanted = (torch.arange(20) < 5).double().expand(4, 20)
    usable = torch.ones(4, 20, dtype=torch.bool)
    beta = hinge(gram, wanted, usable, slack)
    reads = (gram @ beta[:, :, None])[:, :, 0]
    for g, w, s, each in zip(gram, wanted, slack, reads, strict=True):
        torch.testing.assert_close(each, slow_hinge(g, w, s), atol=1e-5, rtol=1e-4)
    # The control: a ridge that pulls both ways is another problem.
    ridge = torch.linalg.solve(gram[0] + slack[0].diag(), wanted[0])
    assert not torch.allclose(gram[0] @ ridge, reads[0], atol=1e-2)
    # Examples that are not usable do not count.
    usable[:, 10:] = False
    fewer = hinge(gram, wanted, usable, slack)
    assert not fewer[:, 10:].any()
    torch.testing.assert_close(
        fewer[:, :10], hinge(gram[:, :10, :10], wanted[:, :10], usable[:, :10], slack[:, :10])
    )
