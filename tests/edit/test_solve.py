from __future__ import annotations

import pytest
import torch

from factsmith.edit import solve
from factsmith.errors import InputError, NumericsError


def moment(size: int = 12, tokens: int = 400, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    samples = torch.randn(tokens, size, generator=draw, dtype=torch.float64) @ torch.randn(size, size, generator=draw, dtype=torch.float64)
    return samples.T @ samples / tokens


def vectors(*sizes: int, seed: int = 1) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=draw, dtype=torch.float64) for size in sizes]


def test_solve_moment_equals_a_general_solver() -> None:
    matrix, keys = moment(), torch.stack(vectors(12, 12, 12))
    expected = torch.linalg.lstsq(matrix, keys.T).solution.T
    torch.testing.assert_close(solve.solve_moment(solve.cholesky(matrix), keys), expected, rtol=1e-8, atol=1e-10)


def test_rome_maps_the_prompts_key_to_v_star() -> None:
    k_star, k_prompt, v_star = vectors(12, 12, 5)
    weight = torch.stack(vectors(*[12] * 5, seed=2))
    left, right = solve.rome(k_star, k_prompt, v_star - weight @ k_prompt, solve.cholesky(moment()))
    assert left.shape == (5, 1) and right.shape == (1, 12)
    torch.testing.assert_close((weight + left @ right) @ k_prompt, v_star)
    assert not torch.allclose((weight + left @ right) @ k_star, v_star), "only one key is written; the mean key differs from it here"


def test_rome_with_one_key_is_the_least_change_under_the_moment() -> None:
    """ROME's theorem: of all updates with Δk = r, it has the smallest E‖Δm‖² = tr(Δ C Δᵀ). Checked against the KKT system, row by row."""
    matrix = moment()
    (key, residual) = vectors(12, 5)
    left, right = solve.rome(key, key, residual, solve.cholesky(matrix))
    kkt = torch.zeros(13, 13, dtype=torch.float64)
    kkt[:12, :12], kkt[:12, 12], kkt[12, :12] = 2 * matrix, key, key
    wanted = torch.zeros(13, 5, dtype=torch.float64)
    wanted[12] = residual
    expected = torch.linalg.lstsq(kkt, wanted).solution[:12].T
    torch.testing.assert_close(left @ right, expected, rtol=1e-7, atol=1e-9)
    other = residual[:, None] @ key[None] / (key @ key)  # also maps key to residual, but ignores the moment
    assert torch.trace(other @ matrix @ other.T) > 1.01 * torch.trace(expected @ matrix @ expected.T)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("tokens", [1, 5])
def test_singular_moment_is_solved_with_the_stated_jitter(tokens: int, dtype: torch.dtype) -> None:
    matrix = moment(tokens=tokens).to(dtype)  # of rank 1 or 5, not 12
    factor = solve.cholesky(matrix)
    error = (factor @ factor.T - matrix).abs().max()
    assert 0 < error <= solve.JITTERS[-1] * matrix.diagonal().mean() * 1.01
    (key, residual) = vectors(12, 5)
    left, right = solve.rome(key, key, residual, factor)
    torch.testing.assert_close(left @ right @ key, residual, rtol=1e-5, atol=1e-5)


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
def test_what_is_no_second_moment_is_refused(matrix: torch.Tensor, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        solve.cholesky(matrix)


def test_keys_that_do_not_overlap_are_refused() -> None:
    factor = solve.cholesky(torch.eye(4, dtype=torch.float64))
    unit = torch.eye(4, dtype=torch.float64)
    with pytest.raises(NumericsError, match="hardly overlap"):
        solve.rome(unit[0], unit[1], torch.ones(3), factor)
    with pytest.raises(NumericsError, match="hardly overlap"):
        solve.rome(torch.zeros(4), unit[1], torch.ones(3), factor)
    with pytest.raises(NumericsError, match="residual holds NaN"):
        solve.rome(unit[0], unit[0], torch.full((3,), float("inf")), factor)
