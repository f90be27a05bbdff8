"""Fine-tuning learns, stays within its bounds, and leaves the model as it was."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch

from editing import new_model
from factsmith.core.errors import InputError, LayerError
from factsmith.core.fact import Fact
from factsmith.edit.delta import read_weights, written
from factsmith.edit.finetune import FineTuneConfig, LoraConfig, fine_tune, lora
from factsmith.model.language_model import LanguageModel

FACTS = [
    Fact("Danielle Darrieux", "The mother tongue of {} is", "English"),
    Fact("Edwin", "The official religion of {} is", "Islam"),
]


@pytest.fixture(params=["gpt2", "llama"])
def lm(request: pytest.FixtureRequest) -> LanguageModel:
    """Each of two families in turn."""
    return new_model(request.param)


def state(lm: LanguageModel) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in lm.module.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_ft_l_learns_within_its_bound(
    lm: LanguageModel, no_hooks_left: Callable[[LanguageModel], None]
) -> None:
    before, asked = state(lm), ([f.text for f in FACTS], [f.target or "" for f in FACTS])
    assert not any(lm.says(*asked, by_tokens=True)), "they are new"
    tuned = fine_tune(lm, FACTS, FineTuneConfig(layers=(1,), lr=0.02, clamp=0.3, steps=80))
    assert same(state(lm), before) and not any(p.requires_grad for p in lm.module.parameters())
    assert set(tuned) == {1} and tuned[1].shape == lm.ffn[1].weight().shape
    change = (tuned[1] - lm.ffn[1].weight()).abs().max()
    assert 0 < change <= 0.3 + 1e-6
    with written(lm, tuned):
        assert all(lm.says(*asked, by_tokens=True))
    assert same(state(lm), before)
    config = FineTuneConfig(layers=(1,), lr=0.02, clamp=1e-4, steps=5, epochs=1)
    with written(lm, fine_tune(lm, FACTS, config)):
        assert not any(lm.says(*asked, by_tokens=True)), "the control: a bound that is too small"
    no_hooks_left(lm)


def test_lora_changes_by_its_rank_and_leaves_nothing_behind(lm: LanguageModel) -> None:
    pytest.importorskip("peft")
    before, modules = state(lm), [type(m) for m in lm.module.modules()]
    asked = ([f.text for f in FACTS], [f.target or "" for f in FACTS])
    config = LoraConfig(layers=(0, 1), lr=0.02, rank=4, steps=150)
    drawn = torch.get_rng_state()
    tuned = lora(lm, FACTS, config)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert same(state(lm), before) and [type(m) for m in lm.module.modules()] == modules
    for layer in (0, 1):
        assert torch.linalg.matrix_rank(tuned[layer] - lm.ffn[layer].weight(), rtol=1e-4) == 4
    with written(lm, tuned):
        assert all(lm.says(*asked, by_tokens=True))
    again = lora(lm, FACTS, config)
    assert all(torch.equal(again[layer], tuned[layer]) for layer in tuned), "the same for a seed"


def test_an_exception_leaves_the_weights(tiny_gpt2: LanguageModel) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = state(tiny_gpt2)
    for train, config in (
        (fine_tune, FineTuneConfig(layers=(1,))),
        (lora, LoraConfig(layers=(1,))),
    ):
        with pytest.raises(KeyboardInterrupt):
            train(tiny_gpt2, FACTS, config, progress=stop)  # type: ignore[operator]
        assert same(state(tiny_gpt2), before)
    new = {1: read_weights(tiny_gpt2, [1])[1] + 1}
    with pytest.raises(KeyboardInterrupt), written(tiny_gpt2, new):
        raise KeyboardInterrupt
    assert same(state(tiny_gpt2), before)


def test_refusals(tiny_gpt2: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="no target"):
        fine_tune(tiny_gpt2, [Fact("Edwin", "{} is", None, target_true="king")])
    with pytest.raises(LayerError, match="layer 9"):
        fine_tune(tiny_gpt2, FACTS, FineTuneConfig(layers=(9,)))
    for wrong in ({"lr": 0}, {"clamp": -1}, {"steps": 0}):
        with pytest.raises(InputError):
            FineTuneConfig(**wrong)  # type: ignore[arg-type]
    with pytest.raises(LayerError):
        LoraConfig(layers=())
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError, match=r"factsmith\[adapter\]"):
        lora(tiny_gpt2, FACTS)
