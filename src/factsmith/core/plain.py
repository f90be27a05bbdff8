"""Files from others as plain values: YAML or JSON, without tags, doubled names or bombs.

    plain_values(Path("facts.yaml"))      dictionaries, lists, texts, numbers, None
    file_text(Path("facts.csv"))          the text alone
    as_yaml({"facts": [...]})             YAML that reads back as the same values

Foreign files are data. A file that is too large, too deep, or that stands for too much through
aliases is refused before its values are built.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from .errors import FactError
from .explain import short
from .filetext import decoded

_MOST_BYTES = 64 * 2**20
"""Bytes of a file."""

_MOST_UNFOLDED = 16 * 2**20
"""Characters that aliases may add: with each written out, a few lines can stand for billions."""

_DEEPEST = 100
"""Brackets inside one another."""

_MOST_BITS = 1000
"""Bits of an integer. In base 16 a file may have more digits than Python prints."""

_LONGEST_PROBLEM = 1000
"""Characters of a parser's own message."""


class _Loader(yaml.SafeLoader):
    """A loader of plain values, for which a field given twice is an error.

    PyYAML would take the last one without a word.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.most = _MOST_UNFOLDED + len(text)

    def get_single_node(self) -> yaml.Node | None:
        """Return the document, after a check of its size with every alias written out."""
        node: yaml.Node | None = super().get_single_node()
        if node is not None and _unfolded(node, {}) > self.most:
            raise yaml.constructor.ConstructorError(
                None, None, "its aliases stand for too much; write it out", node.start_mark
            )
        return node

    def fetch_flow_collection_start(self, TokenClass: type[Any]) -> None:
        """Refuse an opening bracket that is too deep: each one looks at all that are open."""
        if self.flow_level >= _DEEPEST:
            raise yaml.scanner.ScannerError(
                None, None, f"more than {_DEEPEST} brackets within one another", self.get_mark()
            )
        super().fetch_flow_collection_start(TokenClass)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Return a value; a scalar that does not match its tag is an error of YAML's."""
        try:
            value = super().construct_object(node, deep)
            if isinstance(value, int) and value.bit_length() > _MOST_BITS:
                raise ValueError
        except (ValueError, LookupError, AttributeError):
            kind = node.tag.rpartition(":")[2]
            raise yaml.constructor.ConstructorError(
                None,
                None,
                f"{short(node.value)} is not a valid {kind}; put text in quotes",
                node.start_mark,
            ) from None
        return value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return a mapping whose keys differ."""
        seen: set[Any] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if not isinstance(key, yaml.ScalarNode):
                continue  # cannot be the name of a field: refused later
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{short(key.value)} is given twice; leave one out", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """A dumper that writes texts with escapes where a character cannot be seen."""

    def represent_str(self, text: str) -> yaml.ScalarNode:
        """Write a text, in quotes with escapes unless all of it can be seen."""
        plain = all(line.isprintable() for line in text.split("\n"))
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=None if plain else '"')


_Dumper.add_representer(str, _Dumper.represent_str)


def _unfolded(node: yaml.Node, known: dict[int, int]) -> int:
    """Return the size of a node with every alias written out.

    The size counts the characters of all texts and one for each value. A node that holds itself is
    an error of YAML's.
    """
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
    """Return a JSON object whose keys differ."""
    fields = dict(pairs)
    if len(fields) != len(pairs):
        names = [name for name, _ in pairs]
        doubled = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{short(doubled)} is given twice; leave one out")
    return fields


def _no_number(constant: str) -> None:
    raise ValueError(f"it holds {constant}; expected a finite number")


def plain_values(path: Path) -> Any:
    """Return what a YAML file holds, or a JSON file if its name ends so.

    Raises:
        FactError: when the file cannot be read, is too large, or is not valid.
    """
    return parsed(path, file_text(path))


def file_text(path: Path) -> str:
    """Return the text of a file, without a byte order mark.

    Raises:
        FactError: when the file cannot be read, is too large, or is not text in Unicode.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(_MOST_BYTES + 1)
        if len(raw) > _MOST_BYTES:
            raise FactError(
                f"{path} has more than {_MOST_BYTES:,} bytes; split it into several files"
            )
        return decoded(raw)
    except OSError as error:
        raise FactError(
            f"cannot read {path}: {error.strerror}; expected a file of facts in YAML, JSON, "
            "JSON lines or CSV"
        ) from None
    except ValueError as error:  # invalid UTF-8, or a name with NUL
        if isinstance(error, FactError):
            raise
        raise FactError(f"{path} is not valid text: {error}") from None


def parsed(path: Path, text: str) -> Any:
    """Return what a text in YAML holds, or in JSON if the file's name ends so.

    Raises:
        FactError: when the text is not valid.
    """
    kind = "JSON" if path.suffix.lower() == ".json" else "YAML"
    try:
        if kind == "JSON":
            return json_value(text)
        loader = _Loader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        # ValueError: invalid JSON, or a number of too many digits.
        problem = _in_a_sentence(error)
        if len(problem) >= _LONGEST_PROBLEM:
            problem = problem[: _LONGEST_PROBLEM - 1] + "…"
        raise FactError(f"{path} is not valid {kind}: {problem}") from None


def _in_a_sentence(error: Exception) -> str:
    """Return a parser's message as one line, without the excerpt and caret of PyYAML."""
    if not isinstance(error, yaml.YAMLError):
        return str(error)
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    if mark is None:
        return problem
    context = getattr(error, "context", None)
    place = f"line {mark.line + 1}, column {mark.column + 1}"
    return f"{place}: {problem}" + (f" {context}" if context else "")


def json_value(text: str) -> Any:
    """Return a JSON value of finite numbers, in which no name is given twice.

    Raises:
        ValueError: when the text is not one. RecursionError: when it is too deep.
    """
    return json.loads(text, object_pairs_hook=_once, parse_constant=_no_number)


def as_yaml(content: dict[str, Any]) -> str:
    """Return plain values as YAML, the fields in their order."""
    return yaml.dump(content, Dumper=_Dumper, allow_unicode=True, sort_keys=False)
