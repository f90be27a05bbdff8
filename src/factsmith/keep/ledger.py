"""The ledger: which patches a model carries, in order, kept in a folder. It knows no model.

    ledger = Ledger.create("my-workspace", model="gpt2", fingerprint=lm.fingerprint)
    revision = ledger.commit(delta.save, onto=ledger.head, method="rome", facts=[fact], layers=[1], ...)
    for revision in ledger.log():
        print(revision.id[:10], revision.state, revision.message)

A workspace folder holds

    ledger.db              SQLite (write-ahead log): the workspace's model, its revisions, which of them is checked out
    deltas/<sha256>/       one folder a delta, named by its content: readable JSON beside safetensors

History is one line, appended and never rewritten: a revert is a revision of its own. A revision's id is the sha256 of its record, and
the record names its parent, so one id vouches for everything before it. Commit order: the delta's files are written, flushed and renamed
into place, then one SQLite transaction records them; a crash leaves at most a delta that nobody names, never a record of nothing.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..core.errors import DamagedError, FactError, InputError, RevisionError, WorkspaceError
from ..core.fact import Fact
from ..core.files import flush_folder
from .blobs import deltas_of, flush_file, folder_digest, is_whole, remove
from .database import (
    APPLICATION_ID,
    MIGRATIONS,
    SCHEMA,
    SCHEMA_VERSION,
    explained,
    open_database,
    snapshot,
    statements,
    transaction,
)
from .revision import Change, Integrity, Revision, State, Status, Step, StoredChange, StoredRecord

BASE = "base"

LATEST = "latest"

_SHA256 = re.compile(r"[0-9a-f]{64}")

_PREFIX = re.compile(r"[0-9a-f]{4,64}")


class Ledger:
    """The records of one workspace folder; a context manager, closed on exit.

    folder       the workspace
    model        the name or path its model is loaded from
    dtype        the dtype it is loaded in, such as "float32"; the fingerprint depends on it
    fingerprint  sha256 hex of that model before any patch
    created      UTC, ISO 8601

    Raises WorkspaceError when the folder is no workspace, was made by a newer version, is locked or cannot be read, and DamagedError when
    its database is broken.
    """

    def __init__(self, folder: str | os.PathLike[str], *, wait: float = 5.0) -> None:
        """Open a workspace; `wait` is how many seconds to wait for another process that is writing."""
        self.folder = Path(folder)
        self._read: dict[
            str, tuple[tuple[str, str], StoredRecord]
        ] = {}  # records that were read and checked
        self._together = False
        file = self.folder / "ledger.db"
        if not file.is_file():
            raise WorkspaceError(
                f"{self.folder} is not a workspace (no ledger.db in it); make one with `factsmith init MODEL {self.folder}`"
            )
        with explained(self.folder):
            self._db, self._writable = open_database(file, wait)
        try:
            with explained(self.folder):
                self._check_schema()
                row = self._db.execute(
                    "SELECT model, dtype, fingerprint, created FROM workspace"
                ).fetchone()
            if row is None:
                raise DamagedError(
                    f"{file} has lost the row that names its model; restore it from a backup"
                )
            self.model, self.dtype, self.fingerprint, self.created = (str(field) for field in row)
        except BaseException:
            self.close()
            raise

    @classmethod
    def create(
        cls,
        folder: str | os.PathLike[str],
        *,
        model: str,
        fingerprint: str,
        dtype: str = "float32",
        wait: float = 5.0,
    ) -> Ledger:
        """Make a workspace for the model with this name (or path) and fingerprint; raises WorkspaceError if the folder already is one."""
        folder = Path(folder)
        with explained(folder):
            (folder / "deltas").mkdir(parents=True, exist_ok=True)
            db = sqlite3.connect(folder / "ledger.db", timeout=wait, isolation_level=None)
            with contextlib.closing(db):
                # The journal mode cannot change inside a transaction; all else is one, so a crash leaves an empty file to start over.
                db.execute("PRAGMA journal_mode = WAL")
                db.execute("PRAGMA synchronous = FULL")
                with transaction(db):
                    if db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                        raise WorkspaceError(
                            f"{folder} already holds a ledger; use it as it is, or choose another folder"
                        )
                    if any(
                        entry
                        for entry in (folder / "deltas").iterdir()
                        if not entry.name.startswith(".")
                    ):
                        raise WorkspaceError(
                            f"{folder} holds patches but no ledger; put ledger.db back from a copy, or choose another folder"
                        )
                    for statement in statements(SCHEMA):
                        db.execute(statement)
                    db.execute(
                        "INSERT INTO workspace VALUES (1, ?, ?, ?, ?, ?)",
                        (model, dtype, fingerprint, _now(), BASE),
                    )
                    db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                    db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            flush_folder(folder)
        return cls(folder, wait=wait)

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the database; the ledger cannot be used afterwards."""
        self._db.close()

    # ---- reading ----------------------------------------------------------------------------------------------------------------------

    @property
    def head(self) -> str:
        """The id of the newest revision, or "base"."""
        return self._pointers()[0]

    @property
    def current(self) -> str:
        """The id of the revision that is checked out, or "base"; the newest one unless `checkout` said otherwise."""
        return self._pointers()[1]

    def log(self) -> list[Revision]:
        """Every revision, newest first; raises DamagedError when a record does not match its id."""
        return self._history()[::-1]

    def show(self, reference: str) -> Revision:
        """The revision with this id, unique prefix of at least four digits, or "latest"; raises RevisionError."""
        identity = self.resolve(reference)
        if identity == BASE:
            raise RevisionError(
                f"{reference!r} is the unpatched model, which has no record; see `factsmith log` for the revisions"
            )
        return next(revision for revision in self._history() if revision.id == identity)

    def active(self, reference: str | None = None) -> list[Revision]:
        """The patches in effect at a revision (None: the one checked out; "base": none), oldest first: the order they are added in."""
        return [revision for revision in self._history(reference) if revision.carried is not None]

    def resolve(self, reference: str) -> str:
        """The full id (or "base") that an id prefix, "latest" or "base" stands for; raises RevisionError."""
        if reference == BASE:
            return BASE
        if reference == LATEST:
            return self.head
        if not _PREFIX.fullmatch(reference):
            raise RevisionError(
                f"{reference!r} names no revision; expected `base`, `latest`, or at least four hex digits of an id from `factsmith log`"
            )
        with explained(self.folder):
            rows = self._db.execute(
                "SELECT id FROM revisions WHERE substr(id, 1, ?) = ?", (len(reference), reference)
            ).fetchall()
        if not rows:
            raise RevisionError(
                f"no revision begins with {reference!r}; see `factsmith log` for those there are"
            )
        if len(rows) > 1:
            raise RevisionError(
                f"{reference!r} is ambiguous: {', '.join(row[0][:12] for row in rows)}; give more digits"
            )
        return str(rows[0][0])

    def delta_folder(self, revision: Revision, delta: str | None = None) -> Path:
        """The folder with the delta that is carried for a patch (its own where none is), or with another of it, after checking its sha256.

        Raises DamagedError when a file is missing or changed, RevisionError for a revert.
        """
        if revision.kind == "revert":
            raise RevisionError(
                f"revision {revision.id[:10]} is a revert and has no delta; ask for the patch {str(revision.reverts)[:10]}"
            )
        return self._whole(str(delta or revision.carried or revision.delta), revision)

    def _whole(self, delta: str, revision: Revision) -> Path:
        """The folder of a delta of a revision, checked."""
        folder = self.folder / "deltas" / delta
        try:
            found = (
                folder_digest(folder)[0] if folder.exists() or folder.is_symlink() else "nothing"
            )
        except OSError as error:
            raise DamagedError(
                f"cannot read the delta of revision {revision.id[:10]} in {folder}: {error.strerror};"
                f" restore that folder from a backup, or go back with `factsmith checkout {revision.parent[:10]}`"
            ) from None
        if found != delta:
            raise DamagedError(
                f"the delta of revision {revision.id[:10]} is damaged: {folder} should be {delta[:10]}, is {found[:10]};"
                f" restore that folder from a backup, or go back with `factsmith checkout {revision.parent[:10]}`"
            )
        return folder

    def verify(self) -> Integrity:
        """Check the database, every record, the chain of parents and every delta's sha256; raises DamagedError at the first fault."""
        with explained(self.folder):
            (result,) = self._db.execute("PRAGMA integrity_check(1)").fetchone()
        if result != "ok":
            raise DamagedError(
                f"{self.folder / 'ledger.db'} is damaged ({result}); restore it from a backup"
            )
        revisions = self.log()[::-1]
        parent = BASE
        for revision in revisions:
            if revision.parent != parent:
                raise DamagedError(
                    f"revision {revision.id[:10]} follows {revision.parent[:10]}, not {parent[:10]}; restore {self.folder} from a backup"
                )
            if revision.base != self.fingerprint:
                raise DamagedError(
                    f"revision {revision.id[:10]} was made for model {revision.base[:10]}, the workspace for {self.fingerprint[:10]}"
                )
            parent = revision.id
            for delta in deltas_of(revision):
                self._whole(delta, revision)
        named = {delta for revision in revisions for delta in deltas_of(revision)}
        folder = self.folder / "deltas"
        found = (
            sorted(entry.name for entry in folder.iterdir() if _SHA256.fullmatch(entry.name))
            if folder.is_dir()
            else []
        )
        orphans = tuple(name for name in found if name not in named)
        return Integrity(
            revisions=len(revisions), deltas=len(found) - len(orphans), orphans=orphans
        )

    def status(self) -> Status:
        """Where the workspace stands, after `verify`; raises DamagedError."""
        return Status(
            folder=self.folder,
            model=self.model,
            dtype=self.dtype,
            fingerprint=self.fingerprint,
            head=self.head,
            current=self.current,
            active=tuple(self.active()),
            integrity=self.verify(),
        )

    def undoing(self, reference: str, facts: Sequence[int] | None = None) -> list[Step]:
        """What reverting an entry would make of each patch that is in effect before or after it, in ledger order; nothing changes.

        reference  a patch: its facts go. A revert: what it took out comes back, and what it brought back goes
        facts      indices of the patch's facts that go; None: all

        A patch is solved again when some of its facts go, or when it touches a layer that an earlier patch leaves or is solved again in:
        it was solved on top of it. Undoing the newest revision brings back the very deltas of before. Raises RevisionError when there is no
        such revision, it is not in effect, or has no such facts.
        """
        revision, current, head = self.show(reference), self.current, self.head
        now = {patch.id: patch for patch in self._history() if patch.kind == "patch"}
        before = {patch.id: patch for patch in self._history(revision.parent) if patch.id in now}
        held = {
            identity: self._places(patch) for identity, patch in now.items()
        }  # None: out of effect
        if revision.kind == "patch":
            there = held[revision.id]
            if revision.state != "active" or there is None:
                raise RevisionError(
                    f"revision {revision.id[:10]} is not in effect ({revision.state}); `factsmith log` shows which are"
                )
            gone = set(there if facts is None else facts)
            if facts is not None and (not gone or not gone <= set(there)):
                raise RevisionError(
                    f"facts {list(there)} of revision {revision.id[:10]} are in effect; got {sorted(gone)}: name some"
                )
            held[revision.id] = tuple(i for i in there if i not in gone) or None
        else:
            if facts is not None:
                raise RevisionError(
                    f"revision {revision.id[:10]} is a revert, which comes back whole; leave the facts out"
                )
            if revision.state == "later":
                raise RevisionError(
                    f"revision {revision.id[:10]} is not in effect (later); `factsmith checkout latest` first"
                )
            for identity, change in revision.changes.items():
                was, became = (
                    self._places(before[identity]),
                    None if change.delta is None else change.facts,
                )
                if was == became:
                    continue  # only solved again
                if not before[identity].facts:  # of neurons: in effect as a whole, or not
                    held[identity] = was
                    continue
                taken, brought = (
                    set(was or ()) - set(became or ()),
                    set(became or ()) - set(was or ()),
                )
                held[identity] = (
                    tuple(sorted((set(held[identity] or ()) | taken) - brought)) or None
                )
            if all(held[identity] == self._places(patch) for identity, patch in now.items()):
                raise RevisionError(
                    f"what revision {revision.id[:10]} did has been undone already; `factsmith log` shows what is in effect, and any "
                    "patch of it can be reverted by its own id"
                )
        if revision.id == head == current:  # the state before it is known to the bit
            after = {
                identity: (before[identity].carried if identity in before else None)
                for identity in now
            }
            return [
                Step(patch=patch, facts=held[identity], delta=after[identity])
                for identity, patch in now.items()
                if patch.carried is not None or after[identity] is not None
            ]
        steps, moved = [], set[int]()
        for identity, patch in now.items():
            if held[identity] is None and patch.carried is None:
                continue
            # A patch without facts, of neurons, was not solved on top of anything.
            stays = held[identity] == self._places(patch) and not (
                patch.facts and moved & set(patch.layers)
            )
            kept = patch.carried if stays else patch.delta if held[identity] == () else None
            if not stays:
                moved |= set(patch.layers)
            steps.append(Step(patch=patch, facts=held[identity], delta=kept))
        return steps

    @staticmethod
    def _places(patch: Revision) -> tuple[int, ...] | None:
        """Which of a patch's facts are in effect; None where it is not."""
        if patch.carried is None:
            return None
        return tuple(
            i for i, fact in enumerate(patch.facts) if any(fact is kept for kept in patch.in_effect)
        )

    # ---- writing ----------------------------------------------------------------------------------------------------------------------

    def expect(self, onto: str) -> None:
        """Raise now what `commit` would raise later: WorkspaceError when it cannot be written, is locked, or has moved on since `onto`."""
        with self._writing():
            self._expect(onto)

    def commit(
        self,
        write: Callable[[Path], object],
        *,
        onto: str,
        method: str,
        facts: Sequence[Fact],
        layers: Sequence[int],
        config: Mapping[str, Any] | None = None,
        moments: str | None = None,
        report: Mapping[str, Any] | None = None,
        message: str = "",
    ) -> Revision:
        """Append a patch and check it out.

        write    writes the delta's files into the folder it is given (`delta.save`)
        onto     the newest revision the caller knows: the patch was solved on top of it
        message  one line; made from the facts when empty

        Raises WorkspaceError, with nothing recorded, when the history has moved on since `onto`, when an older revision is checked out,
        or when the folder cannot be written (read-only, disk full, locked).
        """
        with self.together(onto):
            digest, size = self._store(write)
            record = StoredRecord(
                kind="patch",
                parent=self.head,
                created=_now(),
                message=_one_line(message or ", ".join(map(str, facts))),
                base=self.fingerprint,
                method=method,
                config=dict(config or {}),
                facts=[fact.to_dict() for fact in facts],
                layers=sorted(int(layer) for layer in layers),
                moments=moments,
                report=dict(report or {}),
                delta=digest,
                delta_bytes=size,
                reverts=None,
            )
            identity = self._append(record)
        return self.show(identity)

    @contextlib.contextmanager
    def together(self, onto: str) -> Iterator[None]:
        """Several commits as one: all of those made inside the block are recorded, or none. Raises what `commit` does."""
        if self._together:
            yield  # inside of a block whose first commit has been checked
            return
        with self._writing():
            self._expect(onto)
            self._together = True
            try:
                yield
            finally:
                self._together = False

    def revert(
        self,
        reference: str,
        *,
        facts: Sequence[int] | None = None,
        solved: Mapping[str, Callable[[Path], object]] | None = None,
        onto: str | None = None,
        report: Mapping[str, Any] | None = None,
        message: str = "",
    ) -> Revision:
        """Append a revision that takes a patch, or some of its facts, out of effect (or brings back what a revert took), and check it out.

        solved  {patch id: writes its new delta's files}, for each step of `undoing` that has to be solved again
        onto    the newest revision the caller knows (None: do not check)
        report  kept with the entry

        Raises RevisionError as `undoing`, and when a delta that has to be solved again is not given; DamagedError when a delta that stays
        is not whole; WorkspaceError as `commit` does.
        """
        given = dict(solved or {})
        with self._writing():
            self._expect(self.head if onto is None else onto)
            revision, steps = self.show(reference), self.undoing(reference, facts)
            again = [step.patch.id for step in steps if step.solve]
            if missing := [identity for identity in again if identity not in given]:
                raise RevisionError(
                    f"taking out {revision.id[:10]} leaves {', '.join(name[:10] for name in missing)} on top of what is gone; "
                    "a Workbench solves them again"
                )
            if stray := sorted(set(given) - set(again)):
                raise InputError(
                    f"{', '.join(name[:10] for name in stray)} need not be solved again; got a new delta"
                )
            changes: dict[str, StoredChange] = {}
            for step in steps:
                patch = step.patch
                if step.solve:
                    delta, size = self._store(given[patch.id])
                    changes[patch.id] = StoredChange(
                        delta=delta, delta_bytes=size, facts=list(step.facts or ())
                    )
                    continue
                if step.delta is not None:
                    folder = self._whole(step.delta, patch)
                if step.delta != patch.carried:
                    size = 0 if step.delta is None else folder_digest(folder)[1]
                    changes[patch.id] = StoredChange(
                        delta=step.delta, delta_bytes=size, facts=list(step.facts or ())
                    )
            taken = {
                step.patch.id: (
                    set(self._places(step.patch) or ()),
                    set(step.facts or ()),
                    step.patch,
                )
                for step in steps
            }
            moved = [
                patch.facts[i] for was, now, patch in taken.values() for i in sorted(was ^ now)
            ]
            what = "" if facts is None else f" {len(moved)} of {len(revision.facts)} facts of"
            record = StoredRecord(
                kind="revert",
                parent=self.head,
                created=_now(),
                message=_one_line(
                    message or f"revert{what} {revision.id[:10]}: {revision.message}"
                ),
                base=self.fingerprint,
                method=revision.method,
                config={},
                facts=[fact.to_dict() for fact in moved],
                layers=sorted({layer for patch in changes for layer in taken[patch][2].layers}),
                moments=None,
                report=dict(report or {}),
                delta=None,
                delta_bytes=sum(
                    change.delta_bytes for identity, change in changes.items() if identity in again
                ),
                reverts=revision.id,
                changes=changes,
            )
            identity = self._append(record)
        return self.show(identity)

    def gc(self, *, dry_run: bool = False) -> tuple[str, ...]:
        """Delete what no revision names: deltas of commits that were killed, and what they were staging. The names, deleted or not.

        History keeps all it names, so nothing that can be checked out goes. Raises WorkspaceError, DamagedError.
        """
        with contextlib.nullcontext() if dry_run else self._writing():
            named = {delta for revision in self._history() for delta in deltas_of(revision)}
            deltas = self.folder / "deltas"
            there = sorted(deltas.iterdir()) if deltas.is_dir() else []
            loose = [
                e
                for e in there
                if e.name.startswith(".staging-")
                or (_SHA256.fullmatch(e.name) and e.name not in named)
            ]
            for entry in () if dry_run else loose:
                remove(entry)
            if loose and not dry_run:
                flush_folder(deltas)
        return tuple(entry.name for entry in loose)

    def checkout(self, reference: str) -> str:
        """Note which revision the model is to carry ("base", "latest", or an id), and return its full id; history does not change.

        Raises RevisionError, or DamagedError when a delta that this revision needs is not whole, and then nothing has moved.
        """
        with self._writing():
            identity = self.resolve(reference)
            for revision in self.active(identity):
                self.delta_folder(revision)
            self._db.execute("UPDATE workspace SET current = ?", (identity,))
        return identity

    # ---- inside -----------------------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Hold the write lock; all of the block is recorded, or none of it."""
        with explained(self.folder):
            if not self._writable:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            with transaction(self._db):
                yield

    def _check_schema(self) -> None:
        (application,) = self._db.execute("PRAGMA application_id").fetchone()
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if application != APPLICATION_ID:
            raise WorkspaceError(
                f"{self.folder / 'ledger.db'} is empty or was not made by factsmith; put it back from a copy, "
                "or make a workspace elsewhere with `factsmith init MODEL FOLDER`"
            )
        if not 1 <= version <= SCHEMA_VERSION:
            raise WorkspaceError(
                f"{self.folder} has ledger format {version}, this factsmith reads formats 1 to {SCHEMA_VERSION}; "
                "upgrade factsmith with `pip install -U factsmith`"
            )
        if (
            version < SCHEMA_VERSION and self._writable
        ):  # of one that cannot be written all can be read as it is
            with transaction(self._db):
                (version,) = self._db.execute(
                    "PRAGMA user_version"
                ).fetchone()  # somebody else may have been faster
                while version < SCHEMA_VERSION:
                    for statement in statements(MIGRATIONS[version]):
                        self._db.execute(statement)
                    version += 1
                    self._db.execute(f"PRAGMA user_version = {version}")

    def _pointers(self) -> tuple[str, str]:
        with explained(self.folder):
            row = self._db.execute(
                "SELECT (SELECT id FROM revisions ORDER BY seq DESC LIMIT 1), current FROM workspace"
            ).fetchone()
        if row is None or not isinstance(row[1], str):
            raise DamagedError(
                f"{self.folder / 'ledger.db'} does not say which revision is checked out; {self._restore}"
            )
        return str(row[0] or BASE), row[1]

    def _number(self, identity: str) -> int:
        """The place of a revision in the history; 0 for "base"."""
        with explained(self.folder):
            row = self._db.execute("SELECT seq FROM revisions WHERE id = ?", (identity,)).fetchone()
        if row is None and identity == BASE:
            return 0
        if row is None or not isinstance(row[0], int):
            raise DamagedError(
                f"{self.folder} is checked out at {identity[:10]}, which its history does not hold; {self._restore}"
            )
        return row[0]

    def _history(self, reference: str | None = None) -> list[Revision]:
        """Every revision, oldest first, as seen from a revision (None: the one checked out)."""
        with explained(self.folder), snapshot(self._db):
            here = self._number(self.current if reference is None else self.resolve(reference))
            rows = self._db.execute(
                "SELECT seq, id, parent, record FROM revisions ORDER BY seq"
            ).fetchall()
        if not all(isinstance(number, int) for number, *_ in rows):
            raise DamagedError(
                f"the revisions in {self.folder / 'ledger.db'} are in no order; {self._restore}"
            )
        read = [
            (int(number), str(identity), self._checked(str(identity), str(parent), str(text)))
            for number, identity, parent, text in rows
        ]
        carried: dict[
            str, tuple[str, tuple[int, ...]]
        ] = {}  # patch -> its delta, and which of its facts are in it, seen from here
        undone: dict[str, str] = {}
        for number, identity, record in read:
            if record.kind == "revert":
                undone |= (
                    {str(record.reverts): identity}
                    if str(record.reverts) not in record.changed
                    else {}
                )
                undone |= {
                    patch: identity if change.delta is None else ""
                    for patch, change in record.changed.items()
                }
            if number > here:
                continue
            if record.delta is not None:
                carried[identity] = (record.delta, tuple(range(len(record.facts))))
            for patch, change in record.changed.items():
                if change.delta is None:
                    carried.pop(patch, None)
                else:
                    carried[patch] = (change.delta, tuple(change.facts))
        revisions = []
        for number, identity, record in read:
            facts = self._facts(identity, record)
            delta, kept = carried.get(identity, (None, ()))
            if any(not 0 <= i < len(facts) for i in kept):
                raise DamagedError(
                    f"revision {identity[:10]} has {len(facts)} facts, of which others are said to stay; {self._restore}"
                )
            state: State = (
                "later"
                if number > here
                else "reverted"
                if record.kind == "patch" and delta is None
                else "active"
            )
            fields = {name: value for name, value in vars(record).items() if name != "changes"}
            revisions.append(
                Revision(
                    id=identity,
                    number=number,
                    state=state,
                    reverted_by=undone.get(identity) or None,
                    carried=delta,
                    in_effect=tuple(facts[i] for i in kept),
                    changes={
                        patch: Change(
                            delta=change.delta,
                            delta_bytes=change.delta_bytes,
                            facts=tuple(change.facts),
                        )
                        for patch, change in record.changed.items()
                    },
                    **{**fields, "facts": facts, "layers": tuple(record.layers)},
                )
            )
        return revisions

    def _checked(self, identity: str, parent: str, text: str) -> StoredRecord:
        """A row's record, once it matches its id and says the same as the column beside it."""
        if (known := self._read.get(identity)) is not None and known[0] == (parent, text):
            return known[1]
        try:
            if hashlib.sha256(text.encode()).hexdigest() != identity:
                raise ValueError("its record does not match its id")
            record = StoredRecord.model_validate_json(text)
            if record.parent != parent:
                raise ValueError("its record and its columns disagree")
            if (record.kind == "revert") != (record.reverts is not None) or (
                record.kind == "patch"
            ) != (record.delta is not None):
                raise ValueError("it is neither a patch nor a revert")
        except ValueError as error:  # pydantic's is one too
            problem = "; ".join(str(error).splitlines())
            raise DamagedError(
                f"revision {str(identity)[:10]} is damaged: {problem}; {self._restore}"
            ) from None
        self._read[identity] = ((parent, text), record)
        return record

    def _facts(self, identity: str, record: StoredRecord) -> tuple[Fact, ...]:
        try:
            return tuple(Fact.from_dict(fact) for fact in record.facts)
        except FactError as error:
            raise DamagedError(
                f"revision {identity[:10]} holds a fact that cannot be read ({error}); {self._restore}"
            ) from None

    @property
    def _restore(self) -> str:
        return f"restore {self.folder / 'ledger.db'} from a backup"

    def _expect(self, onto: str) -> None:
        """Refuse to append unless the newest revision is `onto` and it is checked out; called with the write lock held."""
        head, current = self._pointers()
        if current != head and onto in (current, head):
            raise WorkspaceError(
                f"{self.folder} is checked out at {current[:10]}, but its newest revision is {head[:10]}; "
                "run `factsmith checkout latest` first"
            )
        if head != onto:
            raise WorkspaceError(
                f"somebody committed {head[:10]} to {self.folder} meanwhile (expected the newest to be {onto[:10]}); "
                "look at `factsmith log`, then run this again"
            )

    def _store(self, write: Callable[[Path], object]) -> tuple[str, int]:
        """Write a delta's files, flush them, and rename them into place under their sha256; called with the write lock held."""
        deltas = self.folder / "deltas"
        deltas.mkdir(exist_ok=True)
        for leftover in deltas.glob(
            ".staging-*"
        ):  # of a process that died: whoever holds the write lock is the only one staging
            shutil.rmtree(leftover, ignore_errors=True)
        staging = deltas / f".staging-{secrets.token_hex(8)}"
        try:
            write(staging)
            digest, size = folder_digest(staging)
            for file in staging.iterdir():
                flush_file(file)
            flush_folder(staging)
            target = deltas / digest
            if not is_whole(target):
                remove(target)
                staging.rename(target)
                flush_folder(deltas)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        return digest, size

    def _append(self, record: StoredRecord) -> str:
        try:
            text = json.dumps(
                record.model_dump(), ensure_ascii=False, sort_keys=True, allow_nan=False
            )
            identity = hashlib.sha256(text.encode()).hexdigest()
        except (TypeError, ValueError) as error:
            raise InputError(
                f"config, facts and report are kept as JSON in UTF-8, finite numbers only; got something else: {error}"
            ) from None
        self._db.execute(
            "INSERT INTO revisions (id, parent, record) VALUES (?, ?, ?)",
            (identity, record.parent, text),
        )
        self._db.execute("UPDATE workspace SET current = ?", (identity,))
        return identity


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 200 else line[:199] + "…"
