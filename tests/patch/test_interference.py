"""Directions and shared directions of keys agree with explicit inverses and least squares."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from factsmith.core.errors import InputError
from factsmith.corpus.moments import SecondMoment
from factsmith.patch.interference import directions, interference
from random_keys import D_FF, a_moment, draw


@pytest.mark.parametrize("n", [1, 5, 30])
@pytest.mark.parametrize("ridge", [0.5, 10.0, 1000.0])
def test_directions_are_the_trace_of_the_hat_matrix(n: int, ridge: float) -> None:
    moment, keys = a_moment(), draw(n, D_FF, seed=7)
    K = keys.numpy().T
    hat = K.T @ np.linalg.inv(K @ K.T + ridge * moment.matrix.numpy()) @ K
    assert directions(keys, moment, ridge) == pytest.approx(np.trace(hat), rel=1e-8)
    unweighted = K.T @ np.linalg.inv(K @ K.T + ridge * np.eye(D_FF)) @ K
    assert directions(keys, moment, ridge) != pytest.approx(np.trace(unweighted), rel=1e-2), (
        "the metric of C matters"
    )


def test_directions_count_keys_that_differ() -> None:
    # The keys are so long that the ridge takes next to nothing.
    moment, keys = a_moment(), 1000 * draw(4, D_FF, seed=7)
    assert directions(keys, moment) == pytest.approx(4, abs=1e-3)
    again = torch.cat([keys, keys + 1e-6 * draw(4, D_FF, seed=8)])
    assert directions(again, moment) == pytest.approx(4, abs=2e-2), "repeated keys take up nothing"
    assert directions(1000 * draw(200, D_FF, seed=9), moment) == pytest.approx(D_FF, abs=1e-3), (
        "at most d_ff"
    )
    assert directions(keys[:0], moment) == 0


def test_directions_do_not_depend_on_the_neurons_basis() -> None:
    moment, keys, mixed = a_moment(), draw(6, D_FF, seed=7), draw(D_FF, D_FF, seed=11)
    other = SecondMoment.from_matrix(mixed @ moment.matrix @ mixed.T, count=400)
    assert directions(keys @ mixed.T, other) == pytest.approx(directions(keys, moment), rel=1e-6)


def test_wrong_keys_and_ridges_are_refused() -> None:
    moment, keys = a_moment(), draw(3, D_FF, seed=1)
    for wrong in (keys[:, :-1], keys[0], torch.full_like(keys, float("nan")), "keys"):
        with pytest.raises(InputError, match=r"expected|finite"):
            directions(wrong, moment)  # type: ignore[arg-type]
    for ridge in (0.0, -1.0, float("nan"), True):
        with pytest.raises(InputError, match="ridge"):
            directions(keys, moment, ridge)


def test_explained_shares_are_those_of_least_squares() -> None:
    moment, mixing = a_moment(), draw(D_FF, D_FF, seed=100)
    # Keys with the correlations of ordinary text. The stored keys explain the first whole.
    new, stored = draw(6, D_FF, seed=3) @ mixing, draw(4, D_FF, seed=4) @ mixing
    new[0] = stored.T @ torch.tensor([1.0, -2.0, 0.5, 0.0], dtype=torch.float64)
    shares = interference(new, stored, moment)
    root = np.linalg.inv(np.linalg.cholesky(moment.matrix.numpy()))
    white_new, white_stored = root @ new.numpy().T, root @ stored.numpy().T
    fit = np.linalg.lstsq(white_stored, white_new, rcond=None)[0]
    left = white_new - white_stored @ fit
    expected = 1 - (left**2).sum(0) / (white_new**2).sum(0)
    np.testing.assert_allclose(shares.explained.numpy(), expected, atol=1e-8)
    assert shares.explained[0] == pytest.approx(1, abs=1e-8) and shares.explained[1:].max() < 0.95
    assert shares.chance == pytest.approx(4 / D_FF)
    bare, others = new.numpy().T, stored.numpy().T
    rest = bare - others @ np.linalg.lstsq(others, bare, rcond=None)[0]
    plain = 1 - np.square(rest).sum(0) / np.square(bare).sum(0)
    assert np.abs(plain[1:] - expected[1:]).max() > 0.05, "another metric gives other numbers"


def test_unrelated_keys_are_explained_by_chance() -> None:
    moment = a_moment()
    root = torch.linalg.cholesky(moment.matrix)
    # The keys are white in the metric.
    new, stored = draw(2000, D_FF, seed=3) @ root.T, draw(3, D_FF, seed=4) @ root.T
    shares = interference(new, stored, moment)
    assert float(shares.explained.mean()) == pytest.approx(shares.chance, abs=0.02)


def test_the_closest_with_another_target() -> None:
    moment = a_moment()
    stored = draw(4, D_FF, seed=4)
    new = torch.stack([2 * stored[1], -stored[2] + 0.1 * stored[0]])
    inverse = np.linalg.inv(moment.matrix.numpy())

    def cosine(a: Tensor, b: Tensor) -> float:
        return float(
            a.numpy()
            @ inverse
            @ b.numpy()
            / np.sqrt(a.numpy() @ inverse @ a.numpy() * (b.numpy() @ inverse @ b.numpy()))
        )

    plain = interference(new, stored, moment)
    best = [max(range(4), key=lambda j: cosine(key, stored[j])) for key in new]
    assert plain.closest.tolist() == best and best[0] == 1
    assert plain.cosine.tolist() == pytest.approx(
        [cosine(key, stored[j]) for key, j in zip(new, best, strict=True)]
    )
    assert plain.cosine[0] == pytest.approx(1)

    apart = interference(
        new, stored, moment, targets=["a", "b"], stored_targets=["x", "a", "y", "z"]
    )
    others = max((0, 2, 3), key=lambda j: cosine(new[0], stored[j]))
    assert (
        apart.closest[0] == others
        and apart.cosine[0] == pytest.approx(cosine(new[0], stored[others]))
        and apart.cosine[0] < 0.99
    )
    alone = interference(new, stored[:1], moment, targets=["a", "b"], stored_targets=["a"])
    assert alone.closest.tolist()[0] == -1 and alone.cosine[0] == -1 and alone.closest[1] == 0


def test_nothing_stored_disturbs_nothing() -> None:
    moment, new = a_moment(), draw(2, D_FF, seed=3)
    shares = interference(new, new[:0], moment)
    assert (
        shares.explained.tolist() == [0, 0]
        and shares.closest.tolist() == [-1, -1]
        and shares.chance == 0
    )
    with pytest.raises(InputError, match="targets"):
        interference(new, new, moment, targets=["a", "b"])
    with pytest.raises(InputError, match="one target a key"):
        interference(new, new, moment, targets=["a", "b"], stored_targets=["a"])
