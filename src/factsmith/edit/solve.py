"""The closed forms, as plain tensors: no model, no tokenizer, no file.

    factor = cholesky(C)                              # once for a layer
    left, right = rome(k_star, k_prompt, residual, factor)
    W + left @ right                                  # maps k_prompt to v_star exactly

Everything is computed in float64 through a Cholesky factor; no inverse is formed.
Shapes: d = d_model, m = d_ff, and one column or row for each fact.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InputError, NumericsError

JITTERS = (0.0, 1e-12, 1e-10, 1e-8, 1e-6, 1e-4)
"""What may be added to the diagonal, in units of its mean, smallest first: a matrix estimated from fewer tokens than it has rows is
singular, and rounded to float32 it is slightly indefinite. A larger shift would be a ridge, which changes what is asked for."""

MIN_OVERLAP = 1e-6
"""Smallest |⟨k, u⟩| / ‖k‖ that ROME divides by; below it the update would be a million times larger than the residual."""


def cholesky(matrix: Tensor) -> Tensor:
    """Lower Cholesky factor, (m, m) float64, of a symmetric second moment; the first of JITTERS that succeeds is used.

    Raises InputError when the matrix is not square or not symmetric, NumericsError when it is not finite, is zero, or is not
    positive definite even with the largest jitter.
    """
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise InputError(f"a second moment is a square matrix (d_ff, d_ff); got shape {tuple(matrix.shape)}")
    matrix = matrix.to(torch.float64)
    if not torch.isfinite(matrix).all():
        raise NumericsError("the second moment holds NaN or infinity; compute it again from a model whose outputs are finite")
    mean = matrix.diagonal().mean()
    if mean <= 0:
        raise NumericsError(f"the second moment's mean diagonal is {mean:.3g}; expected a positive number: was it computed from any text?")
    if (matrix - matrix.T).abs().max() > 1e-3 * matrix.abs().max():
        raise InputError("a second moment is symmetric; this matrix is not: give E[m mᵀ] of the down-projection's input")
    for jitter in JITTERS:
        shifted = matrix if jitter == 0 else matrix + jitter * mean * torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
        factor: Tensor
        factor, failed = torch.linalg.cholesky_ex(shifted)
        if not failed:
            return factor
    raise NumericsError(
        f"the second moment is not positive definite, also with {JITTERS[-1]:g} of its mean diagonal added; compute it from more text"
    )


def solve_moment(factor: Tensor, keys: Tensor) -> Tensor:
    """C⁻¹ kᵢ for every row of keys (n, m), as (n, m) float64; `factor` is `cholesky(C)`."""
    solved: Tensor = torch.cholesky_solve(keys.to(factor).T, factor)  # (m, n)
    return solved.T


def rome(k_star: Tensor, k_prompt: Tensor, residual: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """ROME's rank-one update as factors (d, 1) and (1, m), float64. https://arxiv.org/abs/2202.05262, equation 2.

        u = C⁻¹ k_star / ‖C⁻¹ k_star‖,      ΔW = (v_star − W k_prompt) uᵀ / ⟨k_prompt, u⟩

    k_star (m,) is the key averaged over contexts, k_prompt (m,) the key of the bare prompt, residual (d,) = v_star − W k_prompt.
    The paper writes one key for both; the authors' code, which made the tables, divides by the bare prompt's, so that the prompt
    itself is answered exactly. Raises NumericsError when an input is not finite or the two keys do not overlap under C⁻¹.
    """
    k_star, k_prompt, residual = (x.to(factor) for x in (k_star, k_prompt, residual))
    for name, value in (("k_star", k_star), ("the prompt's key", k_prompt), ("the residual", residual)):
        if not torch.isfinite(value).all():
            raise NumericsError(f"{name} holds NaN or infinity; the model does not compute finite states for this fact")
    u = solve_moment(factor, k_star[None])[0]
    u = u / u.norm()
    overlap = k_prompt @ u
    if not overlap.abs() > MIN_OVERLAP * k_prompt.norm():  # also true for a key of zeros, where u is NaN
        raise NumericsError(
            f"⟨k, u⟩ is {overlap:.3g} for a key of norm {k_prompt.norm():.3g}: the prompt's key and its average over contexts hardly "
            "overlap, and the update would blow up; use other contexts or another layer"
        )
    return (residual / overlap)[:, None], u[None]
