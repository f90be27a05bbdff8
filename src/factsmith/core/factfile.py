"""Fact files: facts as YAML, JSON, JSON lines or CSV, with the gates, method and settings of their
patch.

    FactFile.write("facts.yaml", [Fact("Bulgaria", "The currency of {} is the", "euro")])
    FactFile.read("facts.yaml")                   the facts
    FactFile.sheet("facts.yaml").settings         all that the file says

A file in YAML or JSON is a mapping of `facts` and, if wanted, `gates`, `method` and `settings`, or
a bare list of facts. JSON lines (.jsonl) hold one fact a line. A table (.csv, .tsv) holds one fact
a row; `facttable.py` says how.

A fact that the model should forget has `forget: true` in place of its target. A target that is
blank or null is refused: it may have been left out by mistake.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import pydantic
from pydantic import ConfigDict, TypeAdapter

from .errors import FactError, WorkspaceError
from .explain import NAMED, short
from .fact import Fact, FactFields, Text
from .facttable import facts_of_table
from .files import write_file
from .filetext import Line, fault_in_line, json_lines
from .gates import Gates
from .plain import as_yaml, file_text, json_value, parsed

SUFFIXES = (".yaml", ".yml", ".json", ".jsonl", ".ndjson", ".csv", ".tsv")
"""How the name of a fact file may end."""

_TABLES, _LINES = (".csv", ".tsv"), (".jsonl", ".ndjson")


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class _Content:
    """A file of facts, with the gates, method and settings of their patch."""

    facts: Annotated[list[FactFields], pydantic.Field(min_length=1)]
    gates: Gates = dataclasses.field(default_factory=Gates)
    method: Text | None = None
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FactSheet:
    """All that a fact file says.

    Attributes:
        facts: The facts to write.
        gates: The thresholds that the patch must pass.
        method: The name of an editing method. None: whoever applies the file chooses.
        settings: Some of the method's settings, by name.
        names_gates: Whether the file itself names gates. Otherwise `gates` are the defaults.
    """

    facts: tuple[Fact, ...]
    gates: Gates = dataclasses.field(default_factory=Gates)
    method: str | None = None
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    names_gates: bool = False

    @property
    def named_gates(self) -> Gates | None:
        """The gates that the file names; None if it names none."""
        return self.gates if self.names_gates else None


class FactFile:
    """Facts in a file: YAML, JSON, JSON lines, or a table."""

    @staticmethod
    def schema() -> dict[str, Any]:
        """Return the JSON Schema of a fact file, for editors and checks."""
        whole = TypeAdapter(_Content).json_schema()
        definitions = whole.pop("$defs")
        _ask_for_target_or_forget(definitions["FactFields"])
        facts = whole["properties"]["facts"]["items"]
        return {
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            "title": "factsmith fact file",
            "anyOf": [whole, {"type": "array", "minItems": 1, "items": facts}],
            "$defs": definitions,
        }

    @staticmethod
    def read(path: str | os.PathLike[str]) -> list[Fact]:
        """Return the facts of a file, checked.

        Raises:
            FactError: when the file or one of its entries is invalid; it names both.
        """
        return list(FactFile.sheet(path).facts)

    @staticmethod
    def sheet(path: str | os.PathLike[str]) -> FactSheet:
        """Return all that a file says, checked.

        Raises:
            FactError: when the file or one of its entries is invalid; it names both.
        """
        path = Path(path)
        fields, entries = _content(path)
        facts = _facts(path, entries)
        others = {name: value for name, value in fields.items() if name != "facts"}
        try:
            return FactSheet(facts=facts, **_instructions(others))
        except FactError as error:
            raise FactError(f"{path}: {error}") from None

    @staticmethod
    def write(path: str | os.PathLike[str], facts: list[Fact]) -> None:
        """Write facts as YAML, or as JSON if the file's name ends so, in one step.

        Raises:
            WorkspaceError: when the file cannot be written; an older one is left unchanged.
        """
        path = Path(path)
        content = {"facts": [_plain_entry(fact) for fact in facts]}
        text = (
            json.dumps(content, ensure_ascii=False, indent=2) + "\n"
            if path.suffix.lower() == ".json"
            else as_yaml(content)
        )
        try:
            write_file(path, text.encode())
        except OSError as error:
            raise WorkspaceError(
                f"cannot write {path}: {error.strerror}; choose a folder that can be written"
            ) from None

    @staticmethod
    def text(sheet: FactSheet) -> str:
        """Return all that a file says as YAML, which `sheet` reads back as the same."""
        content: dict[str, Any] = {"facts": [_plain_entry(fact) for fact in sheet.facts]}
        if sheet.names_gates:
            content["gates"] = dataclasses.asdict(sheet.gates)
        if sheet.method is not None:
            content["method"] = sheet.method
        if sheet.settings:
            content["settings"] = TypeAdapter(dict[str, Any]).dump_python(
                dict(sheet.settings), mode="json"
            )
        return as_yaml(content)


def _content(path: Path) -> tuple[Mapping[Any, Any], list[tuple[str, Any]]]:
    """Return the fields of a file, and its entries, each after words that say where it is."""
    text, suffix = file_text(path), path.suffix.lower()
    if suffix in _TABLES:
        try:
            return {}, _located(facts_of_table(text))
        except ValueError as error:  # a FactError is one, too
            raise FactError(f"{path}, {error}") from None
    if suffix in _LINES:
        lines = json_lines(text, json_value)
        if len(lines) == 1 and (isinstance(lines[0].value, list) or _holds_facts(lines[0].value)):
            content = lines[0].value  # a whole file in one line
        else:
            return {}, _located(lines)
    else:
        try:
            content = parsed(path, text)
        except FactError:
            lines = json_lines(text, json_value)
            if len(lines) < 2 or not isinstance(lines[0].value, Mapping):
                raise
            return {}, _located(lines)
    fields = content if isinstance(content, Mapping) else {"facts": content}
    entries = fields.get("facts")
    if not isinstance(entries, list):
        entries = []
    return fields, [(f"entry {number}", entry) for number, entry in enumerate(entries, 1)]


def _holds_facts(value: object) -> bool:
    return isinstance(value, Mapping) and "facts" in value


def _located(lines: list[Line]) -> list[tuple[str, Any]]:
    return [(f"line {line.number}", line.value) for line in lines]


def _facts(path: Path, entries: list[tuple[str, Any]]) -> tuple[Fact, ...]:
    """Return the facts of a file's entries; raise one FactError for all that are wrong."""
    if not entries:
        raise FactError(
            f"{path} holds no facts; expected `facts:` followed by a list of entries, or one fact "
            "a line"
        )
    facts, problems = [], []
    for place, entry in entries:
        try:
            facts.append(_fact(entry))
        except FactError as error:
            problems.append(f"{place}: {error}")
    if len(problems) == 1:
        raise FactError(f"{path}, {problems[0]}")
    if problems:
        rest = f", and {len(problems) - NAMED:,} more" if len(problems) > NAMED else ""
        raise FactError(
            f"{path}, {'. '.join(problems[:NAMED])}{rest}. "
            f"{len(problems):,} of {len(entries):,} facts cannot be used"
        )
    return tuple(facts)


def _fact(entry: Any) -> Fact:
    """Return the fact of an entry. Its target is a text, or it has `forget: true`."""
    if isinstance(entry, Exception):
        raise (
            entry if isinstance(entry, FactError) else FactError(f"no JSON: {fault_in_line(entry)}")
        )
    if isinstance(entry, Mapping) and "target" in entry:
        target = entry["target"]
        if entry.get("forget") is True:
            raise FactError("fact: it has a target and `forget: true`; leave one of them out")
        if target is None or (isinstance(target, str) and not target.strip()):
            raise FactError(
                "fact: target is empty; give what the model should say. If it should forget what "
                "it says now, leave the target out and write `forget: true`"
            )
    return Fact.from_dict(entry)


def _entry(fact: Fact) -> dict[str, Any]:
    """Return the entry of a fact in a file."""
    fields = fact.to_dict()
    if fact.target is not None:
        return fields
    return {
        "forget" if name == "target" else name: True if name == "target" else value
        for name, value in fields.items()
    }


def _plain_entry(fact: Fact) -> dict[str, Any]:
    """Return the same in plain values."""
    entry: dict[str, Any] = TypeAdapter(dict[str, Any]).dump_python(_entry(fact), mode="json")
    return entry


def _ask_for_target_or_forget(schema: dict[str, Any]) -> None:
    """Let the schema of a fact ask for a target or for `forget: true`."""
    properties = schema["properties"]
    (properties["target"],) = (
        {**kind, "title": "Target"}
        for kind in properties["target"]["anyOf"]
        if "type" in kind and kind["type"] != "null"
    )
    properties["forget"] = {"type": "boolean", "default": False, "title": "Forget"}
    schema["required"] = [name for name in schema["required"] if name != "target"]
    schema["oneOf"] = [
        {"required": ["target"], "properties": {"forget": {"const": False}}},
        {"required": ["forget"], "properties": {"forget": {"const": True}, "target": False}},
    ]


def _instructions(fields: Mapping[Any, Any]) -> dict[str, Any]:
    """Return the gates, method and settings among the fields of a file."""
    known = ("gates", "method", "settings")
    if unknown := sorted(str(name) for name in fields if name not in known):
        raise FactError(
            f"unknown {', '.join(map(short, unknown[:NAMED]))}; "
            "expected facts, and some of gates, method, settings"
        )
    gates, method, settings = (fields.get(name) for name in known)
    settings = {} if settings is None else settings
    if not isinstance(method, (str, type(None))) or method == "":
        raise FactError(f"method is {short(method)}; expected the name of a method")
    if not isinstance(settings, Mapping):
        raise FactError(f"settings is {short(settings)}; expected values by name")
    return {
        "gates": Gates.from_dict({} if gates is None else gates),
        "method": method,
        "settings": {str(name): value for name, value in settings.items()},
        "names_gates": gates is not None,
    }
