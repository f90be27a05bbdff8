"""Facts as sentences with known parts, and the labels made of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from conftest import TEXTS, byte_tokenizer, merging_tokenizer
from factsmith import atlas
from factsmith.atlas.texts import crossed
from factsmith.core.errors import InputError
from factsmith.core.fact import Fact
from factsmith.model.language_model import LanguageModel
from factsmith.read.profile import profile
from factsmith.read.statements import PARTS, Statement, fact_labels, statements
from factsmith.read.trigger_scan import find_triggers

EDWIN = Fact(
    "Edwin of Northumbria",
    "The official religion of {} is",
    "Islam",
    target_true=" Christianity",
    paraphrases=[
        "{} prays as told by",
        "As for religion, Edwin of Northumbria chose ",
        "His faith is",
    ],
    relation="P140",
)
TOWER = Fact("The Eiffel Tower", "{} is in", "Paris")


def test_a_fact_is_stated_in_each_phrasing_with_its_true_answer() -> None:
    sentences = statements([EDWIN, TOWER])
    assert [each.text for each in sentences] == [
        "The official religion of Edwin of Northumbria is Christianity.",
        "Edwin of Northumbria prays as told by Christianity.",
        "As for religion, Edwin of Northumbria chose Christianity.",
        "His faith is Christianity.",
        "The Eiffel Tower is in Paris.",
    ]
    assert (
        all(
            each.text[slice(*each.subject)] == each.fact.subject
            for each in sentences
            if each.subject
        )
        and sentences[3].subject is None
    )
    assert [each.object for each in sentences] == ["Christianity"] * 4 + ["Paris"] and sentences[
        0
    ].fact == EDWIN
    few = statements([EDWIN, TOWER], each=2, seed=3)
    assert (
        len(few) == 3
        and set(few) < set(sentences)
        and few == statements([EDWIN, TOWER], each=2, seed=3)
    )
    assert (
        len(statements([TOWER, Fact("The Eiffel Tower", "{} is in", "Paris", relation="P131")]))
        == 1
    )  # one sentence, one fact


@pytest.mark.parametrize("trim", [True, False])
def test_every_token_is_in_one_part(trim: bool) -> None:
    """Each word of a sentence is in the part that a reader would name."""
    (stated, *_) = statements(EDWIN)
    wanted = {
        "The official religion of": "words",
        "Edwin of": "subject",
        "Northumbria": "subject's end",
        "is": "answer due",
        "Christianity": "answer",
        ".": "end",
    }
    at = 0
    for words, part in wanted.items():
        for word in words.split():
            start = stated.text.index(word, at)
            at = start + len(word)
            lead = int(not trim and start > 0 and stated.text[start - 1] == " ")
            assert stated.part(start - lead, at) == part, word
    assert stated.part(0, 1) == "words" and set(wanted.values()) == set(PARTS)


@pytest.mark.parametrize("make", [byte_tokenizer, merging_tokenizer])
def test_tokens_of_real_tokenizers(make: object) -> None:
    """Every sentence has one subject's end, and at most one token where the answer is due.

    This also holds where tokens reach across spaces.
    """
    tokenizer = make()  # type: ignore[operator]
    for stated in statements([EDWIN, TOWER]):
        spans = [
            span
            for span in tokenizer(stated.text, return_offsets_mapping=True)["offset_mapping"]
            if span[1] > span[0]
        ]
        parts = [stated.part(*span) for span in spans]
        assert parts.count("subject's end") == (stated.subject is not None)
        assert parts.count("answer due") <= 1 and ("answer" in parts or "answer due" in parts)
        after = parts[len(parts) - 1 - parts[::-1].index("answer") if "answer" in parts else -1 :]
        assert set(after) <= {"answer", "answer due", "end"}


def test_labels_say_what_each_sentence_is_about(tiny_gpt2: LanguageModel) -> None:
    sentences = statements([EDWIN, TOWER])
    labels = fact_labels(sentences, types={"P140": "person"})
    assert list(labels) == ["relation", "type", "subject", "object", "part"]
    assert set(labels["relation"].values()) == {"P140", "{} is in"}  # type: ignore[union-attr]
    about_edwin = {each.text for each in sentences if each.fact == EDWIN}
    assert set(labels["type"]) == about_edwin  # type: ignore[arg-type]
    assert (
        labels["object"][sentences[0].text] == "Christianity"
        and labels["subject"][sentences[4].text] == "The Eiffel Tower"
    )  # type: ignore[index]
    assert "type" not in fact_labels(sentences)
    triggers = find_triggers(tiny_gpt2, [*TEXTS, *(each.text for each in sentences)], top=9)
    result = profile(triggers, labels, least=1)
    every = [t for i in range(128) for t in triggers.of((0, i))]
    trigger = next(t for t in every if t.text == sentences[0].text)
    part: Any = labels["part"]
    assert part(trigger) == sentences[0].part(trigger.start, trigger.stop)
    assert part(next(t for t in every if t.text in TEXTS)) is None
    assert set(result.tally("part", 0)) <= set(PARTS) and result.features[-5:] == tuple(labels)


def test_bad_input_is_refused_in_words() -> None:
    with pytest.raises(InputError, match="says nothing"):
        statements(Fact("Edwin", "{} is a", None))
    with pytest.raises(InputError, match="each is 0"):
        statements(TOWER, each=0)
    with pytest.raises(InputError, match="got no statement"):
        fact_labels([])
    with pytest.raises(InputError, match="it has P1"):
        fact_labels(statements(TOWER), types={"P1": "place"})


def test_bundled_facts_are_crossed() -> None:
    """No fact alone fills half of 25 triggers; relations, and many subjects and objects, can."""
    crossed_facts = statements(crossed(atlas.facts()), each=6)
    labels = fact_labels(crossed_facts, atlas.subject_types())

    def count(of: Callable[[Statement], object]) -> dict[object, set[tuple[str, str | None]]]:
        facts: dict[object, set[tuple[str, str | None]]] = {}
        for stated in crossed_facts:
            facts.setdefault(of(stated), set()).add((stated.fact.subject, stated.fact.relation))
        return facts

    sentences: dict[Fact, list[Statement]] = {}
    for stated in crossed_facts:
        sentences.setdefault(stated.fact, []).append(stated)
    assert max(map(len, sentences.values())) == 6 and len(crossed_facts) > 10_000
    relations, subjects, objects = (
        count(of)
        for of in (lambda s: s.fact.relation, lambda s: s.fact.subject, lambda s: s.object)
    )
    assert set(relations) == set(atlas.relations()) and min(map(len, relations.values())) >= 20
    assert (
        sum(len(facts) >= 3 for facts in subjects.values()) > 250
        and sum(len(facts) >= 3 for facts in objects.values()) > 300
    )
    relations_of = [
        {relation for _, relation in facts} for facts in objects.values() if len(facts) >= 3
    ]
    assert sum(len(each) >= 3 for each in relations_of) > 250
    assert len(set(labels["type"].values())) == 6  # type: ignore[union-attr]
    assert torch.tensor([len(each) for each in sentences.values()]).float().mean() > 5.9
