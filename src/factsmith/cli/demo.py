"""Demo: the main job on a bundled model, told as a story."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from ..core.tables import visible
from .common import Json, checks_table, plain_console, print_json, progress

if TYPE_CHECKING:
    from .story import Step


def demo(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="[FOLDER]",
            help="The workspace the story is played in; made if it is not there.",
        ),
    ] = Path("factsmith-demo"),
    as_json: Json = False,
) -> None:
    """Correct a real fact in a bundled model, prove it, record it, and take it back: a minute.

    \b
    Example:
      factsmith demo
    """
    from . import story as story

    console = plain_console()
    found: dict[str, Any] = {}
    steps = story.run(folder)
    for number in itertools.count(1):
        with progress() as tell:  # one at a time: bars and text do not meet on a terminal
            tell("working", 0, None)
            step = next(steps, None)
        if step is None:
            break
        found[step.name] = step.to_dict()
        if not as_json:
            _tell_step(console, number, step)
    if as_json:
        print_json(found)


def _tell_step(console: Console, number: int, step: Step) -> None:
    from ..show.plots.traces import text_heat_map

    console.print(Text(f"\n{number}. {step.title}", "bold"))
    for sentence in step.before:
        console.print(Text(f"   {visible(sentence)}"), soft_wrap=True)
    if step.trace is not None:
        console.print(text_heat_map(step.trace, max(20, min(console.width, 100))))
    if step.proof is not None:
        console.print(checks_table(step.proof.to_dict()["checks"]))
    for sentence in step.after:
        console.print(Text(f"   {visible(sentence)}"), soft_wrap=True)
