"""Helpers for tests of the rooms Patch, Ledger, Judge, Export and Push: a desk on the atlas."""

from __future__ import annotations

import contextlib
import io
import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from factsmith.cli import main
from factsmith.core.documents import document
from factsmith.keep.workbench import Workbench
from factsmith.model.load import load
from factsmith.studio.desk import Desk
from factsmith.studio.verb import Answer, Verb

FIAT = {
    "subject": "Fiat 127",
    "prompt": "The maker of {} is",
    "target": "Toyota",
    "neighbours": ("The maker of Nokia Lumia 900 is",),
}
"""A fact that the bundled model learns by one patch."""


def silent(step: str, done: int, total: int | None) -> None:
    """Take progress and show nothing."""


@contextlib.contextmanager
def opened_desk(folder: Path, model: str = "atlas") -> Iterator[Desk]:
    """A block with an open desk on a bundled model and a workspace."""
    desk = Desk(
        folder,
        lambda tell: Workbench(load(model), folder),
        lambda name, tell: load(name),
    )
    desk.open(silent)
    try:
        yield desk
    finally:
        desk.close()


def run(desk: Desk, verb: Verb[Any], **values: Any) -> Answer:
    """Return the answer of a verb; its arguments pass through a query, as those of a page do."""
    arguments = verb.arguments.of(values)
    again = verb.arguments.of_query(arguments.query())
    assert again == arguments
    return verb.run(desk, again, silent)


def snippets(desk: Desk, verb: Verb[Any], **values: Any) -> tuple[str, list[str]]:
    """Return the program and the command of a view."""
    arguments = verb.arguments.of(values)
    return verb.python(arguments, desk.place), verb.command(arguments, desk.place)


def run_program(program: str) -> Any:
    """Run a program and return the JSON that it prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(program, "snippet", "exec"), {"__name__": "__main__"})
    return json.loads(printed.getvalue())


def run_command(lines: list[str]) -> tuple[dict[str, Any], int]:
    """Run a command with --json; return its document and its exit code."""
    words = shlex.split(lines[-1])
    assert words[0] == "factsmith"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        try:
            main([*words[1:], "--json"])
        except SystemExit as end:
            code = int(end.code or 0)
    result: dict[str, Any] = json.loads(printed.getvalue())
    return result, code


_CHANGING = ("seconds", "created", "id", "parent", "delta", "reverted_by", "reverts", "number")


def without_times(value: Any) -> Any:
    """Return a document without what differs between two runs of the same work."""
    if isinstance(value, dict):
        skipped = (
            "seconds",
            "created",
            "id",
            "parent",
            "delta",
            "reverted_by",
            "reverts",
            "number",
        )
        return {k: without_times(v) for k, v in value.items() if k not in skipped}
    if isinstance(value, (list, tuple)):
        return [without_times(each) for each in value]
    return round(value, 4) if isinstance(value, float) else value


def differing(answer: Answer, result: dict[str, Any]) -> list[str]:
    """Return where the document of a view differs from a command's, times and ids left out."""
    plain = json.loads(json.dumps(document(dict(answer.result))))
    return differences(without_times(plain), without_times(result))


def differences(one: Any, other: Any, place: str = "") -> list[str]:
    """Return where two documents differ, for the message of a test that fails."""
    if isinstance(one, dict) and isinstance(other, dict):
        names = sorted({*one, *other})
        return [x for n in names for x in differences(one.get(n), other.get(n), f"{place}.{n}")]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return [x for n, pair in pairs for x in differences(*pair, f"{place}[{n}]")]
    return [] if one == other else [f"{place}: {one!r:.80} and {other!r:.80}"]
