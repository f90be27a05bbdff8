"""The command line: parse, call, print. Every decision is made in the library.

    factsmith init atlas my-workspace
    factsmith patch -w my-workspace --subject "Danielle Darrieux" \\
        --prompt "The mother tongue of {} is" --target English
    factsmith log -w my-workspace

Answers go to standard output, as one JSON document with --json. Progress, warnings and errors go
to standard error. Exit codes: 0 done, 2 the input cannot be used, 3 the model cannot be used,
4 numbers went wrong, 5 the workspace or its records, 1 anything else, 130 Ctrl-C.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
from collections.abc import Callable, Iterable
from typing import Annotated, Any

import typer

from ..core.errors import FactsmithError, InputError
from . import capacity, demo, export, judge, keep, locate, patch, plan, read
from .printing import complain, running, with_flag

app = typer.Typer(
    name="factsmith",
    help="Read, locate, patch and keep the facts in a transformer's feed-forward memory.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

COMMANDS: tuple[Callable[..., None], ...] = (
    keep.init,
    read.ask,
    read.explain,
    read.find,
    read.neuron,
    read.browse,
    read.census,
    locate.trace,
    locate.neurons,
    locate.layers,
    patch.moments,
    patch.patch,
    judge.evaluate,
    judge.drift,
    plan.plan,
    plan.apply,
    plan.schema,
    keep.log,
    keep.show,
    keep.diff,
    keep.revert,
    keep.checkout,
    keep.status,
    capacity.capacity,
    keep.verify,
    keep.gc,
    export.export,
    export.import_,
    demo.demo,
)
"""In the order of `factsmith --help`."""

for command in COMMANDS:
    app.command(command.__name__.rstrip("_"))(command)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with its code; our errors are one block on standard error."""
    words = sys.argv[1:] if arguments is None else arguments
    try:
        _check_encoding(words)
        app(arguments, prog_name="factsmith")
    except FactsmithError as error:
        complain("error", with_flag(str(error), error.argument))
        sys.exit(error.exit_code)
    except SystemExit as end:
        if end.code == 130:
            complain("interrupted", "stopped before it was done; nothing is half written")
        raise
    except Exception as error:
        if os.environ.get("FACTSMITH_TRACEBACK"):
            raise
        text = (
            f"{type(error).__name__}: {error}. This is a fault in factsmith; please report it with "
            "what FACTSMITH_TRACEBACK=1 prints"
        )
        complain("unexpected error", text)
        sys.exit(1)


def _check_encoding(words: Iterable[str]) -> None:
    """Raise InputError for an argument that is not in UTF-8; Python marks such bytes."""
    for word in words:
        if any("\udc80" <= character <= "\udcff" for character in word):
            raise InputError(
                f"the argument {word!r} is not in UTF-8; write it in the terminal's own encoding"
            )


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"factsmith {importlib.metadata.version('factsmith')}")
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    group: Any = context.command
    running.set(group.commands.get(context.invoked_subcommand))
