"""False firing of appended neurons agrees with a loop over tokens and facts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from conftest import TEXTS
from factsmith.core.fact import Fact
from factsmith.corpus.moments import SecondMoment, second_moments
from factsmith.edit.delta import Delta
from factsmith.keep.workbench import Workbench
from factsmith.model.appended import AppendedRows
from factsmith.model.language_model import LanguageModel
from factsmith.patch.capacity import Capacity, firing_warning
from factsmith.patch.firing import BUDGET, AppendedUse, firing, firing_of

D, N, M = 12, 5, 400
FACTS = (0, 3, 1, 2, 0, 4, 3)
"""The fact of each row: some have two."""


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def some(gated: bool) -> AppendedRows:
    n = len(FACTS)
    keys = draw(n, D, seed=3)
    homes = keys[[FACTS.index(fact) for fact in range(N)]]  # so each fact fires at home
    shared = {"values": draw(n, D, seed=1), "facts": FACTS, "inputs": homes}
    if gated:
        gates, ups = keys, draw(n, D, seed=4)
        biases = draw(n, seed=5) - 2
        return AppendedRows(gate_keys=gates, up_keys=ups, gate_biases=biases, **shared)
    return AppendedRows(keys=keys, biases=draw(n, seed=5) - 3, **shared)


def written(rows: AppendedRows, act: Callable[[Tensor], Tensor], x: Tensor, fact: int) -> float:
    """How much a fact's neurons write at an input: the norm of a plain sum."""
    total = torch.zeros(D)
    for row, of in enumerate(rows.facts):
        if of != fact:
            continue
        if rows.keys is not None and rows.biases is not None:
            m = act(rows.keys[row] @ x + rows.biases[row])
        else:
            assert rows.gate_keys is not None and rows.up_keys is not None
            assert rows.gate_biases is not None
            m = act(rows.gate_keys[row] @ x + rows.gate_biases[row]) * (rows.up_keys[row] @ x)
        total += m * rows.values[row]
    return float(total.norm())


@pytest.mark.parametrize("gated", [False, True])
def test_firing_is_that_of_a_loop(gated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("factsmith.patch.firing._BLOCK", 7 * 60)  # in several blocks
    rows, sample = some(gated), draw(M, D, seed=7)
    act = F.silu if gated else F.gelu
    assert rows.inputs is not None
    least = [0.1 * written(rows, act, rows.inputs[fact], fact) for fact in range(N)]
    known = {(3, 0), (5, 2), (17, 4), (399, 1)}
    fires = torch.tensor(
        [
            [
                written(rows, act, x, fact) > least[fact] and (token, fact) not in known
                for fact in range(N)
            ]
            for token, x in enumerate(sample)
        ]
    )
    pairs = torch.tensor(sorted(known))
    subjects = ["a", "b", "a", "c", "d"]
    fired = firing(rows, act, sample, known=pairs, patches=[2, 3], subjects=subjects)
    assert fired.shares.tolist() == fires.double().mean(0).tolist()
    assert fired.share == pytest.approx(float(fires.any(1).double().mean()))
    parts = [float(part.any(1).double().mean()) for part in (fires[:, :2], fires[:, 2:])]
    assert fired.patches == pytest.approx(parts) and max(parts) <= fired.share <= sum(parts)
    crossed = {
        (fact, at)
        for fact in range(N)
        for at in range(N)
        if subjects[fact] != subjects[at]
        and written(rows, act, rows.inputs[at], fact) > least[fact]
    }
    assert {(fact, at) for fact, at in fired.crossed.tolist()} == crossed and crossed
    without = firing(rows, act, sample)
    assert without.share >= fired.share and len(without.crossed) >= len(fired.crossed)
    mixed = dataclasses.replace(rows, facts=(0, 3, 1, 2, 4, 0, 3))
    other = firing(mixed, act, sample, known=pairs)
    assert other.shares.tolist() != fired.shares.tolist(), "the control"


def test_neurons_that_cancel_each_other_do_not_fire() -> None:
    """Both of a saturating pair grow without end; what they write together does not."""
    key, value = draw(1, D, seed=1), draw(1, D, seed=2)
    x = key / key.norm() ** 2  # reads 1
    pair = AppendedRows(
        keys=torch.cat([50 * key, 50 * key]),
        biases=torch.tensor([-30.0, -40.0]),
        values=torch.cat([value, -value]),
        facts=(0, 0),
        inputs=x,
    )
    sample = torch.linspace(-1, 3, 81)[:, None] * x
    fired = firing(pair, F.gelu, sample)
    reads = (sample @ key.T)[:, 0]
    assert fired.share == pytest.approx(float((reads > 0.62).double().mean()), abs=2 / 81)
    opposed = dataclasses.replace(pair, biases=torch.tensor([-30.0, -30.0]))
    assert firing(opposed, F.gelu, sample).share == 0


def appended(lm: LanguageModel, moments: dict[int, SecondMoment], n: int) -> Delta:
    """Neurons whose keys are tokens of the sample, so that they fire there."""
    sample = moments[1].sample
    assert sample is not None
    x = sample[:n].float()
    keys = 10 * x / x.square().sum(1, keepdim=True)
    return Delta(
        layers={},
        k_star={},
        v_star=torch.zeros(n, lm.d_model),
        facts=tuple(Fact(f"nobody {i}", "{} is", "x") for i in range(n)),
        method="append",
        config={"contexts": ["{}"]},
        fingerprint=lm.fingerprint,
        appended={
            1: AppendedRows(
                keys=keys,
                biases=torch.full((n,), -5.0),
                values=draw(n, lm.d_model, seed=3),
                facts=tuple(range(n)),
                inputs=x,
            )
        },
    )


def test_a_workspace_says_how_often_its_neurons_fire(
    tiny_gpt2: LanguageModel, tmp_path: Path
) -> None:
    """By the sample of the statistics, in a capacity of its own."""
    lm = tiny_gpt2
    moments = second_moments(lm, TEXTS, [1], site="inputs")
    one = appended(lm, moments, 3)
    (use,) = firing_of(lm, [one], moments)
    sample = moments[1].sample
    assert sample is not None and use.tokens == len(sample)
    assert (use.layer, use.neurons, use.facts) == (1, 3, 3) and use.share
    rows = one.appended[1]
    assert rows.keys is not None and rows.biases is not None
    reads = F.gelu(sample.float() @ rows.keys.T - 5.0, approximate="tanh")
    at_home = F.gelu(rows.inputs @ rows.keys.T - 5.0, approximate="tanh").diagonal()  # type: ignore
    expected = (reads > 0.1 * at_home).any(1).double().mean()
    assert use.share == pytest.approx(float(expected), abs=2 / len(sample))
    with Workbench(lm, tmp_path) as bench:
        bench.commit(one)
        bench.commit(dataclasses.replace(one, fingerprint=lm.fingerprint))
        full = bench.capacity(3, texts=TEXTS, ask=False)
        assert isinstance(full, Capacity) and full.facts == 0 and full.loss == 0
        (both,) = full.appended
        assert (both.neurons, both.facts) == (6, 6) and len(both.patches) == 2
        assert both.patches[0] == both.patches[1] == full.firing == both.share
        assert full.firing_next is not None and full.firing is not None
        assert full.firing_next == pytest.approx(1 - (1 - full.firing) ** 1.5)
        text = str(full)
        assert "appended neurons" in text and "fire on" in text and "load" not in text
        assert full.warning is not None and full.warning == firing_warning(full.appended, 3)
        record = full.to_dict()
        assert record["firing"] == full.firing and record["appended"][0]["neurons"] == 6
        bench.revert("latest")
        (rest,) = bench.capacity(texts=TEXTS, ask=False).appended
        assert (rest.neurons, rest.facts) == (3, 3)


def test_there_is_no_figure_without_a_sample_or_inputs(tiny_gpt2: LanguageModel) -> None:
    lm = tiny_gpt2
    moments = second_moments(lm, TEXTS, [1], site="inputs")
    delta = appended(lm, moments, 2)
    rows = dataclasses.replace(delta.appended[1], inputs=None)
    unknown = dataclasses.replace(delta, appended={1: rows})
    bare = {1: dataclasses.replace(moments[1], sample=None)}
    for deltas, held in (([unknown], moments), ([delta], bare), ([delta], {})):
        (use,) = firing_of(lm, deltas, held)
        assert (use.share, use.tokens, use.neurons) == (None, 0, 2)
        assert use.share_with(5) is None and firing_warning([use]) is None
    assert firing_of(lm, [], moments) == ()


def test_the_budget() -> None:
    use = AppendedUse(
        layer=1, neurons=4, facts=2, tokens=1000, share=BUDGET / 2, most=(("A is → b", 0.004),)
    )
    assert firing_warning([use]) is None and firing_warning([use], 1) is None
    text = firing_warning([use], 20)
    assert text is not None and "22 facts" in text and "'A is → b' fires most" in text
    assert firing_warning([use, dataclasses.replace(use, layer=2), use]) is not None
