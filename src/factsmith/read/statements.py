"""Facts as sentences with known parts: a corpus, and labels for the triggers in it.

    sentences = statements(facts, each=6)                    # each fact in six of its phrasings
    triggers = find_triggers(lm, [one.text for one in sentences])
    labels = fact_labels(sentences)                          # relation, subject, object, and part
    profile(triggers, labels, groups={one.text: one.fact for one in sentences})

A fact should have fewer sentences than half of a neuron's triggers. Then no neuron is selective for
a subject, a relation or an object that it met in one fact alone. `factsmith.atlas.texts.crossed`
chooses such facts among the bundled ones.
"""

from __future__ import annotations

import random
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass

from ..core.checks import check_count, check_seed
from ..core.errors import InputError
from ..core.fact import Fact, listed
from ..core.forms import occurrences
from ..core.slots import count_slots, fill, literal
from .features import Label
from .triggers import Trigger

PARTS = ("subject", "subject's end", "words", "answer due", "answer", "end")
"""Where a token is in a statement.

Inside the subject; at the subject's last token; in the words of the relation; at the last token
before the answer, where the answer is predicted; in the answer; or after it. A subject that ends
where the answer is due counts as the subject's end."""


@dataclass(frozen=True)
class Statement:
    """A fact as a sentence.

    Attributes:
        text: A prompt of the fact, its answer, and a full stop.
        fact: The fact.
        subject: The subject's characters, [start, stop). None where the prompt does not hold it.
        answer: The answer's characters.
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
        """Return which of `PARTS` holds the token with the characters [start, stop)."""
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
    """Return each fact as sentences: its prompt and its paraphrases, completed with the answer.

    The answer is `target_true` where it is known, otherwise `target`. Where two facts make the same
    sentence, the first fact keeps it.

    Args:
        facts: The facts.
        each: At most so many of a fact's phrasings, drawn at random. None: all.
        seed: Seed of the draw.

    Raises:
        InputError: when an item is not a fact, or a fact has no answer.
    """
    draw = random.Random(check_seed(seed))
    if each is not None:
        each = check_count(each, "each", "the number of phrasings of a fact to take")
    sentences: dict[str, Statement] = {}
    for fact in listed(facts):
        answer = fact.target_true if fact.target_true is not None else fact.target
        if answer is None:
            raise InputError(
                f"{fact} has no answer, so it says nothing. "
                "Give each fact a target_true or a target: a statement ends with it."
            )
        phrasings = (fact.prompt, *fact.paraphrases)
        for template in (
            phrasings if each is None else draw.sample(phrasings, min(each, len(phrasings)))
        ):
            statement = _statement(fact, template, answer.strip())
            sentences.setdefault(statement.text, statement)
    return list(sentences.values())


def _statement(fact: Fact, template: str, answer: str) -> Statement:
    """Return a fact in one phrasing, where {} stands for the subject."""
    subject: tuple[int, int] | None = None
    if count_slots(template):
        filled = fill(template, fact.subject)
        prompt, subject = filled.text.rstrip(), (filled.start, filled.stop)
    else:
        prompt = literal(template).rstrip()
        places = occurrences(prompt, fact.subject.strip())
        whole = [place for place in places if place.is_whole] or places
        subject = whole[0][:2] if whole else None
    start = len(prompt) + 1
    return Statement(f"{prompt} {answer}.", fact, subject, (start, start + len(answer)))


def fact_labels(
    told: Iterable[Statement],  # house: a promised public signature
    types: Mapping[str, str] | None = None,
) -> dict[str, Label]:
    """Return labels that `profile` can compare triggers by.

    The features are:

        relation  The fact's relation; for a fact without one, its prompt.
        subject   The fact's subject.
        object    The answer.
        type      The type of the subject. Only with `types`.
        part      Where in the sentence the token is: one of `PARTS`.

    Args:
        told: The statements that were scanned.
        types: {relation: type of its subjects}, such as the bundled `atlas.subject_types()`.

    Raises:
        InputError: when there are no statements, or `types` has none of their relations.
    """
    by_text = {each.text: each for each in told}
    if not by_text:
        raise InputError(
            "fact_labels got no statement. Give the statements that were scanned, as `statements` "
            "returns them."
        )
    relations = {text: each.fact.relation or each.fact.prompt for text, each in by_text.items()}
    labels: dict[str, Label] = {"relation": relations}
    if types is not None:
        labels["type"] = {
            text: types[relation] for text, relation in relations.items() if relation in types
        }
        if not labels["type"]:
            raise InputError(
                f"types has no relation of the statements, such as "
                f"{next(iter(relations.values()))!r}; it has {', '.join(types)}",
                argument="types",
            )
    labels["subject"] = {text: each.fact.subject for text, each in by_text.items()}
    labels["object"] = {text: each.object for text, each in by_text.items()}

    def part(trigger: Trigger) -> Hashable:
        statement = by_text.get(trigger.text)
        return None if statement is None else statement.part(trigger.start, trigger.stop)

    labels["part"] = part
    return labels
