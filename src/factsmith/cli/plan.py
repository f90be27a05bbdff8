"""Facts as code: what a fact file would meet and take, applying it behind gates, and what such a file may hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ..core.errors import NumericsError
from ..core.factfile import FactFile
from ..core.tables import counted
from ..corpus.paragraphs import Paragraphs
from .common import (
    LARGEST_SEED,
    Device,
    Json,
    Where,
    complain,
    in_workspace,
    line,
    opened,
    print_result,
    progress,
    read_settings,
    show_tables,
)

File = Annotated[
    Path,
    typer.Argument(
        metavar="FILE", help="YAML or JSON: facts, and gates, method, settings if wanted."
    ),
]

Method = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="rome, r-rome, memit, emmet or alphaedit.",
        show_default="the file's; else memit, or rome for one fact",
    ),
]

Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="A setting, such as steps=40; may be repeated.",
        show_default="the file's",
    ),
]


def plan(
    file: File,
    method: Method = None,
    setting: Settings = None,
    workspace: Where = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Say what a fact file would meet and take; nothing is changed.

    What the model says now; which facts are new, known, changed or in conflict; how crowded their keys are; layers, bytes, time. Exit
    code 4 where there is a conflict.

    \b
    Example:
      factsmith plan facts.yaml -w my-workspace
    """
    sheet = FactFile.sheet(file)
    with progress() as tell, opened(None, workspace, device, tell) as (_, bench):
        assert bench is not None
        tell("asking", 0, None)
        from ..patch.recipe import Recipe

        recipe = Recipe.for_sheet(sheet, method, read_settings(setting or []))
        found = bench.plan(sheet.facts, recipe)
    print_result(found.to_dict(), show_tables(found.tables()), as_json)
    if found.conflicts:
        complain(
            "conflict",
            f"{counted(len(found.conflicts), 'fact')} of {len(found.entries):,}; `apply` writes none of the file unless forced",
        )
        raise typer.Exit(NumericsError.exit_code)


def apply(
    file: File,
    method: Method = None,
    setting: Settings = None,
    texts: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="Plain text for second moments and drift; may be repeated.",
            show_default="the model's own",
        ),
    ] = None,
    message: Annotated[
        str,
        typer.Option(
            "--message", "-m", help="One line for the log.", show_default="made from the facts"
        ),
    ] = "",
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="Also through conflicts and failed gates, and what the model says already; the record says so.",
        ),
    ] = False,
    seed: Annotated[
        int,
        typer.Option(
            min=0,
            max=LARGEST_SEED,
            help="Of contexts, and of paraphrases and neighbours that are made.",
        ),
    ] = 0,
    workspace: Where = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Write a fact file into a workspace: solve, prove, pass its gates, commit; all of it or nothing.

    Facts that the model says already are asked with the rest, but not written. A failed gate writes nothing, says which fact failed
    where, and the exit code is 4.

    \b
    Examples:
      factsmith apply facts.yaml -w my-workspace -m "ticket 812"
      factsmith apply facts.yaml -w my-workspace --method memit --set steps=40
    """
    sheet = FactFile.sheet(file)
    corpus = Paragraphs(texts) if texts else None
    with progress() as tell, opened(None, workspace, device, tell) as (_, bench):
        assert bench is not None
        from ..patch.recipe import Recipe

        recipe = Recipe.for_sheet(sheet, method, read_settings(setting or []))
        options: dict[str, Any] = {
            "texts": corpus,
            "seed": seed,
            "force": force,
            "message": message,
            "progress": tell,
        }
        outcome = bench.apply(sheet.facts, recipe, gates=sheet.gates, **options)
    planned = outcome.proposal.plan
    conflicts = list(planned.contradictions)
    result = {"plan": planned.to_dict(), "outcome": outcome.to_dict(), "conflicts": conflicts}
    failed = outcome.failures if outcome.revision is None else ()

    def show(console: Console) -> None:
        if outcome.delta is None:
            show_tables(planned.tables())(console)
            if not conflicts:
                line(console, "nothing", "to write: the model says all of it already")
            return
        show_tables(outcome.tables())(console)
        if outcome.revision is not None:
            line(
                console,
                "to take it back:",
                f"factsmith revert{in_workspace(workspace)} {outcome.revision.id[:10]}",
            )

    print_result(result, show, as_json)
    for one in failed:
        kind, _, why = one.partition(": ")
        complain(kind if kind == "conflict" else "failed", why if kind == "conflict" else one)
    if failed or (outcome.revision is None and outcome.delta is not None):
        complain(
            "error",
            f"nothing was written; correct {file}, its gates or the method's settings, or --force",
        )
        raise typer.Exit(NumericsError.exit_code)


def schema(as_json: Json = False) -> None:
    """Print the JSON Schema of a fact file, for editors that check while one writes.

    \b
    Example:
      factsmith schema > facts.schema.json
    """
    found = FactFile.schema()
    print_result(
        found, lambda _: typer.echo(json.dumps(found, indent=2, ensure_ascii=False)), as_json
    )
