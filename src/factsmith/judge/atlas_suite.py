"""judge.atlas_suite."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from functools import cache

from .. import atlas
from ..core.fact import Fact
from .records import Question, Record, Suite, negation

# ── made from the bundled facts ─────────────────────────────────────────────────────────────────────────────────────────

_NEIGHBOURS, _SAME_SUBJECT, _GENERATED, _REFERENCES, _CHAINS = (
    10,
    3,
    3,
    5,
    2,
)  # at most so many a record

_COUNTRY = {
    "P17": "the country in which {} lies",
    "P27": "the country of which {} is a citizen",
    "P495": "the country from which {} comes",
}
"""Relations whose objects are countries, as a name for the object: the first hop."""

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
"""What is asked of a country in a second hop, three ways each."""

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
"""Relations of which one may follow from another: an edit of one is no reason for the others to stay."""


@cache
def _by_relation() -> dict[str, tuple[atlas.AtlasFact, ...]]:
    groups: dict[str, list[atlas.AtlasFact]] = {}
    for fact in atlas.facts():
        groups.setdefault(fact.relation, []).append(fact)
    return {relation: tuple(group) for relation, group in groups.items()}


@cache
def _sharing() -> dict[tuple[str, str], tuple[atlas.AtlasFact, ...]]:
    """Facts by (relation, object)."""
    groups: dict[tuple[str, str], list[atlas.AtlasFact]] = {}
    for fact in atlas.facts():
        groups.setdefault((fact.relation, fact.object), []).append(fact)
    return {key: tuple(group) for key, group in groups.items()}


@cache
def _own_phrasings() -> dict[str, tuple[str, ...]]:
    """The trained phrasings of a relation that no other relation has: "{} lies in" asks for more than one thing."""
    used = Counter(
        template
        for relation in atlas.relations()
        for template in set(atlas.phrasings(relation).every)
    )
    return {
        relation: tuple(t for t in atlas.phrasings(relation).trained if used[t] == 1)
        or atlas.phrasings(relation).trained
        for relation in atlas.relations()
    }


def atlas_suite(limit: int | None, seed: int) -> Suite:
    """The bundled suite: counterfactual edits of facts whose held-out phrasings the models were never told.

    A record's new object is another object of its relation (of those with something further known of them, where a chain can be asked). Its
    neighbours are facts of the same relation, first those with the same object, as COUNTERFACT's all are; locality is asked of the
    subject's facts in relations that the edit has no bearing on. A two-hop question joins the edit and one bundled fact: an edited country
    with what is known of the new one, or what is edited of a country with someone or something of that country. A record is the same
    whatever the limit.
    """
    told = [
        fact
        for fact in atlas.facts()
        if atlas.is_held_out(fact.subject) and len(_objects(fact.relation)) > 1
    ]
    chosen = (
        range(len(told))
        if limit is None
        else sorted(random.Random(seed).sample(range(len(told)), min(limit, len(told))))
    )
    digest = hashlib.sha256(
        "\n".join(f"{f.subject}\t{f.relation}\t{f.object}" for f in atlas.facts()).encode()
    )
    for relation in atlas.relations():
        digest.update("\n".join((relation, *atlas.phrasings(relation).every)).encode())
    records = tuple(_atlas_record(told[at], seed) for at in chosen)
    return Suite(
        name="atlas", records=records, skipped=(), source="bundled", digest=digest.hexdigest()
    )


@cache
def _objects(relation: str) -> tuple[str, ...]:
    """The objects of a relation; where that is a country, those of which something further is known."""
    objects = dict.fromkeys(fact.object for fact in _by_relation()[relation])
    if relation in _COUNTRY:
        objects = dict.fromkeys(
            each
            for each in objects
            if any(fact.relation in _OF_COUNTRY for fact in atlas.facts_about(each))
        )
    return tuple(objects)


def _atlas_record(fact: atlas.AtlasFact, seed: int) -> Record:
    draw = random.Random(f"{seed} {fact.subject} {fact.relation}")
    new = draw.choice([each for each in _objects(fact.relation) if each != fact.object])
    prompt, *others = _own_phrasings()[fact.relation]
    edit = Fact(fact.subject, prompt, new, target_true=fact.object, relation=fact.relation)
    asked = [Question(kind="prompt", prompt=edit.text, answers=(new,), against=fact.object)]
    for template in atlas.phrasings(fact.relation).held_out:
        asked.append(
            Question(
                kind="paraphrase",
                prompt=template.replace("{}", fact.subject),
                answers=(new,),
                against=fact.object,
            )
        )
    for other in _neighbours(fact, new, draw):
        asked.append(
            Question(
                kind="neighbour", prompt=_put(other, draw), answers=(other.object,), against=new
            )
        )
    bound = {fact.relation}.union(*(group for group in _BOUND if fact.relation in group))
    free = [other for other in atlas.facts_about(fact.subject) if other.relation not in bound]
    for other in free[:_SAME_SUBJECT]:
        asked.append(Question(kind="locality", prompt=_put(other, draw), answers=(other.object,)))
    asked += _two_hops(fact, new, draw)
    denied = negation(edit)
    alike = [other for other in _sharing()[fact.relation, new] if other.subject != fact.subject]
    return Record(
        id=f"{fact.relation} {fact.subject}",
        facts=(edit,),
        questions=(*asked, *([] if denied is None else [denied])),
        generation_prompts=tuple(
            t.replace("{}", fact.subject) for t in draw.sample(others, min(_GENERATED, len(others)))
        ),
        references=tuple(
            f"{_put(other, draw)} {other.object}."
            for other in draw.sample(alike, min(_REFERENCES, len(alike)))
        ),
    )


def _put(fact: atlas.AtlasFact, draw: random.Random) -> str:
    """A prompt that asks for a bundled fact."""
    return draw.choice(_own_phrasings()[fact.relation]).replace("{}", fact.subject)


def _neighbours(fact: atlas.AtlasFact, new: str, draw: random.Random) -> list[atlas.AtlasFact]:
    """Facts of the relation about others, those with the same object first; none whose object is the new one."""
    same = [
        other for other in _sharing()[fact.relation, fact.object] if other.subject != fact.subject
    ]
    if len(same) >= _NEIGHBOURS:
        return draw.sample(same, _NEIGHBOURS)
    rest = [
        other for other in _by_relation()[fact.relation] if other.object not in (fact.object, new)
    ]
    return same + draw.sample(rest, min(_NEIGHBOURS - len(same), len(rest)))


def _two_hops(fact: atlas.AtlasFact, new: str, draw: random.Random) -> list[Question]:
    """Questions whose answer follows from the edit and one bundled fact, and is not what was so before; three ways to ask each."""
    cases: list[
        tuple[str, str, str, str | None]
    ] = []  # (the country in words, what is asked of it, the answer now, the answer before)
    if fact.relation in _COUNTRY:
        old = {other.relation: other.object for other in atlas.facts_about(fact.object)}
        for other in atlas.facts_about(new):
            if other.relation in _OF_COUNTRY and other.object != old.get(other.relation):
                country = _COUNTRY[fact.relation].replace("{}", fact.subject)
                cases.append((country, other.relation, other.object, old.get(other.relation)))
    elif fact.relation in _OF_COUNTRY:
        for relation, words in _COUNTRY.items():
            if inside := _sharing().get((relation, fact.subject)):
                cases.append(
                    (
                        words.replace("{}", draw.choice(inside).subject),
                        fact.relation,
                        new,
                        fact.object,
                    )
                )
    return [
        Question(
            kind="multihop",
            prompt=template.replace("{}", country),
            answers=(answer,),
            against=before,
            group=group,
        )
        for group, (country, relation, answer, before) in enumerate(
            draw.sample(cases, min(_CHAINS, len(cases)))
        )
        for template in _OF_COUNTRY[relation]
    ]
