"""Facts as plain values: what should be true after an edit, and what must stay unchanged.

    Fact("Danielle Darrieux", "The mother tongue of {} is", "English", target_true="French")

A `Fact` knows no model. A `FactFile` is a list of facts in YAML or JSON.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

import pydantic
from pydantic import AfterValidator, BeforeValidator, ConfigDict

from .checks import check_items
from .errors import FactError, InputError
from .explain import NAMED, explain, short
from .forms import canonical
from .gap import Gap, before_gap
from .slots import ONE_SLOT, count_slots, fill, fill_all

_LONGEST = 20_000
"""Characters of a text."""


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("is empty; expected some text")
    return text


def _has_one_slot(text: str) -> str:
    if (slots := count_slots(text)) != 1:
        other = "; write `{{}}` for each {} that is no slot" if slots else ""
        raise ValueError(
            f"has {slots} slots `{{}}` in {short(text)}; "
            f"expected exactly one, where the subject goes{other}"
        )
    return text


def _with_slot(subject: object, prompt: object) -> str:
    """Return advice for a prompt that names its subject instead of a slot; "" for any other."""
    if not (isinstance(subject, str) and isinstance(prompt, str) and subject.strip()):
        return ""
    start, named, end = prompt.rpartition(subject.strip())
    if not named or count_slots(prompt):
        return ""
    return f". Write the prompt as {short(f'{start}{{}}{end}')}"


def _as_probe(value: object) -> object:
    return {"prompt": value} if isinstance(value, str) else value


Text = Annotated[
    str,
    AfterValidator(_not_blank),
    pydantic.WithJsonSchema({"type": "string", "pattern": "\\S", "maxLength": _LONGEST}),
]
"""A text that is not blank."""

_Template = Annotated[
    Text,
    AfterValidator(_has_one_slot),
    pydantic.WithJsonSchema(
        {
            "type": "string",
            "pattern": ONE_SLOT,
            "maxLength": _LONGEST,
        }
    ),
]
"""A text with exactly one `{}`."""

_STRICT = ConfigDict(extra="forbid", str_max_length=_LONGEST)


@pydantic.dataclasses.dataclass(frozen=True, config=_STRICT)
class Probe:
    """A prompt whose answer must not change.

    Attributes:
        prompt: The whole prompt.
        expected: What the model should answer. None: what it answered before the edit.
    """

    prompt: Text
    expected: Text | None = None


@pydantic.dataclasses.dataclass(frozen=True, config=_STRICT)
class FactFields:
    """One fact: its fields and their checks."""

    subject: Text
    prompt: _Template
    target: Text | None
    target_true: Text | None = dataclasses.field(default=None, kw_only=True)
    paraphrases: tuple[Text, ...] = dataclasses.field(default=(), kw_only=True)
    neighbours: tuple[
        Annotated[Probe, BeforeValidator(_as_probe, json_schema_input_type=Text | Probe)], ...
    ] = dataclasses.field(default=(), kw_only=True)
    relation: str | None = dataclasses.field(default=None, kw_only=True)
    gap: Gap = dataclasses.field(default="auto", kw_only=True, compare=False)


class Fact(FactFields):
    """One fact to write: `target` should follow `prompt` with `subject` in its `{}`.

    Attributes:
        subject: The entity, as the prompt names it.
        prompt: A template with exactly one `{}`, where the subject goes. Other braces mean
            themselves. For the two characters `{}` themselves, write `{{}}`.
        target: What the model should say. White space around it is not part of it. None: the model
            should forget what it says now, as with `forget=True`.
        target_true: What the model should say without the edit, if known. The field's pairwise
            success scores compare it with the target. With a target of None, what is forgotten.
        paraphrases: Other ways to ask: templates with `{}`, or whole prompts.
        neighbours: Prompts that must keep their answers: `Probe`s or plain strings.
        relation: A label such as a Wikidata property, for grouping.
        gap: What stands between the prompt and its target: "space", "none", or "auto": what the
            model itself goes on with. A patch records what the model chose, if it had to choose.
    """

    def __init__(  # house: a promised public signature
        self,
        subject: str,
        prompt: str,
        target: str | None = "",
        *,
        forget: bool = False,
        target_true: str | None = None,
        paraphrases: Iterable[str] = (),
        neighbours: Iterable[Probe | str | Mapping[str, Any]] = (),
        relation: str | None = None,
        gap: Gap = "auto",
    ) -> None:
        """Check and keep the fields.

        Raises:
            FactError: when a field is empty, when the prompt does not have exactly one slot, or
                when target equals target_true. Also when there is neither a target nor `forget`, or
                both.
        """
        if not isinstance(forget, bool):
            raise FactError(f"fact: forget is {short(forget)}; expected True or False")
        if forget and target not in (None, ""):
            raise FactError(
                f"fact about {short(subject)}: it has the target {short(target)} and forget; "
                "give one of them"
            )
        fields: dict[str, Any] = {
            "subject": subject,
            "prompt": prompt,
            "target": None if forget else target,
            "target_true": target_true,
            "paraphrases": _entries(paraphrases),
            "neighbours": _entries(neighbours),
            "relation": relation,
            "gap": gap,
        }
        try:
            super().__init__(**fields)
        except pydantic.ValidationError as error:
            raise FactError(explain(error, "fact") + _with_slot(subject, prompt)) from None
        if (
            self.target is not None
            and self.target_true is not None
            and self.target.strip() == self.target_true.strip()
        ):
            raise FactError(
                f"fact about {short(self.subject)}: target and target_true are both "
                f"{short(self.target)}; they must differ"
            )

    @property
    def forget(self) -> bool:
        """Whether the model should forget what it says now: there is no target."""
        return self.target is None

    @property
    def text(self) -> str:
        """The prompt with the subject filled in, without spaces at its end."""
        return before_gap(fill(self.prompt, self.subject).text)

    @property
    def template(self) -> str:
        """The prompt without spaces at its end, which are the gap before the target."""
        return before_gap(self.prompt)

    @property
    def asked(self) -> str:
        """The text in the form by which facts are compared: equal for texts that look the same."""
        return canonical(self.text)

    @property
    def wanted(self) -> str | None:
        """The target in the form by which targets are compared; None for a fact to forget."""
        return None if self.target is None else canonical(self.target.strip())

    @property
    def paraphrase_texts(self) -> tuple[str, ...]:
        """The paraphrases with the subject filled in."""
        return tuple(before_gap(fill_all(p, self.subject)) for p in self.paraphrases)

    def __str__(self) -> str:
        """Return the fact on one line."""
        return f"{self.text} → {'(forgotten)' if self.target is None else self.target.strip()}"

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON-able fields; empty ones are left out, except a target of None."""
        return {
            k: v
            for k, v in dataclasses.asdict(self).items()
            if k == "target" or (v not in (None, ()) and (k, v) != ("gap", "auto"))
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Fact:
        """Return a fact from plain fields: the inverse of `to_dict`.

        Raises:
            FactError: when the fields are not a mapping of known fields, or make no valid fact.
        """
        if not isinstance(fields, Mapping):
            raise FactError(f"a fact is a mapping of fields; got {type(fields).__name__}")
        required = ("subject", "prompt", "target")
        known = [field.name for field in dataclasses.fields(cls)] + ["forget"]
        strange = [f"unknown {short(key)}" for key in fields if str(key) not in known][:NAMED]
        missing = [f"no {name}" for name in required if name not in fields]
        if "forget" in fields:
            missing = [name for name in missing if name != "no target"]
        if strange or missing:
            raise FactError(
                f"fact: {', '.join(strange + missing)}; expected subject, prompt and target "
                "(or `forget: true`), and some of "
                + ", ".join(name for name in known if name not in required)
            )
        return cls(**{str(k): v for k, v in fields.items()})


def listed(facts: Fact | Iterable[Fact]) -> list[Fact]:
    """Return one fact or several as a list.

    Raises:
        InputError: when there is no fact, or something that is not a Fact.
    """
    facts = (
        [facts]
        if isinstance(facts, Fact)
        else check_items(facts, "facts", "Fact objects", also="one Fact")
    )
    if not facts or not all(isinstance(fact, Fact) for fact in facts):
        raise InputError(
            f"facts holds {[type(fact).__name__ for fact in facts[:NAMED]]}; "
            "expected a Fact or a list of at least one",
            argument="facts",
        )
    return facts


def _entries(values: object) -> object:
    """Return a tuple of the values, and a single text unchanged: its letters are no list."""
    return (
        tuple(values)
        if isinstance(values, Iterable) and not isinstance(values, (str, bytes, Mapping))
        else values
    )
