"""A proposal measures the disturbance of ordinary text and warns of crowded keys."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from factsmith.core.fact import Fact
from factsmith.edit.configs import MemitConfig
from factsmith.edit.delta import applied
from factsmith.model.language_model import LanguageModel
from patching import proposed
from workbenches import FACT, QUICK, TEXTS, moments_of


def test_how_much_ordinary_text_is_disturbed(lm: LanguageModel) -> None:
    """The disturbance agrees with the layer's outputs at every token, read by hooks. A change of
    more than a quarter gives a warning.
    """
    moments = moments_of(lm)
    proposal = proposed(lm, FACT, config=QUICK, moments=moments, contexts=["{}"])
    assert proposal.delta is not None

    def outputs() -> torch.Tensor:
        seen: list[torch.Tensor] = []
        handle = lm.ffn[1].down.register_forward_hook(
            lambda m, args, out: seen.append(out[0] - m.bias)
        )
        with torch.no_grad():
            for text in TEXTS:
                lm.module(input_ids=torch.tensor([lm.tokenizer(text)["input_ids"]]))
        handle.remove()
        return torch.cat(seen)

    plain = outputs()
    with applied(lm, proposal.delta):
        expected = float((outputs() - plain).norm() / plain.norm())
    assert proposal.disturbance == {1: pytest.approx(expected, rel=1e-3)} and 0 < expected < 0.25
    assert proposal.to_dict()["disturbance"] == {"1": proposal.disturbance[1]} and not any(
        "broken" in w for w in proposal.warnings
    )
    far = dataclasses.replace(QUICK, lr=50.0, clamp=100.0, stop_loss=0.0)
    broken = proposed(lm, FACT, config=far, moments=moments, contexts=["{}"])
    assert broken.disturbance[1] > 0.25 and any(
        "the model may be broken" in warning for warning in broken.warnings
    )


def test_facts_with_one_key_and_two_targets_are_warned_of(lm: LanguageModel) -> None:
    """A key does not depend on the text after the subject."""
    facts = [Fact("Edwin", "{} is a", "king"), Fact("Edwin", "{} plays", "basketball")]
    for method, kind in (("rome", QUICK), ("memit", MemitConfig((1,), steps=3))):
        proposal = proposed(
            lm, facts, method, kind, moments={1: moments_of(lm)[1]}, contexts=["{}"]
        )
        (warning,) = [w for w in proposal.warnings if "nearly the key" in w]
        assert (
            "'Edwin is a'" in warning and "'Edwin plays'" in warning and "cosine 1.000" in warning
        )
        proposal = proposed(
            lm, [facts[0], FACT], method, kind, moments={1: moments_of(lm)[1]}, contexts=["{}"]
        )
        assert not any("nearly the key" in w for w in proposal.warnings)


def test_propose_works_under_no_grad(lm: LanguageModel) -> None:
    moments = moments_of(lm)
    expected = proposed(lm, FACT, config=QUICK, moments=moments, contexts=["{}"]).delta
    with torch.no_grad():
        delta = proposed(lm, FACT, config=QUICK, moments=moments, contexts=["{}"]).delta
        assert not torch.is_grad_enabled()
    assert delta is not None and expected is not None
    assert torch.equal(delta.dense(1), expected.dense(1))
