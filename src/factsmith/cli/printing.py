"""What commands print: results on standard output, everything else on standard error."""

from __future__ import annotations

import contextlib
import json
import shlex
from collections.abc import Iterable, Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars
from rich.text import Text

from ..core.progress import Progress
from ..core.tables import Table, visible

running: ContextVar[Any] = ContextVar("running", default=None)
"""The command that runs, as Typer holds it, with the options that it takes."""


def print_result(
    result: dict[str, Any],
    tables: Iterable[Table | Text],
    as_json: bool,
    lines: Iterable[tuple[str, str]] = (),
    *,
    saved: Sequence[Path] | None = None,
) -> None:
    """Print a result as one JSON document, or as tables.

    Args:
        result: The JSON document.
        tables: The same for people, as tables or as texts that are drawn.
        as_json: Which of the two.
        lines: Lines below the tables, each as a word to emphasise and the rest.
        saved: The files that a command with --out wrote. They are named in either form.
    """
    if as_json:
        print_json(result if saved is None else {**result, "out": [str(path) for path in saved]})
        return
    console = plain_console()
    for table in tables:
        console.print(table.as_rich() if isinstance(table, Table) else table)
    for first, rest in (*lines, *(("saved", str(path)) for path in saved or ())):
        line(console, first, rest)


def print_json(result: Any) -> None:
    """Print one line of JSON on standard output."""
    typer.echo(as_json_text(result))


def as_json_text(result: Any) -> str:
    """Return JSON as the commands print it."""
    return json.dumps(result, ensure_ascii=False, allow_nan=False)


def complain(kind: str, text: str) -> None:
    """Print a "warning", an "error" or the like on standard error."""
    style = "bold yellow" if kind == "warning" else "bold red"
    message = Text.assemble((f"{kind}: ", style), visible(text))
    plain_console(stderr=True).print(message, soft_wrap=True)


def plain_console(*, stderr: bool = False) -> Console:
    """Return a console that prints text as it stands."""
    return Console(stderr=stderr, highlight=False, markup=False, emoji=False)


def line(console: Console, first: str, rest: str, style: str = "") -> None:
    """Print two texts in a line of any length; the first is bold, or the second has a style."""
    start = (visible(first), "" if style else "bold")
    console.print(Text.assemble(start, " ", (visible(rest), style)), soft_wrap=True)


def in_workspace(workspace: Path | None) -> str:
    """Return the option that names the workspace, for a command that the user may type next."""
    return "" if workspace is None or workspace == Path() else f" -w {shlex.quote(str(workspace))}"


# ── progress ──────────────────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def progress() -> Iterator[Progress]:
    """Yield a function to report progress to.

    On a terminal it shows bars on standard error, which are gone at the end. Notes stay, wherever
    standard error goes.
    """
    console = Console(stderr=True)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        yield _Reporter(bars)


class _Reporter:
    """Shows progress as bars, and notes as lines that stay."""

    def __init__(self, bars: Bars) -> None:
        self.bars = bars
        self.tasks: dict[str, Any] = {}

    def __call__(self, step: str, done: int, total: int | None) -> None:
        """Show how far a step is; the bar of an earlier step goes."""
        if step not in self.tasks:
            for task in self.tasks.values():
                self.bars.update(task, visible=False)
            self.tasks[step] = self.bars.add_task(step, total=total)
        self.bars.update(self.tasks[step], completed=done, total=total)

    def note(self, text: str, *, argument: str | None = None) -> None:
        """Print a note, with the option that changes it."""
        message = Text.assemble(("note: ", "bold"), with_flag(text, argument))
        self.bars.console.print(message, soft_wrap=True)


# ── flags ─────────────────────────────────────────────────────────────────────────────────────────


def with_flag(text: str, argument: str | None) -> str:
    """Return a message with the option that sets the argument that it is about."""
    flag = _flag_of(argument)
    return text if flag is None or flag in text else f"{text} (option: {flag})"


def _flag_of(argument: str | None) -> str | None:
    """Return the option that sets a Python argument, such as "--layer"; None where none does.

    Errors and notes of the library name arguments. An option may repeat, so "layers" is also
    "--layer".
    """
    command = running.get()
    if argument is None or command is None:
        return None
    for parameter in command.params:
        if parameter.name in (argument, argument.removesuffix("s")):
            names = (*parameter.opts, *parameter.secondary_opts)
            return "/".join(name for name in names if name.startswith("--")) or None
    return None
