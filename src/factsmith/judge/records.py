"""Records: the facts that a benchmark writes into a model, and the questions that it asks
afterwards.

    fact = Fact("Ada Quill", "{} lives in", "Oslo", target_true="Rome")
    question = Question(kind="prompt", prompt=fact.text, answers=("Oslo",), against="Rome")
    record = Record(id="1", facts=(fact,), questions=(question, negation(fact)))
    suite = Suite(name="own", records=(record,), skipped=(), source="by hand", digest="0")

`load_suite` reads suites from files; see `suites.py`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

from ..core.checks import check_text
from ..core.errors import InputError
from ..core.fact import Fact
from ..core.slots import fill_all
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
"""What a question tests.

prompt, paraphrase: the fact that was written. neighbour: another subject in the same relation,
which must stay. reasoning, aliasing, relation: what follows from the fact by a further fact, by
another name of its subject, or in another relation ("portability"). multihop: a chain of facts, of
which some were written.
locality: anything else that must stay. negation: the fact denied ("It is not true that ...").
"""

LONGEST_TEXT = 20_000
"""Characters that a text of a question may have, as in `Fact`."""

_NEEDS_NO_ANSWER = ("neighbour", "locality", "negation")


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question to ask after an edit.

    Attributes:
        kind: What the question tests.
        prompt: Whole text, which the answer continues.
        answers: The answers that are right after the edit: the object first, then its aliases. For
            a neighbour or locality question, the answers that must stay; () if any answer of the
            unedited model must stay. For a negation, () if no answer in particular is right.
        against: The other side of a two-way comparison. For prompt and paraphrase questions it is
            the old object. For neighbour questions and negations it is the new object. For a
            multi-hop question it is the answer before the edit. None: the question has no
            comparison.
        group: Questions of a record with the same number ask the same thing in several ways, and
            one hit is enough (MQuAKE). None: the question counts by itself.

    Raises:
        InputError: when the kind is unknown, a text is empty or too long, or an answer is missing.
    """

    kind: QuestionKind
    prompt: str
    answers: tuple[str, ...]
    against: str | None = None
    group: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(QuestionKind):
            raise InputError(
                f"the kind of a question is {self.kind!r}; it must be one of "
                f"{', '.join(get_args(QuestionKind))}",
                argument="kind",
            )
        for text in (self.prompt, *self.answers, *([] if self.against is None else [self.against])):
            is_blank = not check_text(text, f"a text of a {self.kind} question").strip()
            if is_blank or len(text) > LONGEST_TEXT:
                raise InputError(
                    f"a text of a {self.kind} question has {len(text):,} characters, "
                    f"{'all of them blank' if is_blank else 'too many'}; "
                    f"give a text of at most {LONGEST_TEXT:,} characters"
                )
        if not self.answers and self.kind not in _NEEDS_NO_ANSWER:
            raise InputError(
                f"the {self.kind} question {self.prompt!r} has no answer; "
                "give at least one that is right after the edit",
                argument="answers",
            )


@dataclass(frozen=True, kw_only=True)
class Record:
    """The facts that are written together, and the questions about them.

    Attributes:
        id: Name of the record, unique in its suite.
        facts: One or more facts to write (MQuAKE has several). A fact without a target is only
            asked for (layout "known").
        questions: In the order of the file.
        generation_prompts: Prompts that the model continues freely, for n-gram entropy and
            consistency.
        references: Texts to compare the continuations with; () if the benchmark's file has none.
    """

    id: str
    facts: tuple[Fact, ...]
    questions: tuple[Question, ...]
    generation_prompts: tuple[str, ...] = ()
    references: tuple[str, ...] = ()


@dataclass(frozen=True)
class Malformed:
    """A record of a file that cannot be used, or a part of one, with the reason.

    Attributes:
        file: Name of the file.
        index: Number of the record in the file, from 0.
        field: Name of the field, such as "requested_rewrite.target_new.str"; "" for the whole
            record.
        message: The reason, which continues the field's name.
        whole: Whether the whole record is left out. Otherwise the record is used without this part.
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

    Attributes:
        name: Name of the layout, or "atlas".
        records: In the order of the file.
        skipped: The malformed parts of the records that were read.
        source: Path, hub id, or "bundled".
        digest: sha256 (hex) of the file's bytes, or of the bundled facts and phrasings.
    """

    name: str
    records: tuple[Record, ...]
    skipped: tuple[Malformed, ...]
    source: str
    digest: str

    @property
    def left_out(self) -> str:
        """How much was malformed, in words: "2 records, 1 question of others"; "" for nothing."""
        records = len({each.index for each in self.skipped if each.whole})
        questions = sum(not each.whole for each in self.skipped)
        parts = []
        if records:
            parts.append(counted(records, "record"))
        if questions:
            parts.append(counted(questions, "question") + (" of others" if records else ""))
        return ", ".join(parts)


def negation(fact: Fact) -> Question | None:
    """Return the question that denies a fact: its prompt after "It is not true that".

    The new object must not follow: it is `against`. The old object, if the fact gives it, is the
    right answer. An edit fails if it ties the new object to the words right before it, whatever the
    sentence says. Editors collapse on such queries: Liu et al. 2025, "Is Model Editing Built on
    Sand?" (arXiv 2510.00625).

    Returns:
        The question. None if the prompt makes no sentence: a question, or a prompt such as "{},
        the".
    """
    if fact.target is None or "?" in fact.prompt or fact.prompt.startswith("{},"):
        return None
    prompt = (
        fact.prompt[0].lower() + fact.prompt[1:] if _OPENERS.match(fact.prompt) else fact.prompt
    )
    return Question(
        kind="negation",
        prompt=f"It is not true that {fill_all(prompt, fact.subject)}",
        answers=() if fact.target_true is None else (fact.target_true,),
        against=fact.target,
    )


_OPENERS = re.compile(
    "(A|An|As|At|By|During|For|From|Her|His|In|Its|Of|On|Our|That|The|Their|This|To|Under|With) "
)
"""Words that may open a sentence and are no names, so their first letter becomes small."""
