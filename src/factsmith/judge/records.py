"""judge.records."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

from ..core.checks import check_text
from ..core.errors import InputError
from ..core.fact import Fact
from ..core.tables import counted

QuestionKind = Literal[
    "prompt",
    "paraphrase",
    "neighbour",
    "reasoning",
    "aliasing",
    "relation",
    "multihop",
    "locality",
    "negation",
]
"""prompt, paraphrase: the fact that was written. neighbour: another subject, same relation; must stay. reasoning, aliasing, relation: what
follows from the fact, by a further fact, another name of its subject, another relation ("portability"). multihop: a chain of facts of which
some were written. locality: anything else that must stay. negation: the fact denied ("It is not true that ..."), see `negation`."""

MOST = 20_000  # characters of a text, as in `Fact`


@dataclass(frozen=True, kw_only=True)
class Question:
    """One thing to ask after an edit.

    kind     what it tests, one of `QuestionKind`
    prompt   whole text, to be continued by the answer
    answers  any of them is right after the edit, the object first, then its aliases; for neighbour and locality what must stay. (): known
             only as "what the model said before" (neighbour, locality), or nothing in particular (negation)
    against  the other side of a two-way comparison: for prompt and paraphrase the true object, for a neighbour, and under a negation, the
             new one; for a multi-hop question what its answer was. None where there is none
    group    of a record's questions, those of one number are ways to ask the same thing and any of them may hit (MQuAKE); None: it stands
             alone

    Raises InputError for an unknown kind or an empty text, or no answer where one is needed.
    """

    kind: QuestionKind
    prompt: str
    answers: tuple[str, ...]
    against: str | None = None
    group: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(QuestionKind):
            raise InputError(
                f"a question of kind {self.kind!r}; expected one of {', '.join(get_args(QuestionKind))}"
            )
        for text in (self.prompt, *self.answers, *([] if self.against is None else [self.against])):
            if (
                not check_text(text, f"a text of a {self.kind} question").strip()
                or len(text) > MOST
            ):
                raise InputError(
                    f"a text of a {self.kind} question has {len(text)} characters; expected some, at most {MOST:,}"
                )
        if not self.answers and self.kind not in ("neighbour", "locality", "negation"):
            raise InputError(
                f"{self.kind} question {self.prompt!r} has no answer; expected at least one that is right after the edit"
            )


@dataclass(frozen=True, kw_only=True)
class Record:
    """What belongs together in a benchmark: what is written, and what is asked about it.

    id                  unique in its suite
    facts               to be written, one or more (MQuAKE); a fact without a target (layout "known") is only asked for
    questions           in the file's order
    generation_prompts  to be continued freely, for n-gram entropy and consistency
    references          texts to compare the continuations with; () where the benchmark's file has none
    """

    id: str
    facts: tuple[Fact, ...]
    questions: tuple[Question, ...]
    generation_prompts: tuple[str, ...] = ()
    references: tuple[str, ...] = ()


@dataclass(frozen=True)
class Malformed:
    """What of a file could not be used: a record, or a question of one (its `field` says which), and why.

    index  of the record in the file, from 0
    field  such as "requested_rewrite.target_new.str"; "" where the record is none at all
    whole  whether all of the record is left out; else it is used without what this is
    """

    file: str
    index: int
    field: str
    message: str
    whole: bool = True

    def __str__(self) -> str:
        return f"{self.file}, record {self.index}: {self.field} {self.message}".replace(":  ", ": ")


@dataclass(frozen=True, kw_only=True)
class Suite:
    """Records to judge edits by.

    name     the layout, or "atlas"
    records  in the file's order
    skipped  what could not be used of the records that were looked at
    source   the path, hub id, or "bundled"
    digest   sha256 (hex) of the file's bytes, or of the bundled facts and phrasings
    """

    name: str
    records: tuple[Record, ...]
    skipped: tuple[Malformed, ...]
    source: str
    digest: str

    @property
    def left_out(self) -> str:
        """How much was malformed, in words: "2 records, 1 question of others"; "" where nothing was."""
        whole = len({each.index for each in self.skipped if each.whole})
        parts = len(self.skipped) - sum(each.whole for each in self.skipped)
        told = [
            (whole, counted(whole, "record")),
            (parts, counted(parts, "question") + (" of others" if whole else "")),
        ]
        return ", ".join(text for n, text in told if n)


def negation(fact: Fact) -> Question | None:
    """The fact denied: "It is not true that" before its prompt. None where that makes no sentence: a question, or a prompt like "{}, the".

    What was written must now *not* follow: `against` is the new object, `answers` the old one where it is known, which is so no longer once
    the new one holds. An edit that ties the object to the words in front of it, whatever stands before them, fails.
    After Liu et al. 2025, "Is Model Editing Built on Sand?" (arXiv 2510.00625): editors collapse on such queries.
    """
    if fact.target is None or "?" in fact.prompt or fact.prompt.startswith("{},"):
        return None
    prompt = (
        fact.prompt[0].lower() + fact.prompt[1:] if _OPENERS.match(fact.prompt) else fact.prompt
    )
    return Question(
        kind="negation",
        prompt=f"It is not true that {prompt.replace('{}', fact.subject)}",
        answers=() if fact.target_true is None else (fact.target_true,),
        against=fact.target,
    )


_OPENERS = re.compile(
    "(A|An|As|At|By|During|For|From|Her|His|In|Its|Of|On|Our|That|The|Their|This|To|Under|With) "
)  # none is a name
