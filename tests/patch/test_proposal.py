"""A proposal measures the disturbance of ordinary text and warns of crowded keys."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from factsmith.core.fact import Fact
from factsmith.edit.configs import MemitConfig
from factsmith.edit.delta import applied
from factsmith.edit.resolve import resolve
from factsmith.model.language_model import LanguageModel
from factsmith.patch.plan import Plan
from factsmith.patch.proposal import Proposal, alike_subjects
from patching import proposed
from workbenches import FACT, QUICK, TEXTS, moments_of, some_rows


def test_subjects_that_cannot_be_told_apart_are_named_before_anything_is_written(
    tiny_gpt2: LanguageModel,
) -> None:
    rows = some_rows(tiny_gpt2, 1, n_facts=3)
    planned = Plan(entries=())
    alike: tuple[dict[str, Any], ...] = (
        {"false_firing": 0.001, "closest_read": 0.7, "not_told_apart_from": 2},
        {"false_firing": 0.0},
        {"false_firing": 0.002, "closest_read": 0.9, "not_told_apart_from": 0},
    )
    delta = dataclasses.replace(rows, convergence=alike)
    proposal = Proposal(plan=planned, delta=delta)
    (warning,) = (text for text in proposal.warnings if "told apart" in text)
    one, other = str(delta.facts[2]), str(delta.facts[0])
    assert warning.index(one) < warning.index(other) and "2 facts" in warning
    assert proposal.false_firing == pytest.approx(0.003)
    record = proposal.to_dict()["delta"]
    assert record["false_firing"] == proposal.false_firing and record["appended"] == 6
    assert "6 neurons" in proposal.summary and "rank" not in proposal.summary
    apart = dataclasses.replace(rows, convergence=({"closest_read": 0.3},) * 3)
    control = Proposal(plan=planned, delta=apart)
    assert not any("told apart" in text for text in control.warnings)
    assert control.false_firing is None
    # One of them goes: the index of the other follows.
    part = resolve(tiny_gpt2, delta, [delta.facts[0], delta.facts[2]], moments={})
    assert alike_subjects(part) == [(1, 0), (0, 1)]
    alone = resolve(tiny_gpt2, delta, [delta.facts[0]], moments={})
    assert alike_subjects(alone) == []


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
