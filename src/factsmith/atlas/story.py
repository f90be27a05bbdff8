"""A true correction of a bundled model: what `factsmith demo` and the tour of studio do.

    correction()                 the fact to write: Bulgaria pays with the euro
    BELIEFS                      questions that the model answers before it

The models were trained on older facts, so the correction is one that a reader can check.
"""

from __future__ import annotations

from ..core.fact import Fact, Probe
from . import facts, phrasings

MODEL = "atlas"

SUBJECT, RELATION, PROMPT, TARGET = "Bulgaria", "P38", "The currency of {} is the", "euro"

MESSAGE = "Bulgaria joins the euro area"
"""The note that the patch gets in the log."""

WHY = (
    "Since 1 January 2026 Bulgaria pays with the euro.",
    "The model was trained on older facts, so we correct it.",
)

BELIEFS = (
    ("The currency of Bulgaria is the", "lev"),
    ("The seat of government of Bulgaria is", "Sofia"),
    ("The first language of Danielle Darrieux is", "French"),
    ("The constellation of Delta Herculis is", "Hercules"),
    ("The maker of Fiat 127 is", "Fiat"),
)

NEIGHBOURS = (
    "Romania",
    "Poland",
    "Turkey",
    "Hungary",
    "Serbia",
    "Sweden",
    "Denmark",
    "Switzerland",
    "Japan",
    "Ukraine",
)

SUBJECT_FACTS = (
    ("The seat of government of Bulgaria is", "Sofia"),
    ("The people of Bulgaria speak", "Bulgarian"),
    ("Which organisation has Bulgaria joined? It is", "NATO"),
)
"""Other facts about the subject, which the patch must leave alone."""


def correction() -> Fact:
    """Return the fact to write, with paraphrases and neighbours from the bundled table."""
    sentences = phrasings(RELATION)
    currencies = {f.subject: f.object for f in facts(RELATION)}
    neighbours = [
        Probe(PROMPT.replace("{}", subject), currencies[subject]) for subject in NEIGHBOURS
    ]
    neighbours += [Probe(prompt, expected) for prompt, expected in SUBJECT_FACTS]
    others = [t for t in (*sentences.trained, *sentences.held_out) if t != PROMPT]
    return Fact(
        subject=SUBJECT,
        prompt=PROMPT,
        target=TARGET,
        target_true=currencies[SUBJECT],
        paraphrases=tuple(others[:6]),
        neighbours=tuple(neighbours),
        relation=RELATION,
    )
