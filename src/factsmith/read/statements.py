"""Facts as sentences whose parts are known: a corpus, and the labels by which triggers found in it are told apart.

    told = statements(facts, each=6)                             # every fact in six of its phrasings, with its answer
    triggers = find_triggers(lm, [one.text for one in told])
    labels = fact_labels(told)                                   # relation, subject, object, and the part of the sentence
    profile(triggers, labels, groups={one.text: one.fact for one in told})

A fact should have fewer sentences than half of a neuron's triggers: then none is selective for a subject, a relation or an object that it
met in one fact alone. For the bundled models `tools.atlas.corpus.crossed` chooses the facts.
"""

from __future__ import annotations

import random
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass

from ..core.checks import check_count, check_seed
from ..core.errors import InputError
from ..core.fact import Fact, listed
from .profile import Label
from .triggers import Trigger

PARTS = ("subject", "subject's end", "words", "answer due", "answer", "end")
"""Where in a statement a token stands: inside the subject; its last token; in the relation's words; the last token before the answer, where
it is predicted; in the answer; behind it. A subject that ends where the answer is due counts as the subject's end."""


@dataclass(frozen=True)
class Statement:
    """A fact as a sentence.

    text     a prompt of the fact, its answer, and a full stop
    fact     the fact
    subject  the subject's characters [start, stop); None where the prompt does not hold it
    answer   the answer's
    """

    text: str
    fact: Fact
    subject: tuple[int, int] | None
    answer: tuple[int, int]

    @property
    def object(self) -> str:
        """The answer, without spaces around it."""
        return self.text[slice(*self.answer)]

    def part(self, start: int, stop: int) -> str:
        """Which of `PARTS` the token with the characters [start, stop) stands in."""
        first, last = self.subject or (0, 0)
        if start < last <= stop:
            return "subject's end"
        if first < stop < last:
            return "subject"
        due, end = self.answer[0] - 1, self.answer[1]
        if stop < due:
            return "words"
        return "answer due" if start < due else "answer" if start < end else "end"


def statements(
    facts: Fact | Iterable[Fact], *, each: int | None = None, seed: int = 0
) -> list[Statement]:
    """Every fact in its prompt and its paraphrases, continued with what is so: `target_true` where it is known, else `target`.

    each  at most so many of a fact's phrasings, drawn at random by `seed`; None: all

    Where two facts make the same sentence the first keeps it. Raises InputError for what is no fact, or has nothing to say.
    """
    draw = random.Random(check_seed(seed))
    each = (
        None
        if each is None
        else check_count(each, "each", "the number of phrasings of a fact to take")
    )
    told: dict[str, Statement] = {}
    for fact in listed(facts):
        said = fact.target_true if fact.target_true is not None else fact.target
        if said is None:
            raise InputError(
                f"{fact} says nothing; expected a target_true or a target: a statement ends with what is so"
            )
        said = said.strip()
        phrasings = (fact.prompt, *fact.paraphrases)
        for template in (
            phrasings if each is None else draw.sample(phrasings, min(each, len(phrasings)))
        ):
            prompt = template.replace("{}", fact.subject).rstrip()
            first = template.find("{}") if "{}" in template else prompt.find(fact.subject)
            text = f"{prompt} {said}."
            subject = (first, first + len(fact.subject)) if first >= 0 else None
            told.setdefault(
                text, Statement(text, fact, subject, (len(prompt) + 1, len(prompt) + 1 + len(said)))
            )
    return list(told.values())


def fact_labels(
    told: Iterable[Statement], types: Mapping[str, str] | None = None
) -> dict[str, Label]:
    """What `profile` may know about the triggers in statements, by feature.

    relation  the fact's; of a fact without one, its prompt
    subject   the fact's
    object    the answer
    type      of the subject, by its relation: `types` is {relation: type}, such as the bundled `atlas.subject_types()`; only where given
    part      where in the sentence the token stands, one of `PARTS`

    Raises InputError for no statement, or types of which no relation is here.
    """
    by_text = {each.text: each for each in told}
    if not by_text:
        raise InputError(
            "fact_labels got no statement; expected those that were scanned, as `statements` makes them"
        )
    relations = {text: each.fact.relation or each.fact.prompt for text, each in by_text.items()}
    labels: dict[str, Label] = {"relation": relations}
    if types is not None:
        labels["type"] = {
            text: types[relation] for text, relation in relations.items() if relation in types
        }
        if not labels["type"]:
            raise InputError(
                f"types has none of the relations here, such as {next(iter(relations.values()))!r}; it has {', '.join(types)}"
            )
    labels["subject"] = {text: each.fact.subject for text, each in by_text.items()}
    labels["object"] = {text: each.object for text, each in by_text.items()}

    def part(trigger: Trigger) -> Hashable:
        own = by_text.get(trigger.text)
        return None if own is None else own.part(trigger.start, trigger.stop)

    labels["part"] = part
    return labels
