"""Factors of a second moment, in float64: Cholesky, spectrum, null space, and solving with them.

    factor = cholesky(matrix)              # lower, (m, m)
    solve_moment(factor, keys)             # C⁻¹ kᵢ for every row of keys (n, m)
    values, vectors = spectrum(matrix)
    null_space(values, vectors, energy=0.98)

A matrix that was estimated from fewer tokens than it has rows is singular, and one that was rounded
to float32 is slightly indefinite. So the factorizations try a few small additions to the diagonal.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.errors import InputError, NumericsError

JITTERS = (0.0, 1e-12, 1e-10, 1e-8, 1e-6, 1e-4)
"""Additions to the diagonal, in units of its mean. The first that works is used.

A larger one would be a ridge, which changes the problem."""


def cholesky(matrix: Tensor) -> Tensor:
    """Return the lower Cholesky factor, (m, m) float64, of a second moment.

    Raises:
        InputError, NumericsError: As `jittered`.
    """
    return jittered(matrix)[0]


def jittered(matrix: Tensor) -> tuple[Tensor, float]:
    """Return the lower Cholesky factor, (m, m) float64, and which of JITTERS it needed.

    Raises:
        InputError: The matrix is not square, or not symmetric.
        NumericsError: The matrix is not finite, is zero, or is not positive definite even with the
            largest jitter.
    """
    matrix = _checked(matrix)
    mean = matrix.diagonal().mean()
    for jitter in JITTERS:
        shifted = matrix
        if jitter:
            identity = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
            shifted = matrix + jitter * mean * identity
        factor: Tensor
        factor, failed = torch.linalg.cholesky_ex(shifted)
        if not failed:
            return factor, jitter
    raise NumericsError(
        f"the second moment is not positive definite, even with {JITTERS[-1]:g} of its mean "
        "diagonal added; compute it from more text"
    )


def spectrum(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues (m,), ascending, and eigenvectors (m, m) of a second moment, float64.

    Raises:
        InputError: The matrix is not square, or not symmetric.
        NumericsError: The matrix is not finite, is zero, or has a negative eigenvalue.
    """
    matrix = _checked(matrix)
    values, vectors = torch.linalg.eigh(matrix)
    if values[0] < -JITTERS[-1] * matrix.diagonal().mean():
        raise NumericsError(
            f"the matrix is not a second moment: it has an eigenvalue of {values[0]:.3g}. Compute "
            "it from more text, or give one that is symmetric and positive"
        )
    return values, vectors


def _checked(matrix: Tensor) -> Tensor:
    """Return a second moment in float64, if it is square, finite, symmetric and not zero."""
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise InputError(f"the matrix is {tuple(matrix.shape)}; give a square one, (d_ff, d_ff)")
    matrix = matrix.to(torch.float64)
    if not torch.isfinite(matrix).all():
        raise NumericsError(
            "the second moment holds NaN or infinity; compute it from a model whose outputs are "
            "finite"
        )
    mean = matrix.diagonal().mean()
    if mean <= 0:
        raise NumericsError(
            f"the second moment has a mean diagonal of {mean:.3g}, which must be above 0; compute "
            "it from some text"
        )
    if (matrix - matrix.T).abs().max() > 1e-3 * matrix.abs().max():
        raise InputError("the matrix is not symmetric; give E[m mᵀ] of the down-projection's input")
    return matrix


def solve_moment(factor: Tensor, keys: Tensor) -> Tensor:
    """Return C⁻¹ kᵢ for every row of keys (n, m), as (n, m) float64; `factor` is `cholesky(C)`."""
    solved: Tensor = torch.cholesky_solve(keys.to(factor).T, factor)  # (m, n)
    return solved.T


def whitened(keys: Tensor, factor: Tensor) -> Tensor:
    """Return L⁻¹ kᵢ for every row of keys (n, m), as (n, m) float64; `factor` is L = `cholesky(C)`.

    In this space the metric of C is the ordinary one. A token of ordinary text has a mean square
    of 1 in every direction, and of d_ff in all.
    """
    white: Tensor = torch.linalg.solve_triangular(factor, keys.to(factor).T, upper=False)  # (m, n)
    return white.T


def null_space(
    values: Tensor, vectors: Tensor, *, threshold: float | None = None, energy: float | None = None
) -> Tensor:
    """Return an orthonormal basis of the directions that ordinary text hardly uses.

    These are the eigenvectors of C with small eigenvalues.

    Args:
        values: The eigenvalues of C, (m,), ascending.
        vectors: Its eigenvectors, (m, m).
        threshold: Take those with an eigenvalue below it (AlphaEdit's code: 0.02, for C divided by
            its count).
        energy: Take as many as possible while the others hold this share of C's trace. Unlike a
            threshold it does not depend on the scale of the coefficients.

    Returns:
        (m, q) float64.

    Raises:
        InputError: Not exactly one of threshold and energy is given, it is out of range, or all
            eigenvalues are below the threshold.
    """
    if (threshold is None) == (energy is None):
        raise InputError(
            f"threshold is {threshold!r} and energy is {energy!r}; a null space takes either a "
            "threshold or an energy"
        )
    if threshold is not None:
        if not threshold > 0:
            raise InputError(f"threshold is {threshold!r}; give a number above 0")
        if threshold > values[-1]:
            raise InputError(
                f"threshold is {threshold:g} and the largest eigenvalue {values[-1]:.3g}, so no "
                "direction would be protected; give a smaller threshold, or an energy"
            )
        return vectors[:, values < threshold]
    assert energy is not None
    if not 0 < energy < 1:
        raise InputError(f"energy is {energy!r}; give a share between 0 and 1")
    held = values.clamp(min=0).cumsum(0)
    unused: Tensor = vectors[:, held <= (1 - energy) * held[-1]]
    return unused


def positive(matrix: Tensor, name: str) -> Tensor:
    """Return the lower Cholesky factor of a matrix that is called `name` in the error.

    Raises:
        NumericsError: The matrix is not positive definite.
    """
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if failed:
        raise NumericsError(
            f"{name} is not positive definite in float64; raise the ridge (moment_weight, l2), or "
            "leave out facts that share keys"
        )
    return factor
