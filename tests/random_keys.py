"""Random keys and second moments for the tests of capacity and interference."""

from __future__ import annotations

import torch
from torch import Tensor

from factsmith.corpus.moments import SecondMoment

D_MODEL, D_FF = 5, 12


def draw(*shape: int, seed: int) -> Tensor:
    """Return normal random numbers in float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def a_moment(seed: int = 0, layer: int | None = None) -> SecondMoment:
    """Return the second moment of correlated coefficients. Its metric is not the Euclidean one."""
    tokens = draw(400, D_FF, seed=seed) @ draw(D_FF, D_FF, seed=seed + 100)
    return SecondMoment.from_matrix(tokens.T @ tokens / 400, count=400, layer=layer)
