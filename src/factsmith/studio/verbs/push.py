"""The room Export and push, its second half: adapters in running servers.

Adapters that are pushed, and the records of pushes, are in the workspace's folder `served`, as for
`factsmith push`.
"""

from __future__ import annotations

import contextlib
from typing import Any, Literal

from pydantic import Field

from ...core.errors import InputError, ServerError
from ...core.progress import Progress, tell
from ...keep.ledger import Ledger
from ...keep.push.names import checked_alias
from ...keep.push.push import check_push, push, roll_back
from ...keep.push.served import Served, served
from ...remote.client import is_url
from ...remote.server import Server
from ..arguments import Arguments
from ..desk import Desk, Place
from ..facts import option_words, program, quoted, shell
from ..verb import Answer, Verb


class PushArguments(Arguments):
    """Where to put a revision."""

    url: str = Field(
        title="Server",
        description="The address of vLLM or llama-server, such as http://127.0.0.1:8000. A key in "
        "the environment variable FACTSMITH_API_KEY is sent to it.",
    )
    revision: str = Field(
        default="",
        title="Revision",
        description="The revision to push. Empty: the one that is checked out.",
        json_schema_extra={"widget": "revision"},
    )
    rollback: bool = Field(
        default=False,
        title="Roll back",
        description="Go back to the revision that the server carried before.",
    )
    alias: str = Field(
        default="",
        title="Alias",
        description="What the adapter's name begins with. Empty: factsmith.",
        json_schema_extra={"advanced": True},
    )
    dtype: Literal["", "float32", "float16", "bfloat16", "quantised"] = Field(
        default="",
        title="Dtype of the server",
        description="What the server computes in, for the tolerance of the proof. Empty: bfloat16 "
        "for vLLM, quantised for llama.cpp.",
        json_schema_extra={"advanced": True},
    )


class ServedArguments(Arguments):
    """The server to ask."""

    url: str = Field(
        title="Server",
        description="The address of vLLM or llama-server, such as http://127.0.0.1:8000. A key in "
        "the environment variable FACTSMITH_API_KEY is sent to it.",
    )
    prove: bool = Field(
        default=False,
        title="Prove again",
        description="Ask the proof of each adapter again.",
    )


def _push(desk: Desk, arguments: PushArguments, progress: Progress) -> Answer:
    if arguments.rollback and arguments.revision:
        raise InputError(
            "a rollback goes back to the revision before, so no revision can be given with it",
            argument="revision",
        )
    checked_alias(arguments.alias or None)
    tell(progress, "asking the server what it is", 0, None)
    references = [arguments.revision] if arguments.revision else []
    options: dict[str, Any] = {
        "alias": arguments.alias or None,
        "dtype": arguments.dtype or None,
    }
    bench = desk.bench
    with _opened(arguments.url, progress) as server:
        if arguments.rollback:
            back = roll_back(
                bench.ledger,
                server,
                opening=lambda: contextlib.nullcontext(bench),
                progress=progress,
                **options,
            )
            pushed = [back]
        else:
            check_push(bench.ledger, server, references, **options)
            pushed = push(bench, server, references, progress=progress, **options)
    results = [each.to_dict() for each in pushed]
    failures = [failure for each in pushed for failure in each.failures]
    notes = [f"Taken out: {adapter}." for each in pushed for adapter in each.withdrawn]
    notes += [f"Ask for the model {each.model}." for each in pushed if each.model is not None]
    return Answer(
        {**results[-1], "pushes": results},
        [table for each in pushed for table in each.tables()],
        notes=notes,
        warnings=[f"The proof failed in the server: {why}" for why in failures[:3]],
        view={"model": pushed[-1].model, "url": arguments.url},
        failed=bool(failures),
    )


def _served(desk: Desk, arguments: ServedArguments, progress: Progress) -> Answer:
    with Ledger(desk.folder) as ledger, _opened(arguments.url, progress) as server:
        result: Served = served(ledger, server, prove=arguments.prove, progress=progress)
    notes = [] if result.model is None else [f"Ask for the model {result.model}."]
    return Answer(
        {"servers": [result.to_dict()]},
        result.tables(),
        notes=notes,
        warnings=list(result.problems),
        view={"up_to_date": result.up_to_date, "url": arguments.url},
        failed=bool(result.problems),
    )


def _opened(url: str, progress: Progress) -> Server:
    """Return a connection to a server.

    Raises:
        InputError: when it is not an address.
        ServerError: when it does not answer.
    """
    if not is_url(url):
        raise InputError(
            f"url is {url[:80]!r}; give the address of a server, such as http://127.0.0.1:8000",
            argument="url",
        )
    try:
        return Server.open(url, progress=progress)
    except ServerError as error:
        error.argument = "url"
        raise


# ── the same as code and as a command ─────────────────────────────────────────────────────────────


def _push_in_python(arguments: PushArguments, place: Place) -> str:
    options = [f", alias={quoted(arguments.alias)}"] if arguments.alias else []
    options += [f", dtype={quoted(arguments.dtype)}"] if arguments.dtype else []
    if arguments.rollback:
        call = f"pushed = [fs.roll_back(bench.ledger, server{''.join(options)})]"
    else:
        references = f", [{quoted(arguments.revision)}]" if arguments.revision else ""
        call = f"pushed = fs.push(bench, server{references}{''.join(options)})"
    return program(
        place,
        f"with fs.Server.open({quoted(arguments.url)}) as server:",
        f"    {call}",
        "print(json.dumps([each.to_dict() for each in pushed]))",
    )


def _push_command(arguments: PushArguments, place: Place) -> list[str]:
    words = option_words(
        [
            ("--rollback", arguments.rollback),
            ("--name", arguments.alias),
            ("--dtype", arguments.dtype),
            ("-w", place.workspace),
        ]
    )
    return [shell("push", arguments.url, arguments.revision, *words)]


def _served_in_python(arguments: ServedArguments, place: Place) -> str:
    prove = ", prove=True" if arguments.prove else ""
    return (
        "import json\n\nimport factsmith as fs\n\n"
        f"with fs.Ledger({quoted(place.workspace)}) as ledger, "
        f"fs.Server.open({quoted(arguments.url)}) as server:\n"
        f"    print(json.dumps(fs.served(ledger, server{prove}).to_dict()))\n"
    )


def _served_command(arguments: ServedArguments, place: Place) -> list[str]:
    words = option_words([("--prove", arguments.prove), ("-w", place.workspace)])
    return [shell("served", arguments.url, *words)]


PUSH = Verb(
    "push",
    "Push",
    "Load a revision into a running vLLM or llama-server, and prove it through the server.",
    PushArguments,
    _push,
    _push_in_python,
    _push_command,
    kind="write",
    button="Push",
)
SERVED = Verb(
    "served",
    "Served",
    "See which revision a running server has, compared with the ledger of this workspace.",
    ServedArguments,
    _served,
    _served_in_python,
    _served_command,
    kind="write",  # it sends the key, so no address alone may start it
    worker="campaign",
    cached=False,
    button="Ask the server",
)

PUSHING = (PUSH, SERVED)
