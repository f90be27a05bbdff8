"""The bundled suite against the bundled table."""

from __future__ import annotations

from collections import Counter
from functools import cache

from factsmith import atlas
from factsmith.judge.records import Question, Suite
from factsmith.judge.suites import load_suite
from suite_files import (
    asked,
)


@cache
def _bundled() -> Suite:
    return load_suite("atlas", limit=1500)


@cache
def _table() -> tuple[dict[tuple[str, str], str], Counter[tuple[str, str]]]:
    """The bundled table: {(subject, relation): object}, and how often a relation has an object."""
    lines = (atlas.folder("facts.tsv")).read_text(encoding="utf-8").splitlines()[1:]
    rows = [tuple(line.split("\t")) for line in lines]
    return {(s, r): o for s, r, o in rows}, Counter((r, o) for _, r, o in rows)


def test_a_bundled_edit_is_another_object_of_the_relation() -> None:
    truth, objects = _table()
    suite = _bundled()
    assert len(suite.records) == 1500 and suite.name == "atlas" and suite.source == "bundled"
    for record in suite.records:
        (fact,) = record.facts
        assert fact.relation is not None and fact.target is not None
        assert truth[fact.subject, fact.relation] == fact.target_true != fact.target
        assert objects[fact.relation, fact.target] > 0
        assert atlas.is_held_out(fact.subject)
        held_out = [
            template.replace("{}", fact.subject)
            for template in atlas.phrasings(fact.relation).held_out
        ]
        assert asked(record, "paraphrase") == [
            (text, (fact.target,), fact.target_true) for text in held_out
        ]
        assert (
            not set(record.generation_prompts) & {fact.text, *held_out}
            and len(record.generation_prompts) == 3
        )
        assert len(record.references) == min(5, objects[fact.relation, fact.target])
        assert all(
            text.endswith(f" {fact.target}.") and fact.subject != text[: len(fact.subject)]
            for text in record.references
        )


def test_neighbours_and_locality_are_facts_of_the_table() -> None:
    truth, objects = _table()
    by_prompt = {
        template.replace("{}", subject): (subject, relation, object_)
        for (subject, relation), object_ in truth.items()
        for template in atlas.phrasings(relation).trained
    }
    shared = 0
    for record in _bundled().records:
        (fact,) = record.facts
        for q in record.questions:
            if q.kind in ("neighbour", "locality"):
                subject, relation, object_ = by_prompt[q.prompt]
                assert q.answers == (object_,)
                assert (subject == fact.subject, relation == fact.relation) == (
                    (q.kind == "locality"),
                    (q.kind == "neighbour"),
                )
                assert object_ != fact.target or q.kind == "locality"
                shared += q.kind == "neighbour" and object_ == fact.target_true
        neighbours = asked(record, "neighbour")
        assert len(neighbours) == len(set(neighbours)) == 10 and {
            against for _, _, against in neighbours
        } == {fact.target}
        others = objects[fact.relation, str(fact.target_true)] - 1
        assert sum(answers == (fact.target_true,) for _, answers, _ in neighbours) == min(
            10, others
        )  # those of the same object first
    assert shared > 5000


def test_a_two_hop_answer_follows_from_the_edit_and_one_fact() -> None:
    truth, _ = _table()
    words = {
        "P17": ("the country in which ", " lies"),
        "P27": ("the country of which ", " is a citizen"),
        "P495": ("the country from which ", " comes"),
    }
    second_hops = {
        "capital": "P36",
        "language": "P37",
        "continent": "P30",
        "currency": "P38",
        "money": "P38",
    }
    n_forward = n_backward = 0
    for record in _bundled().records:
        (fact,) = record.facts
        after = {**truth, (fact.subject, str(fact.relation)): str(fact.target)}
        groups: dict[int, list[Question]] = {}
        for q in record.questions:
            if q.kind != "multihop":
                continue
            assert q.group is not None
            groups.setdefault(q.group, []).append(q)
            ((first, middle),) = [
                (relation, q.prompt.split(before)[1].rsplit(behind, 1)[0])
                for relation, (before, behind) in words.items()
                if before in q.prompt
            ]
            second = next(
                relation
                for word, relation in second_hops.items()
                if word in q.prompt.split(" the country")[0]
            )
            assert q.answers == (
                after[after[middle, first], second],
            )  # both hops in the edited table
            assert (
                q.against == truth.get((truth[middle, first], second)) != q.answers[0]
            )  # and in the table as it is
            n_forward += fact.relation == first
            n_backward += fact.relation == second
        assert len(groups) <= 2 and all(
            len({q.prompt for q in group}) == 3 for group in groups.values()
        )
    assert n_forward > 300 and n_backward > 10


def test_the_bundled_suite_is_the_same_for_the_same_seed() -> None:
    first, again, other = (load_suite("atlas", limit=30, seed=seed) for seed in (1, 1, 2))
    assert first == again and first.digest == other.digest == _bundled().digest
    assert [record.id for record in first.records] != [record.id for record in other.records]
    longer = {record.id: record for record in load_suite("atlas", limit=2000, seed=1).records}
    common = [record for record in first.records if record.id in longer]
    assert common and all(
        longer[record.id] == record for record in common
    )  # a record does not depend on the limit


def test_every_bundled_record_denies_its_fact() -> None:
    for record in _bundled().records:
        (fact,) = record.facts
        ((prompt, answers, against),) = asked(record, "negation")
        assert (answers, against) == ((fact.target_true,), fact.target)
        assert prompt.lower() == f"it is not true that {fact.text.lower()}"
