"""The closed forms against general solvers, and against the theorems that they are known for."""

from __future__ import annotations

import pytest
import torch

from factsmith.core.errors import InputError, NumericsError
from factsmith.corpus import factors
from factsmith.edit import solve


def moment(size: int = 12, tokens: int = 400, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    samples = torch.randn(tokens, size, generator=draw, dtype=torch.float64) @ torch.randn(
        size, size, generator=draw, dtype=torch.float64
    )
    return samples.T @ samples / tokens


def vectors(*sizes: int, seed: int = 1) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=draw, dtype=torch.float64) for size in sizes]


def test_rome_maps_the_prompts_key_to_v_star() -> None:
    k_star, k_prompt, v_star = vectors(12, 12, 5)
    weight = torch.stack(vectors(*[12] * 5, seed=2))
    left, right = solve.rome(
        k_star, k_prompt, v_star - weight @ k_prompt, factors.cholesky(moment())
    )
    assert left.shape == (5, 1) and right.shape == (1, 12)
    torch.testing.assert_close((weight + left @ right) @ k_prompt, v_star)
    assert not torch.allclose((weight + left @ right) @ k_star, v_star), (
        "only one key is written, and the mean key is another"
    )


def test_rome_with_one_key_is_the_least_change_under_the_moment() -> None:
    """ROME's theorem: of all updates with Δk = r, it has the smallest E‖Δm‖² = tr(Δ C Δᵀ).

    It is compared with the solution of the KKT system, row by row.
    """
    matrix = moment()
    (key, residual) = vectors(12, 5)
    left, right = solve.rome(key, key, residual, factors.cholesky(matrix))
    kkt = torch.zeros(13, 13, dtype=torch.float64)
    kkt[:12, :12], kkt[:12, 12], kkt[12, :12] = 2 * matrix, key, key
    wanted = torch.zeros(13, 5, dtype=torch.float64)
    wanted[12] = residual
    expected = torch.linalg.lstsq(kkt, wanted).solution[:12].T
    torch.testing.assert_close(left @ right, expected, rtol=1e-7, atol=1e-9)
    # The control: it also maps the key to the residual, but ignores the second moment.
    other = residual[:, None] @ key[None] / (key @ key)
    least = torch.trace(expected @ matrix @ expected.T)
    assert torch.trace(other @ matrix @ other.T) > 1.01 * least


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("tokens", [1, 5])
def test_singular_moment_is_solved_with_the_stated_jitter(tokens: int, dtype: torch.dtype) -> None:
    matrix = moment(tokens=tokens).to(dtype)  # of rank 1 or 5, not 12
    factor = factors.cholesky(matrix)
    error = (factor @ factor.T - matrix).abs().max()
    assert 0 < error <= factors.JITTERS[-1] * matrix.diagonal().mean() * 1.01
    (key, residual) = vectors(12, 5)
    left, right = solve.rome(key, key, residual, factor)
    torch.testing.assert_close(left @ right @ key, residual, rtol=1e-5, atol=1e-5)


def test_keys_that_do_not_overlap_are_refused() -> None:
    factor = factors.cholesky(torch.eye(4, dtype=torch.float64))
    unit = torch.eye(4, dtype=torch.float64)
    with pytest.raises(NumericsError, match="hardly overlap"):
        solve.rome(unit[0], unit[1], torch.ones(3), factor)
    with pytest.raises(NumericsError, match="hardly overlap"):
        solve.rome(torch.zeros(4), unit[1], torch.ones(3), factor)
    with pytest.raises(NumericsError, match="residual holds NaN"):
        solve.rome(unit[0], unit[0], torch.full((3,), float("inf")), factor)


# ── many facts at once ────────────────────────────────────────────────────────────────────────────


def batch(n: int, size: int = 12, d: int = 5, seed: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(n, size, generator=draw, dtype=torch.float64), torch.randn(
        n, d, generator=draw, dtype=torch.float64
    )


def stacked_least_squares(
    keys: torch.Tensor, residuals: torch.Tensor, matrix: torch.Tensor, ridge: float
) -> torch.Tensor:
    """min Σ‖Δk − r‖² + ridge · tr(Δ A Δᵀ) as one ordinary least-squares problem.

    The rows of √ridge · A½ are further keys, whose wanted output is 0.
    """
    values, vectors = torch.linalg.eigh(matrix)
    root = vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T
    rows = torch.cat([keys, ridge**0.5 * root])
    wanted = torch.cat(
        [residuals, torch.zeros(len(root), residuals.shape[1], dtype=residuals.dtype)]
    )
    return torch.linalg.lstsq(rows, wanted).solution.T


@pytest.mark.parametrize("n", [1, 4, 12, 30])
def test_memit_equals_least_squares_on_the_stacked_system(n: int) -> None:
    """In both spaces in which it is solved: fewer facts than neurons, and more."""
    keys, residuals = batch(n)
    left, right = solve.memit(keys, residuals, factors.cholesky(moment()), 0.7)
    assert left.shape == (5, n) and right.shape == (n, 12)
    expected = stacked_least_squares(keys, residuals, moment(), 0.7)
    torch.testing.assert_close(left @ right, expected, rtol=1e-7, atol=1e-9)
    assert not torch.allclose(
        left @ right, stacked_least_squares(keys, residuals, moment(), 0.9), rtol=1e-3
    )


def test_memit_with_stored_keys_counts_them_as_observations() -> None:
    keys, residuals = batch(4)
    old, _ = batch(3, seed=8)
    factor = factors.cholesky(solve.with_stored(moment(), old.T @ old, 0.7))
    left, right = solve.memit(keys, residuals, factor, 0.7)
    expected = stacked_least_squares(
        torch.cat([keys, old]), torch.cat([residuals, torch.zeros(3, 5).double()]), moment(), 0.7
    )
    torch.testing.assert_close(left @ right, expected, rtol=1e-7, atol=1e-9)
    without = solve.memit(keys, residuals, factors.cholesky(moment()), 0.7)
    assert ((without[0] @ without[1]) @ old.T).norm() > 1.2 * ((left @ right) @ old.T).norm(), (
        "the stored keys are kept"
    )


def test_emmet_without_a_ridge_gives_every_key_its_output() -> None:
    keys, residuals = batch(7)
    left, right = solve.emmet(keys, residuals, factors.cholesky(moment()))
    torch.testing.assert_close((left @ right) @ keys.T, residuals.T)
    softened = solve.emmet(keys, residuals, factors.cholesky(moment()), weight=1, ridge=0.1)
    assert not torch.allclose((softened[0] @ softened[1]) @ keys.T, residuals.T, rtol=1e-3)
    torch.testing.assert_close(
        softened, solve.memit(keys, residuals, factors.cholesky(moment()), 0.1)
    )


def test_emmet_is_the_least_change_among_those_that_fit() -> None:
    """It equals the solution of the KKT system of min tr(Δ C Δᵀ) with Δ K = R, by lstsq."""
    matrix = moment()
    keys, residuals = batch(3)
    kkt = torch.zeros(15, 15, dtype=torch.float64)
    kkt[:12, :12], kkt[:12, 12:], kkt[12:, :12] = 2 * matrix, keys.T, keys
    wanted = torch.zeros(15, 5, dtype=torch.float64)
    wanted[12:] = residuals
    left, right = solve.emmet(keys, residuals, factors.cholesky(matrix))
    torch.testing.assert_close(
        left @ right, torch.linalg.lstsq(kkt, wanted).solution[:12].T, rtol=1e-7, atol=1e-9
    )


def test_emmet_with_one_fact_is_rome() -> None:
    keys, residuals = batch(1)
    factor = factors.cholesky(moment())
    left, right = solve.emmet(keys, residuals, factor)
    u, v = solve.rome(keys[0], keys[0], residuals[0], factor)
    torch.testing.assert_close(left @ right, u @ v)


@pytest.mark.parametrize("with_stored", [False, True])
def test_alphaedit_is_the_authors_system_and_leaves_ordinary_text_alone(with_stored: bool) -> None:
    """P (KᵀK + Σ k kᵀ) + l2 · I is not symmetric. A general solver takes it as the paper has it."""
    matrix = moment(tokens=6)  # of rank 6: text uses half of the space
    basis = factors.null_space(*torch.linalg.eigh(matrix), threshold=1e-9)
    assert basis.shape == (12, 6)
    keys, residuals = batch(4)
    old, _ = batch(3, seed=8)
    stored = old.T @ old if with_stored else torch.zeros(12, 12).double()
    projector = basis @ basis.T
    system = projector @ (keys.T @ keys + stored) + 2.0 * torch.eye(12).double()
    expected = torch.linalg.lstsq(system, projector @ keys.T @ residuals).solution.T
    left, right = solve.alphaedit(keys, residuals, basis, 2.0, stored if with_stored else None)
    torch.testing.assert_close(left @ right, expected, rtol=1e-7, atol=1e-9)
    texts = torch.linalg.eigh(matrix).eigenvectors[:, 6:]
    assert (left @ right @ texts).norm() < 1e-9 * (left @ right).norm()
    memit = solve.memit(
        keys, residuals, factors.cholesky(matrix + 0.1 * torch.eye(12).double()), 1.0
    )
    assert (memit[0] @ memit[1] @ texts).norm() > 1e-3, "the control writes there"


@pytest.mark.parametrize("method", ["memit", "emmet", "alphaedit"])
def test_the_order_of_facts_does_not_matter(method: str) -> None:
    keys, residuals = batch(6)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    factor = factors.cholesky(moment())
    basis = factors.null_space(*torch.linalg.eigh(moment()), energy=0.5)
    formula = {
        "memit": lambda k, r: solve.memit(k, r, factor, 2.0),
        "emmet": lambda k, r: solve.emmet(k, r, factor),
        "alphaedit": lambda k, r: solve.alphaedit(k, r, basis, 1.0),
    }[method]
    straight, mixed = formula(keys, residuals), formula(keys[order], residuals[order])
    torch.testing.assert_close(straight[0] @ straight[1], mixed[0] @ mixed[1], rtol=1e-7, atol=1e-9)
    other = formula(keys, residuals[order])
    assert not torch.allclose(straight[0] @ straight[1], other[0] @ other[1], rtol=1e-3)


@pytest.mark.parametrize("n", [2, 13])
def test_keys_that_are_not_independent_have_no_exact_solution(n: int) -> None:
    keys, residuals = batch(n)
    if n == 2:
        keys[1] = 3 * keys[0]
    with pytest.raises(NumericsError, match=r"independent|not positive"):
        solve.emmet(keys, residuals, factors.cholesky(moment()))
    _, right = solve.memit(keys, residuals, factors.cholesky(moment()), 1e-3)
    assert torch.isfinite(right).all(), "a ridge averages them"


def test_a_fact_given_twice_is_averaged_by_a_ridge() -> None:
    keys, residuals = batch(2)
    keys[1] = keys[0]
    left, right = solve.memit(keys, residuals, factors.cholesky(moment()), 1e-9)
    torch.testing.assert_close((left @ right) @ keys[0], residuals.mean(0), rtol=1e-5, atol=1e-6)


def test_bad_input_is_refused() -> None:
    keys, residuals = batch(3)
    factor = factors.cholesky(moment())
    for wrong in (
        lambda: solve.memit(keys, residuals[:2], factor, 1.0),
        lambda: solve.memit(keys, residuals, factor, 0.0),
    ):
        with pytest.raises(InputError):
            wrong()
    with pytest.raises(InputError, match="null space"):
        solve.alphaedit(keys, residuals, torch.empty(12, 0), 1.0)
    keys[1, 4] = torch.nan
    with pytest.raises(NumericsError, match="key of fact 1"):
        solve.memit(keys, residuals, factor, 1.0)


def test_the_closest_key_of_another_group() -> None:
    """It equals cosines with an explicit inverse, for more keys than are compared at a time."""
    draw = torch.Generator().manual_seed(5)
    keys, groups = (
        torch.randn(1100, 12, generator=draw),
        torch.randint(0, 3, (1100,), generator=draw),
    )
    keys[1050] = 2 * keys[7]
    groups[7], groups[1050] = 0, 1
    index, cosine = solve.closest(keys, factors.cholesky(moment()), groups)
    gram = keys.double() @ torch.linalg.inv(moment()) @ keys.double().T
    scale = gram.diagonal().sqrt()
    expected = (gram / (scale[:, None] * scale)).masked_fill(groups[:, None] == groups, -1)
    torch.testing.assert_close(cosine, expected.max(1).values, rtol=1e-8, atol=1e-8)
    assert torch.equal(index, expected.argmax(1)) and (index[7], index[1050]) == (1050, 7)
    plain = torch.nn.functional.cosine_similarity(keys[:, None], keys[None], dim=-1).masked_fill(
        groups[:, None] == groups, -1
    )
    assert not torch.equal(index, plain.argmax(1)), "the second moment counts"
    alone = solve.closest(keys[:4], factors.cholesky(moment()), torch.zeros(4, dtype=torch.long))
    assert (alone[1] == -1).all()


def test_the_disturbance_is_that_of_samples_with_this_moment() -> None:
    samples = torch.randn(400, 12, generator=torch.Generator().manual_seed(3)).double()
    left, right, weight = (
        torch.randn(5, 2).double(),
        torch.randn(2, 12).double(),
        torch.randn(5, 12).double(),
    )
    expected = (samples @ (left @ right).T).norm() / (samples @ weight.T).norm()
    share = solve.disturbance(left, right, weight, samples.T @ samples / 400)
    assert share == pytest.approx(float(expected), rel=1e-4)
    assert solve.disturbance(left, right, weight, torch.eye(12)) != pytest.approx(share, rel=1e-3)


def test_compact_keeps_the_update() -> None:
    left, right = torch.randn(5, 30).double(), torch.randn(30, 12).double()
    small = solve.compact(left, right)
    assert small[0].shape == (5, 5) and small[1].shape == (5, 12)
    torch.testing.assert_close(small[0] @ small[1], left @ right)
    assert solve.compact(left[:, :5], right[:5])[0] is not small[0]


def test_shares_and_anchors() -> None:
    missing = torch.ones(2, 3)
    assert [float(solve.share(missing, n, "even")[0, 0]) for n in (1, 2, 4)] == [1, 0.5, 0.25]
    assert [float(solve.share(missing, n, "sqrt")[0, 0]) for n in (1, 4)] == [1, 0.5]
    rescaled = solve.anchored(torch.tensor([[3.0, 4.0], [0.3, 0.4]]), 10.0)
    torch.testing.assert_close(rescaled, torch.tensor([[6.0, 8.0], [6.0, 8.0]]))
