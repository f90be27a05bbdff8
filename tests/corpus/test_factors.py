"""Factors of second moments, compared with general solvers."""

from __future__ import annotations

import pytest
import torch

from factsmith.core.errors import InputError, NumericsError
from factsmith.corpus import factors


def moment(size: int = 12, tokens: int = 400, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    samples = torch.randn(tokens, size, generator=draw, dtype=torch.float64) @ torch.randn(
        size, size, generator=draw, dtype=torch.float64
    )
    return samples.T @ samples / tokens


def test_solve_moment_equals_a_general_solver() -> None:
    matrix, keys = (
        moment(),
        torch.randn(3, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64),
    )
    expected = torch.linalg.lstsq(matrix, keys.T).solution.T
    torch.testing.assert_close(
        factors.solve_moment(factors.cholesky(matrix), keys), expected, rtol=1e-8, atol=1e-10
    )


@pytest.mark.parametrize(
    ("matrix", "error", "words"),
    [
        (torch.ones(3, 4), InputError, "square"),
        (torch.eye(3) + torch.triu(torch.ones(3, 3), 1), InputError, "symmetric"),
        (torch.zeros(3, 3), NumericsError, "mean diagonal"),
        (torch.diag(torch.tensor([1.0, 1.0, -0.5])), NumericsError, "positive definite"),
        (torch.full((3, 3), float("nan")), NumericsError, "NaN"),
    ],
)
def test_what_is_no_second_moment_is_refused(
    matrix: torch.Tensor, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        factors.cholesky(matrix)


def test_the_null_space_by_energy_does_not_depend_on_the_scale() -> None:
    values, vectors = torch.linalg.eigh(moment())
    basis = factors.null_space(values, vectors, energy=0.9)
    assert torch.equal(factors.null_space(1e4 * values, vectors, energy=0.9), basis)
    left_out = torch.trace(basis.T @ moment() @ basis) / torch.trace(moment())
    assert left_out <= 0.1
    wider = vectors[:, : basis.shape[1] + 1]
    assert torch.trace(wider.T @ moment() @ wider) / torch.trace(moment()) > 0.1, (
        "one more direction would be too much"
    )
    assert factors.null_space(values, vectors, threshold=float(values[4])).shape[1] == 4


def test_the_spectrum_of_what_is_no_second_moment_is_refused() -> None:
    values, vectors = factors.spectrum(moment())
    torch.testing.assert_close(vectors @ torch.diag(values) @ vectors.T, moment())
    for matrix, error, words in (
        (torch.zeros(3, 3), NumericsError, "mean diagonal"),
        (torch.diag(torch.tensor([1.0, 1.0, -0.5])), NumericsError, "eigenvalue of -0.5"),
        (torch.eye(3) + torch.triu(torch.ones(3, 3), 1), InputError, "symmetric"),
        (torch.full((3, 3), float("inf")), NumericsError, "infinity"),
    ):
        with pytest.raises(error, match=words):
            factors.spectrum(matrix)
    with pytest.raises(InputError, match="no direction would be protected"):
        factors.null_space(values, vectors, threshold=2 * float(values[-1]))


def test_a_null_space_takes_a_threshold_or_an_energy() -> None:
    for energy in (0.0, 1.0, float("nan")):
        with pytest.raises(InputError, match="energy"):
            factors.null_space(*torch.linalg.eigh(moment()), energy=energy)
    with pytest.raises(InputError, match="either"):
        factors.null_space(*torch.linalg.eigh(moment()))


def test_whitened_keys_have_the_moments_metric() -> None:
    keys = torch.randn(5, 12, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    white = factors.whitened(keys, factors.cholesky(moment()))
    expected = keys @ torch.linalg.inv(moment()) @ keys.T
    torch.testing.assert_close(white @ white.T, expected, rtol=1e-8, atol=1e-8)


def test_a_matrix_that_is_not_positive_is_named() -> None:
    with pytest.raises(NumericsError, match="the test matrix is not positive definite"):
        factors.positive(torch.diag(torch.tensor([1.0, -1.0])), "the test matrix")
    kept = factors.positive(moment(), "the test matrix")
    torch.testing.assert_close(kept @ kept.T, moment())
