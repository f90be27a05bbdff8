"""The Python programs and the commands that do what a reading verb does, as text.

    program(source, place, ["print(json.dumps(lens(lm, 'Hello').to_dict()))"])
    command(source, place, "trace", ["Bulgaria is"], {"--subject": "Bulgaria"})

The weights of a reading verb are those that its `Source` names. The checked-out weights are those
of the open workspace. The base weights are the model without a workspace. Python puts the patches
of another revision into the model for a block, and the command line exports that revision first.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from ...keep.ledger import BASE
from ..arguments import Source
from ..desk import Place

_WIDTH = 88
"""Columns of a program. A longer call has one argument a line."""

_INDENT = "    "


def literal(value: object) -> str:
    """Return a value as Python code; texts in double quotes where that needs no escape."""
    code = repr(value)
    if isinstance(value, str) and code[0] == "'" and '"' not in value and "\\" not in code:
        return f'"{code[1:-1]}"'
    if isinstance(value, (list, tuple)):
        items = ", ".join(map(literal, value))
        if isinstance(value, list):
            return f"[{items}]"
        return f"({items},)" if len(value) == 1 else f"({items})"
    return code


def call(name: str, *positional: str, **named: object) -> str:
    """Return a call as code.

    Args:
        name: The function, with what the result is assigned to before it.
        positional: The positional arguments, as code.
        named: The values of the keyword arguments. None, "" and [] are left out.
    """
    given = {key: value for key, value in named.items() if value not in (None, "", [], ())}
    parts = [*positional, *(f"{key}={literal(value)}" for key, value in given.items())]
    line = f"{name}({', '.join(parts)})"
    if len(line) + len(_INDENT) <= _WIDTH:
        return line
    return "\n".join([f"{name}(", *(f"{_INDENT}{part}," for part in parts), ")"])


def program(source: Source, place: Place, body: Sequence[str], imports: Sequence[str] = ()) -> str:
    """Return a program that does something with the weights that a source names.

    Args:
        source: The model and the revision.
        place: The model and the folder of the workspace.
        body: Code that reads the model `lm`. It prints its result as JSON.
        imports: Import statements that the code needs besides `json` and `fs`.
    """
    code = block(source, place, body)
    return "\n".join(["import json", "", "import factsmith as fs", *imports, "", code]) + "\n"


def block(source: Source, place: Place, body: Sequence[str]) -> str:
    """Return code that does something with the weights that a source names.

    Args:
        source: The model and the revision.
        place: The model and the folder of the workspace.
        body: Code that reads the model `lm`.
    """
    opening, is_block = _opening(source, place)
    code = "\n".join(body)
    if is_block:
        code = indented(f"lm = bench.lm\n{code}")
    return f"{opening}\n{code}"


def command(
    source: Source,
    place: Place,
    verb: str,
    words: Sequence[str],
    options: Mapping[str, object] | None = None,
) -> list[str]:
    """Return the lines of shell that do the same; the last one is the command.

    Args:
        source: The model and the revision.
        place: The model and the folder of the workspace.
        verb: The name of the command.
        words: Its words without the model, such as the prompt.
        options: {flag: value}. True is a flag alone; None, False, "" and [] are left out; a list
            gives the flag several times.
    """
    lines: list[str] = []
    folder, model = place.workspace, source.model or place.model
    from_workspace = _is_own(source, place) and not source.revision
    if not from_workspace and Path(folder).resolve() == Path.cwd():
        # In the folder of a workspace the name of its model means the workspace.
        lines, folder = ["cd .."], Path.cwd().name
    if _is_own(source, place) and source.revision not in ("", BASE):
        model = f"model-{source.revision[:10]}"
        export = ["factsmith", "export", "--overwrite", "-w", folder]
        export += ["--revision", source.revision, model]
        lines.append(shlex.join(export))
    flags = [text for flag, value in (options or {}).items() for text in _flag(flag, value)]
    flags = ["-w", folder, *flags] if from_workspace else flags
    rest = [*words] if from_workspace else [model, *words]
    guard = ["--"] if any(word.startswith("-") for word in rest) else []
    return [*lines, shlex.join(["factsmith", verb, *flags, *guard, *rest])]


def no_command(arguments: Source, place: Place) -> list[str]:
    """Return no line: there is no such command."""
    return []


def _flag(flag: str, value: object) -> list[str]:
    """Return an option as words."""
    if value is None or value is False or value in ("", [], ()):
        return []
    if value is True:
        return [flag]
    if isinstance(value, (list, tuple)):
        return [word for item in value for word in (flag, str(item))]
    return [flag, str(value)]


def _is_own(source: Source, place: Place) -> bool:
    """Return whether a source means the workspace's model."""
    return source.model in ("", place.model)


def _opening(source: Source, place: Place) -> tuple[str, bool]:
    """Return the code that gives the model, and whether it opens a block."""
    if not _is_own(source, place) or source.revision == BASE:
        return f"lm = fs.load({literal(source.model or place.model)})", False
    bench = f"fs.Workbench(fs.load({literal(place.model)}), {literal(place.workspace)}) as bench"
    if not source.revision:
        return f"with {bench}:", True
    deltas = f"bench.deltas_at({literal(source.revision)}).values()"
    return f"with {bench}, bench.carrying_exactly({deltas}):", True


def indented(code: str) -> str:
    """Return code one level further in."""
    return "\n".join(_INDENT + line if line else line for line in code.split("\n"))
