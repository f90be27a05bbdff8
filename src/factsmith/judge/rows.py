"""judge.rows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from .records import QuestionKind

BASE = "base"
"""The model as it was."""

STAYING: tuple[QuestionKind, ...] = ("neighbour", "locality")

PROBE = "probe: "

BROKEN = "broken"

LOWEST = -1e4
"""Stands for both log-probabilities of a comparison where a model gives no finite number: neither side is the likelier, exp of it is 0."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One question asked once.

    editor, unit  which editor had written, and which of its edits the model carried: a record, a batch or a round, from 0; -1: none
    record, kind, group, prompt  the question
    written       the unit in which the question's record was written
    answer        what the model said
    exact         whether that is right: it begins with an answer; for a negation, that it does not begin with what was written
    stayed        of what must stay, whether it says what it said before any edit; None for other kinds, and for the base model
    log_wanted    mean log-probability a token of the first right answer; None where there is none, `LOWEST` where it is no finite number
    log_against   of the other side of the comparison; None where there is none, `LOWEST` where either side's is no finite number
    tokens        share of the right answer's tokens that are the likeliest in their place, each after those before it (teacher forced);
                  None for a negation, to which more than one thing is right; 0 from a model that gives no finite numbers
    """

    editor: str
    unit: int
    record: str
    kind: QuestionKind
    group: int | None
    prompt: str
    written: int
    answer: str
    exact: bool | None
    stayed: bool | None
    log_wanted: float | None
    log_against: float | None
    tokens: float | None

    @property
    def success(self) -> bool | None:
        """Whether the wanted side of the comparison is the likelier; for a negation, the side that was not written."""
        return (
            None
            if self.log_wanted is None or self.log_against is None
            else self.log_wanted > self.log_against
        )

    @property
    def broken(self) -> bool:
        """Whether the model gave no finite number here: what it was asked counts as wrong."""
        return LOWEST in (self.log_wanted, self.log_against)


@dataclass(frozen=True, kw_only=True)
class Continuation:
    """What a model wrote when it was given a record's generation prompts to go on from.

    editor, unit, record  as in `Row`
    texts        one a prompt, which it begins with
    entropy      n-gram entropy in bits, the mean over the texts: low when the model repeats itself
    consistency  with the record's references, in [0, 1]; None where it has none
    """

    editor: str
    unit: int
    record: str
    texts: tuple[str, ...]
    entropy: float
    consistency: float | None


@dataclass(frozen=True)
class Share:
    """A mean over questions (of entropies, in bits): of n of them, with its 95 % bootstrap interval over records."""

    value: float
    low: float
    high: float
    n: int


def finite_numbers(notes: object) -> dict[str, float]:
    """What of some notes are finite numbers."""
    found = notes if isinstance(notes, Mapping) else {}
    return {
        str(name): float(value)
        for name, value in found.items()
        if isinstance(value, (int, float)) and math.isfinite(value)
    }
