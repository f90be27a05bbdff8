"""The `demo` command: the main job on a bundled model, step by step.

    factsmith demo                  # in the folder factsmith-demo
    factsmith demo somewhere --json

`story.py` does the steps; this module prints them.
"""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from ..core.tables import visible
from .options import Json
from .printing import drawn, plain_console, print_json
from .waiting import during, progress

if TYPE_CHECKING:
    from .story import Step

_INDENT = "   "

_LEAST_WIDTH, _MOST_WIDTH = 20, 100
"""Columns of a terminal between which the heat map is as wide as the terminal."""


def demo(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="[FOLDER]",
            help="The workspace of the demonstration; it is made if it does not exist.",
        ),
    ] = Path("factsmith-demo"),
    as_json: Json = False,
) -> None:
    """Correct a real fact in a bundled model, and take it back.

    It is proved and recorded in between. This takes a minute.

    \b
    Example:
      factsmith demo
    """
    with during("starting"):
        from .story import run

    console = plain_console()
    results: dict[str, Any] = {}
    steps = run(folder)
    for number in itertools.count(1):
        with progress() as tell:  # one bar for each step: a bar and text must not mix
            tell("working", 0, None)
            step = next(steps, None)
        if step is None:
            break
        results[step.name] = step.to_dict()
        if not as_json:
            _print_step(console, number, step)
    if as_json:
        print_json(results)


def _print_step(console: Console, number: int, step: Step) -> None:
    from ..show.plots.traces import text_heat_map

    console.print(Text(f"\n{number}. {visible(step.title)}", "bold"))
    _print_sentences(console, step.before)
    if step.trace is not None:
        width = max(_LEAST_WIDTH, min(console.width, _MOST_WIDTH))
        console.print(drawn(text_heat_map(step.trace, width)))
    if step.proof is not None:
        for table in step.proof.tables():  # their titles are the shares, which the sentences give
            console.print(dataclasses.replace(table, title="").as_rich())
    _print_sentences(console, step.after)


def _print_sentences(console: Console, sentences: tuple[str, ...]) -> None:
    for sentence in sentences:
        console.print(Text(_INDENT + visible(sentence)), soft_wrap=True)
