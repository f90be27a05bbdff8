"""Which records can be judged, and which a model knows."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from functools import cache

import pytest
import torch

from conftest import GPT2, byte_tokenizer, tiny_model
from factsmith import atlas
from factsmith.core.errors import InputError
from factsmith.core.fact import Fact
from factsmith.judge.records import Question, Record
from factsmith.judge.run import evaluate
from factsmith.judge.suites import load_suite
from factsmith.judge.usable import UNKNOWN, known, usable
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import load, wrap
from judging import refuse_target

FACTS = [
    Fact("Danielle Darrieux", "The mother tongue of {} is", "English"),
    Fact("Edwin", "The official religion of {} is", "Islam"),
]
bundled = pytest.mark.skipif(
    not atlas.names(), reason="the bundled models are not in this checkout"
)


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return wrap(tiny_model("gpt2", **GPT2), byte_tokenizer())


def record(n: int, fact: Fact) -> Record:
    return Record(
        id=f"r{n}",
        facts=(fact,),
        questions=(Question(kind="prompt", prompt=fact.text, answers=(fact.target or "",)),),
    )


def test_which_records_can_be_used(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    say = "French"
    truth = Fact(FACTS[0].subject, FACTS[0].prompt, "English", target_true=say)
    other = Fact(FACTS[0].subject, FACTS[0].prompt, "Dutch", target_true=say)
    twice = Fact("Edwin", "Edwin and {} are", "kings", target_true="x")
    nothing = Record(
        id="n", facts=(Fact("Edwin", "{} is", None, target_true="king"),), questions=()
    )
    every = [record(0, truth), record(1, other), record(2, twice), nothing, record(3, FACTS[1])]
    kept, left = usable(lm, every, known_only=False)
    assert [r.id for r in kept] == ["r0", "r2", "r3"]
    assert left == {"another target for the same prompt": 1, "nothing to write": 1}
    assert usable(lm, every[:1]) == ((), {"the model does not say the old object": 1})
    monkeypatch.setattr(lm, "says", lambda prompts, answers: [answer == say for answer in answers])
    kept, left = usable(lm, every[:1] + every[4:])
    assert [r.id for r in kept] == ["r0"] and left == {UNKNOWN: 1}


def test_a_record_without_tokens_is_left_out_and_the_others_stay(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_target(monkeypatch, lm, "Rome")
    facts = [Fact("Edwin", "{} is", target, target_true="king") for target in ("wise", "Rome")]
    records = [record(n, fact) for n, fact in enumerate(facts)]
    kept, left = usable(lm, records, known_only=False)
    assert [r.id for r in kept] == ["r0"]
    assert left == {"a subject or a target has no token that the model knows": 1}
    assert usable(lm, records)[1].keys() >= left.keys()


def test_unicode_forms_of_one_prompt_contradict_each_other(lm: LanguageModel) -> None:
    facts = [
        Fact("André Malraux", "{} speaks", "Dutch"),
        Fact("Andre\u0301\u00a0Malraux", "{} speaks", "Greek"),
        Fact("Andre\u0301 Malraux", "{} speaks", "Dutch"),
    ]
    records = [record(n, fact) for n, fact in enumerate(facts)]
    kept, left = usable(lm, records, known_only=False)
    assert [r.id for r in kept] == ["r0", "r2"]
    assert left == {"another target for the same prompt": 1}


def test_records_too_long_for_the_model_are_left_out(lm: LanguageModel) -> None:
    """64 positions; every byte of these prompts is a token or nearly."""
    fact = Fact("Edwin", "{} is", "wise", target_true="king")
    long = "q" * 63

    def asking(n: int, *prompts: str, written: Fact = fact) -> Record:
        questions = tuple(
            Question(kind="locality", prompt=prompt, answers=()) for prompt in prompts
        )
        return Record(id=f"r{n}", facts=(written,), questions=questions)

    whole = Question(kind="paraphrase", prompt=long, answers=("zq zq",))
    records = [
        asking(0, long),
        asking(1, long + "qq"),
        asking(2, "short", written=Fact("Edwin", f"{long} {{}} is", "wise", target_true="king")),
        Record(id="r3", facts=(fact,), questions=(whole,)),
    ]
    assert len(lm.prompt_ids(long)) == 63, "with the answer, or two letters more, it is too long"
    kept, left = usable(lm, records, known_only=False)
    assert [record.id for record in kept] == ["r0"] and left == {
        "too long for the model's positions": 3
    }
    assert usable(lm, records)[1]["too long for the model's positions"] == 3
    assert evaluate(
        lm, kept, {"nothing": lambda facts: contextlib.nullcontext()}, drift_tokens=0
    ).editors == ("base", "nothing")
    with pytest.raises(InputError, match="positions for 64"):
        evaluate(
            lm, [records[1]], {"nothing": lambda facts: contextlib.nullcontext()}, drift_tokens=0
        )


@cache
def _atlas_model() -> LanguageModel:
    return load("atlas")


@bundled
def test_known_records_are_those_the_model_says() -> None:
    """Against a plain pass of transformers over prompt and answer, record by record."""
    lm = _atlas_model()
    records = load_suite("atlas", limit=60, seed=3).records
    kept = known(lm, records)
    for record in records:
        (fact,) = record.facts
        prompt = lm.tokenizer(fact.text)["input_ids"]
        whole = lm.tokenizer(f"{fact.text} {fact.target_true}", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            likeliest = lm.module(input_ids=whole).logits[0].argmax(-1)
        assert (record in kept) == bool(
            (likeliest[len(prompt) - 1 : -1] == whole[0, len(prompt) :]).all()
        )
    assert 30 < len(kept) <= 60
    lies = [
        replace(
            r,
            facts=(
                Fact(
                    r.facts[0].subject, r.facts[0].prompt, "nothing", target_true=r.facts[0].target
                ),
            ),
        )
        for r in kept
    ]
    assert len(known(lm, lies)) == 0  # control: the new objects are not known


@bundled
def test_a_record_is_known_when_all_its_facts_are() -> None:
    lm = _atlas_model()
    one, two = known(lm, load_suite("atlas", limit=20, seed=3).records)[:2]
    wrong = Fact("Vineta", "The harbour of {} opens to", "a", target_true="b")
    open_ended = Fact("Vineta", "The harbour of {} opens to", "a")
    both = replace(one, facts=one.facts + two.facts)
    assert known(
        lm,
        [
            both,
            replace(one, facts=(*one.facts, wrong)),
            replace(one, facts=(open_ended,)),
            replace(one, facts=()),
            two,
        ],
    ) == (
        both,
        two,
    )
    assert known(lm, []) == ()
