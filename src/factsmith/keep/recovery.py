"""Revisions that are in the folder of a workspace and not in its ledger.db, and their way back.

    recover("my-workspace", dry_run=True).recovered      # what could be put back
    recover("my-workspace")                              # puts it back
    recover("my-workspace", give_up=True)                # goes on without it

They get lost when ledger.db is copied without ledger.db-wal, is replaced by an older one, or when
somebody deletes them in it. Their records are still in `records/` (`copies`) and their deltas in
`deltas/`. So they can be put back exactly as they were, with the same ids. No ledger opens before
one or the other was done: it would show an old history as the whole one.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.errors import DamagedError
from ..core.tables import Shown, Table, counted
from .blobs import Blobs
from .copies import Copies
from .database import Database, Row
from .explained import explained
from .records import check_rows
from .revision import BASE, RevisionKind, StoredRecord


@dataclass(frozen=True, kw_only=True)
class LostRevision:
    """A revision that is in the folder of a workspace and not in its ledger.db.

    Attributes:
        id: Its id.
        kind: "patch" or "revert". None: its record cannot be read.
        created: The UTC time of its commit, in ISO 8601.
        message: One line.
        problem: Why it cannot be put back. "": it can.
    """

    id: str
    kind: RevisionKind | None = None
    created: str = ""
    message: str = ""
    problem: str = ""

    @classmethod
    def of(cls, identity: str, record: StoredRecord, problem: str = "") -> LostRevision:
        """Return it with what its record says."""
        return cls(
            id=identity,
            kind=record.kind,
            created=record.created,
            message=record.message,
            problem=problem,
        )


@dataclass(frozen=True, kw_only=True, repr=False)
class Recovery(Shown):
    """What became of the lost revisions of a workspace.

    Attributes:
        folder: The workspace.
        recovered: The revisions that were put back, oldest first.
        left: Those that could not be put back, and why.
        given_up: Those that were given up.
        head: The id of the newest revision afterwards, or "base".
        dry_run: Whether nothing was changed.
    """

    folder: Path
    recovered: tuple[LostRevision, ...]
    left: tuple[LostRevision, ...]
    given_up: tuple[LostRevision, ...]
    head: str
    dry_run: bool

    def tables(self) -> list[Table]:
        """Return the revisions, one on a line."""
        would = "would be " if self.dry_run else ""
        groups = (
            (f"{would}put back", self.recovered),
            ("cannot be put back", self.left),
            (f"{would}given up", self.given_up),
        )
        columns = {" ": "<", "  ": "<", "   ": "<", "    ": "<"}
        rows = [
            (each.id[:10], each.created[:16].replace("T", " "), what, each.problem or each.message)
            for what, revisions in groups
            for each in revisions
        ]
        title = "" if rows else "no revision is missing"
        return [Table(title, columns if rows else {}, rows)]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        groups = {
            name: [vars(each) for each in getattr(self, name)]
            for name in ("recovered", "left", "given_up")
        }
        return {**vars(self), "folder": str(self.folder.resolve()), **groups}


def check_nothing_lost(folder: Path, ids: Collection[str], copied: Collection[str]) -> None:
    """Raise DamagedError when a revision that was committed is not in ledger.db.

    Args:
        folder: The workspace.
        ids: The ids in ledger.db.
        copied: The ids that had copies before the database was read.
    """
    lost = set(copied) - set(ids)
    if not lost:
        return
    copies, records = Copies(folder), {}
    for identity in sorted(lost):
        with contextlib.suppress(DamagedError):
            records[identity] = copies.read(identity)[0]
    parents = {record.parent for record in records.values()}
    ends = [
        f", the newest {identity[:10]} {record.message!r:.80}"
        for identity, record in records.items()
        if identity not in parents
    ]
    newest = ends[0] if len(ends) == 1 else ""
    are = "is" if len(lost) == 1 else "are"
    raise DamagedError(
        f"{counted(len(lost), 'revision')} {are} in {folder} and not in its ledger.db{newest}. "
        "ledger.db is older than the folder, as in a copy without ledger.db-wal. Put that file "
        f"back, or run `factsmith recover -w {folder}`, which puts the revisions back into "
        "ledger.db."
    )


def recover(
    folder: str | os.PathLike[str],
    *,
    give_up: bool = False,
    dry_run: bool = False,
    wait: float = 5.0,
) -> Recovery:
    """Put lost revisions back into a workspace's ledger.db, with the ids that they had.

    Args:
        folder: The workspace.
        give_up: Go on without the lost revisions. Their records are moved to `records/given-up`;
            their deltas stay. A revision that others in ledger.db follow is put back all the same.
        dry_run: Only look, and change nothing.
        wait: How many seconds to wait for another process that is writing.

    Raises:
        WorkspaceError: when the folder is not a workspace, is locked, or cannot be written.
        DamagedError: when ledger.db is damaged in a way that the records cannot mend.
    """
    folder = Path(folder)
    copies = Copies(folder)
    with contextlib.ExitStack() as stack:
        database = stack.enter_context(contextlib.closing(Database(folder, wait)))
        stack.enter_context(explained(folder))
        if not dry_run:
            stack.enter_context(database.writing())
        rows = database.rows()
        lost = copies.ids() - {row.id for row in rows}
        base = database.workspace().fingerprint
        try:
            gaps = _gaps(copies, lost, rows, base)
        except DamagedError as error:
            raise DamagedError(f"{error}. {database.restore}") from None
        lost -= {row.id for row, _ in gaps}
        head = rows[-1].id if rows else BASE
        chain, left = _chain(copies, lost, head, base)
        given_up: list[LostRevision] = []
        if give_up:
            given_up = [*left, *(LostRevision.of(*each[:2]) for each in chain)]
            chain, left = [], []
            if not dry_run:
                copies.give_up(lost)
        if not dry_run:
            for row, _ in gaps:
                database.put_back(row)
        for identity, record, text in chain:
            head = identity
            if not dry_run:
                database.append(identity, record.parent, text)
    return Recovery(
        folder=folder,
        recovered=(
            *(LostRevision.of(row.id, record) for row, record in gaps),
            *(LostRevision.of(identity, record) for identity, record, _ in chain),
        ),
        left=tuple(left),
        given_up=tuple(given_up),
        head=head,
        dry_run=dry_run,
    )


def _gaps(
    copies: Copies, lost: Collection[str], rows: Sequence[Row], base: str
) -> list[tuple[Row, StoredRecord]]:
    """Return the revisions that were taken out before others, oldest first, with their places.

    The record of a row names the revision before it, and so on: the hashes prove what belongs
    there.

    Raises:
        DamagedError: when the history is not whole with them.
    """
    try:
        check_rows(rows)
    except DamagedError as error:
        broken = error
    else:
        return []
    gaps: list[tuple[Row, StoredRecord]] = []
    known = {row.id for row in rows}
    before = BASE
    for row in rows:
        number, parent = row.number, _parent(row)
        missing: list[tuple[Row, StoredRecord]] = []
        while parent != before:
            number -= 1
            if parent in known or parent == BASE:
                raise DamagedError(f"{broken}; no record in {copies.folder} mends that")
            if parent not in lost:
                raise DamagedError(
                    f"{broken}; revision {parent[:10]} cannot be put back, since "
                    f"{copies.folder} has no record of it"
                )
            record, text = copies.read(parent)
            if problem := _problem(copies.folder.parent, [parent], record, base):
                raise DamagedError(f"{broken}; {parent[:10]} cannot be put back: {problem}")
            known.add(parent)
            missing.insert(0, (Row(number, parent, record.parent, text), record))
            parent = record.parent
        gaps += missing
        before = row.id
    check_rows(sorted([*rows, *(row for row, _ in gaps)]))
    return gaps


def _parent(row: Row) -> str:
    """Return the id of the revision before a row, as its record says."""
    try:
        parent = StoredRecord.model_validate_json(row.record).parent
    except ValueError:  # errors of pydantic are ValueErrors
        parent = ""
    if parent != row.parent or hashlib.sha256(row.record.encode()).hexdigest() != row.id:
        raise DamagedError(f"Revision {row.id[:10]} is damaged: its record does not match its row")
    return parent


def _chain(
    copies: Copies, lost: Collection[str], head: str, base: str
) -> tuple[list[tuple[str, StoredRecord, str]], list[LostRevision]]:
    """Return the lost records that follow the newest revision, in order; and the others."""
    left: list[LostRevision] = []
    after: dict[str, list[tuple[str, StoredRecord, str]]] = {}
    for identity in sorted(lost):
        try:
            record, text = copies.read(identity)
        except DamagedError as error:
            left.append(LostRevision(id=identity, problem=str(error)))
        else:
            after.setdefault(record.parent, []).append((identity, record, text))
    chain: list[tuple[str, StoredRecord, str]] = []
    problem = ""
    while not problem and (following := after.get(head)):
        identity, record, text = following[0]
        problem = _problem(copies.folder.parent, following, record, base)
        if not problem:
            chain.append(following[0])
            del after[head]
            head = identity
    for parent, following in after.items():
        why = problem if parent == head else f"it follows {parent[:10]}, which is not there"
        left += (LostRevision.of(identity, record, why) for identity, record, _ in following)
    return chain, left


def _problem(folder: Path, following: Collection[object], record: StoredRecord, base: str) -> str:
    """Return why a record cannot be put back; "" if it can."""
    if len(following) > 1:
        return f"{len(following)} revisions follow {record.parent[:10]}"
    if record.base != base:
        return f"it was made for the model {record.base[:10]}"
    blobs = Blobs(folder / "deltas")
    for delta in (record.delta, *(change.delta for change in record.changed.values())):
        try:
            if delta is not None:
                blobs.check(delta)
        except DamagedError as error:
            return str(error)
    return ""
