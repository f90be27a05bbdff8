"""Records whose fields have names of their own: a mapping says which field holds what.

    load_suite("my.json", fields={"prompt": "question", "target": "object"})
    load_suite("my.json", fields={"target": "answer.new", "locality": "others.question"})

A dot goes into a field. Where a field holds a list, `others.question` means the question of each
entry, and `others.0.question` that of the first. A name that the mapping leaves out stands for the
field of the same name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..core.errors import InputError
from ..core.slots import fill_all
from .entry import Entry, FieldError
from .records import Question, QuestionKind, Record, negation

REQUIRED = ("subject", "prompt", "target")

_KINDS: dict[str, QuestionKind] = {
    "neighbours": "neighbour",
    "locality": "locality",
    "reasoning": "reasoning",
    "aliasing": "aliasing",
    "multihop": "multihop",
}
"""The names of fields with questions, and the kind of these questions."""

_ANSWERS = {name: f"{kind}_answers" for name, kind in _KINDS.items()}

NAMES = (
    *REQUIRED,
    "target_true",
    "aliases",
    "paraphrases",
    *(name for pair in _ANSWERS.items() for name in pair),
    "generation_prompts",
    "relation",
    "id",
)
"""Every name that a mapping may have."""


def check_fields(fields: object) -> dict[str, str]:
    """Return a mapping of names to fields.

    Raises:
        InputError: when it is no mapping of names to texts.
    """
    if not isinstance(fields, Mapping) or not all(
        isinstance(path, str) and path.strip() for path in fields.values()
    ):
        raise InputError(
            f"fields is {fields!r}; give the name of a field for each part of a record, such as "
            '{"prompt": "question", "target": "answer"}',
            argument="fields",
        )
    return {str(name): path.strip() for name, path in fields.items()}


def check_names(fields: Mapping[str, str]) -> None:
    """Raise an InputError for a name that is no part of a record."""
    if strange := [name for name in fields if name not in NAMES]:
        raise InputError(
            f"fields names {strange[0]!r}; the parts of a record are {', '.join(NAMES)}",
            argument="fields",
        )


def check_present(what: str, rows: Sequence[Any], fields: Mapping[str, str]) -> None:
    """Raise an InputError for a field that no record has."""
    for name, path in fields.items():
        if all(value_at(row, path) is None for row in rows):
            raise InputError(
                f"no record of {what} has the field {path!r}, which fields gives for {name}; "
                f"they have {seen_fields(rows)}",
                argument="fields",
            )


def value_at(value: Any, path: str) -> Any:
    """Return what a field holds; None where it is missing. A dot in the path goes into a field."""
    if isinstance(value, Mapping) and path in value:
        return value[path]
    head, _, rest = path.partition(".")
    if isinstance(value, list) and not head.isdecimal():
        values = [value_at(each, path) for each in value]
        return values if any(each is not None for each in values) else None
    if isinstance(value, list):
        inner = value[int(head)] if int(head) < len(value) else None
    else:
        inner = value.get(head) if isinstance(value, Mapping) else None
    return value_at(inner, rest) if rest else inner


def with_value(row: Mapping[str, Any], name: str, value: Any) -> dict[str, Any]:
    """Return a record with one more field. A dot in the name goes into a field."""
    head, _, rest = name.partition(".")
    if rest:
        inner = row.get(head)
        value = with_value(inner if isinstance(inner, Mapping) else {}, rest, value)
    return {**row, head: value}


def seen_fields(rows: Sequence[Any], most: int = 20) -> str:
    """Return the names of the fields of the first record, for a message."""
    record = next((row for row in rows if isinstance(row, Mapping)), None)
    if record is None:
        return "no record of named fields"
    names = [name for name, _ in zip(_paths(record), range(most + 1), strict=False)]
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")


def _paths(value: Any, path: str = "", depth: int = 0) -> Iterator[str]:
    """The paths of all fields."""
    if isinstance(value, list) and value and isinstance(value[0], Mapping):
        value = value[0]
    if not isinstance(value, Mapping) or depth > 2:
        yield path
        return
    for name, inner in value.items():
        yield from _paths(inner, f"{path}.{name}" if path else str(name), depth + 1)


def read_mapped(row: Entry, index: int, *, fields: Mapping[str, str]) -> Record:
    """Read a record by a mapping of names to fields."""
    values = {name: value_at(row.fields, fields.get(name, name)) for name in NAMES}
    present = {name: value for name, value in values.items() if value is not None}
    entry = Entry(present, names=fields, dropped=row.dropped)
    template, subject = entry.template("prompt", entry.text("subject"))
    if not (targets := entry.texts("target")):
        entry.text("target")  # raises a FieldError that says what is wrong
    true = entry.texts("target_true")
    fact = entry.fact(
        subject,
        template,
        targets[0],
        target_true=true[0] if true else None,
        relation=entry.optional("relation"),
    )
    answers = (*targets, *entry.texts("aliases"))
    questions = entry.ask("prompt", "prompt", fact.text, answers, fact.target_true)
    denial = negation(fact)
    questions += [] if denial is None else [denial]
    for text in entry.texts("paraphrases"):
        filled = fill_all(text, subject)
        questions += entry.ask("paraphrase", "paraphrases", filled, answers, fact.target_true)
    for name in _KINDS:
        questions += _asked(entry, name)
    return Record(
        id=entry.id(index, "id"),
        facts=(fact,),
        questions=tuple(questions),
        generation_prompts=entry.texts("generation_prompts"),
    )


def _asked(entry: Entry, name: str) -> list[Question]:
    """The questions of one kind. Prompts and answers are paired in their order."""
    prompts, answers = _listed(entry.fields.get(name)), _listed(entry.fields.get(_ANSWERS[name]))
    if len(prompts) == 1 and len(answers) > 1:
        answers = [answers]  # several right answers to one prompt
    if answers and len(answers) != len(prompts):
        reason = f"has {len(answers)} values for {len(prompts)} prompts; expected one for each"
        entry.dropped.append(FieldError(entry.path_of(_ANSWERS[name]), reason))
        return []
    questions: list[Question] = []
    for at, prompt in enumerate(prompts):
        one = Entry({"prompt": prompt, "answers": answers[at] if answers else None}, dropped=[])
        try:
            if one.has("prompt"):
                text, right = one.text("prompt"), one.texts("answers")
                questions += entry.ask(_KINDS[name], name, text, right)
        except FieldError as error:
            entry.dropped.append(FieldError(entry.path_of(name), error.message))
    return questions


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]
