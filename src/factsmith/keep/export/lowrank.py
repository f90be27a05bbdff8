"""Sums of low-rank updates, written as one product of the lowest rank.

    product = compress([(left, right), ...], max_rank=None, dtype=torch.float32)
    product.left @ product.right, product.rank, product.error

With left = Q₁R₁ and rightᵀ = Q₂R₂ the sum Σ leftᵢ rightᵢ is Q₁ (R₁R₂ᵀ) Q₂ᵀ. So its singular values
are those of the small core R₁R₂ᵀ, and no matrix is larger than the factors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

RANK_TOLERANCE = torch.finfo(torch.float32).eps
"""Smaller singular values, relative to the largest, are rounding: 1.2e-7, the spacing of the
float32 factors."""


@dataclass(frozen=True)
class LowRank:
    """A sum of updates as one product.

    Attributes:
        left: (d_model, kept), in the dtype that is written.
        right: (kept, d_ff), in the same dtype.
        rank: The exact rank of the sum.
        error: ‖sum − left @ right‖ / ‖sum‖ (Frobenius).
    """

    left: Tensor
    right: Tensor
    rank: int
    error: float

    @property
    def kept(self) -> int:
        """The rank of the product."""
        return self.left.shape[1]

    @property
    def is_rough(self) -> bool:
        """Whether the product differs from the sum by more than rounding in float32."""
        return self.error > 10 * RANK_TOLERANCE


def compress(
    factors: Sequence[tuple[Tensor, Tensor]], max_rank: int | None, dtype: torch.dtype
) -> LowRank:
    """Write Σ leftᵢ rightᵢ as one product.

    Args:
        factors: Pairs of left (d_model, rᵢ) and right (rᵢ, d_ff).
        max_rank: The largest rank of the product; what is beyond it is truncated by SVD. None: the
            exact rank of the sum.
        dtype: The dtype of the product's factors.
    """
    left = torch.cat([a for a, _ in factors], dim=1).double()
    right = torch.cat([b for _, b in factors], dim=0).double()
    q1, r1 = torch.linalg.qr(left)
    q2, r2 = torch.linalg.qr(right.T)
    u, s, vh = torch.linalg.svd(r1 @ r2.T, full_matrices=False)
    # Rounding of the core itself: all that is left of Δ − Δ.
    noise = (
        len(s)
        * torch.finfo(torch.float64).eps
        * torch.linalg.matrix_norm(r1)
        * torch.linalg.matrix_norm(r2)
    )
    s = torch.where(s > torch.maximum(RANK_TOLERANCE * s[0], noise), s, 0.0)
    rank = max(1, int((s > 0).sum()))
    kept = rank if max_rank is None else min(rank, max_rank)
    root = s[
        :kept
    ].sqrt()  # half to each factor, so that neither leaves the range of a narrow dtype
    new_left = (q1 @ (u[:, :kept] * root)).to(dtype)
    new_right = ((root[:, None] * vh[:kept]) @ q2.T).to(dtype)
    lost = product_norm(
        torch.cat([left, -new_left.double()], dim=1), torch.cat([right, new_right.double()], dim=0)
    )
    norm = float(torch.linalg.vector_norm(s))
    return LowRank(left=new_left, right=new_right, rank=rank, error=lost / norm if norm else 0.0)


def product_norm(left: Tensor, right: Tensor) -> float:
    """Return ‖left @ right‖ (Frobenius) from the factors."""
    return float(torch.linalg.matrix_norm(torch.linalg.qr(left)[1] @ torch.linalg.qr(right.T)[1].T))
