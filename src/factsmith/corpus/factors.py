"""corpus.factors."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.errors import InputError, NumericsError

JITTERS = (0.0, 1e-12, 1e-10, 1e-8, 1e-6, 1e-4)
"""What may be added to the diagonal, in units of its mean, smallest first: a matrix estimated from fewer tokens than it has rows is
singular, and rounded to float32 it is slightly indefinite. A larger shift would be a ridge, which changes what is asked for."""


def cholesky(matrix: Tensor) -> Tensor:
    """Lower Cholesky factor, (m, m) float64, of a symmetric second moment; the first of JITTERS that succeeds is used.

    Errors as `jittered`, which also says which.
    """
    return jittered(matrix)[0]


def jittered(matrix: Tensor) -> tuple[Tensor, float]:
    """`cholesky`, and the one of JITTERS that it needed.

    Raises InputError when the matrix is not square or not symmetric, NumericsError when it is not finite, is zero, or is not
    positive definite even with the largest jitter.
    """
    matrix = _checked(matrix)
    mean = matrix.diagonal().mean()
    for jitter in JITTERS:
        shifted = (
            matrix
            if jitter == 0
            else matrix
            + jitter * mean * torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
        )
        factor: Tensor
        factor, failed = torch.linalg.cholesky_ex(shifted)
        if not failed:
            return factor, jitter
    raise NumericsError(
        f"the second moment is not positive definite, also with {JITTERS[-1]:g} of its mean diagonal added; compute it from more text"
    )


def spectrum(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (m,), ascending, and eigenvectors (m, m) of a second moment, float64; errors as `cholesky`."""
    matrix = _checked(matrix)
    values, vectors = torch.linalg.eigh(matrix)
    if values[0] < -JITTERS[-1] * matrix.diagonal().mean():
        raise NumericsError(
            f"the second moment has an eigenvalue of {values[0]:.3g}, so it is none; compute it again, from more text"
        )
    return values, vectors


def _checked(matrix: Tensor) -> Tensor:
    """A second moment in float64, square, finite, symmetric and not zero."""
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise InputError(
            f"a second moment is a square matrix (d_ff, d_ff); got shape {tuple(matrix.shape)}"
        )
    matrix = matrix.to(torch.float64)
    if not torch.isfinite(matrix).all():
        raise NumericsError(
            "the second moment holds NaN or infinity; compute it again from a model whose outputs are finite"
        )
    mean = matrix.diagonal().mean()
    if mean <= 0:
        raise NumericsError(
            f"the second moment's mean diagonal is {mean:.3g}; expected a positive number: was it computed from any text?"
        )
    if (matrix - matrix.T).abs().max() > 1e-3 * matrix.abs().max():
        raise InputError(
            "a second moment is symmetric; this matrix is not: give E[m mᵀ] of the down-projection's input"
        )
    return matrix


def solve_moment(factor: Tensor, keys: Tensor) -> Tensor:
    """C⁻¹ kᵢ for every row of keys (n, m), as (n, m) float64; `factor` is `cholesky(C)`."""
    solved: Tensor = torch.cholesky_solve(keys.to(factor).T, factor)  # (m, n)
    return solved.T


def whitened(keys: Tensor, factor: Tensor) -> Tensor:
    """L⁻¹ kᵢ for every row of keys (n, m), as (n, m) float64; `factor` is L = `cholesky(C)`. There C's metric is the ordinary one: a token
    of ordinary text has as much in every direction, 1 on average (squared), d_ff in all."""
    white: Tensor = torch.linalg.solve_triangular(factor, keys.to(factor).T, upper=False)  # (m, n)
    return white.T


def null_space(
    values: Tensor, vectors: Tensor, *, threshold: float | None = None, energy: float | None = None
) -> Tensor:
    """Orthonormal basis (m, q) float64 of the directions that ordinary text hardly uses: eigenvectors of C with small eigenvalues.

    values, vectors  of C, (m,) ascending and (m, m): `torch.linalg.eigh`
    threshold  those with an eigenvalue below it (AlphaEdit's code: 0.02, for C divided by its count)
    energy     as many as can be left out while the others hold this share of C's trace: does not depend on the coefficients' scale

    Raises InputError unless exactly one of them is given, in range, and when all directions are below the threshold.
    """
    if (threshold is None) == (energy is None):
        raise InputError(
            f"null_space takes either a threshold or an energy; got threshold={threshold!r}, energy={energy!r}"
        )
    if threshold is not None:
        if not threshold > 0:
            raise InputError(f"the threshold of a null space is above 0; got {threshold!r}")
        if threshold > values[-1]:
            raise InputError(
                f"all eigenvalues are below the threshold {threshold:g} (the largest is {values[-1]:.3g}), so nothing would be kept as it "
                "is; give an energy instead"
            )
        return vectors[:, values < threshold]
    assert energy is not None
    if not 0 < energy < 1:
        raise InputError(
            f"the energy that stays out of the null space is a share between 0 and 1; got {energy!r}"
        )
    held = values.clamp(min=0).cumsum(0)
    unused: Tensor = vectors[:, held <= (1 - energy) * held[-1]]
    return unused


def positive(matrix: Tensor, name: str) -> Tensor:
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if failed:
        raise NumericsError(
            f"{name} is not positive definite in float64; raise the ridge (moment_weight, l2), or leave out facts that share keys"
        )
    return factor
