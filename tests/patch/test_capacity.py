"""How full a layer is, against explicit inverses and least squares; what is predicted, against what was measured."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from factsmith.core.errors import InputError, LayerError
from factsmith.core.fact import Fact
from factsmith.corpus.moments import SecondMoment
from factsmith.edit.delta import Delta
from factsmith.patch import capacity as module
from factsmith.patch.capacity import Capacity, capacity, warning
from factsmith.patch.forecast import FITTED, Forecast
from factsmith.patch.interference import directions, interference

D_MODEL, D_FF = 5, 12
RESULTS = Path(__file__).resolve().parents[2] / "benchmarks/results/capacity.json"


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def a_moment(seed: int = 0, layer: int | None = None) -> SecondMoment:
    """Of coefficients that hang together, so that its metric is not the ordinary one."""
    tokens = draw(400, D_FF, seed=seed) @ draw(D_FF, D_FF, seed=seed + 100)
    return SecondMoment.from_matrix(tokens.T @ tokens / 400, count=400, layer=layer)


def a_delta(n: int, *layers: int, seed: int = 0, size: float = 0.05) -> Delta:
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


# ---- directions -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 5, 30])
@pytest.mark.parametrize("ridge", [0.5, 10.0, 1000.0])
def test_directions_are_the_trace_of_the_hat_matrix(n: int, ridge: float) -> None:
    moment, keys = a_moment(), draw(n, D_FF, seed=7)
    K = keys.numpy().T
    hat = K.T @ np.linalg.inv(K @ K.T + ridge * moment.matrix.numpy()) @ K
    assert directions(keys, moment, ridge) == pytest.approx(np.trace(hat), rel=1e-8)
    unweighted = K.T @ np.linalg.inv(K @ K.T + ridge * np.eye(D_FF)) @ K
    assert directions(keys, moment, ridge) != pytest.approx(np.trace(unweighted), rel=1e-2), (
        "the metric of C matters here"
    )


def test_directions_count_keys_that_differ() -> None:
    moment, keys = (
        a_moment(),
        1000 * draw(4, D_FF, seed=7),
    )  # far from ordinary text: the ridge takes next to nothing
    assert directions(keys, moment) == pytest.approx(4, abs=1e-3)
    again = torch.cat([keys, keys + 1e-6 * draw(4, D_FF, seed=8)])
    assert directions(again, moment) == pytest.approx(4, abs=2e-2), (
        "the same keys once more take up nothing"
    )
    assert directions(1000 * draw(200, D_FF, seed=9), moment) == pytest.approx(D_FF, abs=1e-3), (
        "no more than there are"
    )
    assert directions(keys[:0], moment) == 0


def test_directions_do_not_depend_on_the_neurons_basis() -> None:
    moment, keys, mixed = a_moment(), draw(6, D_FF, seed=7), draw(D_FF, D_FF, seed=11)
    other = SecondMoment.from_matrix(mixed @ moment.matrix @ mixed.T, count=400)
    assert directions(keys @ mixed.T, other) == pytest.approx(directions(keys, moment), rel=1e-6)


def test_what_is_no_set_of_keys_is_refused() -> None:
    moment, keys = a_moment(), draw(3, D_FF, seed=1)
    for wrong in (keys[:, :-1], keys[0], torch.full_like(keys, float("nan")), "keys"):
        with pytest.raises(InputError, match=r"expected|finite"):
            directions(wrong, moment)  # type: ignore[arg-type]
    for ridge in (0.0, -1.0, float("nan"), True):
        with pytest.raises(InputError, match="ridge"):
            directions(keys, moment, ridge)


# ---- interference ---------------------------------------------------------------------------------------------------------------------


def test_explained_shares_are_those_of_least_squares() -> None:
    moment, mixing = a_moment(), draw(D_FF, D_FF, seed=100)
    new, stored = (
        draw(6, D_FF, seed=3) @ mixing,
        draw(4, D_FF, seed=4) @ mixing,
    )  # such as ordinary text has
    new[0] = stored.T @ torch.tensor(
        [1.0, -2.0, 0.5, 0.0], dtype=torch.float64
    )  # nothing of it is its own
    found = interference(new, stored, moment)
    root = np.linalg.inv(np.linalg.cholesky(moment.matrix.numpy()))
    ours, theirs = root @ new.numpy().T, root @ stored.numpy().T
    left = ours - theirs @ np.linalg.lstsq(theirs, ours, rcond=None)[0]
    expected = 1 - (left**2).sum(0) / (ours**2).sum(0)
    np.testing.assert_allclose(found.explained.numpy(), expected, atol=1e-8)
    assert found.explained[0] == pytest.approx(1, abs=1e-8) and found.explained[1:].max() < 0.95
    assert found.chance == pytest.approx(4 / D_FF)
    bare, others = new.numpy().T, stored.numpy().T
    plain = 1 - np.square(bare - others @ np.linalg.lstsq(others, bare, rcond=None)[0]).sum(
        0
    ) / np.square(bare).sum(0)
    assert np.abs(plain[1:] - expected[1:]).max() > 0.05, (
        "without the metric it would be another number"
    )


def test_keys_without_likeness_are_explained_by_chance() -> None:
    moment = a_moment()
    root = torch.linalg.cholesky(moment.matrix)
    new, stored = (
        draw(2000, D_FF, seed=3) @ root.T,
        draw(3, D_FF, seed=4) @ root.T,
    )  # white in the metric
    found = interference(new, stored, moment)
    assert float(found.explained.mean()) == pytest.approx(found.chance, abs=0.02)


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

    found = interference(new, stored, moment)
    best = [max(range(4), key=lambda j: cosine(key, stored[j])) for key in new]
    assert found.closest.tolist() == best and best[0] == 1
    assert found.cosine.tolist() == pytest.approx(
        [cosine(key, stored[j]) for key, j in zip(new, best, strict=True)]
    )
    assert found.cosine[0] == pytest.approx(1)

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
    found = interference(new, new[:0], moment)
    assert (
        found.explained.tolist() == [0, 0]
        and found.closest.tolist() == [-1, -1]
        and found.chance == 0
    )
    with pytest.raises(InputError, match="targets"):
        interference(new, new, moment, targets=["a", "b"])
    with pytest.raises(InputError, match="one target a key"):
        interference(new, new, moment, targets=["a", "b"], stored_targets=["a"])


# ---- capacity -------------------------------------------------------------------------------------------------------------------------


def a_workspace(*deltas: Delta) -> tuple[list[Delta], dict[int, Tensor], dict[int, SecondMoment]]:
    return (
        list(deltas),
        {x: draw(D_MODEL, D_FF, seed=20 + x).float() for x in (0, 1)},
        {x: a_moment(x, x) for x in (0, 1)},
    )


def test_layers_hold_what_all_deltas_do_together() -> None:
    deltas, weights, moments = a_workspace(a_delta(2, 0, 1, seed=1), a_delta(3, 0, seed=2))
    found = capacity(deltas, weights, moments)
    assert [(use.layer, use.facts, use.d_ff) for use in found.layers] == [
        (0, 5, D_FF),
        (1, 2, D_FF),
    ] and found.facts == 5
    rows = np.random.default_rng(0).multivariate_normal(
        np.zeros(D_FF), moments[0].matrix.double().numpy(), size=200_000
    )
    update = (
        sum(left @ right for left, right in (delta.layers[0] for delta in deltas)).double().numpy()
    )  # type: ignore[union-attr]
    weight = weights[0].double().numpy()
    assert found.layers[0].norm == pytest.approx(
        np.linalg.norm(update) / np.linalg.norm(weight), rel=1e-5
    )
    output = np.sqrt(
        np.square(rows @ update.T).sum() / np.square(rows @ weight.T).sum()
    )  # on drawn text, not by the formula
    assert found.layers[0].disturbance == pytest.approx(output, rel=0.02)
    apart = [capacity([delta], weights, moments).layers[0].disturbance for delta in deltas]
    assert abs(found.layers[0].disturbance - sum(apart)) > 0.02, "they do not just add up"
    assert found.disturbance == pytest.approx(sum(use.disturbance for use in found.layers) / 2)
    assert found.load == pytest.approx(5 / (2 * D_FF))
    assert found.full == pytest.approx(
        (found.layers[0].directions + found.layers[1].directions) / (2 * D_FF)
    )
    assert 0 < found.full < 5 / D_FF


def wide(facts: int, disturbance: float, neurons: int = 3072) -> Forecast:
    return Forecast(neurons, facts, disturbance)


def test_the_loss_follows_the_stated_formula() -> None:
    forecast = wide(100, 0.2)
    load = 100 / 3072
    expected = 100 * (1 - np.exp(-((0.2 / FITTED.scale) ** FITTED.power) * load**FITTED.crowding))
    assert forecast.loss(100) == pytest.approx(expected)
    later = 0.2 * 2**FITTED.growth
    expected = 100 * (
        1 - np.exp(-((later / FITTED.scale) ** FITTED.power) * (2 * load) ** FITTED.crowding)
    )
    assert forecast.loss(200) == pytest.approx(expected)
    assert forecast.loss(0) == 0
    losses = [forecast.loss(n) or 0.0 for n in range(0, 400, 20)]
    assert losses == sorted(losses) and len(set(losses)) == len(losses)


@pytest.mark.parametrize(("facts", "disturbance"), [(0, 0.0), (3, 0.1), (60, 0.2), (200, 0.4)])
def test_the_breaking_point_is_where_the_limit_is_reached(facts: int, disturbance: float) -> None:
    forecast = wide(facts, disturbance)
    for limit in (2.0, 10.0):
        at = forecast.breaking(limit)
        assert at is not None
        before, there = forecast.loss(at - 1), forecast.loss(at)
        assert before is not None and there is not None and before <= limit < there


def test_beyond_what_was_measured_nothing_is_said() -> None:
    most = int(FITTED.load * 3072)
    assert wide(0, 0.0).loss(most) is not None and wide(0, 0.0).loss(most + 1) is None
    assert wide(10, FITTED.disturbance * 1.01).loss(10) is None
    assert wide(100, 0.01).breaking(50.0) is None, (
        "so small a change would take more facts than were ever measured"
    )

    deltas, weights, moments = a_workspace(a_delta(5, 0, seed=1, size=3.0))
    found = capacity(deltas, weights, moments, next_facts=1)
    assert found.loss is None and found.loss_next is None
    assert (
        "outside of what was measured" in repr(found)
        and found.warning is not None
        and "ever measured" in found.warning
    )
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["loss"] is None


def test_few_facts_say_little_about_the_next() -> None:
    usual = wide(0, 0.0).disturbance_of(400)
    wild = (
        5 * FITTED.usual * (1 / 3072) ** FITTED.growth
    )  # one fact five times as loud as facts are
    assert wide(1, wild).disturbance_of(400) < 1.5 * usual
    assert wide(40, 5 * FITTED.usual * (40 / 3072) ** FITTED.growth).disturbance_of(
        400
    ) == pytest.approx(5 * usual)
    assert wide(1, wild).disturbance_of(1) == wild, "what is there is what is there"


def test_an_unpatched_model_is_empty() -> None:
    found = capacity([], {}, {}, layers={0: 1024, 1: 1024, 2: 1024}, next_facts=100)
    assert (found.full, found.facts, found.loss, found.retention) == (0, 0, 0.0, None)
    assert (
        found.loss_next is not None
        and 0 < found.loss_next < 10
        and found.breaking is not None
        and found.breaking > 100
    )
    assert found.warning is None and "0 facts stored" in repr(found)
    more = capacity([], {}, {}, layers={0: 1024, 1: 1024, 2: 1024}, next_facts=200)
    assert more.warning is not None and "200 facts: about 9 %" in more.warning, (
        "from half the limit on"
    )
    with pytest.raises(InputError, match="no layers"):
        capacity([], {}, {})


def test_a_warning_comes_from_half_the_limit_on() -> None:
    deltas, weights, moments = a_workspace(a_delta(1, 0, seed=1, size=0.02))
    found = capacity(deltas, weights, moments)
    assert found.loss is not None and 0 < found.loss < 5
    assert warning(deltas, weights, moments) is None and found.warning is None
    for limit in (2.1 * found.loss, 1.9 * found.loss):
        one, other = (
            warning(deltas, weights, moments, limit=limit),
            capacity(deltas, weights, moments, limit=limit).warning,
        )
        assert one == other and (one is not None) == (limit < 2 * found.loss)
    said = warning(deltas, weights, moments, next_facts=50)
    assert said is not None and said.startswith("50 more facts, 51 in all")
    assert warning([], weights, moments, next_facts=50) is None, "nothing was solved for"


def test_what_does_not_fit_is_refused() -> None:
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


def test_it_shows_itself() -> None:
    deltas, weights, moments = a_workspace(a_delta(2, 0, 1, seed=1, size=0.01))
    found = capacity(deltas, weights, moments, next_facts=1, asked=2, kept=1)
    assert found.retention == 0.5
    text = repr(found)
    assert (
        "1 of 2 stored facts are still said" in text
        and "with 1 more" in text
        and "breaking point" in text
        and "2 layers" in text
    )
    record = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert record["layers"][1]["full"] == pytest.approx(found.layers[1].full) and record[
        "load"
    ] == pytest.approx(found.load)
    assert isinstance(found, Capacity)
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.facts = 3  # type: ignore[misc]


# ---- what was measured ------------------------------------------------------------------------------------------------------------------


def test_the_constants_are_those_that_were_fitted() -> None:
    assert vars(FITTED) == json.loads(RESULTS.read_text())["fit"]


def test_what_was_measured_is_predicted() -> None:
    """The library's own prediction of every point, against what the model answered; a constant guess is the control."""
    points = [p for p in json.loads(RESULTS.read_text())["points"].values() if p["efficacy"] >= 70]
    measured = np.array([p["loss"] for p in points])
    predicted = np.array([FITTED.loss(p["disturbance"], p["load"]) for p in points])
    spread = np.square(measured - measured.mean()).sum()
    assert len(points) > 60 and 1 - np.square(measured - predicted).sum() / spread > 0.9
    shuffled = np.random.default_rng(0).permutation(predicted)
    assert 1 - np.square(measured - shuffled).sum() / spread < 0
    assert all(FITTED.covers(p["disturbance"], p["load"]) for p in points)
    assert {p["model"] for p in points} == {"atlas", "atlas-llama"} and min(
        p["others"] for p in points
    ) >= 500


def test_every_warning_came_before_the_limit() -> None:
    """Round after round, or batch by batch: at the point before the limit was reached, the loss was warned of."""
    points = json.loads(RESULTS.read_text())["points"].values()
    series: dict[tuple[str, str], list[dict[str, float]]] = {}
    for point in sorted((p for p in points if p["efficacy"] >= 70), key=lambda p: p["facts"]):
        series.setdefault((point["model"], point["job"]), []).append(point)
    reached = 0
    for own in series.values():
        over = next((i for i, p in enumerate(own) if p["loss"] > module.LIMIT), None)
        if over is None:
            continue
        reached += 1
        before, there = own[over - 1], own[over]
        neurons = before["facts"] / before["load"]
        forecast = Forecast(round(neurons), int(before["facts"]), before["disturbance"])
        said = module._warning(
            0, int(there["facts"]), forecast.loss(int(there["facts"])), module.LIMIT, None
        )
        assert said is not None, (before, there)
    assert reached == 7
