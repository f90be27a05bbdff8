"""Facts as plain values: what should be true after an edit, and what must stay as it is.

    Fact("Danielle Darrieux", "The mother tongue of {} is", "English", target_true="French")

A `Fact` knows no model; a `FactFile` is a list of them in YAML or JSON.
"""

from __future__ import annotations

import dataclasses
import json
import os
import reprlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import pydantic
import yaml
from pydantic import AfterValidator, BeforeValidator, ConfigDict, TypeAdapter

from .checks import check_items
from .errors import FactError, InputError, WorkspaceError
from .files import write_file

_MOST_BYTES = 64 * 2**20
_MOST_UNFOLDED = 16 * 2**20
"""Characters of a fact file's texts with every alias written out; a few lines of YAML can stand for billions."""
_DEEPEST = 100


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("is empty; expected some text")
    return text


def _has_one_slot(text: str) -> str:
    if text.count("{}") != 1:
        raise ValueError(f"has {text.count('{}')} slots `{{}}` in {_short(text)}; expected exactly one, where the subject goes")
    return text


def _as_probe(value: object) -> object:
    return {"prompt": value} if isinstance(value, str) else value


def _no_truth(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError(f"is {str(value).lower()}; expected a number, or null to switch it off")
    return value


Text = Annotated[str, AfterValidator(_not_blank), pydantic.WithJsonSchema({"type": "string", "pattern": "\\S", "maxLength": 20_000})]
_STRICT = ConfigDict(extra="forbid", str_max_length=20_000)


@pydantic.dataclasses.dataclass(frozen=True, config=_STRICT)
class Probe:
    """A prompt whose answer must not change; `expected` is what the model should say (None: whatever it said before)."""

    prompt: Text
    expected: Text | None = None


@pydantic.dataclasses.dataclass(frozen=True, config=_STRICT)
class _Fact:
    subject: Text
    prompt: Annotated[
        Text,
        AfterValidator(_has_one_slot),
        pydantic.WithJsonSchema({"type": "string", "pattern": r"^((?!\{\})[\s\S])*\{\}((?!\{\})[\s\S])*$", "maxLength": 20_000}),
    ]
    target: Text | None
    target_true: Text | None = dataclasses.field(default=None, kw_only=True)
    paraphrases: tuple[Text, ...] = dataclasses.field(default=(), kw_only=True)
    neighbours: tuple[Annotated[Probe, BeforeValidator(_as_probe, json_schema_input_type=Text | Probe)], ...] = dataclasses.field(
        default=(), kw_only=True
    )
    relation: str | None = dataclasses.field(default=None, kw_only=True)


Share = Annotated[float, pydantic.Field(ge=0, le=1, allow_inf_nan=False), BeforeValidator(_no_truth)]
Amount = Annotated[float, pydantic.Field(ge=0, allow_inf_nan=False), BeforeValidator(_no_truth)]


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", strict=False))
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
            raise FactError(f"fact about {_short(self.subject)}: target and target_true are both {_short(self.target)}; they must differ")

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
            strange = [f"unknown {_short(key)}" for key in fields if str(key) not in known][:_NAMED]
            missing = [f"no {name}" for name in ("subject", "prompt", "target") if name not in fields]
            raise FactError(
                f"fact: {', '.join(strange + missing)}; expected subject, prompt and target (null: to be forgotten), and some of "
                f"{', '.join(name for name in known if name not in ('subject', 'prompt', 'target'))}"
            ) from None


def listed(facts: Fact | Iterable[Fact]) -> list[Fact]:
    """One fact or several as a list; raises InputError for none, or for anything else."""
    facts = [facts] if isinstance(facts, Fact) else check_items(facts, "facts", "a Fact or a list of at least one")
    if not facts or not all(isinstance(fact, Fact) for fact in facts):
        raise InputError(f"expected a Fact or a list of at least one; got {[type(fact).__name__ for fact in facts]}")
    return facts


class _Loader(yaml.SafeLoader):
    """Plain values only; a field given twice is an error, where the last would win without a word."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.most = _MOST_UNFOLDED + len(text)

    def get_single_node(self) -> yaml.Node | None:
        """The document, once it is known to be of a size that can be held."""
        node: yaml.Node | None = super().get_single_node()
        if node is not None and _unfolded(node, {}) > self.most:
            raise yaml.constructor.ConstructorError(None, None, "its aliases stand for too much; write it out", node.start_mark)
        return node

    def fetch_flow_collection_start(self, TokenClass: type[Any]) -> None:
        """An opening bracket; each looks at all that are open, so that many would take long."""
        if self.flow_level >= _DEEPEST:
            raise yaml.scanner.ScannerError(None, None, f"more than {_DEEPEST} brackets within one another", self.get_mark())
        super().fetch_flow_collection_start(TokenClass)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """A value; a scalar that is not what its tag says is an error of YAML's."""
        try:
            value = super().construct_object(node, deep)
            if isinstance(value, int) and value.bit_length() > 1000:  # in base 16 there may be more digits than Python will print
                raise ValueError
        except (ValueError, LookupError, AttributeError):
            kind = node.tag.rpartition(":")[2]
            raise yaml.constructor.ConstructorError(
                None, None, f"{_short(node.value)} is no {kind}; put text in quotes", node.start_mark
            ) from None
        return value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping whose keys differ."""
        seen: set[Any] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if not isinstance(key, yaml.ScalarNode):
                continue  # no name of a field; refused below
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{_short(key.value)} is given twice; leave one out", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Texts as they are; those with line ends and marks that YAML would take for its own are written with escapes."""

    def represent_str(self, text: str) -> yaml.ScalarNode:
        """A text, in quotes with escapes unless all of it can be seen."""
        plain = all(line.isprintable() for line in text.split("\n"))
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=None if plain else '"')


_Dumper.add_representer(str, _Dumper.represent_str)


def _unfolded(node: yaml.Node, known: dict[int, int]) -> int:
    """Characters of a node's texts, and one for each value, with every alias written out; raises for a node that holds itself."""
    if (size := known.get(id(node))) is None:
        known[id(node)] = 0
        size = 1
        if isinstance(node, yaml.ScalarNode):
            size += len(node.value)
        else:
            for part in node.value:
                size += sum(_unfolded(each, known) for each in (part if isinstance(part, tuple) else (part,)))
        known[id(node)] = size
    elif not size:
        raise yaml.constructor.ConstructorError(None, None, "it holds itself; write it out", node.start_mark)
    return size


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys differ."""
    fields = dict(pairs)
    if len(fields) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{_short(next(name for name in names if names.count(name) > 1))} is given twice; leave one out")
    return fields


def _no_number(constant: str) -> None:
    raise ValueError(f"it holds {constant}, which is no number")


def _plain_values(path: Path) -> Any:
    """What a YAML or JSON file holds; raises FactError."""
    kind = "JSON" if path.suffix.lower() == ".json" else "YAML"
    try:
        with path.open("rb") as file:
            raw = file.read(_MOST_BYTES + 1)
        if len(raw) > _MOST_BYTES:
            raise FactError(f"{path} has more than {_MOST_BYTES:,} bytes; split it into several files")
        text = raw.decode()
        if kind == "JSON":
            return json.loads(text, object_pairs_hook=_once, parse_constant=_no_number)
        loader = _Loader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except FactError:
        raise
    except OSError as error:
        raise FactError(f"cannot read {path}: {error.strerror}; expected a YAML or JSON file of facts") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: UTF-8, JSON, a number of too many digits, a name with NUL
        problem = str(error)
        raise FactError(f"{path} is not valid {kind}: {problem if len(problem) < 1000 else problem[:999] + '…'}") from None


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class _Content:
    """A fact file as its JSON Schema describes it."""

    facts: Annotated[list[_Fact], pydantic.Field(min_length=1)]
    gates: Gates = dataclasses.field(default_factory=Gates)
    method: Text | None = None
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FactSheet:
    """What a fact file says: facts, the gates they have to pass, and how they are to be written.

    method    an editor's name; None: whoever applies the file chooses
    settings  some of the method's settings, by name
    """

    facts: tuple[Fact, ...]
    gates: Gates = dataclasses.field(default_factory=Gates)
    method: str | None = None
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class FactFile:
    """Facts in a YAML or JSON file: `facts: [...]`, beside them `gates`, `method` and `settings` if wanted; or a bare list of facts."""

    @staticmethod
    def schema() -> dict[str, Any]:
        """The JSON Schema of a fact file, for editors and checks."""
        found = TypeAdapter(_Content).json_schema()
        definitions = found.pop("$defs")
        listed_bare = {"type": "array", "minItems": 1, "items": found["properties"]["facts"]["items"]}
        head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "factsmith fact file"}
        return {**head, "anyOf": [found, listed_bare], "$defs": definitions}

    @staticmethod
    def read(path: str | os.PathLike[str]) -> list[Fact]:
        """Read and validate every fact; raises FactError naming the file and the entry."""
        return list(FactFile.sheet(path).facts)

    @staticmethod
    def sheet(path: str | os.PathLike[str]) -> FactSheet:
        """Read and validate all that a file says; raises FactError naming the file and the entry."""
        path = Path(path)
        content = _plain_values(path)
        entries = content.get("facts") if isinstance(content, Mapping) else content
        if not isinstance(entries, list) or not entries:
            raise FactError(f"{path} holds no facts; expected `facts:` followed by a list of entries")
        facts = []
        for index, entry in enumerate(entries):
            try:
                facts.append(Fact.from_dict(entry))
            except FactError as error:
                raise FactError(f"{path}, entry {index + 1}: {error}") from None
        rest = {name: value for name, value in content.items() if name != "facts"} if isinstance(content, Mapping) else {}
        if unknown := sorted(str(name) for name in rest if name not in ("gates", "method", "settings")):
            raise FactError(f"{path} has {', '.join(map(_short, unknown[:_NAMED]))}; expected facts, and some of gates, method, settings")
        method, settings, gates_told = rest.get("method"), rest.get("settings"), rest.get("gates")
        settings, gates_told = ({} if told is None else told for told in (settings, gates_told))
        if not isinstance(method, (str, type(None))) or method == "" or not isinstance(settings, Mapping):
            raise FactError(f"{path}: method is a name, and settings are values by name; got {_short(method)} and {_short(settings)}")
        try:
            gates = Gates.from_dict(gates_told)
        except FactError as error:
            raise FactError(f"{path}: {error}") from None
        return FactSheet(facts=tuple(facts), gates=gates, method=method, settings={str(name): value for name, value in settings.items()})

    @staticmethod
    def write(path: str | os.PathLike[str], facts: list[Fact]) -> None:
        """Write facts as YAML (or JSON, by the suffix), replacing the file in one step; raises WorkspaceError."""
        path = Path(path)
        content = {"facts": [TypeAdapter(dict[str, Any]).dump_python(f.to_dict(), mode="json") for f in facts]}
        text = (
            json.dumps(content, ensure_ascii=False, indent=2) + "\n"
            if path.suffix.lower() == ".json"
            else yaml.dump(content, Dumper=_Dumper, allow_unicode=True, sort_keys=False)
        )
        try:
            write_file(path, text.encode())
        except OSError as error:
            raise WorkspaceError(f"cannot write {path}: {error.strerror}; choose a folder that can be written") from None


def _entries(values: object) -> object:
    """A tuple of what was given; a single text is left as it is, to be refused: its letters are no list."""
    return tuple(values) if isinstance(values, Iterable) and not isinstance(values, (str, bytes, Mapping)) else values


def _explain(error: pydantic.ValidationError, what: str) -> str:
    parts, found = [], error.errors(include_url=False)
    for item in found[:_NAMED]:
        where = ".".join(_short(p).strip("'") for p in item["loc"]) or what
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "string_type":
            message = f"is {_short(item['input'])}; expected text (in quotes, where it looks like a number, a date, or yes and no)"
        elif item["type"] == "tuple_type":
            message = f"is {_short(item['input'])}; expected a list"
        parts.append(f"{where} {message[0].lower() + message[1:]}" if message else where)
    more = f"; and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    return f"{what}: " + "; ".join(parts) + more


_NAMED = 5
"""Faults that a message names; files from others may have millions."""
_brief = reprlib.Repr()
_brief.maxstring = _brief.maxother = 120
_brief.maxlevel = 2


def _short(value: object) -> str:
    """A value as messages quote it: never long, however large or deep it is."""
    try:
        text = _brief.repr(value)
    except ValueError:  # an integer of too many digits
        return f"a huge {type(value).__name__}"
    return text if len(text) <= 160 else f"{text[:159]}…"
