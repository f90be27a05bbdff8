"""The settings of a dataclass, with what each one means, in `help()`.

    @documented
    @dataclass(frozen=True)
    class Settings:
        \"\"\"How it runs.\"\"\"

        steps: int = 20
        \"\"\"How many steps it takes.\"\"\"

    help(Settings)         # How it runs. Settings: steps: int = 20. How many steps it takes.

Python forgets a text that stands under a field. `documented` reads it from the source file.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import textwrap
from pathlib import Path
from typing import Any, TypeVar

_Settings = TypeVar("_Settings", bound=type)


def documented(settings: _Settings) -> _Settings:
    """Add each field of a dataclass to its docstring: type, default, and the text under it.

    Inherited fields come last. Without the source file, the docstring stays as it is.
    """
    meanings: dict[str, tuple[str, str]] = {}
    for ancestor in settings.__mro__:
        meanings = {**_meanings(ancestor), **meanings}
    lines = []
    inherited = [name for name in dataclasses.fields(settings) if name.name in meanings]
    for field in sorted(inherited, key=lambda field: field.name not in vars(settings)):
        kind, meaning = meanings[field.name]
        lines.append(f"    {field.name}: {kind}{_default(field)}")
        lines.append(textwrap.indent(textwrap.fill(meaning, 88), " " * 8))
    if lines:
        settings.__doc__ = "\n".join([inspect.getdoc(settings) or "", "", "Settings:", *lines])
    return settings


def _default(field: dataclasses.Field[Any]) -> str:
    """Return " = 20", or nothing for a field that must be given."""
    return "" if field.default is dataclasses.MISSING else f" = {field.default!r}"


def _meanings(of: type) -> dict[str, tuple[str, str]]:
    """Return {field: (its type, the text under it)} of the fields that a class defines itself."""
    try:
        path = inspect.getsourcefile(of)
    except TypeError:  # a class that is built in
        return {}
    return _classes(path).get(of.__qualname__, {}) if path else {}


@functools.cache
def _classes(path: str) -> dict[str, dict[str, tuple[str, str]]]:
    """Return the meanings of the fields of each class in a source file."""
    try:
        tree = ast.parse(Path(path).read_text(encoding="utf-8"))
    except OSError:
        return {}
    return {node.name: _fields(node) for node in tree.body if isinstance(node, ast.ClassDef)}


def _fields(node: ast.ClassDef) -> dict[str, tuple[str, str]]:
    return {
        field.target.id: (ast.unparse(field.annotation), inspect.cleandoc(text.value.value))
        for field, text in zip(node.body, node.body[1:], strict=False)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
        if isinstance(text.value.value, str)
    }
