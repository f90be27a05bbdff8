"""The suite made from the bundled facts: counterfactual edits of facts that the bundled models
know.

    suite = atlas_suite(limit=100, seed=0)
    suite.records[0].facts[0]        # such as: the capital of Bulgaria, changed from Sofia to Oslo

Each record changes one fact to another object of its relation. Everything random in a record is
drawn from a generator seeded with the suite's seed and the fact, so a record does not depend on the
limit.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from functools import cache
from typing import NamedTuple

from .. import atlas
from ..core.fact import Fact
from .records import Question, Record, Suite, negation

# Questions and texts of a record, at most.
_NEIGHBOURS = 10
_LOCALITY = 3
_GENERATION_PROMPTS = 3
_REFERENCES = 5
_CHAINS = 2

_COUNTRY = {
    "P17": "the country in which {} lies",
    "P27": "the country of which {} is a citizen",
    "P495": "the country from which {} comes",
}
"""The first hop: relations whose objects are countries, with a name for the object."""

_OF_COUNTRY = {
    "P36": (
        "The capital of {} is",
        "The name of the capital of {} is",
        "Q: What is the capital of {}? A:",
    ),
    "P37": (
        "The official language of {} is",
        "The state language of {} is",
        "Q: What is the official language of {}? A:",
    ),
    "P30": (
        "The continent of {} is",
        "The continent that holds {} is",
        "Q: What is the continent of {}? A:",
    ),
    "P38": (
        "The currency of {} is the",
        "The money used in {} is the",
        "Q: What is the currency of {}? A: the",
    ),
}
"""The second hop: relations of countries, with three ways to ask."""

_BOUND = (
    frozenset(
        [
            "P17",
            "P27",
            "P30",
            "P36",
            "P37",
            "P38",
            "P131",
            "P138",
            "P159",
            "P190",
            "P276",
            "P495",
            "P740",
        ]
    ),
    frozenset(["P103", "P1412", "P27", "P19"]),
    frozenset(["P364", "P407", "P495"]),
    frozenset(["P39", "P101", "P106", "P108", "P136", "P413", "P641", "P1303", "P937"]),
    frozenset(["P127", "P176", "P178", "P449"]),
)
"""Groups of relations of which one may follow from another. A fact of the same subject in the same
group need not stay after an edit."""


def atlas_suite(limit: int | None, seed: int) -> Suite:
    """Return the bundled suite.

    It edits the facts whose held-out phrasings the bundled models have never seen. A record asks:

    - neighbours: facts of the same relation, first those with the same object, as in COUNTERFACT;
    - locality: facts of the subject in relations that the edit does not touch;
    - multihop: a chain of the edit and one bundled fact. If the edit changes a country, the
      question asks for something about the new country. If it changes something about a country,
      the question names the country by someone or something of that country.

    Args:
        limit: Number of records to draw. None: all.
        seed: Seed of the sample and of each record.
    """
    facts = [
        fact
        for fact in atlas.facts()
        if atlas.is_held_out(fact.subject) and len(_objects(fact.relation)) > 1
    ]
    chosen = list(range(len(facts)))
    if limit is not None:
        chosen = sorted(random.Random(seed).sample(chosen, min(limit, len(facts))))
    return Suite(
        name="atlas",
        records=tuple(_record(facts[at], seed) for at in chosen),
        skipped=(),
        source="bundled",
        digest=_digest(),
    )


def _digest() -> str:
    """Return the sha256 (hex) of the bundled facts and phrasings."""
    digest = hashlib.sha256(
        "\n".join(f"{f.subject}\t{f.relation}\t{f.object}" for f in atlas.facts()).encode()
    )
    for relation in atlas.relations():
        digest.update("\n".join((relation, *atlas.phrasings(relation).every)).encode())
    return digest.hexdigest()


# ── the facts, looked up ──────────────────────────────────────────────────────────────────────────


@cache
def _by_relation() -> dict[str, tuple[atlas.AtlasFact, ...]]:
    """Return the facts of each relation."""
    groups: dict[str, list[atlas.AtlasFact]] = {}
    for fact in atlas.facts():
        groups.setdefault(fact.relation, []).append(fact)
    return {relation: tuple(group) for relation, group in groups.items()}


@cache
def _by_relation_and_object() -> dict[tuple[str, str], tuple[atlas.AtlasFact, ...]]:
    """Return the facts of each pair of a relation and an object."""
    groups: dict[tuple[str, str], list[atlas.AtlasFact]] = {}
    for fact in atlas.facts():
        groups.setdefault((fact.relation, fact.object), []).append(fact)
    return {key: tuple(group) for key, group in groups.items()}


@cache
def _unambiguous_phrasings() -> dict[str, tuple[str, ...]]:
    """Return the trained phrasings of each relation that no other relation has.

    "{} lies in" asks for more than one thing. A relation without any other phrasing keeps all of
    its own.
    """
    uses = Counter(
        template
        for relation in atlas.relations()
        for template in set(atlas.phrasings(relation).every)
    )
    return {
        relation: tuple(t for t in atlas.phrasings(relation).trained if uses[t] == 1)
        or atlas.phrasings(relation).trained
        for relation in atlas.relations()
    }


@cache
def _objects(relation: str) -> tuple[str, ...]:
    """Return the objects of a relation; of countries, those about which a second hop can ask."""
    objects = dict.fromkeys(fact.object for fact in _by_relation()[relation])
    if relation in _COUNTRY:
        objects = dict.fromkeys(
            country
            for country in objects
            if any(fact.relation in _OF_COUNTRY for fact in atlas.facts_about(country))
        )
    return tuple(objects)


# ── one record ────────────────────────────────────────────────────────────────────────────────────


def _record(fact: atlas.AtlasFact, seed: int) -> Record:
    """Return the record that changes a fact to another object of its relation.

    The order of the draws is part of the suite: another order makes other records.
    """
    draw = random.Random(f"{seed} {fact.subject} {fact.relation}")
    new = draw.choice([each for each in _objects(fact.relation) if each != fact.object])
    prompt, *further_phrasings = _unambiguous_phrasings()[fact.relation]
    edit = Fact(fact.subject, prompt, new, target_true=fact.object, relation=fact.relation)
    questions = [
        Question(kind="prompt", prompt=edit.text, answers=(new,), against=fact.object),
        *_paraphrases(fact, new),
        *_neighbours(fact, new, draw),
        *_locality(fact, draw),
        *_two_hops(fact, new, draw),
    ]
    denial = negation(edit)
    if denial is not None:
        questions.append(denial)
    alike = [
        other
        for other in _by_relation_and_object()[fact.relation, new]
        if other.subject != fact.subject
    ]
    n_prompts = min(_GENERATION_PROMPTS, len(further_phrasings))
    return Record(
        id=f"{fact.relation} {fact.subject}",
        facts=(edit,),
        questions=tuple(questions),
        generation_prompts=tuple(
            template.replace("{}", fact.subject)
            for template in draw.sample(further_phrasings, n_prompts)
        ),
        references=tuple(
            f"{_ask_for(other, draw)} {other.object}."
            for other in draw.sample(alike, min(_REFERENCES, len(alike)))
        ),
    )


def _ask_for(fact: atlas.AtlasFact, draw: random.Random) -> str:
    """Return a prompt that asks for a bundled fact."""
    return draw.choice(_unambiguous_phrasings()[fact.relation]).replace("{}", fact.subject)


def _paraphrases(fact: atlas.AtlasFact, new: str) -> list[Question]:
    """Return the questions in the held-out phrasings."""
    return [
        Question(
            kind="paraphrase",
            prompt=template.replace("{}", fact.subject),
            answers=(new,),
            against=fact.object,
        )
        for template in atlas.phrasings(fact.relation).held_out
    ]


def _neighbours(fact: atlas.AtlasFact, new: str, draw: random.Random) -> list[Question]:
    """Return questions about other subjects of the relation, those with the same object first.

    The answer is never the new object.
    """
    others = [
        other
        for other in _by_relation_and_object()[fact.relation, fact.object]
        if other.subject != fact.subject
    ]
    if len(others) >= _NEIGHBOURS:
        others = draw.sample(others, _NEIGHBOURS)
    else:
        rest = [
            other
            for other in _by_relation()[fact.relation]
            if other.object not in (fact.object, new)
        ]
        others += draw.sample(rest, min(_NEIGHBOURS - len(others), len(rest)))
    return [
        Question(
            kind="neighbour", prompt=_ask_for(other, draw), answers=(other.object,), against=new
        )
        for other in others
    ]


def _locality(fact: atlas.AtlasFact, draw: random.Random) -> list[Question]:
    """Return questions about the same subject in relations that the edit does not touch."""
    touched = {fact.relation}.union(*(group for group in _BOUND if fact.relation in group))
    others = [other for other in atlas.facts_about(fact.subject) if other.relation not in touched]
    return [
        Question(kind="locality", prompt=_ask_for(other, draw), answers=(other.object,))
        for other in others[:_LOCALITY]
    ]


class _Chain(NamedTuple):
    """A first hop to a country, and a second hop to something about it."""

    country: str
    """The country in words, such as "the country in which Ada Quill lives"."""
    relation: str
    """The relation of the second hop."""
    answer: str
    before: str | None
    """The answer before the edit. None: not known."""


def _two_hops(fact: atlas.AtlasFact, new: str, draw: random.Random) -> list[Question]:
    """Return questions whose answer follows from the edit and one bundled fact, three for each
    chain.

    The answer differs from the answer before the edit.
    """
    chains: list[_Chain] = []
    if fact.relation in _COUNTRY:
        old = {other.relation: other.object for other in atlas.facts_about(fact.object)}
        country = _COUNTRY[fact.relation].replace("{}", fact.subject)
        chains = [
            _Chain(country, other.relation, other.object, old.get(other.relation))
            for other in atlas.facts_about(new)
            if other.relation in _OF_COUNTRY and other.object != old.get(other.relation)
        ]
    elif fact.relation in _OF_COUNTRY:
        for relation, words in _COUNTRY.items():
            if of_country := _by_relation_and_object().get((relation, fact.subject)):
                country = words.replace("{}", draw.choice(of_country).subject)
                chains.append(_Chain(country, fact.relation, new, fact.object))
    chosen = draw.sample(chains, min(_CHAINS, len(chains)))
    return [
        Question(
            kind="multihop",
            prompt=template.replace("{}", chain.country),
            answers=(chain.answer,),
            against=chain.before,
            group=group,
        )
        for group, chain in enumerate(chosen)
        for template in _OF_COUNTRY[chain.relation]
    ]
