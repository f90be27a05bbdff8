"""Fact files: facts as YAML or JSON, with the gates, method and settings of their patch.

    FactFile.write("facts.yaml", [Fact("Bulgaria", "The currency of {} is the", "euro")])
    FactFile.read("facts.yaml")                   the facts
    FactFile.sheet("facts.yaml").settings         all that the file says

A file is a mapping of `facts` and, if wanted, `gates`, `method` and `settings`; or a bare list of
facts.
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
from .files import write_file
from .gates import Gates
from .plain import as_yaml, plain_values


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
    """Facts in a YAML or JSON file."""

    @staticmethod
    def schema() -> dict[str, Any]:
        """Return the JSON Schema of a fact file, for editors and checks."""
        whole = TypeAdapter(_Content).json_schema()
        definitions = whole.pop("$defs")
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
        content = plain_values(path)
        fields = content if isinstance(content, Mapping) else {"facts": content}
        facts = _facts(path, fields.get("facts"))
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
        plain = TypeAdapter(dict[str, Any])
        content = {"facts": [plain.dump_python(fact.to_dict(), mode="json") for fact in facts]}
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


def _facts(path: Path, entries: object) -> tuple[Fact, ...]:
    """Return the facts of a file's entries."""
    if not isinstance(entries, list) or not entries:
        raise FactError(f"{path} holds no facts; expected `facts:` followed by a list of entries")
    facts = []
    for number, entry in enumerate(entries, 1):
        try:
            facts.append(Fact.from_dict(entry))
        except FactError as error:
            raise FactError(f"{path}, entry {number}: {error}") from None
    return tuple(facts)


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
