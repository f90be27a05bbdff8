"""Capacity: how full the edited layers are, and what more facts will cost."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..corpus.paragraphs import Paragraphs
from .common import (
    LARGEST_SEED,
    Device,
    Json,
    Where,
    complain,
    opened,
    print_result,
    progress,
    show_tables,
)


def capacity(
    next_facts: Annotated[
        int, typer.Option("--next", metavar="N", min=0, help="How many more facts to look ahead.")
    ] = 100,
    limit: Annotated[
        float,
        typer.Option(
            metavar="PERCENT",
            help="Unrelated facts answered otherwise that count as broken, in per cent.",
        ),
    ] = 10.0,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify/--no-verify", help="Ask the model which of the stored facts it still says."
        ),
    ] = True,
    texts: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="Plain text for second moments that are not kept yet; may be repeated.",
            show_default="the model's own",
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=LARGEST_SEED, help="Of text that the model writes itself.")
    ] = 0,
    workspace: Where = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Say how full a workspace's edited layers are, and what more facts will cost.

    The loss is predicted from the patches, not measured; `factsmith drift` measures it.

    \b
    Examples:
      factsmith capacity -w my-workspace
      factsmith capacity -w my-workspace --next 500 --limit 5 --json
    """
    corpus = Paragraphs(texts) if texts else None
    with progress() as tell, opened(None, workspace or Path(), device, tell) as (_, bench):
        assert bench is not None
        found = bench.capacity(
            next_facts, limit=limit, ask=verify, texts=corpus, seed=seed, progress=tell
        )

    def show(console: Console) -> None:
        show_tables([table for table in found.tables() if table.columns])(console)

    if found.warning is not None:
        complain("warning", found.warning)
    print_result(found.to_dict(), show, as_json)
