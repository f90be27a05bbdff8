"""judge.layouts."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from ..core.checks import check_text
from ..core.errors import FactError, InputError
from ..core.fact import Fact
from .records import MOST, Question, QuestionKind, Record, negation

if TYPE_CHECKING:
    pass


class Refused(Exception):
    """A field that cannot be used."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field} {message}")
        self.field, self.message = field, message


class Entry:
    """The fields of a record, checked as they are read; `dropped` collects questions that cannot be used though the record can."""

    def __init__(self, fields: Any, path: str = "", *, dropped: list[Refused]) -> None:
        if not isinstance(fields, Mapping):
            raise Refused(path, f"is {brief(fields)}; expected fields with names")
        self.fields, self.path, self.dropped = fields, path, dropped

    def at(self, name: str) -> str:
        """The whole name of a field."""
        return f"{self.path}.{name}" if self.path else name

    def has(self, name: str) -> bool:
        """Whether a field is there and holds something (None, NaN, and blank text are how tables write nothing)."""
        value = self.fields.get(name)
        return not (
            value is None
            or (isinstance(value, float) and math.isnan(value))
            or (isinstance(value, str) and not value.strip())
        )

    def text(self, name: str) -> str:
        """A text that is not blank."""
        if not self.has(name):
            raise Refused(
                self.at(name), f"is {'empty' if name in self.fields else 'missing'}; expected text"
            )
        return _as_text(self.fields[name], self.at(name))

    def optional(self, name: str) -> str | None:
        """The same, or None where there is nothing."""
        return self.text(name) if self.has(name) else None

    def texts(self, name: str) -> tuple[str, ...]:
        """All the texts of a list, or a list of lists, that are not blank; a text alone is one; nothing is none."""
        if not self.has(name):
            return ()
        value = self.fields[name]
        if not isinstance(value, (list, str)):
            raise Refused(self.at(name), f"is {brief(value)}; expected text or a list of texts")
        return tuple(dict.fromkeys(_flat(value, self.at(name))))

    def wanted(self, name: str, otherwise: str = "these questions are left out") -> tuple[str, ...]:
        """The texts of a field that every record of the layout has; a note in `dropped` where it is missing or has nothing in it."""
        value = self.fields.get(name)
        blank = isinstance(value, list) and any(
            each is None or (isinstance(each, str) and not each.strip()) for each in value
        )
        found = self.texts(name)
        if blank or not found:
            state = (
                "has a blank text" if blank else "is empty" if name in self.fields else "is missing"
            )
            self.dropped.append(Refused(self.at(name), f"{state}; expected text, so {otherwise}"))
        return found

    def row(self, name: str) -> Entry:
        """Fields inside a field."""
        if not self.has(name):
            raise Refused(self.at(name), "is missing; expected fields with names")
        return Entry(self.fields[name], self.at(name), dropped=self.dropped)

    def rows(self, name: str) -> list[Entry]:
        """A list of these, or one; nothing is none."""
        value = self.fields.get(name) if self.has(name) else []
        if isinstance(value, Mapping):
            return [self.row(name)]
        if not isinstance(value, list):
            raise Refused(self.at(name), f"is {brief(value)}; expected a list")
        return [
            Entry(each, f"{self.at(name)}.{at}", dropped=self.dropped)
            for at, each in enumerate(value)
        ]

    def id(self, index: int, *names: str) -> str:
        """The record's own number or name, else its place in the file."""
        own = [self.fields[name] for name in names if self.has(name)]
        if not all(isinstance(each, (str, int)) and not isinstance(each, bool) for each in own):
            raise Refused(self.at(names[0]), f"is {brief(own[0])}; expected a number or text")
        return "-".join(map(str, own)) or str(index)

    def fact(
        self,
        subject: str,
        prompt: str,
        target: str | None,
        true: str | None,
        relation: str | None,
        field: str,
    ) -> Fact:
        """A fact; an old object that is the new one as well says nothing and is left out only where the caller does so."""
        if prompt.count("{}") != 1:
            raise Refused(
                self.at(field),
                f"has {prompt.count('{}')} slots in {brief(prompt)}; expected one `{{}}`, where the subject goes",
            )
        try:
            return Fact(subject, prompt, target, target_true=true, relation=relation)
        except FactError as error:
            raise Refused(self.at(field), f"makes no fact: {error}") from None

    def told(self, field: str, subject: str) -> tuple[str, str]:
        """(template, subject as it stands there) of a prompt that names its subject: where it does so last, if more than once."""
        prompt = self.text(field)
        if "{}" in prompt:
            raise Refused(
                self.at(field), f"holds {{}} in {brief(prompt)}; expected the subject itself"
            )
        whole = rf"(?<!\w){re.escape(subject)}(?!\w)"
        for pattern, flags in ((whole, 0), (re.escape(subject), 0), (whole, re.IGNORECASE)):
            if found := list(re.finditer(pattern, prompt, flags)):
                start, stop = found[-1].span()
                return f"{prompt[:start]}{{}}{prompt[stop:]}", prompt[start:stop]
        raise Refused(
            self.at(field),
            f"{brief(prompt)} does not name the subject {brief(subject)}; expected it there",
        )

    def ask(
        self,
        kind: QuestionKind,
        field: str,
        prompt: str,
        answers: Sequence[str],
        against: str | None = None,
    ) -> list[Question]:
        """The question, or nothing and a note in `dropped` where it has no answer but needs one."""
        try:
            return [
                Question(
                    kind=kind, prompt=prompt, answers=tuple(dict.fromkeys(answers)), against=against
                )
            ]
        except InputError as error:
            self.dropped.append(Refused(self.at(field), f"is no question and is left out: {error}"))
            return []


def _as_text(value: object, field: str) -> str:
    if not isinstance(value, str):
        raise Refused(field, f"is {brief(value)}; expected text")
    if len(value) > MOST:
        raise Refused(field, f"has {len(value):,} characters; expected at most {MOST:,}")
    try:
        check_text(value, "it")
    except InputError as error:
        raise Refused(field, f"cannot be used: {error}") from None
    return value.strip()


def _flat(value: object, field: str, depth: int = 0) -> Iterator[str]:
    """The texts of a list, or of a list of lists of them, but the blank ones."""
    if isinstance(value, list) and depth < 3:
        for at, each in enumerate(value):
            yield from _flat(each, f"{field}.{at}", depth + 1)
    elif text := _as_text(value, field):
        yield text


def brief(value: object) -> str:
    """A value in a message; of what holds others only its type, since a file may nest them without end."""
    if isinstance(value, str):
        return repr(value if len(value) <= 60 else f"{value[:57]}...")
    return f"a {type(value).__name__}" if isinstance(value, (Mapping, list)) else repr(value)


# ── layouts ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


class Layout(NamedTuple):
    """How a benchmark writes its records: the fields by which it is recognised, and how one is read."""

    name: str
    fields: frozenset[str]
    read: Callable[[Entry, int], Record]


def _written(
    row: Entry, fact: Fact, *, aliases: Sequence[str] = (), compared: bool = True
) -> list[Question]:
    """The questions every fact has: its prompt, and its negation."""
    assert fact.target is not None
    asked = row.ask(
        "prompt",
        "prompt",
        fact.text,
        (fact.target, *aliases),
        fact.target_true if compared else None,
    )
    denied = negation(fact)
    return asked + ([] if denied is None else [denied])


def _counterfact(row: Entry, index: int) -> Record:
    rewrite = row.row("requested_rewrite")
    new, true = rewrite.row("target_new").text("str"), rewrite.row("target_true").text("str")
    subject, prompt = rewrite.text("subject"), rewrite.text("prompt")
    fact = rewrite.fact(subject, prompt, new, true, rewrite.optional("relation_id"), "prompt")
    asked = _written(row, fact)
    for text in row.wanted("paraphrase_prompts"):
        asked += row.ask("paraphrase", "paraphrase_prompts", text, (new,), true)
    for text in row.wanted("neighborhood_prompts"):
        asked += row.ask("neighbour", "neighborhood_prompts", text, (true,), new)
    if alias := row.optional("alternative_subject"):
        asked += row.ask(
            "aliasing", "alternative_subject", prompt.replace("{}", alias), (new,), true
        )
    if row.has("portability"):
        further = row.row("portability")
        asked += further.ask(
            "reasoning", "New Question", further.text("New Question"), (further.text("New Answer"),)
        )
    return Record(
        id=row.id(index, "case_id"),
        facts=(fact,),
        questions=tuple(asked),
        generation_prompts=row.texts("generation_prompts"),
    )


def _slim(row: Entry, index: int) -> Record:
    fact = _named(row, "prompt", "target_new", row.texts("ground_truth"))
    asked = _written(row, fact)
    assert fact.target is not None
    for text in row.wanted("rephrase_prompt"):
        asked += row.ask("paraphrase", "rephrase_prompt", text, (fact.target,), fact.target_true)
    for text in row.wanted("locality_prompt"):
        asked += row.ask(
            "neighbour", "locality_prompt", text, row.texts("locality_ground_truth"), fact.target
        )
    return Record(id=row.id(index, "case_id"), facts=(fact,), questions=tuple(asked))


def _zsre(row: Entry, index: int, *, rome: bool) -> Record:
    true = row.wanted("answers", "no old object is known")
    template, subject = row.told("src", row.text("subject"))
    if rome:
        if not true:
            raise Refused(row.at("answers"), "is empty; expected the true answer, which is written")
        new, old = true[0], None
    else:
        new = row.text("alt")
        old = true[0] if true and new not in true else None
    fact = row.fact(subject, template, new, old, None, "src")
    asked = _written(row, fact, aliases=true[1:] if rome else (), compared=False)
    for text in row.wanted("rephrase"):
        asked += row.ask("paraphrase", "rephrase", text, (new,))
    for text in row.wanted("loc"):
        asked += row.ask(
            "locality", "loc", text if text.endswith("?") else f"{text}?", row.texts("loc_ans")
        )
    if row.has("portability") and not rome:
        further = row.row("portability")
        asked += further.ask(
            "reasoning", "New Question", further.text("New Question"), (further.text("New Answer"),)
        )
    return Record(id=row.id(index, "case_id"), facts=(fact,), questions=tuple(asked))


def _mquake(row: Entry, index: int) -> Record:
    hops = [
        (hop.text("question"), (hop.text("answer"), *hop.texts("answer_alias")))
        for hop in row.rows("new_single_hops")
    ]
    aliases = dict(hops)
    facts, asked, written = [], [], set()
    for rewrite in row.rows("requested_rewrite"):
        new, true = rewrite.row("target_new").text("str"), rewrite.row("target_true").text("str")
        fact = rewrite.fact(
            rewrite.text("subject"),
            rewrite.text("prompt"),
            new,
            true,
            rewrite.optional("relation_id"),
            "prompt",
        )
        facts.append(fact)
        question = rewrite.optional("question")
        others = aliases.get(question or "", ())
        asked += _written(rewrite, fact, aliases=others)
        if question is not None:
            written.add(question)
            asked += rewrite.ask("paraphrase", "question", question, (new, *others), true)
    if not facts:
        raise Refused(row.at("requested_rewrite"), "is empty; expected at least one fact to write")
    answers = (row.text("new_answer"), *row.texts("new_answer_alias"))
    before = row.optional("answer")
    for text in row.wanted("questions"):
        multi = row.ask(
            "multihop", "questions", text, answers, before if before not in answers else None
        )
        asked += [replace(question, group=0) for question in multi]
    for question, stays in hops:
        if question not in written:
            asked += row.ask("locality", "new_single_hops", question, stays)
    return Record(id=row.id(index, "case_id"), facts=tuple(facts), questions=tuple(asked))


_ABILITIES: dict[str, QuestionKind] = {
    "Reasoning": "reasoning",
    "reasoning": "reasoning",
    "Subject_Aliasing": "aliasing",
    "Logical_Generalization": "relation",
    "Relation_Specificity": "locality",
    "Forgetfulness": "locality",
}


def _knowedit(row: Entry, index: int) -> Record:
    fact = _named(row, "prompt", "target_new", row.texts("ground_truth"))
    assert fact.target is not None
    asked = _written(row, fact)
    for text in row.texts("rephrase") or row.texts("rephrase_prompt"):
        asked += row.ask("paraphrase", "rephrase", text, (fact.target,), fact.target_true)
    for part, otherwise in (("portability", "reasoning"), ("locality", "locality")):
        abilities = row.row(part) if row.has(part) else Entry({}, dropped=row.dropped)
        for ability in abilities.fields:
            kind: QuestionKind = _ABILITIES.get(str(ability), otherwise)  # type: ignore[arg-type]
            for each in abilities.rows(ability):
                old = fact.target_true if kind == "aliasing" else None
                asked += each.ask(
                    kind, "ground_truth", each.text("prompt"), each.texts("ground_truth"), old
                )
    prompts = row.texts("generate_prompt")
    return Record(
        id=row.id(index, "case_id"),
        facts=(fact,),
        questions=tuple(asked),
        generation_prompts=prompts,
    )


def known_layout(row: Entry, index: int) -> Record:
    template, subject = row.told("prompt", row.text("subject"))
    true = row.text("attribute")
    fact = row.fact(subject, template, None, true, row.optional("relation_id"), "prompt")
    asked = row.ask("prompt", "prompt", fact.text, (true,))
    return Record(id=row.id(index, "known_id"), facts=(fact,), questions=tuple(asked))


def _wikibigedit(row: Entry, index: int) -> Record:
    fact = _named(row, "update", "ans", (), relation=row.optional("relation"))
    assert fact.target is not None
    asked = _written(row, fact)
    for field, texts in (("rephrase", row.wanted("rephrase")), ("personas", row.texts("personas"))):
        for text in texts:
            asked += row.ask("paraphrase", field, text, (fact.target,))
    if row.has("mhop"):
        asked += row.ask("multihop", "mhop", row.text("mhop"), row.texts("mhop_ans"))
    if row.has("loc"):
        asked += row.ask("locality", "loc", row.text("loc"), row.texts("loc_ans"))
    return Record(id=row.id(index, "case_id", "id"), facts=(fact,), questions=tuple(asked))


def _qaedit(row: Entry, index: int) -> Record:
    fact = _named(row, "prompt", "target", ())
    assert fact.target is not None
    asked = _written(row, fact)
    for text in row.wanted("rephrase"):
        asked += row.ask("paraphrase", "rephrase", text, (fact.target,))
    for each in row.rows("locality"):
        asked += each.ask("locality", "loc", each.text("loc"), each.texts("loc_ans"))
    return Record(id=row.id(index, "source", "id"), facts=(fact,), questions=tuple(asked))


def _named(
    row: Entry, prompt: str, target: str, true: Sequence[str], *, relation: str | None = None
) -> Fact:
    """The fact of a layout whose prompt names its subject."""
    template, subject = row.told(prompt, row.text("subject"))
    return row.fact(
        subject, template, row.text(target), true[0] if true else None, relation, prompt
    )


LAYOUTS = {
    name: Layout(name, frozenset(fields.split()), read)
    for name, fields, read in (
        ("counterfact", "requested_rewrite paraphrase_prompts neighborhood_prompts", _counterfact),
        ("counterfact-slim", "subject prompt target_new rephrase_prompt locality_prompt", _slim),
        ("zsre", "subject src alt answers", partial(_zsre, rome=False)),
        ("zsre-rome", "subject src alt answers", partial(_zsre, rome=True)),
        ("mquake", "requested_rewrite questions new_answer", _mquake),
        ("knowedit", "subject prompt target_new", _knowedit),
        ("known", "subject attribute prompt", known_layout),
        ("wikibigedit", "subject update ans", _wikibigedit),
        ("qaedit", "subject prompt target rephrase", _qaedit),
    )
}
