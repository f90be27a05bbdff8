"""Serve: revisions into running servers, and back."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ..core.errors import InputError, NumericsError
from ..core.tables import visible
from ..keep.ledger import Ledger
from . import completing
from .models import opened_workspace
from .options import Device, Json, Where
from .printing import complain_of, print_result, suggested
from .waiting import progress

Url = Annotated[
    str,
    typer.Argument(metavar="URL", help="The server, for example http://127.0.0.1:8000."),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        metavar="NAME",
        help="What the server computes in, for the tolerance of the proof: float32, float16, "
        "bfloat16 or quantised.",
        show_default="bfloat16 for vLLM, quantised for llama.cpp",
    ),
]
Folder = Annotated[
    Path | None,
    typer.Option(
        "--folder",
        metavar="DIR",
        help="Where adapters and records of pushes are kept.",
        show_default="`served` in the workspace",
    ),
]
Timeout = Annotated[
    float, typer.Option("--timeout", min=1, help="Seconds within which the server must answer.")
]
Retries = Annotated[
    int, typer.Option("--retries", min=0, help="How often a request is sent again.")
]


def push(  # house: Typer reads one parameter for each option
    url: Url,
    revisions: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[ID]...",
            autocompletion=completing.revisions,
            help="Revisions: ids, the first digits of them, or `latest`.",
            show_default="the one that is checked out",
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(
            "--name",
            metavar="ALIAS",
            help="What the adapter's name begins with. The revision's id and four characters "
            "follow, because a name is never used twice.",
            show_default="factsmith",
        ),
    ] = None,
    rollback: Annotated[
        bool,
        typer.Option("--rollback", help="Go back to the revision that the server carried before."),
    ] = False,
    dtype: Dtype = None,
    base: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Base model to name in the adapter: a hub id.",
            show_default="where the model comes from",
        ),
    ] = None,
    folder: Folder = None,
    seen_as: Annotated[
        str | None,
        typer.Option(
            "--seen-as",
            metavar="PATH",
            help="How the server sees that folder, if it runs in a container or elsewhere.",
            show_default="by the same path",
        ),
    ] = None,
    timeout: Timeout = 60.0,
    retries: Retries = 3,
    workspace: Where = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Put a revision into a running server, and prove it there.

    vLLM needs --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True. llama-server reads adapters
    when it starts; push proves one and switches it on. The patch's own proof is asked through the
    server. If it fails, the adapter is taken out, and the exit code is 4. A key comes from the
    environment variable FACTSMITH_API_KEY.

    \b
    Examples:
      factsmith push http://127.0.0.1:8000 -w my-workspace
      factsmith push http://127.0.0.1:8000 latest --name capitals
      factsmith push http://127.0.0.1:8000 --rollback -w my-workspace
    """
    where = workspace or Path()
    if rollback and (revisions or base):
        given = "revisions" if revisions else "--base"
        raise InputError(
            f"--rollback goes back to the revision before, and {given} cannot be given with it; "
            "push a revision by its id instead"
        )
    with contextlib.ExitStack() as stack:
        tell = stack.enter_context(progress())
        tell("asking the server what it is", 0, None)
        from ..keep.push.names import checked_alias
        from ..keep.push.place import AdapterPlace
        from ..keep.push.push import check_push, roll_back
        from ..keep.push.push import push as push_revisions
        from ..keep.push.tolerance import tolerance_of
        from ..remote.server import Server

        checked_alias(name)
        if dtype is not None:
            tolerance_of(dtype)
        place = AdapterPlace(folder, seen_as)
        ledger = stack.enter_context(Ledger(where))
        server = stack.enter_context(
            Server.open(url, timeout=timeout, retries=retries, progress=tell)
        )
        options: dict[str, Any] = {"alias": name, "dtype": dtype, "place": place}
        if rollback:
            pushed = [
                roll_back(
                    ledger,
                    server,
                    opening=lambda: opened_workspace(workspace, device, tell),
                    progress=tell,
                    **options,
                )
            ]
        else:
            check_push(ledger, server, revisions or (), **options)
            bench = stack.enter_context(opened_workspace(workspace, device, tell))
            pushed = push_revisions(
                bench, server, revisions or (), base=base, progress=tell, **options
            )
    lines: list[tuple[str, str]] = []
    for each in pushed:
        lines += [("taken out:", adapter) for adapter in each.withdrawn]
        if each.model is not None:
            lines.append(("model:", each.model))
    results = [each.to_dict() for each in pushed]
    # One revision is the usual case: its fields stand at the top as well.
    result = {**results[-1], "pushes": results}
    print_result(result, [table for each in pushed for table in each.tables()], as_json, lines)
    failures = [failure for each in pushed for failure in each.failures]
    if failures:
        more = f"; and {len(failures) - 3:,} more" if len(failures) > 3 else ""
        text = f"the proof failed in the server: {'; '.join(failures[:3])}{more}"
        complain_of(NumericsError, text, NumericsError.exit_code)
        raise typer.Exit(NumericsError.exit_code)


def served(
    urls: Annotated[
        list[str], typer.Argument(metavar="URL...", help="Servers, such as http://127.0.0.1:8000.")
    ],
    prove: Annotated[
        bool,
        typer.Option(
            "--prove", help="Ask the proof of each adapter again; exit code 4 if one fails."
        ),
    ] = False,
    dtype: Dtype = None,
    folder: Folder = None,
    timeout: Timeout = 60.0,
    retries: Retries = 3,
    workspace: Where = None,
    as_json: Json = False,
) -> None:
    """Compare what servers carry with the ledger.

    Each adapter is named with its revision, and how that stands to the revision that is checked
    out. No model is loaded.

    \b
    Examples:
      factsmith served http://127.0.0.1:8000 -w my-workspace
      factsmith served http://a:8000 http://b:8000 --prove
    """
    results = []
    with progress() as tell, Ledger(workspace or Path()) as ledger:
        tell("asking the server what it is", 0, None)
        from ..keep.push.place import AdapterPlace
        from ..keep.push.served import served as compared
        from ..keep.push.tolerance import tolerance_of
        from ..remote.server import Server

        if dtype is not None:
            tolerance_of(dtype)
        for url in urls:
            with Server.open(url, timeout=timeout, retries=retries, progress=tell) as server:
                options: dict[str, Any] = {"place": AdapterPlace(folder), "dtype": dtype}
                results.append(compared(ledger, server, prove=prove, progress=tell, **options))
    lines = []
    for each in results:
        if each.model is not None:
            lines.append(("model:", each.model))
        if not each.up_to_date and each.checked_out != "base":
            more = "" if folder is None else f" --folder {shlex.quote(str(folder))}"
            command = suggested("push", workspace, each.url + more)
            lines.append(("next:", f"`{command}`"))
    tables = [table for each in results for table in each.tables()]
    print_result({"servers": [each.to_dict() for each in results]}, tables, as_json, lines)
    _end(problem for each in results for problem in each.problems)


def _end(problems: Any) -> None:
    """Exit with code 4 if there are problems, which are printed."""
    listed: Sequence[str] = [visible(problem) for problem in problems]
    if listed:
        complain_of(NumericsError, "; ".join(listed), NumericsError.exit_code)
        raise typer.Exit(NumericsError.exit_code)
