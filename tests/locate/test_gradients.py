"""The quadrature that replaces a Riemann sum of many points, and where it may do so."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from factsmith.locate import gradients


@pytest.mark.parametrize("steps", [17, 20, 300])
def test_few_nodes_average_polynomials_as_all_points_do(steps: int) -> None:
    nodes, mixing = gradients._quadrature(steps, 8)
    points = torch.arange(steps, dtype=torch.float64) / steps
    assert float(nodes[0]) == 0 and bool((nodes[1:] > 0).all()) and float(nodes[-1]) < 1
    for degree in range(15):
        assert float(mixing[0] @ nodes**degree) == pytest.approx(
            float((points**degree).mean()), rel=1e-9
        )
    assert abs(float(mixing[0] @ nodes**16) - float((points**16).mean())) > 1e-12
    # The coefficients are those in orthonormal polynomials: a cubic has none beyond the third, and
    # the sum of their squares is its mean square.
    cubic = mixing @ (1 - 2 * nodes + 5 * nodes**3)
    assert float(cubic[4:].abs().max()) < 1e-12 < float(cubic[3].abs())
    assert float(cubic.square().sum()) == pytest.approx(
        float((1 - 2 * points + 5 * points**3).square().mean())
    )


def test_only_smooth_gradients_are_taken_from_few_nodes() -> None:
    nodes, mixing = gradients._quadrature(20, 8)

    def fades(function: Callable[[Tensor], Tensor]) -> bool:
        return bool(gradients._fades((mixing @ function(nodes))[:, None, None, None])[0])

    assert fades(lambda a: (1 + a).rsqrt()) and fades(lambda a: a.exp()) and fades(torch.ones_like)
    for size in (1.0, 0.3, 0.1, 0.03):
        assert not fades(lambda a, size=size: 1 + size * (a > 0.43).double())
        assert not fades(lambda a, size=size: 1 + size * (a - 0.43).abs())
    assert not fades(lambda a: 1 / (a + 0.01))  # a norm crossed close to 0
    assert not fades(torch.zeros_like) and not fades(lambda a: a * torch.nan)
