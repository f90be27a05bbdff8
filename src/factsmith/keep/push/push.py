"""Push revisions to a server: put the adapter there, prove it there, and only then name it.

    with Server.open("http://127.0.0.1:8000") as server:
        check_push(ledger, server, ["latest"])          # before a model is loaded
        pushed = push(bench, server, ["latest"])
        pushed[0].model                                 # what users ask for; None: the proof failed
        roll_back(ledger, server)                       # needs no model in most cases

The order is: the server's own model is compared with the workspace's; the adapter is loaded under a
new name; the proof is asked of it; then the name is told, or the adapter is taken out again. An
exception, a Ctrl-C and a killed server leave no adapter that was not proved, as far as the server
can be reached.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ...core.errors import InputError
from ...core.progress import Progress, tell
from ...core.tables import counted
from ...edit.delta_folder import stated_neurons
from ...remote.server import Server
from ..ledger import Ledger
from ..revision import Revision
from ..workbench import Workbench
from .carriers import carrier_of
from .expected import expect
from .names import checked_alias
from .place import IN_THE_WORKSPACE, AdapterPlace
from .pushed import Pushed
from .records import check_folder, turn
from .tolerance import tolerance_of
from .visit import Opening, Visit


def check_push(
    ledger: Ledger,
    server: Server,
    references: Sequence[str] = (),
    *,
    alias: str | None = None,
    dtype: str | None = None,
    place: AdapterPlace = IN_THE_WORKSPACE,
) -> list[Revision]:
    """Check the arguments of a push before a model is loaded.

    Args:
        ledger: The workspace's records.
        server: The server.
        references: The revisions. (): the one that is checked out.
        alias: As for `push`.
        dtype: As for `push`.
        place: As for `push`.

    Returns:
        The revisions, as their records.

    Raises:
        InputError: when the server takes no adapters, or a revision cannot be one.
        RevisionError: when there is no such revision.
        WorkspaceError: when adapters or records cannot be written.
        ServerError: when the server does not answer.
    """
    checked_alias(alias)
    if dtype is not None:
        tolerance_of(dtype)
    carrier = carrier_of(server)
    check_folder(place.below(ledger))
    identities = [ledger.resolve(each) for each in references or [ledger.current]]
    if len(set(identities)) < len(identities):
        raise InputError("a revision is named twice; name each once", argument="revisions")
    for identity in identities:
        active = ledger.active(identity)
        if not any(revision.in_effect for revision in active):
            raise InputError(
                f"revision {identity[:10]} has no fact in effect, so nothing could be proved in a "
                "server; `factsmith log` lists the revisions",
                argument="revisions",
            )
        folders = [ledger.delta_folder(revision, revision.carried) for revision in active]
        if n := sum(map(stated_neurons, folders)):
            raise InputError(
                f"revision {identity[:10]} appends {counted(n, 'neuron')}, and an adapter cannot "
                "add any. Export a checkpoint or a GGUF file, and start the server with it.",
                argument="revisions",
            )
    carrier.check(identities)
    return [ledger.show(identity) for identity in identities]


def push(
    bench: Workbench,
    server: Server,
    references: Sequence[str] = (),
    *,
    alias: str | None = None,
    dtype: str | None = None,
    base: str | None = None,
    place: AdapterPlace = IN_THE_WORKSPACE,
    progress: Progress | None = None,
) -> list[Pushed]:
    """Put revisions into a server as adapters, and prove each there.

    A revision that the server carries already is proved again, and not loaded again. After a proof
    that fails, the adapter is out of the server, and the revisions after it are not pushed.

    Args:
        bench: The workspace with its model. Its checkout does not move.
        server: vLLM with runtime updating of adapters, or llama.cpp.
        references: The revisions: ids, unique prefixes or "latest". (): the one checked out.
        alias: What the adapters' names begin with. None: "factsmith".
        dtype: What the server computes in, for the tolerance of the proof: "float32", "float16",
            "bfloat16" or "quantised". None: bfloat16 in vLLM, quantised in llama.cpp.
        base: The base model's name for adapter_config.json, as in `export_adapter`.
        place: Where adapters and records are kept.
        progress: Called with the step's name and how much is done.

    Returns:
        One result for each revision that was tried.

    Raises:
        ServerError: when the server cannot be reached or refuses.
        InputError, RevisionError, WorkspaceError, DamagedError: as `check_push`.
    """
    checked = check_push(bench.ledger, server, references, alias=alias, dtype=dtype, place=place)
    pushing = Visit(bench.ledger, server, dtype, place, progress)
    results: list[Pushed] = []
    with turn(pushing.folder, server.client.url, progress):
        for revision in checked:
            expected = expect(bench, revision.id, progress)

            def write(folder: Path, revision: Revision = revision) -> int:
                tell(progress, "writing the adapter", 0, None)
                made = bench.export(
                    folder, "adapter", revision=revision.id, base=base, verify=False
                )
                return made.rank

            results.append(pushing.push(revision.id, expected, checked_alias(alias), write))
            if not results[-1].passed:
                break
    return results


def roll_back(
    ledger: Ledger,
    server: Server,
    *,
    alias: str | None = None,
    dtype: str | None = None,
    place: AdapterPlace = IN_THE_WORKSPACE,
    opening: Opening | None = None,
    progress: Progress | None = None,
) -> Pushed:
    """Go back to the revision that a server carried before, and take the present one out.

    The earlier adapter is proved first, by the proof that was kept when it was pushed. If it is no
    longer there, the revision before in the ledger is pushed. If that has no patch, the base model
    is what remains. A rollback that could not take its adapter out is finished first.

    Args:
        ledger: The workspace's records.
        server: The server.
        alias: Only adapters whose names begin with it. None: all of this workspace.
        dtype: As for `push`.
        place: As for `push`.
        opening: Opens the workspace with its model, where an adapter must be made again.
        progress: Called with the step's name and how much is done.

    Returns:
        What the server carries now. Its `withdrawn` names what was taken out; after a proof that
        fails it names nothing, and the server is as it was.

    Raises:
        InputError: when the server carries no adapter of this workspace.
        ServerError: when the server cannot be reached or refuses.
    """
    if alias is not None:
        checked_alias(alias)
    rolling = Visit(ledger, server, dtype, place, progress)
    with turn(rolling.folder, server.client.url, progress):
        rolling.tidy()
        if (unfinished := rolling.withdrawn_and_there(alias)) is not None:
            return unfinished
        present, earlier = rolling.newest_two(alias)
        if earlier is not None:
            result = rolling.prove_again(earlier, opening)
        else:
            result = rolling.before_in_ledger(present, alias, opening)
        if not result.passed:
            return result
        rolling.withdraw(present, result)
    return result.without(present.adapter.name)
