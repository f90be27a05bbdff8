"""The index of a model, in the room Memory: scanned text, by which neurons are found."""

from __future__ import annotations

import contextlib

from ...core.progress import Progress
from ...core.tables import Table, counted
from ...keep.ledger import BASE
from ...keep.workbench import Workbench
from ...read.index_store import find_index
from ..arguments import Source
from ..desk import Desk, Place
from ..verb import Answer, Verb
from .calls import no_command, program

NO_INDEX = (
    "No text was scanned with these weights yet, so it is not known where neurons fire. An index "
    "holds that. It takes about two minutes for a bundled model, and longer for a larger one; "
    "other pages do not wait for it."
)
"""What a page says where there is no index."""


def index_form(source: Source) -> dict[str, str]:
    """Return the fields of the button that builds an index."""
    return {"model": source.model, "revision": source.revision}


def _run_index(desk: Desk, arguments: Source, tell: Progress) -> Answer:
    """Build the index of a model, with a model of its own."""
    identity = desk.resolve(arguments.revision, arguments.model)
    with contextlib.ExitStack() as stack:
        lm = desk.load(arguments.model, tell)
        if desk.is_own(arguments.model) and identity != BASE:
            bench = stack.enter_context(Workbench(lm, desk.folder))
            stack.enter_context(bench.carrying_exactly(bench.deltas_at(identity).values()))
        index = find_index(lm, progress=tell)
    texts, tokens = index.triggers.n_texts, index.triggers.n_tokens
    result = {
        "index": str(index.folder),
        "n_texts": texts,
        "n_tokens": tokens,
        "model": lm.name,
    }
    read = f"{counted(texts, 'text')}, {counted(tokens, 'token')}"
    return Answer(
        result,
        [Table(f"The index is made of {read}, and kept in {index.folder}", {})],
        view={"find": arguments.address("/memory/find")},
    )


def _index_python(arguments: Source, place: Place) -> str:
    """Return the program that builds the same index."""
    body = [
        "index = find_index(lm)",
        'result = {"index": str(index.folder), "n_tokens": index.triggers.n_tokens}',
        "print(json.dumps(result))",
    ]
    return program(arguments, place, body, ["from factsmith.read.index_store import find_index"])


INDEX = Verb(
    "index",
    "Index",
    "Scan text, so that neurons can be found by what they fire after. Other pages do not wait.",
    Source,
    _run_index,
    _index_python,
    no_command,
    kind="write",
    worker="campaign",
    template="answers/index.html",
    button="Build the index",
)
