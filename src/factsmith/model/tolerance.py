"""How far two ways to compute the same thing may differ, in each dtype."""

from __future__ import annotations

import torch
from torch import Tensor


def tolerance(dtype: torch.dtype) -> float:
    """Return the relative difference that two ways to compute the same may show in a dtype."""
    return {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2e-2}.get(dtype, 1e-1)


def same(a: Tensor, b: Tensor, within: float | None = None) -> bool:
    """Return whether two tensors agree, relative to the larger one's greatest entry."""
    if a.shape != b.shape:
        return False
    within = tolerance(a.dtype) if within is None else within
    a, b = a.double(), b.double()
    scale = max(float(a.abs().max()), float(b.abs().max()), 1e-30)
    return bool(((a - b).abs().max() / scale) <= within)
