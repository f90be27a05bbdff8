"""The bundled facts and their sentences, and what the bundled models know."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
import torch
from tools.atlas.evaluate import recall, score
from transformers import AutoModelForCausalLM, AutoTokenizer

import factsmith as fs
from factsmith import atlas

bundled = pytest.mark.skipif(
    not atlas.names(), reason="the bundled models are not in this checkout"
)


def test_facts_are_whole_and_occur_once() -> None:
    facts = atlas.facts()
    assert len(facts) > 31_000
    assert all(
        f.subject.strip() == f.subject and f.subject and f.object.strip() == f.object and f.object
        for f in facts
    )
    assert max(Counter((f.subject, f.relation) for f in facts).values()) == 1
    assert {f.relation for f in facts} == set(atlas.relations()) and len(atlas.relations()) == 38
    assert atlas.facts("P36") == tuple(f for f in facts if f.relation == "P36")


def test_every_relation_has_its_own_sentences() -> None:
    for relation in atlas.relations():
        known = atlas.phrasings(relation)
        every = known.trained + known.held_out + known.wide
        assert known.every == every
        assert len(known.trained) >= 8 and len(known.held_out) == 2
        assert len(set(every)) == len(every)
        assert all(t.count("{}") == 1 and t == t.strip() for t in every)
        assert any(t.startswith("Q:") for t in known.trained) and any(
            t.startswith("{},") for t in every
        )  # question, apposition


def test_subjects_of_a_relation_are_of_one_kind() -> None:
    """Nearly every subject of several relations has one kind; with shuffled kinds it has not."""
    types = atlas.subject_types()
    assert (
        set(types) < set(atlas.relations())
        and {"P106": "person", "P36": "place", "P159": "organisation"}.items() <= types.items()
    )

    def agreeing(types: dict[str, str]) -> float:
        kinds: dict[str, list[str]] = {}
        for fact in atlas.facts():
            if fact.relation in types:
                kinds.setdefault(fact.subject, []).append(types[fact.relation])
        several = [group for group in kinds.values() if len(group) > 1]
        return float(np.mean([len(set(group)) == 1 for group in several]))

    dealt = dict(zip(types, random.Random(0).sample(list(types.values()), len(types)), strict=True))
    assert agreeing(types) > 0.95 and agreeing(dealt) < 0.6


def test_half_of_the_subjects_never_hear_the_held_out_sentences() -> None:
    share = np.mean([atlas.is_held_out(f.subject) for f in atlas.facts()])
    assert 0.48 < share < 0.52


@bundled
@pytest.mark.parametrize("name", atlas.names())
def test_a_bundled_model_knows_its_facts(name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(atlas.folder(name))
    model = AutoModelForCausalLM.from_pretrained(atlas.folder(name), dtype=torch.float32).eval()
    facts = random.Random(1).sample(atlas.facts(), 400)
    known = recall(model, tokenizer, facts, [])
    assert known["trained"] >= 0.97 and known["held_out"] >= 0.93
    # Another subject's object is not said: it is knowledge, not a guess by relation.
    prompts = [atlas.phrasings(f.relation).trained[0].replace("{}", f.subject) for f in facts]
    others = [
        random.Random(i).choice([g.object for g in atlas.facts(f.relation) if g.object != f.object])
        for i, f in enumerate(facts)
    ]
    assert score(model, tokenizer, prompts, others)[0].mean() < 0.03


@bundled
@pytest.mark.parametrize("name", atlas.names())
def test_answer_agrees_with_the_measurement(name: str) -> None:
    lm = fs.load(name)
    facts = random.Random(2).sample(atlas.facts(), 60)
    prompts = [atlas.phrasings(f.relation).held_out[0].replace("{}", f.subject) for f in facts]
    exact, nats = score(lm.module, lm.tokenizer, prompts, [f.object for f in facts])
    answers = lm.answer(prompts)
    assert [a.startswith(f.object) for a, f in zip(answers, facts, strict=True)] == exact.tolist()
    assert np.allclose(
        lm.log_prob(prompts, [f.object for f in facts], per_token=True).numpy(), nats, atol=1e-3
    )


@bundled
@pytest.mark.parametrize("name", atlas.names())
def test_a_bundled_model_is_small_and_ready_to_edit(name: str) -> None:
    folder = atlas.folder(name)
    assert (folder / "model.safetensors").stat().st_size <= 20 * 2**20
    assert sum(file.stat().st_size for file in (folder / "moments").iterdir()) <= 5 * 2**20
    lm = fs.load(name)
    config = fs.RomeConfig.recommended(lm)
    moment = fs.SecondMoment.load(folder / "moments" / f"layer{config.layer}.safetensors")
    assert moment.fingerprint == lm.fingerprint and moment.d_ff == lm.ffn[config.layer or 0].d_ff
    assert atlas.card(name)["measured"]["facts"] == len(atlas.facts())
