"""What servers carry, compared with the ledger of a workspace.

for each in served(ledger, ["http://127.0.0.1:8000"]):
    each.up_to_date, each.adapters[0].name, each.adapters[0].standing
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...core.errors import DamagedError, FactsmithError
from ...core.progress import Progress, tell
from ...core.tables import Shown, Table, counted
from ...remote.server import Server
from ..export.manifest import check_files
from ..ledger import BASE, Ledger
from ..revision import Revision
from .carrier import Adapter, Carrier
from .carriers import carrier_of
from .names import parsed
from .place import IN_THE_WORKSPACE, AdapterPlace
from .proof import ServedProof, ask, compare, compare_base
from .records import PushRecord, of_adapters, read_records
from .tolerance import tolerance_of
from .visit import DTYPES

NEVER = "never proved"
"""The standing of an adapter whose push was killed, or failed and could not be taken out."""


@dataclass(frozen=True, kw_only=True)
class ServedAdapter:
    """An adapter that a server carries.

    Attributes:
        name: Its name in the server.
        path: Where the server has read it.
        is_on: Whether requests use it: in vLLM those that name it, in llama.cpp all.
        revision: The id of the workspace's revision that it holds. None: not of this workspace.
        message: The message of that revision.
        standing: How the revision stands in the ledger, in words.
        pushed: When the push was proved, UTC. None: there is no record of it here.
        files: "whole", "changed" or "not here": the files that the server read, as seen from here.
        proof: The proof, asked now. None: it was not asked.
        problem: Why it was not asked or did not pass, in words. "": nothing.
    """

    name: str
    path: str
    is_on: bool
    revision: str | None
    message: str
    standing: str
    pushed: str | None
    files: str
    proof: ServedProof | None = None
    problem: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return {**vars(self), "proof": None if self.proof is None else self.proof.to_dict()}


@dataclass(frozen=True, kw_only=True, repr=False)
class Served(Shown):
    """A server and its adapters.

    Attributes:
        url: The server.
        kind: "vllm" or "llama.cpp".
        base: The name of its base model.
        checked_out: The revision that the workspace has checked out.
        adapters: What it carries, in the order in which it came.
        model: The name to ask for: that of the adapter that was pushed last; that of the base model
            where the server carries no adapter of the workspace. None: it carries some, and no
            record here says that one was proved.
    """

    url: str
    kind: str
    base: str
    checked_out: str
    adapters: tuple[ServedAdapter, ...]
    model: str | None

    @property
    def up_to_date(self) -> bool:
        """Whether the server carries the revision that is checked out; for "base", none."""
        if self.checked_out == BASE:
            return not any(each.revision and each.is_on for each in self.adapters)
        return any(
            each.revision == self.checked_out and each.is_on and each.standing != NEVER
            for each in self.adapters
        )

    @property
    def problems(self) -> tuple[str, ...]:
        """What is wrong, in words."""
        return tuple(f"{each.name}: {each.problem}" for each in self.adapters if each.problem)

    def tables(self) -> list[Table]:
        """Return the adapters."""
        has = "carries" if self.up_to_date else "does not carry"
        title = f"{self.url} ({self.kind}, {self.base}) {has} revision {self.checked_out[:10]}"
        names = ("adapter", "revision", "in the ledger", "on", "files")
        rows = [
            (
                each.name,
                "" if each.revision is None else each.revision[:10],
                each.standing,
                "on" if each.is_on else "off",
                each.files,
            )
            for each in self.adapters
        ]
        if not rows:
            return [Table(f"{title}; it has no adapter", {})]
        tables = [Table(title, dict.fromkeys(names, "<"), rows)]
        tables += [
            Table(f"{each.name}: {each.proof.in_words}", {})
            for each in self.adapters
            if each.proof is not None
        ]
        return tables

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        adapters = [each.to_dict() for each in self.adapters]
        return {**vars(self), "up_to_date": self.up_to_date, "adapters": adapters}


def served(
    ledger: Ledger,
    server: Server,
    *,
    prove: bool = False,
    dtype: str | None = None,
    place: AdapterPlace = IN_THE_WORKSPACE,
    progress: Progress | None = None,
) -> Served:
    """Compare what a server carries with the ledger. No model is needed.

    Args:
        ledger: The workspace's records.
        server: vLLM or llama.cpp.
        prove: Ask the proof of each of the workspace's adapters again, as it was kept when it was
            pushed: of those in use, and of others that were pushed once.
        dtype: As for `push`.
        place: Where the records are.
        progress: Called with the step's name and how much is done.

    Raises:
        InputError: when the server is of a kind that takes no adapters.
        ServerError: when it cannot be reached or refuses.
        DamagedError: when the record of a push cannot be read.
    """
    tell(progress, "asking the server what it carries", 0, None)
    carrier = carrier_of(server)
    log = {revision.id: revision for revision in ledger.log()}
    held = carrier.held(list(log))
    records = of_adapters(read_records(place.below(ledger), server.client.url))
    adapters = []
    for adapter in carrier.adapters():
        revision = log.get(held.get(adapter.name, ""))
        record = records.get(adapter.name)
        proof, problem = None, ""
        if prove and revision is not None and (adapter.is_on or record is not None):
            proof, problem = _proved(carrier, adapter, record, dtype, progress)
        adapters.append(
            ServedAdapter(
                name=adapter.name,
                path=adapter.path,
                is_on=adapter.is_on,
                revision=None if revision is None else revision.id,
                message="" if revision is None else revision.message,
                standing=_standing(ledger, adapter.name, revision, record),
                pushed=record.at if record is not None and record.state == "serving" else None,
                files=_files(Path(adapter.path)),
                proof=proof,
                problem=problem,
            )
        )
    in_use = [each for each in adapters if each.revision is not None and each.is_on]
    proved = [each for each in in_use if each.pushed is not None]
    newest = max(proved, key=lambda each: each.pushed or "", default=None)
    model = None
    if newest is not None:
        model = carrier.model_of(Adapter(newest.name, newest.path, newest.is_on))
    elif not in_use:
        model = carrier.model_of(None)
    return Served(
        url=server.client.url,
        kind=server.kind,
        base=server.base,
        checked_out=ledger.current,
        adapters=tuple(adapters),
        model=model,
    )


def _standing(
    ledger: Ledger, name: str, revision: Revision | None, record: PushRecord | None
) -> str:
    """Return how an adapter's revision stands in the ledger, in words."""
    if revision is None:
        ours = parsed(name) is not None
        return "of another workspace, or lost" if ours else "not by factsmith"
    if record is not None and record.state in ("loading", "failed"):
        return NEVER
    known = "" if record is not None else ", pushed from elsewhere"
    if revision.id == ledger.current:
        return f"checked out{known}"
    order = [each.id for each in reversed(ledger.log())]
    at = order.index(revision.id)
    now = -1 if ledger.current == BASE else order.index(ledger.current)
    between = counted(abs(now - at), "revision")
    return f"{between} {'behind' if at < now else 'ahead'}{known}"


def _files(path: Path) -> str:
    """Return whether the files of an adapter are as they were exported."""
    try:
        if not path.exists():
            return "not here"
        check_files(path)
    except (DamagedError, OSError, ValueError):  # also a path that no disk allows
        return "changed" if _is_there(path) else "not here"
    return "whole"


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def _proved(
    carrier: Carrier,
    adapter: Adapter,
    record: PushRecord | None,
    dtype: str | None,
    progress: Progress | None,
) -> tuple[ServedProof | None, str]:
    """Return the proof of an adapter, asked now, and what is wrong in words."""
    if record is None:
        return None, "it was pushed from elsewhere, so its proof is not kept here; push it again"
    tolerance = tolerance_of(dtype or DTYPES[carrier.server.kind])
    try:
        base = ask(carrier.base_voice(), record.expected, progress)
        share, wrong = compare_base(record.expected, base, tolerance)
        if wrong is not None:
            return None, wrong
        answers = ask(carrier.voice(adapter), record.expected, progress)
    except FactsmithError as error:
        return None, str(error)
    proof = compare(record.expected, base, answers, tolerance, share)
    return proof, "; ".join(proof.failures[:3])
