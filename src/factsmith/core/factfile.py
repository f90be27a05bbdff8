"""Fact files: facts as YAML or JSON, with the gates, method and settings of their patch."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import pydantic
import yaml
from pydantic import ConfigDict, TypeAdapter

from .errors import FactError, WorkspaceError
from .fact import NAMED, Fact, FactFields, Gates, Text, short
from .files import write_file

_MOST_BYTES = 64 * 2**20

_MOST_UNFOLDED = 16 * 2**20
"""Characters of a fact file's texts with every alias written out; a few lines of YAML can stand for billions."""

_DEEPEST = 100


class _Loader(yaml.SafeLoader):
    """Plain values only; a field given twice is an error, where the last would win without a word."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.most = _MOST_UNFOLDED + len(text)

    def get_single_node(self) -> yaml.Node | None:
        """The document, once it is known to be of a size that can be held."""
        node: yaml.Node | None = super().get_single_node()
        if node is not None and _unfolded(node, {}) > self.most:
            raise yaml.constructor.ConstructorError(
                None, None, "its aliases stand for too much; write it out", node.start_mark
            )
        return node

    def fetch_flow_collection_start(self, TokenClass: type[Any]) -> None:
        """An opening bracket; each looks at all that are open, so that many would take long."""
        if self.flow_level >= _DEEPEST:
            raise yaml.scanner.ScannerError(
                None, None, f"more than {_DEEPEST} brackets within one another", self.get_mark()
            )
        super().fetch_flow_collection_start(TokenClass)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """A value; a scalar that is not what its tag says is an error of YAML's."""
        try:
            value = super().construct_object(node, deep)
            if (
                isinstance(value, int) and value.bit_length() > 1000
            ):  # in base 16 there may be more digits than Python will print
                raise ValueError
        except (ValueError, LookupError, AttributeError):
            kind = node.tag.rpartition(":")[2]
            raise yaml.constructor.ConstructorError(
                None, None, f"{short(node.value)} is no {kind}; put text in quotes", node.start_mark
            ) from None
        return value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping whose keys differ."""
        seen: set[Any] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if not isinstance(key, yaml.ScalarNode):
                continue  # no name of a field; refused below
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{short(key.value)} is given twice; leave one out", key.start_mark
                )
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
                size += sum(
                    _unfolded(each, known)
                    for each in (part if isinstance(part, tuple) else (part,))
                )
        known[id(node)] = size
    elif not size:
        raise yaml.constructor.ConstructorError(
            None, None, "it holds itself; write it out", node.start_mark
        )
    return size


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys differ."""
    fields = dict(pairs)
    if len(fields) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(
            f"{short(next(name for name in names if names.count(name) > 1))} is given twice; leave one out"
        )
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
            raise FactError(
                f"{path} has more than {_MOST_BYTES:,} bytes; split it into several files"
            )
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
        raise FactError(
            f"cannot read {path}: {error.strerror}; expected a YAML or JSON file of facts"
        ) from None
    except (
        yaml.YAMLError,
        ValueError,
        RecursionError,
    ) as error:  # ValueError: UTF-8, JSON, a number of too many digits, a name with NUL
        problem = str(error)
        raise FactError(
            f"{path} is not valid {kind}: {problem if len(problem) < 1000 else problem[:999] + '…'}"
        ) from None


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class _Content:
    """A fact file as its JSON Schema describes it."""

    facts: Annotated[list[FactFields], pydantic.Field(min_length=1)]
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
        listed_bare = {
            "type": "array",
            "minItems": 1,
            "items": found["properties"]["facts"]["items"],
        }
        head = {
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            "title": "factsmith fact file",
        }
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
            raise FactError(
                f"{path} holds no facts; expected `facts:` followed by a list of entries"
            )
        facts = []
        for index, entry in enumerate(entries):
            try:
                facts.append(Fact.from_dict(entry))
            except FactError as error:
                raise FactError(f"{path}, entry {index + 1}: {error}") from None
        rest = (
            {name: value for name, value in content.items() if name != "facts"}
            if isinstance(content, Mapping)
            else {}
        )
        if unknown := sorted(
            str(name) for name in rest if name not in ("gates", "method", "settings")
        ):
            raise FactError(
                f"{path} has {', '.join(map(short, unknown[:NAMED]))}; expected facts, and some of gates, method, settings"
            )
        method, settings, gates_told = rest.get("method"), rest.get("settings"), rest.get("gates")
        settings, gates_told = ({} if told is None else told for told in (settings, gates_told))
        if (
            not isinstance(method, (str, type(None)))
            or method == ""
            or not isinstance(settings, Mapping)
        ):
            raise FactError(
                f"{path}: method is a name, and settings are values by name; got {short(method)} and {short(settings)}"
            )
        try:
            gates = Gates.from_dict(gates_told)
        except FactError as error:
            raise FactError(f"{path}: {error}") from None
        return FactSheet(
            facts=tuple(facts),
            gates=gates,
            method=method,
            settings={str(name): value for name, value in settings.items()},
        )

    @staticmethod
    def write(path: str | os.PathLike[str], facts: list[Fact]) -> None:
        """Write facts as YAML (or JSON, by the suffix), replacing the file in one step; raises WorkspaceError."""
        path = Path(path)
        content = {
            "facts": [
                TypeAdapter(dict[str, Any]).dump_python(f.to_dict(), mode="json") for f in facts
            ]
        }
        text = (
            json.dumps(content, ensure_ascii=False, indent=2) + "\n"
            if path.suffix.lower() == ".json"
            else yaml.dump(content, Dumper=_Dumper, allow_unicode=True, sort_keys=False)
        )
        try:
            write_file(path, text.encode())
        except OSError as error:
            raise WorkspaceError(
                f"cannot write {path}: {error.strerror}; choose a folder that can be written"
            ) from None
