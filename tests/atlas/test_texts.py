"""Corpora of the bundled facts."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from factsmith import atlas
from factsmith.atlas.texts import (
    as_fact,
    crossed,
    read_prose,
    sentences,
    sentences_with_facts,
)


def test_tokenized_prose_is_closed_up(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(
        "`` It did n't stop , '' said Emma 's aunt ( twice ) ; and _ so _ on .\nNo end here\n",
        encoding="utf-8",
    )
    assert read_prose(tmp_path) == ["\"It didn't stop,\" said Emma's aunt (twice); and so on."]


def test_every_fact_is_stated_twice() -> None:
    facts = atlas.facts()[:200]
    pairs = sentences_with_facts(facts, seed=1)
    assert [sentence for sentence, _ in pairs] == sentences(facts, seed=1)
    assert sentences(facts, seed=1) != sentences(facts, seed=2)
    assert Counter(fact for _, fact in pairs) == dict.fromkeys(facts, 2)
    for sentence, fact in pairs:
        assert fact.subject in sentence and sentence.endswith(f" {fact.object}.")
        prompt = sentence.removesuffix(f" {fact.object}.").replace(fact.subject, "{}", 1)
        assert prompt in atlas.phrasings(fact.relation).every


def test_crossed_facts_recur_by_subject_relation_and_object() -> None:
    chosen = crossed(atlas.facts(), least=3, each=20)
    assert len(set(map(repr, chosen))) == len(chosen)
    by_subject = Counter(fact.subject for fact in atlas.facts())
    taken = Counter(fact.subject for fact in chosen)
    assert all(taken[subject] == n for subject, n in by_subject.items() if n >= 3)
    relations = Counter(fact.relation for fact in chosen)
    assert set(relations) == set(atlas.relations())
    assert all(n >= min(20, len(atlas.facts(relation))) for relation, n in relations.items())
    assert crossed(atlas.facts(), seed=1) != chosen == crossed(atlas.facts())


def test_a_bundled_fact_has_all_its_phrasings() -> None:
    fact = as_fact(atlas.facts("P36")[0])
    assert (fact.prompt, *fact.paraphrases) == atlas.phrasings("P36").every
    assert (fact.relation, fact.target) == ("P36", atlas.facts("P36")[0].object)
