"""The command line: parse, call, print. Every decision is made in the library.

    factsmith init atlas my-workspace
    factsmith patch -w my-workspace --subject "Danielle Darrieux" \\
        --prompt "The mother tongue of {} is" --target English
    factsmith log -w my-workspace

Answers go to standard output, as one JSON document with --json. Progress, warnings and errors go
to standard error; with --json each is a JSON document on a line. Exit codes: 0 done, 2 the input
cannot be used, 3 the model cannot be used, 4 numbers went wrong, 5 the workspace or its records,
6 a server, 7 a cluster, 1 anything else, 130 Ctrl-C.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import os
import sys
from collections.abc import Callable, Iterable
from typing import Annotated, Any

import typer

from ..core.documents import fault_in_words
from ..core.errors import FactsmithError, InputError
from . import (
    cache,
    capacity,
    demo,
    drift,
    export,
    inside,
    judge,
    keep,
    locate,
    patch,
    plan,
    read,
    serve,
    studio,
)
from .common import Command, Group, Quiet, Verbose, spoken_warnings, with_common_options
from .loading import with_loading_options
from .printing import Manner, complain, complain_of, manner, program, running
from .streams import UnwrittenError, forgiving_streams, go_silent, printing_output

_Parsing: Any = typer.BadParameter.__mro__[2]
"""ClickException, of the click that Typer uses: some versions of Typer bring their own."""

app = typer.Typer(
    cls=Group,
    name="factsmith",
    help="Read, locate, patch and keep the facts in a transformer's feed-forward memory.",
    epilog=(
        "`factsmith COMMAND --help` shows the options of a command, and examples. What can be made "
        "again, such as the index of a model, is kept in the folder $FACTSMITH_CACHE, or in the "
        "user's cache folder."
    ),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

COMMANDS: dict[str, tuple[Callable[..., None], ...]] = {
    "Start": (keep.init, demo.demo, studio.studio, cache.cache),
    "Read: what the memory holds": (
        read.ask,
        read.explain,
        inside.lens,
        inside.at,
        inside.intervene,
        read.find,
        read.neuron,
        read.browse,
        read.census,
    ),
    "Locate: where a fact is": (locate.trace, locate.neurons, locate.layers),
    "Patch: write facts": (patch.patch, patch.moments),
    "Judge: what edits do": (judge.evaluate, drift.drift),
    "Keep: the history of a workspace": (
        keep.log,
        keep.show,
        keep.diff,
        keep.revert,
        keep.checkout,
        keep.status,
        keep.verify,
        keep.gc,
        keep.recover,
        capacity.capacity,
    ),
    "Keep: facts as files": (plan.plan, plan.apply, plan.schema),
    "Keep: exports": (export.export, export.import_),
    "Serve: running servers": (serve.push, serve.served),
}
"""{the title of a group: its commands}, in the order of `factsmith --help`."""

for title, command in ((t, c) for t, commands in COMMANDS.items() for c in commands):
    name = command.__name__.rstrip("_")
    app.command(name, cls=Command, rich_help_panel=title)(
        with_common_options(with_loading_options(command))
    )


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with its code; our errors are one block on standard error."""
    words = sys.argv[1:] if arguments is None else arguments
    _let_threads_sleep()
    before_dashes = itertools.takewhile(lambda word: word != "--", words)
    manner.set(Manner(json="--json" in before_dashes))
    running.set(None)
    with forgiving_streams(), spoken_warnings():
        try:
            code = _exit_code(words)
            with printing_output():
                pass  # what is still in the buffer
        except UnwrittenError as error:
            code = _not_printed(error)
    sys.exit(code)


def _let_threads_sleep() -> None:
    """Let torch's threads sleep while they wait for each other.

    OpenMP lets them spin by default. On a busy machine the spinning threads keep those that they
    wait for from the processor, and a command takes ten times as long. The variable counts when
    torch is loaded, so it is set before.
    """
    if "torch" not in sys.modules:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _exit_code(words: list[str]) -> int:
    """Run the command line and return its exit code."""
    try:
        _check_encoding(words)
        code: Any = app(words, prog_name="factsmith", standalone_mode=False)
        if code == 130:  # how newer versions of Typer end after Ctrl-C
            raise KeyboardInterrupt
        return int(code or 0)
    except _Parsing as error:
        return _misused(error)
    except FactsmithError as error:
        complain_of(error, str(error), error.exit_code, argument=error.argument)
        return error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        _interrupted()
        return 130
    except SystemExit as end:
        if end.code == 130:
            _interrupted()
        raise
    except UnwrittenError as error:
        return _not_printed(error)
    except Exception as error:
        if os.environ.get("FACTSMITH_TRACEBACK"):
            raise
        text = f"{fault_in_words(error)}; please report it with what FACTSMITH_TRACEBACK=1 prints"
        complain_of(error, text, 1)
        return 1


def _not_printed(error: UnwrittenError) -> int:
    """Name the reason why output cannot be written, and return the exit code.

    A reader that went away is no fault, and nobody is left to tell.
    """
    if not isinstance(error.__cause__, BrokenPipeError):
        complain("error", f"the output cannot be written: {error}", exit_code=1)
    go_silent()
    return 1


def _misused(error: Any) -> int:
    """Print an error of the command line's own grammar, and return the exit code."""
    if type(error).__name__ == "NoArgsIsHelpError":  # the help was printed
        return int(error.exit_code)
    context = getattr(error, "ctx", None)
    parameter = getattr(error, "param", None)
    options = getattr(parameter, "opts", None) or [getattr(error, "option_name", None)]
    words = "" if context is None else context.command_path.removeprefix("factsmith")
    help_ = f"{program()}{words} --help"
    argument = getattr(parameter, "name", None)
    option = next((word for word in options if word and word.startswith("-")), None)
    message = " ".join(error.format_message().split()).rstrip(".")
    complain(
        "error",
        f"{message}{'' if message.endswith('?') else '.'} See `{help_}`.",
        type="UsageError",
        argument=argument,
        option=option,
        exit_code=error.exit_code,
    )
    return int(error.exit_code)


def _interrupted() -> None:
    """Say that Ctrl-C was pressed."""
    text = "stopped before it was done; nothing is half written"
    if manner.get().json:
        complain_of(KeyboardInterrupt, text, 130)
    else:
        complain("interrupted", text)


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
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    manner.set(Manner(manner.get().json, quiet, verbose))
    group: Any = context.command
    running.set(group.commands.get(context.invoked_subcommand))
