"""Means over facts and their 95 % intervals, by Student's t.

mean, low, high = mean_interval(values)    # values (n_facts, ...); nan where a fact has none
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor


def mean_interval(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mean over the first dimension and its 95 % interval, all in float32.

    A nan is not counted. The interval is nan where fewer than two numbers are left.

    Args:
        values: (n, ...) the numbers.

    Returns:
        The mean, and the lower and the upper end of its interval, each of the other dimensions.
    """
    values = values.double()
    count = (~values.isnan()).sum(0)
    mean = values.nanmean(0)
    variance = (values - mean).square().nansum(0) / (count - 1)
    factor = count.double().apply_(lambda n: t_quantile(int(n) - 1) if n > 1 else torch.nan)
    error = factor * (variance / count).sqrt()
    return mean.float(), (mean - error).float(), (mean + error).float()


@cache
def t_quantile(degrees: int, share: float = 0.95) -> float:
    """Return t such that [-t, t] holds `share` of Student's distribution.

    Args:
        degrees: Degrees of freedom of the distribution.
        share: The share, between 0 and 1.
    """
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _share_inside(middle, degrees) < share else (low, middle)
    return math.sqrt(degrees) * math.tan(low)


def _share_inside(angle: float, degrees: int) -> float:
    """The share of Student's distribution in [-t, t], for t = sqrt(degrees) tan(angle).

    A finite sum: Abramowitz and Stegun 26.7.3-4.
    """
    odd, cosine = degrees % 2, math.cos(angle)
    term, total = cosine if odd else 1.0, 0.0
    for k in range(2 + odd, degrees + 1, 2):
        total += term
        term *= cosine**2 * (k - 1) / k
    total = total * math.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total


def margin(low: float, high: float) -> str:
    """Return " ± " and half of an interval, or nothing if the interval is nan."""
    return "" if math.isnan(low) else f" ± {(high - low) / 2:.3f}"
