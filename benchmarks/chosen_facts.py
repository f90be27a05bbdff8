"""Real facts that a model knows: some to edit, and others to ask again after the edits.

    facts, others = chosen(lm, count=100, seed=0, others=2000)

`methods.py` and `capacity.py` use them. The same arguments give the same facts.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache

from factsmith import atlas
from factsmith.core.fact import Fact
from factsmith.model.language_model import LanguageModel


def chosen(
    lm: LanguageModel, count: int, seed: int, others: int
) -> tuple[list[Fact], list[tuple[str, str]]]:
    """Return `count` edits, and (prompt, object) of up to `others` known facts outside them."""
    draw = random.Random(seed)
    pool = list(atlas.facts())
    draw.shuffle(pool)
    facts: list[Fact] = []
    seen: set[tuple[str, str]] = set()
    for first in range(0, len(pool), 500):
        if len(facts) >= count:
            break
        some = [f for f in pool[first : first + 500] if (f.subject, f.relation) not in seen]
        for fact, templates in known_templates(lm, some).items():
            if (fact.subject, fact.relation) in seen:
                continue
            if (edited := counterfact(fact, templates, draw)) is not None:
                seen.add((fact.subject, fact.relation))
                facts.append(edited)
    facts = facts[:count]
    edits = {(fact.subject, fact.relation) for fact in facts}
    rest = [f for f in pool if (f.subject, f.relation) not in edits]
    rest = rest[: 2 * others] if others else rest
    prompts = [
        draw.choice(atlas.phrasings(f.relation).trained).replace("{}", f.subject) for f in rest
    ]
    said = lm.says(prompts, [f.object for f in rest])
    kept = [(p, f.object) for p, f, right in zip(prompts, rest, said, strict=True) if right]
    return facts, kept[:others] if others else kept


def same_subject(lm: LanguageModel, facts: Sequence[Fact], seed: int) -> list[tuple[str, str]]:
    """Return (prompt, object) of the known facts about edited subjects in other relations."""
    draw = random.Random(seed)
    edits = {(fact.subject, fact.relation) for fact in facts}
    rest = [
        other
        for subject in sorted({fact.subject for fact in facts})
        for other in atlas.facts_about(subject)
        if (subject, other.relation) not in edits
    ]
    prompts = [
        draw.choice(atlas.phrasings(f.relation).trained).replace("{}", f.subject) for f in rest
    ]
    said = lm.says(prompts, [f.object for f in rest]) if rest else []
    return [(p, f.object) for p, f, right in zip(prompts, rest, said, strict=True) if right]


def known_templates(
    lm: LanguageModel, facts: Sequence[atlas.AtlasFact]
) -> dict[atlas.AtlasFact, list[str]]:
    """Return for each fact the phrasings in which the model knows it, if there are any."""
    pairs = []
    for fact in facts:
        phrasings = atlas.phrasings(fact.relation)
        pairs += [(fact, template) for template in (*phrasings.trained, *phrasings.held_out)]
    prompts = [template.replace("{}", fact.subject) for fact, template in pairs]
    said = lm.says(prompts, [fact.object for fact, _ in pairs])
    known: dict[atlas.AtlasFact, list[str]] = {}
    for (fact, template), right in zip(pairs, said, strict=True):
        if right:
            known.setdefault(fact, []).append(template)
    return known


def counterfact(fact: atlas.AtlasFact, templates: list[str], draw: random.Random) -> Fact | None:
    """Return a fact with another object of its relation, and up to 5 other phrasings.

    None if the model does not know the first phrasing and another one, or if there is no object
    that the subject has nothing to do with.
    """
    phrasings = atlas.phrasings(fact.relation)
    near = {other.object for other in atlas.facts_about(fact.subject)}
    targets = [target for target in objects_of(fact.relation) if target not in near]
    if templates[0] != phrasings.trained[0] or len(templates) < 2 or not targets:
        return None
    held_out = [template for template in templates if template in phrasings.held_out]
    trained = [template for template in templates[1:] if template not in held_out]
    other = [*held_out, *draw.sample(trained, min(3, len(trained)))][:5]
    return Fact(
        fact.subject,
        templates[0],
        draw.choice(targets),
        target_true=fact.object,
        paraphrases=other,
        relation=fact.relation,
    )


@cache
def objects_of(relation: str) -> list[str]:
    """Return all objects of a relation, in alphabetical order."""
    return sorted({fact.object for fact in atlas.facts(relation)})
