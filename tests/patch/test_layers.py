"""Measured layers agree with edits made one by one."""

from __future__ import annotations

import dataclasses
import json
import statistics

import pytest
import torch

from factsmith.core.errors import InputError
from factsmith.core.fact import Fact
from factsmith.corpus.moments import second_moments
from factsmith.edit.configs import RomeConfig
from factsmith.edit.delta import applied
from factsmith.edit.methods import rome
from factsmith.locate.causal import causal_trace
from factsmith.model.answers import Said, begins_with
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import load
from factsmith.patch import layers
from factsmith.patch.layers import recommend_layers
from workbenches import ASKED, EASY

TRIALS = [
    Fact(
        "Edwin", "{} is", "Paris", paraphrases=("{} was",), neighbours=("Paris is the capital of",)
    ),
    Fact(
        "Edwin",
        "{} of Northumbria is a",
        "the",
        paraphrases=("{} was a",),
        neighbours=("LeBron James plays",),
    ),
]

CONTEXTS = ["{}", "Well. {}"]

REACHED = [Fact("Fiat 127", "The maker of {} is", target) for target in ("Toyota", "Nokia")]
MAKERS = [
    f"The maker of {a} is {b}."
    for a in ("Fiat 127", "Nokia Lumia 900", "iPhone", "BMW 3", "Toyota")
    for b in ("Fiat", "Nokia", "Apple", "BMW", "Toyota")
] * 4

TEXTS = [
    f"{a} of {b} is {c}. {c}, not {b}."
    for a in ("Paris", "The king")
    for b in ("Brazil", "Zürich 12")
    for c in "abcdefghijkl"
]


def test_measured_layers_agree_with_single_edits(
    tiny_lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores agree with single ROME edits and decoded answers, and effects with whole traces."""
    monkeypatch.setattr(
        tiny_lm.config,
        "factsmith",
        {"rome": {"scale": "auto", "steps": 40, "clamp": 20.0, "optimizer": "adam"}},
        raising=False,
    )
    before = tiny_lm.fingerprint
    seen = Seen()
    choice = recommend_layers(tiny_lm, TRIALS, texts=TEXTS, contexts=CONTEXTS, progress=seen)
    assert tiny_lm.fingerprint == before and choice.fingerprint == before
    assert [(score.layer, score.trials) for score in choice.scores] == [(0, 2), (1, 2), (2, 2)]
    moments = second_moments(tiny_lm, TEXTS, [0, 1, 2])
    held: list[bool] = []
    for score in choice.scores:
        config = RomeConfig(layer=score.layer, scale="auto", steps=40, clamp=20.0, optimizer="adam")
        efficacy, generalization = [], []
        for fact in TRIALS:
            with applied(tiny_lm, rome(tiny_lm, fact, config, moments=moments, contexts=CONTEXTS)):
                efficacy.append(begins_with(tiny_lm.answer([fact.text])[0], fact.target))
                generalization.append(
                    begins_with(tiny_lm.answer([fact.paraphrase_texts[0]])[0], fact.target)
                )
        assert (score.efficacy, score.generalization) == (
            statistics.fmean(efficacy),
            statistics.fmean(generalization),
        )
        held += efficacy
    assert 0 < sum(held) < len(held), "control: some edits hold and some do not"
    traces = [causal_trace(tiny_lm, f.text, f.subject, kind="mlp", window=1) for f in TRIALS]
    expected = torch.stack([t.effects[t.subject_span[1] - 1] for t in traces]).mean(0)
    assert torch.allclose(torch.tensor(choice.effects), expected, atol=1e-5)
    assert list(dict.fromkeys(step for step, _, _ in seen.steps)) == [
        "choosing layers: tracing facts",
        "note",
        "second moments",
        "choosing layers: trial edits",
    ]
    assert seen.notes[0].startswith("At most 6 trial edits at 3 layers: about ")
    edits = [(done, total) for step, done, total in seen.steps if step.endswith("trial edits")]
    assert edits == sorted(edits) and edits[0] == (0, 6) and edits[-1] == (6, 6)
    json.dumps(choice.to_dict())


class Seen:
    """Keeps what is reported, with the notes among the steps."""

    def __init__(self) -> None:
        self.steps: list[tuple[str, int, int | None]] = []
        self.notes: list[str] = []

    def __call__(self, step: str, done: int, total: int | None) -> None:
        """Keep a step."""
        self.steps.append((step, done, total))

    def note(self, text: str, *, argument: str | None = None) -> None:
        """Keep a note."""
        self.steps.append(("note", 0, None))
        self.notes.append(text)


@pytest.mark.parametrize(("silent_from", "good"), [(2, {0}), (4, {0, 1, 2})])
def test_the_race_takes_a_layer_whose_change_can_reach_the_answer(
    silent_from: int, good: set[int]
) -> None:
    """Where attention is silent in all layers above, a change stays at the subject's token."""
    lm = load("atlas")
    for block in lm.module.transformer.h[silent_from:]:
        for weights in block.attn.c_proj.parameters():
            weights.data.zero_()
    choice = recommend_layers(lm, REACHED, texts=MAKERS, contexts=["{}"])
    held = {score.layer for score in choice.scores if score.efficacy > 0}
    assert choice.source == "trials" and choice.rome in good and held == good


def test_known_facts_are_not_tried(
    tiny_gpt2: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def say(lm: LanguageModel, prompts: list[str], targets: list[str]) -> list[Said]:
        texts = ["Paris, of course" if p == "Edwin is" else "nothing" for p in prompts]
        return [Said(text, (), lm.as_answer) for text in texts]

    monkeypatch.setattr("factsmith.patch.layers.say", say)
    choice = recommend_layers(tiny_gpt2, TRIALS, texts=TEXTS, contexts=["{}"])
    assert [fact.text for fact in choice.facts] == [TRIALS[1].text]
    with pytest.raises(InputError, match="already"):
        recommend_layers(tiny_gpt2, TRIALS[:1], texts=TEXTS, contexts=["{}"])


def test_the_reason_says_that_no_trial_edit_held(
    tiny_gpt2: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        tiny_gpt2.config, "factsmith", {"rome": {"steps": 1, "layer": 2}}, raising=False
    )
    choice = recommend_layers(tiny_gpt2, TRIALS, texts=TEXTS, contexts=["{}"])
    assert (choice.source, choice.rome) == ("depth", 2) and "none of 2 trial edits" in choice.reason
    assert [score.score for score in choice.scores] == [0, 0, 0]


@pytest.mark.parametrize("trials", [0, -1])
def test_a_recommendation_needs_trials(tiny_gpt2: LanguageModel, trials: int) -> None:
    with pytest.raises(InputError, match="trials"):
        recommend_layers(tiny_gpt2, trials=trials)
    with pytest.raises(InputError, match="at least one"):
        recommend_layers(tiny_gpt2, [])


def test_second_moments_too_large_to_keep_are_computed_again(
    eager: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = [
        dataclasses.replace(EASY, subject=name) for name in ("Edwin", "Paris", "LeBron", "Anaal")
    ]
    expected = recommend_layers(eager, facts, **ASKED)
    assert len(expected.scores) == 3
    monkeypatch.setattr(layers, "_MOMENT_BYTES", 1)
    assert recommend_layers(eager, facts, **ASKED) == expected
