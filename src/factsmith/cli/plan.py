"""Facts as code: plan what a fact file would meet, apply it behind gates, and print its schema."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..core.errors import NumericsError
from ..core.factfile import FactFile
from ..core.tables import counted
from ..corpus.own import texts_of
from .engine import engine, on_workers
from .models import opened_workspace
from .options import Device, Json, Message, Method, Seed, Settings, Texts, Where, read_settings
from .patch import read_recipe, replaced, stop_if_failed
from .printing import as_json_text, complain, complain_of, print_json, print_result, suggested
from .waiting import PATCH_STAGES, progress

File = Annotated[
    Path,
    typer.Argument(
        metavar="FILE",
        help="Facts in YAML, JSON, JSON lines or CSV. YAML and JSON may also name gates, method "
        "and settings.",
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
    """Say what applying a fact file would do and cost; nothing changes.

    The plan says what the model says now; which facts are new, known, changed or in conflict; how
    crowded their keys are; and the layers, bytes and time. A conflict exits with code 4.

    \b
    Example:
      factsmith plan facts.yaml -w my-workspace
    """
    sheet = FactFile.sheet(file)
    changes = read_settings(setting)
    with progress() as tell:
        recipe = read_recipe(tell, sheet, method, changes)
        with opened_workspace(workspace, device, tell) as bench:
            planned = bench.plan(sheet.facts, recipe, progress=tell)
    print_result(planned.to_dict(), planned.tables(), as_json)
    if planned.conflicts:
        count = f"{counted(len(planned.conflicts), 'fact')} of {len(planned.entries):,}"
        rest = "; `apply` writes no fact of the file unless forced"
        if as_json:
            text = f"{count} are in conflict{rest}"
            complain_of(NumericsError, text, NumericsError.exit_code)
        else:
            complain("conflict", f"{count}{rest}")
        raise typer.Exit(NumericsError.exit_code)


@on_workers
def apply(  # house: Typer reads one parameter for each option
    file: File,
    method: Method = None,
    setting: Settings = None,
    texts: Texts = None,
    message: Message = "",
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="Write through conflicts and failed gates, and write also what the model already "
            "says. The record says so.",
        ),
    ] = False,
    seed: Seed = 0,
    workspace: Where = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Write a fact file into a workspace: all of it, or nothing.

    The facts are solved, proved, and committed if they pass the file's gates. Facts that the model
    already says are asked with the rest, but not written. If a gate fails, nothing is written, the
    command says which fact failed where, and the exit code is 4.

    \b
    Examples:
      factsmith apply facts.yaml -w my-workspace -m "ticket 812"
      factsmith apply facts.yaml -w my-workspace --method memit --set steps=40
    """
    sheet = FactFile.sheet(file)
    changes = read_settings(setting)
    corpus = texts_of(texts)
    with progress(*PATCH_STAGES) as tell:
        recipe = read_recipe(tell, sheet, method, changes)
        with opened_workspace(workspace, device, tell) as bench, engine(tell):
            outcome = bench.apply(
                sheet.facts,
                recipe,
                texts=corpus,
                seed=seed,
                gates=sheet.gates,
                force=force,
                message=message,
                progress=tell,
            )
    planned = outcome.proposal.plan
    result = {
        "plan": planned.to_dict(),
        "outcome": outcome.to_dict(),
        "conflicts": list(planned.contradictions),
    }
    lines = replaced(outcome)
    if outcome.revision is not None:
        undo = suggested(f"revert {outcome.revision.id[:10]}", workspace)
        lines.append(("to take it back:", undo))
    elif outcome.delta is None and not planned.conflicts:
        lines.append(("nothing", "to write: the model already says all of it"))
    for remark in () if outcome.delta is None else outcome.made:
        complain("warning", remark)
    tables = planned.tables() if outcome.delta is None else outcome.tables()
    print_result(result, tables, as_json, lines)
    if outcome.revision is None:
        stop_if_failed(outcome, force=force)


def schema(as_json: Json = False) -> None:
    """Print the JSON Schema of a fact file, for text editors.

    An editor uses it to check the file while you write.

    \b
    Example:
      factsmith schema > facts.schema.json
    """
    content = FactFile.schema()
    if as_json:
        print_json(content)
    else:
        typer.echo(as_json_text(content, indent=2))
