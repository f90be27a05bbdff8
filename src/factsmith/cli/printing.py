"""What commands print: results on standard output, everything else on standard error.

Nothing that a fact, a token or a name holds can steer a terminal: `visible` replaces such
characters in text, and JSON escapes them. With --json standard error has one JSON document a line.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import typer
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from ..core.documents import document, error_fields
from ..core.errors import FactsmithError
from ..core.tables import Table, visible
from .streams import can_write, printing_output

_MOST_COMPLAINTS = 20
"""Warnings or failures that are printed; the others are counted."""

running: ContextVar[Any] = ContextVar("running", default=None)
"""The command that runs, as Typer holds it, with the options that it takes."""


@dataclass(frozen=True)
class Manner:
    """How a command speaks.

    Attributes:
        json: Print JSON instead of text.
        quiet: Print no progress and no notes.
        verbose: What to log. 0: nothing; 1: what is done; 2: each step.
    """

    json: bool = False
    quiet: bool = False
    verbose: int = 0


_TEXT = Manner()

manner: ContextVar[Manner] = ContextVar("manner", default=_TEXT)
"""How the command that runs speaks."""


# ── results ───────────────────────────────────────────────────────────────────────────────────────


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
    with printing_output():
        for table in tables:
            if isinstance(table, Table):
                typed = replace(table, title=runnable(table.title), note=runnable(table.note))
                console.print(typed.as_rich())
            else:
                console.print(drawn(table))
        for first, rest in (*lines, *(("saved", str(path)) for path in saved or ())):
            line(console, first, rest)


def print_json(result: dict[str, Any], *, indent: int | None = None) -> None:
    """Print a JSON document on standard output, with the version of its format."""
    with printing_output():
        typer.echo(as_json_text(document(result), indent=indent))


def as_json_text(result: Any, *, indent: int | None = None) -> str:
    """Return JSON as the commands print it: all but printable characters are escaped."""
    text = json.dumps(result, ensure_ascii=False, allow_nan=False, indent=indent)
    if not text.isprintable():
        text = "".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text)
    if can_write(text) and can_write(text, err=True):
        return text
    return json.dumps(result, ensure_ascii=True, allow_nan=False, indent=indent)


def drawn(text: Text) -> Text:
    """Return a text of several lines without characters that would steer the terminal."""
    safe = text.copy()
    safe.plain = "\n".join(map(visible, text.plain.split("\n")))  # as long, so styles stay
    return safe


def line(console: Console, first: str, rest: str, style: str = "") -> None:
    """Print two texts in a line; the first is bold, or the second has a style."""
    start = (visible(first), "" if style else "bold")
    text = Text.assemble(start, " ", (visible(runnable(rest)), style))
    _print_words(console, text)


def _print_words(console: Console, text: Text) -> None:
    """Print a text. A terminal gets it wrapped by word, with long words such as paths whole."""
    console.print(wrapped(text, console.width) if console.is_terminal else text, soft_wrap=True)


def wrapped(text: Text, width: int) -> Text:
    """Return a text in lines of at most a width, except where a single word is longer."""
    breaks, used = [], 0
    for word in re.finditer(r"\s*\S+\s*", text.plain):
        if used and used + cell_len(word[0].rstrip()) > width:
            breaks.append(word.start())
            used = 0
        used += cell_len(word[0])
    lines = text.divide(breaks)
    for line in lines:
        line.rstrip()
    return Text("\n").join(lines)


def plain_console(*, stderr: bool = False) -> Console:
    """Return a console that prints text as it stands."""
    return Console(stderr=stderr, highlight=False, markup=False, emoji=False)


# ── messages ──────────────────────────────────────────────────────────────────────────────────────

_live: list[Console] = []
"""The consoles that show progress bars now. A message printed through one goes above its bars."""


@contextlib.contextmanager
def above_bars(console: Console) -> Iterator[None]:
    """Print messages through this console, above its progress bars, while the block runs."""
    _live.append(console)
    try:
        yield
    finally:
        _live.remove(console)


_STYLES = {"warning": "bold yellow", "note": "bold", "progress": "dim", "log": "dim"}
"""Styles of messages that are no errors."""


def complain(kind: str, text: str, **fields: Any) -> None:
    """Print a "warning", an "error" or the like on standard error.

    Args:
        kind: What it is.
        text: The message.
        fields: What the JSON document says besides.
    """
    if manner.get().json:
        said = as_json_text(document({kind: {"message": text, **fields}}))
        if _live:
            _live[-1].print(Text(said), soft_wrap=True)
        else:
            typer.echo(said, err=True)
        return
    style = _STYLES.get(kind, "bold red")
    message = Text.assemble((f"{kind}: ", style), visible(runnable(text)))
    _print_words(_live[-1] if _live else plain_console(stderr=True), message)


def complain_all(complaints: Sequence[tuple[str, str]], what: str) -> None:
    """Print the first complaints, and how many there are more; under --json all of them.

    Args:
        complaints: Each with its kind, as `complain` takes them.
        what: The complaints, as a plural: "failures".
    """
    most = len(complaints) if manner.get().json else _MOST_COMPLAINTS
    for kind, text in complaints[:most]:
        complain(kind, text.replace("force=True", "--force"))
    if (more := len(complaints) - most) > 0:
        complain("note", f"{more:,} more {what}; --json lists all")


def complain_of(
    error: BaseException | type[BaseException], text: str, code: int, *, argument: str | None = None
) -> None:
    """Print an error on standard error, with its type, what to change, and the exit code."""
    fields = error_fields(error, code, argument, flag_of(argument))
    kind = error if isinstance(error, type) else type(error)
    said = text if manner.get().json else with_flag(text, argument)
    is_fault = code == 1 and not issubclass(kind, FactsmithError) and not manner.get().json
    complain("unexpected error" if is_fault else "error", said, **fields)


def with_flag(text: str, argument: str | None) -> str:
    """Return a message with the option that sets the argument that it is about."""
    flag = flag_of(argument)
    return text if flag is None or flag in text else f"{text} (option: {flag})"


def flag_of(argument: str | None) -> str | None:
    """Return the option that sets a Python argument, such as "--layer"; None where none does.

    Errors and notes of the library name arguments. An option may repeat, so "layers" is also
    "--layer"; and a switch may turn an argument off, so "verify" is also "--no-verify".
    """
    command = running.get()
    if argument is None or command is None:
        return None
    for parameter in command.params:
        if parameter.name in (argument, argument.removesuffix("s"), f"no_{argument}"):
            names = (*parameter.opts, *parameter.secondary_opts)
            if options := [name for name in names if name.startswith("--")]:
                return "/".join(options)
    return None


# ── commands that the user may type next ──────────────────────────────────────────────────────────


def program() -> str:
    """Return how to type `factsmith`: by its path where it is not on the PATH."""
    if shutil.which("factsmith"):
        return "factsmith"
    name = "factsmith.exe" if os.name == "nt" else "factsmith"
    for path in (Path(sys.argv[0]), Path(sys.executable).with_name(name)):
        if path.name == name and path.is_file():
            return shlex.quote(_from_here(path))
    return f"{shlex.quote(_from_here(Path(sys.executable)))} -m factsmith"


def runnable(text: str) -> str:
    """Return a text whose `factsmith ...` commands can be typed as they are written."""
    if "`factsmith " not in text:
        return text
    return re.sub(r"`factsmith (?=[a-z])", lambda _: f"`{program()} ", text)


def suggested(command: str, workspace: Path | None = None, rest: str = "") -> str:
    """Return a command that the user may type next, such as "factsmith log -w space"."""
    words = (program(), command, in_workspace(workspace).strip(), rest)
    return " ".join(word for word in words if word)


def in_workspace(workspace: Path | None) -> str:
    """Return the option that names the workspace, for a command that the user may type next."""
    return "" if workspace is None or workspace == Path() else f" -w {shlex.quote(str(workspace))}"


def _from_here(path: Path) -> str:
    """Return a path as the user can type it in the current folder."""
    absolute = Path(os.path.abspath(path))  # noqa: PTH100 - a virtual environment's links stay
    try:
        return str(absolute.relative_to(Path.cwd()))
    except ValueError:
        return str(absolute)
