"""Settings of the methods: what is refused, what is recommended, and the formulas they name."""

from __future__ import annotations

import dataclasses
import statistics

import numpy as np
import pytest
import torch

from conftest import GPT2, TEXTS, VOCAB, byte_tokenizer, shared_dir, tiny_model
from editing import CONTEXTS, FACTS, full_rank_moments, new_model
from factsmith.core.errors import InputError, LayerError, NumericsError
from factsmith.corpus.moments import SecondMoment, second_moments
from factsmith.corpus.moments_store import find_moments
from factsmith.edit.configs import AlphaEditConfig, EmmetConfig, MemitConfig, RomeConfig, by_depth
from factsmith.edit.delta import Delta, applied
from factsmith.edit.methods import METHODS, edit, rome
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import load, wrap
from factsmith.patch.trial_facts import trial_facts


@pytest.mark.parametrize(
    "changes",
    [
        {"layers": ()},
        {"layers": (1, 1)},
        {"layers": (-1,)},
        {"layers": ("1",)},
        {"spread": "all"},
        {"keys": "some"},
        {"norm_anchor": -1.0},
        {"repair": 1.5},
        {"subject_share": 1.0, "keys": "each"},
        {"subject_share": 0.3, "keys": "mean"},
        {"moment_weight": 0.0},
        {"moment_weight": "much"},
    ],
)
def test_settings_are_checked(changes: dict[str, object]) -> None:
    with pytest.raises((InputError, LayerError)):
        MemitConfig(**{"layers": (0, 1), **changes})  # type: ignore[arg-type]
    assert MemitConfig((1, 0)).layers == (0, 1)
    assert MemitConfig(2).layers == (2,)  # type: ignore[arg-type]


def test_the_null_space_is_set_by_a_threshold_or_an_energy() -> None:
    configs = (
        AlphaEditConfig((0,)),
        AlphaEditConfig((0,), threshold=0.1),
        AlphaEditConfig((0,), energy=0.5),
    )
    pairs = [(config.threshold, config.energy) for config in configs]
    assert pairs == [(0.02, None), (0.1, None), (None, 0.5)]
    with pytest.raises(InputError, match="threshold or an energy"):
        AlphaEditConfig((0,), threshold=0.02, energy=0.5)
    with pytest.raises(InputError, match="l2 or a moment_weight"):
        AlphaEditConfig((0,), l2=10.0, moment_weight=10.0)


def test_layers_by_depth_are_around_romes_in_the_first_third() -> None:
    assert by_depth(28) == (3, 4, 5, 6, 7) and by_depth(32) == (4, 5, 6, 7, 8)
    assert by_depth(1) == (0,) and by_depth(6) == (0, 1, 2)
    for n_layers in range(1, 100):
        layers = by_depth(n_layers)
        assert layers == by_depth(n_layers, n_layers // 6)
        assert n_layers // 6 in layers and max(layers) <= max(n_layers // 6, n_layers // 3)
    assert by_depth(12, 0) == (0, 1, 2, 3) and by_depth(12, 9) == (8, 9)


def test_one_layer_is_all_that_rome_takes() -> None:
    assert RomeConfig().at([3]).edited == (3,)
    with pytest.raises(LayerError, match="ROME edits one layer") as refused:
        RomeConfig().at([3, 4])
    assert refused.value.argument == "layer"
    for layer in (-1, 1.0, "1", True):
        with pytest.raises(LayerError, match="a whole number of at least 0"):
            RomeConfig(layer=layer)  # type: ignore[arg-type]


def test_numbers_of_numpy_become_plain_ones() -> None:
    config = AlphaEditConfig((np.int64(0),), lr=np.float32(0.5), steps=np.int64(3))
    assert (config.layers, config.lr, config.steps) == ((0,), 0.5, 3)
    assert type(config.lr) is float and type(config.steps) is int
    for odd in (
        {"lr": True},
        {"clamp": True},
        {"threshold": "abc"},
        {"threshold": None, "energy": "abc"},
        {"norm_anchor": True},
    ):
        with pytest.raises(InputError):
            AlphaEditConfig((0,), **odd)  # type: ignore[arg-type]


def test_settings_shipped_with_a_model(tiny_gpt2: LanguageModel) -> None:
    lm = wrap(tiny_model("gpt2", **GPT2), byte_tokenizer())
    assert RomeConfig.recommended(lm) == RomeConfig(layer=0, scale="auto", steps=80, lr=0.1)
    lm.config.factsmith = {"rome": {"layer": 2, "steps": 2, "clamp": 3}}
    assert RomeConfig.recommended(lm) == RomeConfig(layer=2, steps=2, clamp=3)
    delta = rome(lm, FACTS[0], moments=second_moments(lm, TEXTS, [2]), contexts=CONTEXTS)
    assert delta.config["layer"] == 2 and delta.convergence[0]["steps"] <= 2
    lm.config.factsmith = {"rome": {"steps": 3}}
    assert RomeConfig.recommended(lm) == RomeConfig(layer=0, steps=3), (
        "the layer has its own default"
    )
    for odd in ({"rome": {"momentum": 1}}, {"rome": 3}, "rome"):
        lm.config.factsmith = odd
        with pytest.raises(InputError, match="expected some of"):
            RomeConfig.recommended(lm)


@pytest.mark.parametrize("method", list(METHODS))
def test_recommended_settings_fit_any_model(method: str) -> None:
    lm = new_model("llama")
    config = METHODS[method].config.recommended(lm)
    assert config.edited and max(config.edited) < lm.n_layers and config.scale == "auto"
    assert config.at([1]).edited == (1,)
    config = dataclasses.replace(config, steps=3).at([1])
    moments = full_rank_moments(lm, site=config.draws_on)
    delta = edit(lm, FACTS[0], method, config, moments=moments)
    assert delta.touched == (1,)
    assert len(lm.tokenizer) == VOCAB


@pytest.mark.parametrize(
    ("name", "method", "least"),
    [
        ("atlas", "memit", (1.0, 0.75, 0.85)),
        ("atlas", "emmet", (1.0, 0.75, 0.85)),
        ("atlas", "alphaedit", (1.0, 0.75, 0.85)),
        ("atlas-llama", "memit", (1.0, 0.75, 0.85)),
        # It knows a tenth of the facts, and not all targets as objects, and is easily disturbed.
        ("golden", "memit", (0.85, 0.7, 0.5)),
    ],
)
def test_recommended_settings_hold_without_tuning(
    name: str, method: str, least: tuple[float, float, float]
) -> None:
    """Real facts on models that know them take, also in other words, and near facts stay.

    A random change of the same size does not do that.
    """
    lm = load(str(shared_dir() / "golden" / "facts-gpt2") if name == "golden" else name)
    facts = trial_facts(lm, 8, seed=11, paraphrases=3, neighbours=6, others=1)
    assert len(facts) == 8
    config = METHODS[method].config.recommended(lm)
    assert config.edited is not None
    moments = find_moments(lm, config.edited)
    delta = edit(lm, facts, method, config, moments=moments)

    def shares(*changes: Delta) -> tuple[float, float, float]:
        near = [(probe.prompt, probe.expected or "") for fact in facts for probe in fact.neighbours]
        other = [(text, fact.target or "") for fact in facts for text in fact.paraphrase_texts]
        asked = [[(fact.text, fact.target or "") for fact in facts], other, near]
        with applied(lm, changes):
            efficacy, generalization, specificity = (
                statistics.fmean(lm.says(*map(list, zip(*pairs, strict=True)))) for pairs in asked
            )
        return efficacy, generalization, specificity

    assert shares()[:2] == (0.0, 0.0) and shares()[2] == 1.0
    reached = shares(delta)
    assert all(share >= bound for share, bound in zip(reached, least, strict=True)), reached
    noise = {
        layer: torch.randn(left.shape, generator=torch.Generator().manual_seed(0))
        for layer, (left, _) in delta.layers.items()
    }
    random = {
        layer: (noise[layer] * left.norm() / noise[layer].norm(), right)
        for layer, (left, right) in delta.layers.items()
    }
    assert max(shares(dataclasses.replace(delta, layers=random))[:2]) < 0.2


@pytest.mark.parametrize("ridge", [0.1, 2.0])
def test_emmet_with_a_ridge_keeps_stored_keys_as_memit_does(ridge: float) -> None:
    draw = torch.Generator().manual_seed(0)
    samples, keys, before, residuals = (
        torch.randn(*size, generator=draw).double()
        for size in ((400, 12), (3, 12), (4, 12), (3, 5))
    )
    moment, stored = (
        SecondMoment.from_matrix(samples.T @ samples / 400, count=400),
        before.T @ before,
    )
    config = EmmetConfig((0,), moment_weight=50.0, ridge=ridge)
    left, right = config.update(keys, residuals, moment, stored)
    system = 50 * ridge * moment.matrix + stored + keys.T @ keys
    expected = torch.linalg.solve(system, keys.T @ residuals).T
    torch.testing.assert_close(left @ right, expected, rtol=1e-8, atol=1e-10)
    lighter = 50 * ridge * moment.matrix + ridge * stored + keys.T @ keys
    other = torch.linalg.solve(lighter, keys.T @ residuals).T
    assert not torch.allclose(left @ right, other, rtol=1e-2), "the control"


def test_no_l2_comes_from_a_null_space_without_any_text() -> None:
    settings = {**AlphaEditConfig.scale_free(), "layers": (0,), "moment_weight": 10.0}
    config, keys, residuals = AlphaEditConfig(**settings), torch.ones(2, 12), torch.ones(2, 5)
    one = torch.zeros(12, 12)
    one[0, 0] = 1.0
    with pytest.raises(NumericsError, match="too little text"):
        config.update(keys, residuals, SecondMoment.from_matrix(one, count=1), None)
    full = SecondMoment.from_matrix(torch.diag(torch.arange(1.0, 13.0)), count=100)
    assert config.update(keys, residuals, full, None)[0].shape == (5, 2)
