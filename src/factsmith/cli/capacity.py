"""Capacity: how full the edited layers are, and what more facts will cost."""

from __future__ import annotations

from typing import Annotated

import typer

from ..core.checks import check_number
from ..corpus.own import texts_of
from .models import opened_workspace
from .options import Device, Json, Seed, Texts, Where
from .printing import complain, print_result
from .waiting import progress


def capacity(
    next_facts: Annotated[
        int, typer.Option("--next", min=0, metavar="N", help="How many more facts to look ahead.")
    ] = 100,
    limit: Annotated[
        float,
        typer.Option(
            metavar="PERCENT",
            help="A model counts as broken when it answers so many unrelated facts otherwise.",
        ),
    ] = 10.0,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify/--no-verify", help="Ask the model which of the stored facts it still says."
        ),
    ] = True,
    texts: Texts = None,
    seed: Seed = 0,
    workspace: Where = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Say how full the edited layers are, and what more facts cost.

    The loss is predicted from the patches, not measured; `factsmith drift` measures it.

    \b
    Examples:
      factsmith capacity -w my-workspace
      factsmith capacity -w my-workspace --next 500 --limit 5 --json
    """
    check_number(limit, "limit", "the percentage of lost facts", above=0, below=100)
    corpus = texts_of(texts)
    with progress() as tell, opened_workspace(workspace, device, tell) as bench:
        full = bench.capacity(
            next_facts, limit=limit, ask=verify, texts=corpus, seed=seed, progress=tell
        )
    if full.warning is not None:
        complain("warning", full.warning)
    print_result(full.to_dict(), [table for table in full.tables() if table.columns], as_json)
