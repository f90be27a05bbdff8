"""The largest and smallest products, compared with an exact product."""

from __future__ import annotations

import pytest
import torch

from factsmith.read import extremes
from factsmith.read.extremes import extreme_tokens


def same_as_exact(vectors: torch.Tensor, weight: torch.Tensor, k: int) -> float:
    """Return the share of vectors whose k largest and smallest products are those of float64.

    The scores must agree everywhere.
    """
    scores = vectors.double() @ weight.double().T
    top, top_scores, bottom, bottom_scores = extreme_tokens(vectors, weight, k)
    same = []
    for ids, screened, sign in ((top, top_scores, 1), (bottom, bottom_scores, -1)):
        assert torch.allclose(
            screened.double(),
            scores.gather(1, ids),
            rtol=1e-4,
            atol=1e-4 * float(scores.abs().max()),
        )
        same.append((ids == (sign * scores).topk(k).indices).all(1))
    return float(torch.stack(same).double().mean())


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("k", [1, 10])
def test_screening_finds_what_an_exact_product_finds(
    k: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extremes, "_fastest", lambda device: dtype)
    generator = torch.Generator().manual_seed(1)
    weight, vectors = (
        torch.randn(5003, 64, generator=generator),
        torch.randn(600, 64, generator=generator),
    )
    vectors[3] = 0
    assert same_as_exact(vectors[4:], weight, k) >= 0.999
    assert extreme_tokens(vectors, weight, k)[1][3].tolist() == [0.0] * k
    assert same_as_exact(vectors[4:].bfloat16(), weight.bfloat16(), k) >= 0.99, (
        "a model in bfloat16"
    )


def test_what_screening_cannot_separate_is_multiplied_exactly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A column a thousand times the others leaves them few steps of int8.

    The control trusts the rough order.
    """
    monkeypatch.setattr(extremes, "_fastest", lambda device: torch.int8)
    generator = torch.Generator().manual_seed(1)
    weight, vectors = (
        torch.randn(5003, 64, generator=generator),
        torch.randn(600, 64, generator=generator),
    )
    weight[:, 5] = 1000 + 0.01 * weight[:, 5]
    assert same_as_exact(vectors, weight, 10) >= 0.99  # float32 itself cannot tell all apart
    monkeypatch.setattr(extremes, "_ERRORS", -torch.inf)
    assert same_as_exact(vectors, weight, 10) < 0.5


def test_a_vocabulary_smaller_than_k() -> None:
    weight = -torch.rand(5, 3) - 0.1
    top, scores, *_ = extreme_tokens(torch.ones(2, 3), weight, 10)
    assert top.shape == (2, 5) and (scores < 0).all() and sorted(top[0].tolist()) == [0, 1, 2, 3, 4]
