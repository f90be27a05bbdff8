"""A choice of layers: the published one, the one by depth, its scores and its record."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any, cast

import pytest

from factsmith.core.errors import InputError, LayerError, UnsupportedModelError
from factsmith.core.fact import Fact, Probe
from factsmith.edit.published import PublishedLayers
from factsmith.model.language_model import LanguageModel
from factsmith.patch.layer_choice import (
    LayerChoice,
    LayerScore,
    depth_choice,
    first_choice,
    published,
)


def test_the_models_settings_precede_its_preset(
    tiny_gpt2: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert published(tiny_gpt2) is None
    layers = PublishedLayers(8, (), "GPT-2 medium", "a file")
    monkeypatch.setattr("factsmith.patch.layer_choice.published_layers", lambda lm: layers)
    preset, shipped = published(tiny_gpt2), published(tiny_gpt2, 2)
    assert (
        preset is not None
        and (preset.source, preset.rome, preset.memit) == ("preset", 8, ())
        and "GPT-2 medium" in preset.reason
    )
    assert shipped is not None and (shipped.source, shipped.rome, shipped.fingerprint) == (
        "model",
        2,
        tiny_gpt2.fingerprint,
    )
    with pytest.raises(LayerError, match="layer 3"):
        published(tiny_gpt2, 3)


def test_scores_are_harmonic_means_of_the_measured_rates() -> None:
    score = LayerScore.of(3, [(1.0, 0.5, None), (0.0, 1.0, 0.8)])
    assert (score.layer, score.trials, score.efficacy, score.generalization, score.specificity) == (
        3,
        2,
        0.5,
        0.75,
        0.8,
    )
    assert score.score == pytest.approx(3 / (1 / 0.5 + 1 / 0.75 + 1 / 0.8))
    alone = LayerScore.of(0, [(1.0, None, None)])
    assert (alone.generalization, alone.specificity, alone.score) == (None, None, 1.0)
    assert LayerScore.of(0, [(1.0, 0.0, 1.0)]).score == 0.0


@pytest.mark.parametrize("n_layers", [1, 2, 3, 6, 12, 28, 32, 48])
def test_without_knowledge_the_depth_decides(n_layers: int) -> None:
    class Model:
        fingerprint = "00"

    Model.n_layers = n_layers  # type: ignore[attr-defined]
    choice = depth_choice(Model(), n_layers // 6, "it knows nothing")  # type: ignore[arg-type]
    assert choice.source == "depth" and "it knows nothing" in choice.reason
    assert choice.rome in choice.memit and max(choice.memit) < n_layers and len(choice.memit) <= 5
    if n_layers == 32:
        assert choice.memit == (4, 5, 6, 7, 8)


def test_a_first_choice_passes_over_layers_of_experts() -> None:
    class Layer:
        def __init__(self, n_experts: int) -> None:
            self.n_experts = n_experts

    def model(*experts: int) -> LanguageModel:
        ffn = [Layer(n) for n in experts]
        lm = SimpleNamespace(fingerprint="00", n_layers=len(ffn), ffn=ffn)
        return cast(LanguageModel, lm)

    dense, first_dense = first_choice(model(*[0] * 30)), first_choice(model(0, 0, *[8] * 28))
    assert (dense.source, dense.rome, dense.memit) == ("depth", 5, (4, 5, 6, 7, 8))
    assert (first_dense.rome, first_dense.memit) == (1, (0, 1))
    every_other = first_choice(model(*[0, 8] * 15))
    assert every_other.rome in (4, 6) and every_other.memit == (every_other.rome,)
    assert "`factsmith layers` measures" in dense.reason
    with pytest.raises(UnsupportedModelError):
        first_choice(model(8, 8))


FACT = Fact(
    "Edwin", "{} is a", "king", paraphrases=("{} was a",), neighbours=(Probe("Paris is", "x"),)
)

CHOICE = LayerChoice(
    rome=1,
    memit=(0, 1),
    source="trials",
    reason="because",
    fingerprint="ab",
    effects=(0.5, 0.25),
    window=1,
    facts=(FACT,),
    seed=3,
    scores=(LayerScore(layer=1, trials=4, efficacy=1.0, generalization=None, specificity=0.5),),
)


def test_a_choice_survives_json() -> None:
    written = json.loads(json.dumps(CHOICE.to_dict()))
    assert LayerChoice.from_dict(written) == CHOICE and CHOICE.trials == 4
    assert written["scores"][0]["score"] == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    "change",
    [
        {"rome": -1},
        {"rome": True},
        {"memit": [0, 2]},
        {"memit": [1, 0]},
        {"memit": "01"},
        {"source": "a dream"},
        {"scores": [{"layer": 1}]},
        {"scores": [{**CHOICE.scores[0].to_dict(), "efficacy": "all"}]},
        {"scores": None},
        {"effects": ["x"]},
        {"facts": [{"subject": "x"}]},
        {"more": 1},
    ],
)
def test_wrong_fields_of_a_choice_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        LayerChoice.from_dict({**CHOICE.to_dict(), **change})
    fields = CHOICE.to_dict()
    del fields["reason"]
    with pytest.raises(InputError):
        LayerChoice.from_dict(fields)
