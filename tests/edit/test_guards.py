"""Further guards of a target: what the model says about the subject in other relations."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import factsmith as fs
from factsmith.edit.guards import OTHER_RELATIONS, other_relations
from factsmith.edit.keys import subject_columns, with_added
from factsmith.edit.questions import tokenize_facts
from factsmith.edit.search import find_targets
from factsmith.model.language_model import LanguageModel
from factsmith.model.replay import record

FACTS = [fs.Fact("Canada", "The capital of {} is", "Rome")]


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return fs.load("atlas")


def divergence(lm: LanguageModel, template: str, delta: torch.Tensor) -> float:
    """Return KL(p ‖ p_δ) of the next token after a prompt, from plain passes."""
    ids, _, pivot = subject_columns(lm, template, FACTS[0].subject)
    batch = lm.align([ids], [pivot])
    replay = record(lm, batch, start=batch.pivot, until=1)
    logs = []
    for change in (torch.zeros_like(delta), delta):
        hidden = with_added(replay, 0, change[None], "ffn")
        logs.append(replay.logits(hidden[:, len(ids) - 1 - pivot]).float().log_softmax(-1))
    return float((logs[0].exp() * (logs[0] - logs[1])).sum())


def test_the_rows_predict_what_small_changes_do(lm: LanguageModel) -> None:
    questions = tokenize_facts(lm, FACTS, ["{}"])
    rows = other_relations(lm, questions, 0, "ffn", lm.d_model)[0]
    draw = torch.Generator().manual_seed(1)
    changes = [0.3 * torch.randn(lm.d_model, generator=draw) for _ in range(6)]
    others = [t for t in OTHER_RELATIONS if t != FACTS[0].prompt]
    measured = [sum(divergence(lm, t, delta) for t in others) for delta in changes]
    modelled = [0.5 * float((rows @ delta).square().sum()) for delta in changes]
    # Two samples a prompt are few, so the sums agree in size; the weight is 0.3.
    ratio = sum(modelled) / sum(measured)
    assert 0.05 < ratio < 1.5
    assert sum(modelled) > 100 * 0.5 * float((rows @ (changes[0] / 1e3)).square().sum())


def test_a_prompt_that_asks_for_the_fact_itself_does_not_count(lm: LanguageModel) -> None:
    rows = other_relations(lm, tokenize_facts(lm, FACTS, ["{}"]), 0, "ffn", lm.d_model)[0]
    per_prompt = rows.view(len(OTHER_RELATIONS), -1, lm.d_model).norm(dim=(1, 2))
    fact = OTHER_RELATIONS.index(FACTS[0].prompt)
    assert per_prompt[fact] == 0
    assert (per_prompt > 0).sum() >= len(OTHER_RELATIONS) // 2


def test_a_guarded_target_changes_other_relations_less(lm: LanguageModel) -> None:
    config = dataclasses.replace(fs.AppendConfig.recommended(lm), layer=0)
    others = [t for t in OTHER_RELATIONS if t != FACTS[0].prompt]
    change = {}
    for guarded in (False, True):
        settings = dataclasses.replace(config, guards_relations=guarded)
        targets = find_targets(lm, FACTS, 0, settings, ["{}"])
        assert targets.convergence[0]["stopped"] == "loss"
        delta = (targets.v_star - targets.v_initial)[0].detach()
        change[guarded] = sum(divergence(lm, template, delta) for template in others)
    assert change[True] < 0.9 * change[False]
