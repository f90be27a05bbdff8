"""Facts as plain values: what should be true after an edit, and what must stay as it is.

    Fact("Danielle Darrieux", "The mother tongue of {} is", "English", target_true="French")

A `Fact` knows no model; a `FactFile` is a list of them in YAML or JSON.
"""

from __future__ import annotations

import dataclasses
import reprlib
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

import pydantic
from pydantic import AfterValidator, BeforeValidator, ConfigDict

from .checks import check_items
from .errors import FactError, InputError


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("is empty; expected some text")
    return text


def _has_one_slot(text: str) -> str:
    if text.count("{}") != 1:
        raise ValueError(
            f"has {text.count('{}')} slots `{{}}` in {short(text)}; expected exactly one, where the subject goes"
        )
    return text


def _as_probe(value: object) -> object:
    return {"prompt": value} if isinstance(value, str) else value


def _no_truth(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError(f"is {str(value).lower()}; expected a number, or null to switch it off")
    return value


Text = Annotated[
    str,
    AfterValidator(_not_blank),
    pydantic.WithJsonSchema({"type": "string", "pattern": "\\S", "maxLength": 20_000}),
]

_STRICT = ConfigDict(extra="forbid", str_max_length=20_000)


@pydantic.dataclasses.dataclass(frozen=True, config=_STRICT)
class Probe:
    """A prompt whose answer must not change; `expected` is what the model should say (None: whatever it said before)."""

    prompt: Text
    expected: Text | None = None


@pydantic.dataclasses.dataclass(frozen=True, config=_STRICT)
class FactFields:
    subject: Text
    prompt: Annotated[
        Text,
        AfterValidator(_has_one_slot),
        pydantic.WithJsonSchema(
            {
                "type": "string",
                "pattern": r"^((?!\{\})[\s\S])*\{\}((?!\{\})[\s\S])*$",
                "maxLength": 20_000,
            }
        ),
    ]
    target: Text | None
    target_true: Text | None = dataclasses.field(default=None, kw_only=True)
    paraphrases: tuple[Text, ...] = dataclasses.field(default=(), kw_only=True)
    neighbours: tuple[
        Annotated[Probe, BeforeValidator(_as_probe, json_schema_input_type=Text | Probe)], ...
    ] = dataclasses.field(default=(), kw_only=True)
    relation: str | None = dataclasses.field(default=None, kw_only=True)


Share = Annotated[
    float, pydantic.Field(ge=0, le=1, allow_inf_nan=False), BeforeValidator(_no_truth)
]

Amount = Annotated[float, pydantic.Field(ge=0, allow_inf_nan=False), BeforeValidator(_no_truth)]


@pydantic.dataclasses.dataclass(
    frozen=True, kw_only=True, config=ConfigDict(extra="forbid", strict=False)
)
class Gates:
    """What a patch must pass before it is committed; None: not asked. Names as in a fact file.

    efficacy      least share of the written prompts that are answered with the target
    paraphrases   the same of the paraphrases
    neighbours    least share of the neighbours whose answer stays
    earlier       least share of the facts of earlier patches that hold
    kl_text       most nats a token by which the distribution on prose may move, on average; kl_text_worst: its 99 % quantile
    kl_facts      the same where the answers of unrelated facts are due
    changed_share  largest share of these that may be answered otherwise
    perplexity    largest ratio of the perplexity on that prose, after to before
    """

    efficacy: Share | None = 1.0
    paraphrases: Share | None = 0.5
    neighbours: Share | None = 0.8
    earlier: Share | None = 1.0
    kl_text: Amount | None = 0.1
    kl_text_worst: Amount | None = None
    kl_facts: Amount | None = None
    changed_share: Share | None = None
    perplexity: Amount | None = None

    @classmethod
    def from_dict(cls, fields: object) -> Gates:
        """Gates from plain values; those that are not named stay as they are by default. Raises FactError."""
        if not isinstance(fields, Mapping):
            raise FactError(f"gates are thresholds by name; got {type(fields).__name__}")
        try:
            return cls(**{str(name): value for name, value in fields.items()})
        except pydantic.ValidationError as error:
            raise FactError(_explain(error, "gates")) from None


class Fact(FactFields):
    """One fact to write: `prompt` with `subject` in its `{}` is to be continued by `target`.

    subject      the entity, as it stands in the prompt
    prompt       template with exactly one `{}`
    target       what the model should say; a leading space is added where the tokenizer needs one. None: nothing in particular, the model
                 is to forget what it says now
    target_true  what is so today, if known (the other side of the field's pairwise success scores); what is forgotten
    paraphrases  other ways to ask: templates with `{}`, or whole prompts
    neighbours   prompts that must keep their answers: `Probe`s or plain strings
    relation     a label such as a Wikidata property, for grouping

    Raises FactError when a field is empty, the prompt has not exactly one slot, or target equals target_true.
    """

    def __init__(
        self,
        subject: str,
        prompt: str,
        target: str | None,
        *,
        target_true: str | None = None,
        paraphrases: Iterable[str] = (),
        neighbours: Iterable[Probe | str | Mapping[str, Any]] = (),
        relation: str | None = None,
    ) -> None:
        given = {
            "subject": subject,
            "prompt": prompt,
            "target": target,
            "target_true": target_true,
            "relation": relation,
        }
        try:
            super().__init__(
                **given, paraphrases=_entries(paraphrases), neighbours=_entries(neighbours)
            )  # type: ignore[arg-type]
        except pydantic.ValidationError as error:
            raise FactError(_explain(error, "fact")) from None
        if (
            self.target is not None
            and self.target_true is not None
            and self.target.strip() == self.target_true.strip()
        ):
            raise FactError(
                f"fact about {short(self.subject)}: target and target_true are both {short(self.target)}; they must differ"
            )

    @property
    def text(self) -> str:
        """The prompt with the subject filled in."""
        return self.prompt.replace("{}", self.subject)

    @property
    def paraphrase_texts(self) -> tuple[str, ...]:
        """The paraphrases with the subject filled in."""
        return tuple(p.replace("{}", self.subject) for p in self.paraphrases)

    def __str__(self) -> str:
        """The fact on one line."""
        return f"{self.text} → {'(forgotten)' if self.target is None else self.target.strip()}"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able fields; empty ones are left out, but for a target of None."""
        return {
            k: v
            for k, v in dataclasses.asdict(self).items()
            if k == "target" or v not in (None, ())
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Fact:
        """The inverse of `to_dict`; raises FactError on anything but a mapping of known fields."""
        if not isinstance(fields, Mapping):
            raise FactError(f"a fact is a mapping of fields; got {type(fields).__name__}")
        try:
            return cls(**{str(k): v for k, v in fields.items()})
        except TypeError:
            known = [field.name for field in dataclasses.fields(cls)]
            strange = [f"unknown {short(key)}" for key in fields if str(key) not in known][:NAMED]
            missing = [
                f"no {name}" for name in ("subject", "prompt", "target") if name not in fields
            ]
            raise FactError(
                f"fact: {', '.join(strange + missing)}; expected subject, prompt and target (null: to be forgotten), and some of "
                f"{', '.join(name for name in known if name not in ('subject', 'prompt', 'target'))}"
            ) from None


def listed(facts: Fact | Iterable[Fact]) -> list[Fact]:
    """One fact or several as a list; raises InputError for none, or for anything else."""
    facts = (
        [facts]
        if isinstance(facts, Fact)
        else check_items(facts, "facts", "Fact objects", also="one Fact")
    )
    if not facts or not all(isinstance(fact, Fact) for fact in facts):
        raise InputError(
            f"expected a Fact or a list of at least one; got {[type(fact).__name__ for fact in facts]}"
        )
    return facts


def _entries(values: object) -> object:
    """A tuple of what was given; a single text is left as it is, to be refused: its letters are no list."""
    return (
        tuple(values)
        if isinstance(values, Iterable) and not isinstance(values, (str, bytes, Mapping))
        else values
    )


def _explain(error: pydantic.ValidationError, what: str) -> str:
    parts, found = [], error.errors(include_url=False)
    for item in found[:NAMED]:
        where = ".".join(short(p).strip("'") for p in item["loc"]) or what
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "string_type":
            message = f"is {short(item['input'])}; expected text (in quotes, where it looks like a number, a date, or yes and no)"
        elif item["type"] == "tuple_type":
            message = f"is {short(item['input'])}; expected a list"
        parts.append(f"{where} {message[0].lower() + message[1:]}" if message else where)
    more = f"; and {len(found) - NAMED} more" if len(found) > NAMED else ""
    return f"{what}: " + "; ".join(parts) + more


NAMED = 5
"""Faults that a message names; files from others may have millions."""

_brief = reprlib.Repr()

_brief.maxstring = _brief.maxother = 120

_brief.maxlevel = 2


def short(value: object) -> str:
    """A value as messages quote it: never long, however large or deep it is."""
    try:
        text = _brief.repr(value)
    except ValueError:  # an integer of too many digits
        return f"a huge {type(value).__name__}"
    return text if len(text) <= 160 else f"{text[:159]}…"
