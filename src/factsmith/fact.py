"""Facts as plain values: what should be true after an edit, and what must stay as it is.

    Fact("Danielle Darrieux", "The mother tongue of {} is", "English", target_true="French")

A `Fact` knows no model; a `FactFile` is a list of them in YAML or JSON.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import pydantic
import yaml
from pydantic import AfterValidator, BeforeValidator, ConfigDict, TypeAdapter

from .errors import FactError, InputError, WorkspaceError
from .files import write_file


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("is empty; expected some text")
    return text


def _has_one_slot(text: str) -> str:
    if text.count("{}") != 1:
        raise ValueError(f"has {text.count('{}')} slots `{{}}` in {text!r}; expected exactly one, where the subject goes")
    return text


def _as_probe(value: object) -> object:
    return {"prompt": value} if isinstance(value, str) else value


Text = Annotated[str, AfterValidator(_not_blank)]
_STRICT = ConfigDict(extra="forbid", str_max_length=20_000)


@pydantic.dataclasses.dataclass(frozen=True, config=_STRICT)
class Probe:
    """A prompt whose answer must not change; `expected` is what the model should say (None: whatever it said before)."""

    prompt: Text
    expected: Text | None = None


@pydantic.dataclasses.dataclass(frozen=True, config=_STRICT)
class _Fact:
    subject: Text
    prompt: Annotated[Text, AfterValidator(_has_one_slot)]
    target: Text | None
    target_true: Text | None = dataclasses.field(default=None, kw_only=True)
    paraphrases: tuple[Text, ...] = dataclasses.field(default=(), kw_only=True)
    neighbours: tuple[Annotated[Probe, BeforeValidator(_as_probe)], ...] = dataclasses.field(default=(), kw_only=True)
    relation: str | None = dataclasses.field(default=None, kw_only=True)


class Fact(_Fact):
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
        given = {"subject": subject, "prompt": prompt, "target": target, "target_true": target_true, "relation": relation}
        try:
            super().__init__(**given, paraphrases=_entries(paraphrases), neighbours=_entries(neighbours))  # type: ignore[arg-type]
        except pydantic.ValidationError as error:
            raise FactError(_explain(error, "fact")) from None
        if self.target is not None and self.target_true is not None and self.target.strip() == self.target_true.strip():
            raise FactError(f"fact about {self.subject!r}: target and target_true are both {self.target!r}; they must differ")

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
        return {k: v for k, v in dataclasses.asdict(self).items() if k == "target" or v not in (None, ())}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Fact:
        """The inverse of `to_dict`; raises FactError on anything but a mapping of known fields."""
        if not isinstance(fields, Mapping):
            raise FactError(f"a fact is a mapping of fields; got {type(fields).__name__}")
        try:
            return cls(**{str(k): v for k, v in fields.items()})
        except TypeError:
            known = [field.name for field in dataclasses.fields(cls)]
            strange = [f"unknown {key!r}" for key in fields if str(key) not in known]
            missing = [f"no {name}" for name in ("subject", "prompt", "target") if name not in fields]
            raise FactError(
                f"fact: {', '.join(strange + missing)}; expected subject, prompt and target (null: to be forgotten), and some of "
                f"{', '.join(name for name in known if name not in ('subject', 'prompt', 'target'))}"
            ) from None


def listed(facts: Fact | Iterable[Fact]) -> list[Fact]:
    """One fact or several as a list; raises InputError for none, or for anything else."""
    facts = [facts] if isinstance(facts, Fact) else list(facts)
    if not facts or not all(isinstance(fact, Fact) for fact in facts):
        raise InputError(f"expected a Fact or a list of at least one; got {[type(fact).__name__ for fact in facts]}")
    return facts


class _Loader(yaml.SafeLoader):
    """Plain values only; a field given twice is an error, where the last would win without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping whose keys differ."""
        seen: set[Any] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue  # no name of a field; refused below
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice; leave one out", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class FactFile:
    """A list of facts in a YAML (`facts: [...]`, or a bare list) or JSON file."""

    @staticmethod
    def read(path: str | os.PathLike[str]) -> list[Fact]:
        """Read and validate every fact; raises FactError naming the file and the entry."""
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
            content = json.loads(text) if path.suffix.lower() == ".json" else yaml.load(text, Loader=_Loader)
        except OSError as error:
            raise FactError(f"cannot read {path}: {error.strerror}; expected a YAML or JSON file of facts") from None
        except (yaml.YAMLError, json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise FactError(f"{path} is not valid {'JSON' if path.suffix.lower() == '.json' else 'YAML'}: {error}") from None
        entries = content.get("facts") if isinstance(content, Mapping) else content
        if not isinstance(entries, list) or not entries:
            raise FactError(f"{path} holds no facts; expected `facts:` followed by a list of entries")
        facts = []
        for index, entry in enumerate(entries):
            try:
                facts.append(Fact.from_dict(entry))
            except FactError as error:
                raise FactError(f"{path}, entry {index + 1}: {error}") from None
        return facts

    @staticmethod
    def write(path: str | os.PathLike[str], facts: list[Fact]) -> None:
        """Write facts as YAML (or JSON, by the suffix), replacing the file in one step; raises WorkspaceError."""
        path = Path(path)
        content = {"facts": [TypeAdapter(dict[str, Any]).dump_python(f.to_dict(), mode="json") for f in facts]}
        text = (
            json.dumps(content, ensure_ascii=False, indent=2) + "\n"
            if path.suffix.lower() == ".json"
            else yaml.safe_dump(content, allow_unicode=True, sort_keys=False)
        )
        try:
            write_file(path, text.encode())
        except OSError as error:
            raise WorkspaceError(f"cannot write {path}: {error.strerror}; choose a folder that can be written") from None


def _entries(values: object) -> object:
    """A tuple of what was given; a single text is left as it is, to be refused: its letters are no list."""
    return tuple(values) if isinstance(values, Iterable) and not isinstance(values, (str, bytes, Mapping)) else values


def _explain(error: pydantic.ValidationError, what: str) -> str:
    parts = []
    for item in error.errors():
        where = ".".join(str(p) for p in item["loc"]) or what
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "string_type":
            message = f"is {item['input']!r}; expected text (in quotes, where it looks like a number, a date, or yes and no)"
        elif item["type"] == "tuple_type":
            message = f"is {item['input']!r}; expected a list"
        parts.append(f"{where} {message[0].lower() + message[1:]}" if message else where)
    return f"{what}: " + "; ".join(parts)
