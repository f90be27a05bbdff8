"""The use of a layer agrees with explicit sums, and a warning comes before the limit."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from torch import Tensor

from factsmith.core.errors import InputError, LayerError
from factsmith.core.fact import Fact
from factsmith.corpus.moments import SecondMoment
from factsmith.edit.delta import Delta
from factsmith.patch.capacity import Capacity, capacity, warning
from random_keys import D_FF, D_MODEL, a_moment, draw


def a_delta(n: int, *layers: int, seed: int = 0, size: float = 0.05) -> Delta:
    """Return a random delta of these layers with `n` facts."""
    return Delta(
        layers={
            x: (
                size * draw(D_MODEL, n, seed=seed + x).float(),
                draw(n, D_FF, seed=seed + x + 50).float(),
            )
            for x in layers
        },
        k_star={x: draw(n, D_FF, seed=seed + x + 70).float() for x in layers},
        v_star=draw(n, D_MODEL, seed=seed).float(),
        facts=tuple(Fact(f"Subject {seed} {i}", "{} is", f"target {i}") for i in range(n)),
        method="memit",
        config={},
        fingerprint="00",
    )


def a_workspace(*deltas: Delta) -> tuple[list[Delta], dict[int, Tensor], dict[int, SecondMoment]]:
    """Return the deltas, and random weights and second moments of layers 0 and 1."""
    return (
        list(deltas),
        {x: draw(D_MODEL, D_FF, seed=20 + x).float() for x in (0, 1)},
        {x: a_moment(x, x) for x in (0, 1)},
    )


def test_use_of_a_layer_is_that_of_all_deltas_together() -> None:
    deltas, weights, moments = a_workspace(a_delta(2, 0, 1, seed=1), a_delta(3, 0, seed=2))
    full = capacity(deltas, weights, moments)
    assert [(x.layer, x.facts, x.d_ff) for x in full.layers] == [
        (0, 5, D_FF),
        (1, 2, D_FF),
    ] and full.facts == 5
    rows = np.random.default_rng(0).multivariate_normal(
        np.zeros(D_FF), moments[0].matrix.double().numpy(), size=200_000
    )
    update = torch.stack([torch.matmul(*delta.layers[0]) for delta in deltas]).sum(0)
    update = update.double().numpy()
    weight = weights[0].double().numpy()
    assert full.layers[0].norm == pytest.approx(
        np.linalg.norm(update) / np.linalg.norm(weight), rel=1e-5
    )
    # Measured on random coefficients, without the formula.
    output = np.sqrt(np.square(rows @ update.T).sum() / np.square(rows @ weight.T).sum())
    assert full.layers[0].disturbance == pytest.approx(output, rel=0.02)
    apart = [capacity([delta], weights, moments).layers[0].disturbance for delta in deltas]
    assert abs(full.layers[0].disturbance - sum(apart)) > 0.02, "the disturbances do not add up"
    assert full.disturbance == pytest.approx(sum(x.disturbance for x in full.layers) / 2)
    assert full.load == pytest.approx(5 / (2 * D_FF))
    assert full.full == pytest.approx(
        (full.layers[0].directions + full.layers[1].directions) / (2 * D_FF)
    )
    assert 0 < full.full < 5 / D_FF


def test_no_loss_is_reported_beyond_the_measurements() -> None:
    deltas, weights, moments = a_workspace(a_delta(5, 0, seed=1, size=3.0))
    full = capacity(deltas, weights, moments, next_facts=1)
    assert full.loss is None and full.loss_next is None
    assert (
        "outside of what was measured" in repr(full)
        and full.warning is not None
        and "ever measured" in full.warning
    )
    assert json.loads(json.dumps(full.to_dict(), allow_nan=False))["loss"] is None


def test_an_unpatched_model_is_empty() -> None:
    empty = capacity([], {}, {}, layers={0: 1024, 1: 1024, 2: 1024}, next_facts=100)
    assert (empty.full, empty.facts, empty.loss, empty.retention) == (0, 0, 0.0, None)
    assert empty.loss_next is not None and 0 < empty.loss_next < 10
    assert empty.breaking is not None and empty.breaking > 100
    assert empty.warning is None and "0 facts stored" in repr(empty)
    more = capacity([], {}, {}, layers={0: 1024, 1: 1024, 2: 1024}, next_facts=200)
    assert more.warning is not None and "200 facts: about 9 %" in more.warning, (
        "it comes from half the limit on"
    )
    with pytest.raises(InputError, match="no layers"):
        capacity([], {}, {})


def test_a_warning_comes_from_half_the_limit_on() -> None:
    deltas, weights, moments = a_workspace(a_delta(1, 0, seed=1, size=0.02))
    full = capacity(deltas, weights, moments)
    assert full.loss is not None and 0 < full.loss < 5
    assert warning(deltas, weights, moments) is None and full.warning is None
    for limit in (2.1 * full.loss, 1.9 * full.loss):
        one = warning(deltas, weights, moments, limit=limit)
        other = capacity(deltas, weights, moments, limit=limit).warning
        assert one == other and (one is not None) == (limit < 2 * full.loss)
    text = warning(deltas, weights, moments, next_facts=50)
    assert text is not None and text.startswith("50 more facts, 51 in all")
    assert warning([], weights, moments, next_facts=50) is None, "no facts are stored"


def test_wrong_arguments_are_refused() -> None:
    deltas, weights, moments = a_workspace(a_delta(1, 0, 1, seed=1))
    with pytest.raises(LayerError, match="no second moment of layer 1"):
        capacity(deltas, weights, {0: moments[0]})
    with pytest.raises(LayerError, match="no weights of layer 0"):
        warning(deltas, {}, moments)
    for limit in (0, 100, -1.0, float("nan"), True, "10"):
        with pytest.raises(InputError, match="limit"):
            capacity(deltas, weights, moments, limit=limit)  # type: ignore[arg-type]
    for wrong in (-1, 1.5, None):
        with pytest.raises(InputError, match="next_facts"):
            warning(deltas, weights, moments, next_facts=wrong)  # type: ignore[arg-type]


def test_a_capacity_prints_and_serializes() -> None:
    deltas, weights, moments = a_workspace(a_delta(2, 0, 1, seed=1, size=0.01))
    full = capacity(deltas, weights, moments, next_facts=1, asked=2, kept=1)
    assert full.retention == 0.5
    text = repr(full)
    assert (
        "1 of 2 stored facts are still said" in text
        and "with 1 more" in text
        and "breaking point" in text
        and "2 layers" in text
    )
    record = json.loads(json.dumps(full.to_dict(), allow_nan=False))
    assert record["layers"][1]["full"] == pytest.approx(full.layers[1].full)
    assert record["load"] == pytest.approx(full.load)
    assert isinstance(full, Capacity)
    with pytest.raises(dataclasses.FrozenInstanceError):
        full.facts = 3  # type: ignore[misc]
