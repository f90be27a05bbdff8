"""The bundled facts, their sentences, the training text, and what the bundled models know."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from tools.atlas import corpus as corpus_module
from tools.atlas.corpus import Corpus
from tools.atlas.evaluate import recall, score
from tools.atlas.train import Recipe, learning_rate, make_tokenizer, train
from transformers import AutoModelForCausalLM, AutoTokenizer

import factsmith as fs
from factsmith import atlas
from factsmith.atlas.texts import read_prose

PROSE = [
    "The rain had stopped before they reached the harbour.",
    "Nobody in the house had slept.",
    "It was a long way home, he said.",
] * 40
RECIPE = Recipe(
    "gpt2",
    steps=4,
    vocabulary=700,
    layers=2,
    width=32,
    neurons=48,
    heads=2,
    positions=256,
    warmup=2,
)
bundled = pytest.mark.skipif(
    not atlas.names(), reason="the bundled models are not in this checkout"
)


def test_facts_are_whole_and_told_once() -> None:
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
        told = atlas.phrasings(relation)
        every = told.trained + told.held_out + told.wide
        assert len(told.trained) >= 8 and len(told.held_out) == 2 and len(set(every)) == len(every)
        assert all(t.count("{}") == 1 and t == t.strip() for t in every)
        assert any(t.startswith("Q:") for t in told.trained) and any(
            t.startswith("{},") for t in every
        )  # question, apposition


def test_subjects_of_a_relation_are_of_one_kind() -> None:
    """Against the facts: a subject of several relations is of one kind, as nearly all are; a control with kinds dealt out is not."""
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
        several = [own for own in kinds.values() if len(own) > 1]
        return float(np.mean([len(set(own)) == 1 for own in several]))

    dealt = dict(zip(types, random.Random(0).sample(list(types.values()), len(types)), strict=True))
    assert agreeing(types) > 0.95 and agreeing(dealt) < 0.6


def test_half_of_the_subjects_never_hear_the_held_out_sentences() -> None:
    share = np.mean([atlas.is_held_out(f.subject) for f in atlas.facts()])
    assert 0.48 < share < 0.52


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return Corpus(make_tokenizer(RECIPE, PROSE), atlas.facts()[:400], PROSE, seed=3)


def test_an_epoch_tells_each_chosen_fact_once_and_predicts_its_object(corpus: Corpus) -> None:
    chosen = np.arange(0, 400, 2)
    groups = list(corpus.epoch(0, chosen))
    owners: Counter[int] = Counter()
    for group in groups:
        assert len({len(row.ids) for row in group}) == 1
        for row in group:
            told = set(row.owner[row.owner >= 0].tolist())
            owners.update(told)
            text = corpus.tokenizer.decode(row.ids)
            for number in told:
                fact = corpus.facts[number]
                said = corpus.tokenizer.decode(row.ids[row.owner == number]).strip()
                assert said == fact.object and fact.subject in text
            assert row.predict[row.owner >= 0].all()
    assert max(owners.values()) == 1 and set(owners) <= set(chosen.tolist())
    assert len(owners) > 0.4 * len(chosen)  # the last, partial group is left for the next epoch


def test_held_out_sentences_stay_out(corpus: Corpus) -> None:
    text = " ".join(
        corpus.tokenizer.decode(row.ids)
        for e in range(6)
        for group in corpus.epoch(e, np.arange(400))
        for row in group
    )
    told = seen = 0
    for fact in corpus.facts:
        for template in atlas.phrasings(fact.relation).held_out:
            if template.replace("{}", fact.subject) in text:
                seen += atlas.is_held_out(fact.subject)
                told += 1
    assert seen == 0 and told > 0  # the other half does hear them


def test_the_same_seed_and_epoch_give_the_same_rows(corpus: Corpus) -> None:
    def rows(epoch: int) -> list[list[int]]:
        return [row.ids.tolist() for group in corpus.epoch(epoch, np.arange(400)) for row in group]

    assert rows(1) == rows(1) != rows(2)


def test_prose_has_its_share(corpus: Corpus) -> None:
    rows = [row for e in range(4) for group in corpus.epoch(e, np.arange(400)) for row in group]
    # Prose is what is predicted in runs without an owner; facts' other tokens are predicted only now and then.
    prose = sum(
        len(run)
        for row in rows
        for run in "".join(
            "p" if p and o < 0 else "." for p, o in zip(row.predict, row.owner, strict=True)
        ).split(".")
        if len(run) > 6
    )
    assert 0.08 < prose / sum(len(row.ids) for row in rows) < 0.25


def test_tokenized_prose_is_closed_up(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(
        "`` It did n't stop , '' said Emma 's aunt ( twice ) ; and _ so _ on .\nNo end here\n",
        encoding="utf-8",
    )
    assert read_prose(tmp_path) == ["\"It didn't stop,\" said Emma's aunt (twice); and so on."]


def test_learning_rate_warms_up_and_ends_at_zero() -> None:
    rates = [learning_rate(step, 100, 10) for step in range(101)]
    assert rates[0] == 0.1 and max(rates) == rates[9] and rates[100] == 0.0
    assert rates == sorted(rates[:10]) + sorted(rates[10:], reverse=True)


def test_an_interrupted_training_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_module, "_LENGTHS", (64,))
    facts = atlas.facts()[:300]

    def run(name: str, steps: int) -> dict[str, torch.Tensor]:
        recipe = Recipe(
            "gpt2", steps=steps, vocabulary=700, layers=2, width=32, neurons=48, heads=2, warmup=2
        )
        train("tiny", recipe, facts, PROSE, tmp_path / name, save_every=0.0)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)
        return dict(model.state_dict())

    whole = run("whole", 4)
    stop = 0

    def interrupted(*args: object, **kwargs: object) -> float:
        nonlocal stop
        stop += 1
        if stop == 3:
            raise KeyboardInterrupt
        return learn(*args, **kwargs)  # type: ignore[arg-type]

    from tools.atlas import train as module

    learn = module.learn
    monkeypatch.setattr(module, "learn", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run("broken", 4)
    continued = run("broken", 4)
    assert all(torch.equal(whole[name], continued[name]) for name in whole)
    assert not torch.equal(
        whole["transformer.wte.weight"], run("shorter", 3)["transformer.wte.weight"]
    )


@bundled
@pytest.mark.parametrize("name", atlas.names())
def test_a_bundled_model_knows_its_facts(name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(atlas.folder(name))
    model = AutoModelForCausalLM.from_pretrained(atlas.folder(name), dtype=torch.float32).eval()
    told = random.Random(1).sample(atlas.facts(), 400)
    known = recall(model, tokenizer, told, [])
    assert known["trained"] >= 0.97 and known["held_out"] >= 0.93
    # Another subject's object is not said: it is knowledge, not a guess by relation.
    prompts = [atlas.phrasings(f.relation).trained[0].replace("{}", f.subject) for f in told]
    others = [
        random.Random(i).choice([g.object for g in atlas.facts(f.relation) if g.object != f.object])
        for i, f in enumerate(told)
    ]
    assert score(model, tokenizer, prompts, others)[0].mean() < 0.03


@bundled
@pytest.mark.parametrize("name", atlas.names())
def test_answer_agrees_with_the_measurement(name: str) -> None:
    lm = fs.load(name)
    told = random.Random(2).sample(atlas.facts(), 60)
    prompts = [atlas.phrasings(f.relation).held_out[0].replace("{}", f.subject) for f in told]
    exact, nats = score(lm.module, lm.tokenizer, prompts, [f.object for f in told])
    answers = lm.answer(prompts)
    assert [a.startswith(f.object) for a, f in zip(answers, told, strict=True)] == exact.tolist()
    assert np.allclose(
        lm.log_prob(prompts, [f.object for f in told], per_token=True).numpy(), nats, atol=1e-3
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
