"""Sums of low-rank updates have the rank, the norm and the best truncation of the dense sum."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from factsmith.keep.export.lowrank import compress, product_norm

Factors = list[tuple[torch.Tensor, torch.Tensor]]


def factors(*ranks: int, d: int = 12, d_ff: int = 20) -> Factors:
    """Return random updates of the given ranks."""
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(d, r, generator=generator), torch.randn(r, d_ff, generator=generator))
        for r in ranks
    ]


def dense(updates: Factors) -> np.ndarray:
    """Return the sum of some updates in float64."""
    return np.sum([a.double().numpy() @ b.double().numpy() for a, b in updates], axis=0)


@pytest.mark.parametrize("ranks", [(1,), (2, 3), (4, 1, 2), (9, 9)])
def test_the_product_is_the_sum_at_its_exact_rank(ranks: tuple[int, ...]) -> None:
    updates = factors(*ranks)
    product = compress(updates, None, torch.float32)
    assert product.rank == product.kept == min(sum(ranks), 12)
    written = product.left.double().numpy() @ product.right.double().numpy()
    assert np.linalg.norm(written - dense(updates)) < 1e-6 * np.linalg.norm(dense(updates))
    assert not product.is_rough


def test_updates_that_cancel_leave_nothing() -> None:
    (left, right) = factors(3)[0]
    product = compress([(left, right), (-left, right)], None, torch.float32)
    assert product.rank == 1 and not (product.left @ product.right).any()


def test_a_truncation_is_the_best_one_and_its_error_is_known() -> None:
    updates = factors(4, 2)
    singular = np.linalg.svd(dense(updates), compute_uv=False)
    product = compress(updates, 4, torch.float32)
    best = np.sqrt((singular[4:] ** 2).sum() / (singular**2).sum())  # Eckart and Young
    assert (product.rank, product.kept) == (6, 4) and product.is_rough
    assert product.error == pytest.approx(best, rel=1e-4)


def test_a_norm_comes_from_the_factors() -> None:
    (left, right) = factors(3)[0]
    assert product_norm(left, right) == pytest.approx(float((left @ right).norm()), rel=1e-5)
