"""The fields of a record as its file holds them, checked while they are read.

    entry = Entry({"subject": "Ada Quill", "prompt": "Ada Quill lives in"}, dropped=[])
    entry.text("subject")                     # "Ada Quill"
    entry.template("prompt", "Ada Quill")     # ("{} lives in", "Ada Quill")
    entry.text("target")                      # raises FieldError: target is missing; expected text

A field that a record cannot do without raises `FieldError`, and the record is left out. A question
that cannot be used is added to `dropped`, and the record is used without it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..core.checks import check_text
from ..core.errors import FactError, InputError
from ..core.fact import Fact
from ..core.forms import occurrences
from ..core.slots import count_slots
from .records import LONGEST_TEXT, Question, QuestionKind


class FieldError(Exception):
    """A field that cannot be used.

    Attributes:
        field: Whole name of the field, such as "requested_rewrite.subject".
        message: The reason, which continues the name.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field} {message}")
        self.field, self.message = field, message


class Entry:
    """The fields of a record, or the fields inside one field.

    Attributes:
        fields: {name: value}, as the file holds them.
        path: Whole name of the field that holds these fields; "" for the record itself.
        dropped: The questions that cannot be used. An entry inside a field shares this list.
        names: {name here: name in the file}, of the fields with another name in the file.
    """

    def __init__(
        self,
        fields: Any,
        path: str = "",
        *,
        dropped: list[FieldError],
        names: Mapping[str, str] | None = None,
    ) -> None:
        if not isinstance(fields, Mapping):
            raise FieldError(path, f"is {brief(fields)}; expected fields with names")
        self.fields, self.path, self.dropped = fields, path, dropped
        self.names = names or {}

    def path_of(self, name: str) -> str:
        """Return the whole name of a field."""
        name = self.names.get(name, name)
        return f"{self.path}.{name}" if self.path else name

    def has(self, name: str) -> bool:
        """Return whether a field holds something. None, NaN and blank text hold nothing."""
        value = self.fields.get(name)
        return not (
            value is None
            or (isinstance(value, float) and math.isnan(value))
            or (isinstance(value, str) and not value.strip())
        )

    def text(self, name: str) -> str:
        """Return a text that is not blank."""
        if not self.has(name):
            state = "empty" if name in self.fields else "missing"
            raise FieldError(self.path_of(name), f"is {state}; expected text")
        return _text(self.fields[name], self.path_of(name))

    def optional(self, name: str) -> str | None:
        """Return a text, or None for a field that holds nothing."""
        return self.text(name) if self.has(name) else None

    def texts(self, name: str) -> tuple[str, ...]:
        """Return the texts of a list, or of a list of lists, without blank and repeated ones.

        A text alone counts as a list of one. A field that holds nothing gives ().
        """
        if not self.has(name):
            return ()
        value = self.fields[name]
        if not isinstance(value, (list, str)):
            raise FieldError(
                self.path_of(name), f"is {brief(value)}; expected text or a list of texts"
            )
        return tuple(dict.fromkeys(_texts(value, self.path_of(name))))

    def expected_texts(
        self, name: str, otherwise: str = "these questions are left out"
    ) -> tuple[str, ...]:
        """Return the texts of a field that every record of the layout has.

        A field that is missing, empty, or holds a blank text is added to `dropped`.

        Args:
            name: Name of the field.
            otherwise: What follows from the missing text, for the message.
        """
        value = self.fields.get(name)
        has_blank = isinstance(value, list) and any(
            each is None or (isinstance(each, str) and not each.strip()) for each in value
        )
        texts = self.texts(name)
        if has_blank:
            state = "has a blank text"
        elif not texts:
            state = "is empty" if name in self.fields else "is missing"
        else:
            return texts
        self.dropped.append(
            FieldError(self.path_of(name), f"{state}; expected text, so {otherwise}")
        )
        return texts

    def entry(self, name: str) -> Entry:
        """Return the fields inside a field."""
        if not self.has(name):
            raise FieldError(self.path_of(name), "is missing; expected fields with names")
        return Entry(self.fields[name], self.path_of(name), dropped=self.dropped)

    def entries(self, name: str) -> list[Entry]:
        """Return a list of entries inside a field. One entry alone counts as a list of one."""
        value = self.fields.get(name) if self.has(name) else []
        if isinstance(value, Mapping):
            return [self.entry(name)]
        if not isinstance(value, list):
            raise FieldError(self.path_of(name), f"is {brief(value)}; expected a list")
        return [
            Entry(each, f"{self.path_of(name)}.{at}", dropped=self.dropped)
            for at, each in enumerate(value)
        ]

    def id(self, index: int, *names: str) -> str:
        """Return the numbers or names that a record gives itself, or its place in the file."""
        parts = [self.fields[name] for name in names if self.has(name)]
        if not all(isinstance(part, (str, int)) and not isinstance(part, bool) for part in parts):
            raise FieldError(
                self.path_of(names[0]), f"is {brief(parts[0])}; expected a number or text"
            )
        return "-".join(map(str, parts)) or str(index)

    def fact(
        self,
        subject: str,
        prompt: str,
        target: str | None,
        *,
        target_true: str | None = None,
        relation: str | None = None,
        field: str = "prompt",
    ) -> Fact:
        """Return a fact. A message speaks of `field`, the field that holds the prompt."""
        if (slots := count_slots(prompt)) != 1:
            raise FieldError(
                self.path_of(field),
                f"has {slots} slots in {brief(prompt)}; expected one `{{}}` for the subject",
            )
        try:
            return Fact(subject, prompt, target, target_true=target_true, relation=relation)
        except FactError as error:
            raise FieldError(self.path_of(field), f"makes no fact: {error}") from None

    def template(self, name: str, subject: str) -> tuple[str, str]:
        """Return a prompt that names its subject, with a slot in place of the subject.

        If the prompt names the subject more than once, the slot takes the last place. A prompt that
        does not name it may have the slot already.

        Returns:
            The template, and the subject as the prompt writes it.
        """
        prompt = self.text(name)
        places = occurrences(prompt, subject)
        whole = [place for place in places if place.is_whole]
        if n_slots := count_slots(prompt):
            if n_slots == 1 and not whole:
                return prompt, subject
            raise FieldError(
                self.path_of(name),
                f"holds {{}} in {brief(prompt)}; expected the subject itself, "
                "and {{}} for two braces that mean themselves",
            )
        if not places:
            loose = occurrences(prompt, subject, ignore_case=True)
            places = [place for place in loose if place.is_whole]
        if places:
            start, stop, _ = (whole or places)[-1]
            return f"{prompt[:start]}{{}}{prompt[stop:]}", prompt[start:stop]
        raise FieldError(
            self.path_of(name),
            f"{brief(prompt)} does not name the subject {brief(subject)}; "
            "expected a prompt that does",
        )

    def ask(
        self,
        kind: QuestionKind,
        field: str,
        prompt: str,
        answers: Sequence[str],
        against: str | None = None,
    ) -> list[Question]:
        """Return one question, or add a note to `dropped` and return [] if it cannot be asked."""
        answers = tuple(dict.fromkeys(answers))
        try:
            return [Question(kind=kind, prompt=prompt, answers=answers, against=against)]
        except InputError as error:
            reason = f"is no question and is left out: {error}"
            self.dropped.append(FieldError(self.path_of(field), reason))
            return []


def brief(value: object) -> str:
    """Return a value as a message shows it. A value that holds others is named by its type
    alone."""
    if isinstance(value, str):
        return repr(value if len(value) <= 60 else f"{value[:57]}...")
    return f"a {type(value).__name__}" if isinstance(value, (Mapping, list)) else repr(value)


def _text(value: object, field: str) -> str:
    """Return a value as text without white space around it."""
    if not isinstance(value, str):
        raise FieldError(field, f"is {brief(value)}; expected text")
    if len(value) > LONGEST_TEXT:
        raise FieldError(field, f"has {len(value):,} characters; expected at most {LONGEST_TEXT:,}")
    try:
        check_text(value, "it")
    except InputError as error:
        raise FieldError(field, f"cannot be used: {error}") from None
    return value.strip()


def _texts(value: object, field: str, depth: int = 0) -> Iterator[str]:
    """Yield the texts of nested lists, except blank ones."""
    if isinstance(value, list) and depth < 3:
        for at, each in enumerate(value):
            yield from _texts(each, f"{field}.{at}", depth + 1)
    elif text := _text(value, field):
        yield text
