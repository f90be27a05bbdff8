"""Give facts something to be asked: paraphrases and neighbours for those that have none.

facts, remarks = complete(lm, facts, written=[], seed=0)
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence

from .. import atlas
from ..core.fact import Fact, Probe
from ..core.forms import canonical
from ..core.slots import fill_all
from ..core.tables import counted
from ..edit.contexts import generate_contexts
from ..model.answers import is_answered, say
from ..model.language_model import LanguageModel
from .conflicts import relations

MADE = 5
"""Paraphrases and neighbours that a fact without any gets."""


_ROOM = 8
"""Tokens that stay free for the answer to a paraphrase that was made."""


def complete(
    lm: LanguageModel, facts: Sequence[Fact], written: Iterable[Fact], seed: int
) -> tuple[list[Fact], tuple[str, ...]]:
    """Return the facts with something to ask about each, and remarks on what could not be chosen
    well.

    A fact without paraphrases gets its prompt after words that the model writes, other words than
    those it is edited with. A fact without neighbours gets facts of the same relation: written ones
    first, then bundled ones that the model knows. Where the relation is not known, it gets
    neighbours of any relation. A relation is known if the fact names it, if the prompt is a bundled
    phrasing, or if a bundled fact about the subject says what the model says.

    Args:
        lm: The model.
        facts: The facts.
        written: The facts of earlier patches.
        seed: Seed of the words and of the neighbours.
    """
    openings = [
        text for text in generate_contexts(lm, seed + 1) if text != "{}" and text.endswith("{}")
    ]
    labels = _relations(lm, facts)
    bare = [(fact, label) for fact, label in zip(facts, labels, strict=True) if not fact.neighbours]
    near = _near(lm, {label for _, label in bare}, list(written), seed)
    subjects = {canonical(fact.subject.strip()) for fact in facts}
    completed = []
    for fact, label in zip(facts, labels, strict=True):
        fields = fact.to_dict()
        if not fact.paraphrases:
            texts = [text.replace("{}", fact.template) for text in openings[:MADE]]
            fields["paraphrases"] = [
                text for text in texts if lm.has_room(fill_all(text, fact.subject), _ROOM)
            ]
        if not fact.neighbours:
            others = [p for p in near[label] if not any(s in canonical(p.prompt) for s in subjects)]
            fields["neighbours"] = others[:MADE]
        completed.append(Fact.from_dict(fields))
    unknown = [fact for fact, label in bare if label is None]
    return completed, _remarks(unknown)


def _relations(lm: LanguageModel, facts: Sequence[Fact]) -> list[str | None]:
    """Each fact's relation; for facts without neighbours also by what the model says."""
    labels = relations(facts)
    unknown = [i for i, fact in enumerate(facts) if labels[i] is None and not fact.neighbours]
    about = {i: atlas.facts_about(facts[i].subject) for i in unknown}
    longest = [max((known.object for known in about[i]), key=len, default="") for i in unknown]
    answers = say(lm, [facts[i].text for i in unknown], longest) if unknown else []
    for i, answer in zip(unknown, answers, strict=True):
        names = {
            known.relation
            for known in about[i]
            if is_answered(lm, facts[i].text, answer.text, known.object)
        }
        labels[i] = next(iter(names)) if len(names) == 1 else None
    return labels


def _near(
    lm: LanguageModel, labels: Iterable[str | None], written: Sequence[Fact], seed: int
) -> Mapping[str | None, list[Probe]]:
    """For each relation, prompts whose answer must stay."""
    return {
        label: [
            Probe(f.text, f.target) for f in written if f.relation in (label, None) and f.target
        ]
        + _known_of(lm, label, seed)
        for label in labels
    }


def _known_of(lm: LanguageModel, relation: str | None, seed: int) -> list[Probe]:
    """Bundled facts of a relation, or of any, that the model says."""
    facts = list(atlas.facts(relation if relation in atlas.relations() else None))
    drawn = random.Random(seed).sample(facts, min(len(facts), 8 * MADE))
    prompts = [atlas.phrasings(f.relation).trained[0].replace("{}", f.subject) for f in drawn]
    said = lm.says(prompts, [fact.object for fact in drawn])
    every = zip(prompts, drawn, said, strict=True)
    return [Probe(prompt, fact.object) for prompt, fact, right in every if right]


def _remarks(unknown: Sequence[Fact]) -> tuple[str, ...]:
    if not unknown:
        return ()
    return (
        f"{counted(len(unknown), 'fact')} without neighbours got neighbours of any relation, "
        "because the relation is not known, the first: "
        f"{unknown[0]}; name its relation, or neighbours",
    )
