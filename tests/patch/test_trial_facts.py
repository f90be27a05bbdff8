"""Trial facts are facts that the model knows, each with another object."""

from __future__ import annotations

import pytest

from factsmith import atlas
from factsmith.corpus.moments import second_moments
from factsmith.edit.configs import RomeConfig
from factsmith.edit.delta import applied
from factsmith.edit.rome import rome_each
from factsmith.model.answers import begins_with
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import load
from factsmith.patch.layer_trials import mlp_effects
from factsmith.patch.trial_facts import judge, trial_facts


def test_a_random_model_knows_no_facts_and_is_asked_once(
    tiny_lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    plain = tiny_lm.says
    monkeypatch.setattr(
        tiny_lm,
        "says",
        lambda prompts, targets: asked.append(len(prompts)) or plain(prompts, targets),
    )
    assert trial_facts(tiny_lm, 8) == []
    assert len(asked) == 1 and 200 < asked[0] <= 256


bundled = pytest.mark.skipif("atlas" not in atlas.names(), reason="the bundled model is not built")


@bundled
def test_trial_facts_are_known_and_judged_like_plain_answers() -> None:
    lm = load("atlas")
    facts = trial_facts(lm, 3, seed=5)
    assert facts == trial_facts(lm, 3, seed=5) != trial_facts(lm, 3, seed=6)
    table = {(f.subject, f.relation): f.object for f in atlas.facts()}
    for fact in facts:
        assert fact.target_true == table[fact.subject, fact.relation or ""] != fact.target
        assert 1 <= len(fact.paraphrases) <= 5 and 1 <= len(fact.neighbours) <= 13
        asked = [fact.text, *fact.paraphrase_texts]
        assert all(
            begins_with(answer, fact.target_true or "")
            for answer in lm.answer(asked, max_new_tokens=12)
        )
        near = [probe.prompt for probe in fact.neighbours]
        answers = lm.answer(near, max_new_tokens=12)
        pairs = zip(answers, fact.neighbours, strict=True)
        assert all(begins_with(answer, probe.expected or "") for answer, probe in pairs)
        assert judge(lm, fact)[:2] == (0.0, 0.0) and judge(lm, fact)[2] == 1.0, "unedited"
    assert mlp_effects(lm, facts, samples=3)[0] > 0.02
    moments = second_moments(lm, [f"{fact.text} {fact.target_true}." for fact in facts] * 8, [0, 5])
    (early,) = rome_each(
        lm, facts[:1], RomeConfig(layer=0, scale="auto", steps=40), moments=moments, contexts=["{}"]
    )
    (late,) = rome_each(
        lm, facts[:1], RomeConfig(layer=5, scale="auto", steps=3), moments=moments, contexts=["{}"]
    )
    with applied(lm, early):
        assert judge(lm, facts[0])[0] == 1.0
    with applied(lm, late):
        assert judge(lm, facts[0])[0] == 0.0, "control: an edit of the last layer fails"
