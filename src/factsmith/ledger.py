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
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn
from urllib.parse import quote

import pydantic

from .errors import DamagedError, FactError, FactsmithError, InputError, RevisionError, WorkspaceError
from .fact import Fact
from .files import flush_folder

BASE = "base"
LATEST = "latest"

_SCHEMA_VERSION = 1
_APPLICATION_ID = 0x46435453  # "FCTS" in the file's header, so that another program's ledger.db is not taken for ours
_SCHEMA = """
CREATE TABLE workspace (
    one          INTEGER PRIMARY KEY CHECK (one = 1),
    model        TEXT NOT NULL,
    dtype        TEXT NOT NULL,
    fingerprint  TEXT NOT NULL,
    created      TEXT NOT NULL,
    current      TEXT NOT NULL
);
CREATE TABLE revisions (
    seq      INTEGER PRIMARY KEY,
    id       TEXT NOT NULL UNIQUE,
    parent   TEXT NOT NULL UNIQUE,
    reverts  TEXT UNIQUE REFERENCES revisions (id),
    delta    TEXT,
    record   TEXT NOT NULL
);
CREATE TRIGGER revisions_keep BEFORE DELETE ON revisions BEGIN SELECT RAISE(ABORT, 'history is appended, never rewritten'); END;
CREATE TRIGGER revisions_stay BEFORE UPDATE ON revisions BEGIN SELECT RAISE(ABORT, 'history is appended, never rewritten'); END;
"""
_SHA256 = re.compile(r"[0-9a-f]{64}")
_PREFIX = re.compile(r"[0-9a-f]{4,64}")

Kind = Literal["patch", "revert"]
State = Literal["active", "reverted", "later"]


class _Record(pydantic.BaseModel):
    """What is kept of a revision, and what its id is the sha256 of."""

    model_config = pydantic.ConfigDict(strict=True, extra="forbid")

    kind: Kind
    parent: str
    created: str
    message: str
    base: str
    method: str
    config: dict[str, Any]
    facts: list[dict[str, Any]]
    layers: list[int]
    moments: str | None
    report: dict[str, Any]
    delta: Annotated[str, pydantic.Field(pattern="^[0-9a-f]{64}$")] | None
    delta_bytes: int
    reverts: str | None


@dataclass(frozen=True, kw_only=True)
class Revision:
    """One entry of the history.

    id           sha256 hex of the record; any unique prefix of at least four digits names it
    parent       id of the entry before it, or "base"
    number       1 for the first entry
    kind         "patch" (adds a delta) or "revert" (takes one out)
    state        "active" (in effect where the workspace is checked out), "reverted", or "later" (comes after the checked-out entry)
    created      UTC, ISO 8601
    message      one line
    base         fingerprint of the unpatched model
    method       name of the editing method; for a revert, that of the reverted entry
    config       its settings, plain JSON values
    facts        what was written, or taken out
    layers       the layers touched
    moments      digest of the second moments used, or None
    report       the evaluation kept with the entry, plain JSON values
    delta        sha256 of the delta's files; None for a revert
    delta_bytes  their size
    reverts      id of the entry that a revert takes out; None for a patch
    reverted_by  id of the revert that took this patch out (in effect or not), or None
    """

    id: str
    parent: str
    number: int
    kind: Kind
    state: State
    created: str
    message: str
    base: str
    method: str
    config: Mapping[str, Any]
    facts: tuple[Fact, ...]
    layers: tuple[int, ...]
    moments: str | None
    report: Mapping[str, Any]
    delta: str | None
    delta_bytes: int
    reverts: str | None
    reverted_by: str | None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able fields."""
        return {**vars(self), "facts": [fact.to_dict() for fact in self.facts], "layers": list(self.layers)}


@dataclass(frozen=True, kw_only=True)
class Integrity:
    """What `Ledger.verify` counted: revisions read, delta folders checked against their sha256, and those that no revision names."""

    revisions: int
    deltas: int
    orphans: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able fields."""
        return {**vars(self), "orphans": list(self.orphans)}


@dataclass(frozen=True, kw_only=True)
class Status:
    """A workspace at a glance.

    folder, model, dtype, fingerprint  as in `Ledger`
    head, current                      ids of the newest and of the checked-out revision, or "base"
    active                             the patches in effect, oldest first
    integrity                          what was counted while every record and every delta's sha256 was checked
    """

    folder: Path
    model: str
    dtype: str
    fingerprint: str
    head: str
    current: str
    active: tuple[Revision, ...]
    integrity: Integrity

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able fields; the active patches by their ids."""
        active = [revision.id for revision in self.active]
        return {**vars(self), "folder": str(self.folder.resolve()), "active": active, "integrity": self.integrity.to_dict()}


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
        file = self.folder / "ledger.db"
        if not file.is_file():
            raise WorkspaceError(
                f"{self.folder} is not a workspace (no ledger.db in it); make one with `factsmith init MODEL {self.folder}`"
            )
        with _explained(self.folder):
            self._db, self._writable = _open(file, wait)
        try:
            with _explained(self.folder):
                self._check_schema()
                row = self._db.execute("SELECT model, dtype, fingerprint, created FROM workspace").fetchone()
            if row is None:
                raise DamagedError(f"{file} has lost the row that names its model; restore it from a backup")
            self.model, self.dtype, self.fingerprint, self.created = (str(field) for field in row)
        except BaseException:
            self.close()
            raise

    @classmethod
    def create(cls, folder: str | os.PathLike[str], *, model: str, fingerprint: str, dtype: str = "float32", wait: float = 5.0) -> Ledger:
        """Make a workspace for the model with this name (or path) and fingerprint; raises WorkspaceError if the folder already is one."""
        folder = Path(folder)
        with _explained(folder):
            (folder / "deltas").mkdir(parents=True, exist_ok=True)
            db = sqlite3.connect(folder / "ledger.db", timeout=wait, isolation_level=None)
            with contextlib.closing(db):
                # The journal mode cannot change inside a transaction; all else is one, so a crash leaves an empty file to start over.
                db.execute("PRAGMA journal_mode = WAL")
                db.execute("PRAGMA synchronous = FULL")
                with _transaction(db):
                    if db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                        raise WorkspaceError(f"{folder} already holds a ledger; use it as it is, or choose another folder")
                    if any(entry for entry in (folder / "deltas").iterdir() if not entry.name.startswith(".")):
                        raise WorkspaceError(
                            f"{folder} holds patches but no ledger; put ledger.db back from a copy, or choose another folder"
                        )
                    for statement in _statements(_SCHEMA):
                        db.execute(statement)
                    db.execute("INSERT INTO workspace VALUES (1, ?, ?, ?, ?, ?)", (model, dtype, fingerprint, _now(), BASE))
                    db.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
                    db.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")
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
        return self._select("TRUE")[::-1]

    def show(self, reference: str) -> Revision:
        """The revision with this id, unique prefix of at least four digits, or "latest"; raises RevisionError."""
        identity = self.resolve(reference)
        if identity == BASE:
            raise RevisionError(f"{reference!r} is the unpatched model, which has no record; see `factsmith log` for the revisions")
        return self._select("entry.id = ?", identity)[0]

    def active(self, reference: str | None = None) -> list[Revision]:
        """The patches in effect at a revision (None: the one checked out; "base": none), oldest first: the order they are added in."""
        here = self._number(self.current if reference is None else self.resolve(reference))
        return self._select("entry.reverts IS NULL AND entry.seq <= ? AND (undo.seq IS NULL OR undo.seq > ?)", here, here)

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
        with _explained(self.folder):
            rows = self._db.execute("SELECT id FROM revisions WHERE substr(id, 1, ?) = ?", (len(reference), reference)).fetchall()
        if not rows:
            raise RevisionError(f"no revision begins with {reference!r}; see `factsmith log` for those there are")
        if len(rows) > 1:
            raise RevisionError(f"{reference!r} is ambiguous: {', '.join(row[0][:12] for row in rows)}; give more digits")
        return str(rows[0][0])

    def delta_folder(self, revision: Revision) -> Path:
        """The folder with a patch's delta, after checking its sha256; raises DamagedError when a file is missing or changed."""
        if revision.delta is None:
            raise RevisionError(f"revision {revision.id[:10]} is a revert and has no delta; ask for the patch {str(revision.reverts)[:10]}")
        folder = self.folder / "deltas" / revision.delta
        try:
            found = _digest(folder)[0] if folder.is_dir() else "nothing"
        except OSError as error:
            raise DamagedError(f"cannot read the delta of revision {revision.id[:10]} in {folder}: {error.strerror}") from None
        if found != revision.delta:
            raise DamagedError(
                f"the delta of revision {revision.id[:10]} is damaged: {folder} should be {revision.delta[:10]}, is {found[:10]};"
                f" restore that folder from a backup, or go back with `factsmith checkout {revision.parent[:10]}`"
            )
        return folder

    def verify(self) -> Integrity:
        """Check the database, every record, the chain of parents and every delta's sha256; raises DamagedError at the first fault."""
        with _explained(self.folder):
            (result,) = self._db.execute("PRAGMA integrity_check(1)").fetchone()
        if result != "ok":
            raise DamagedError(f"{self.folder / 'ledger.db'} is damaged ({result}); restore it from a backup")
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
            if revision.kind == "patch":
                self.delta_folder(revision)
        named = {revision.delta for revision in revisions}
        folder = self.folder / "deltas"
        found = sorted(entry.name for entry in folder.iterdir() if _SHA256.fullmatch(entry.name)) if folder.is_dir() else []
        orphans = tuple(name for name in found if name not in named)
        return Integrity(revisions=len(revisions), deltas=len(found) - len(orphans), orphans=orphans)

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

    def blockers(self, reference: str) -> list[Revision]:
        """The later patches in effect that touch a layer this one touches, newest first: they were solved on top of it."""
        revision = self.show(reference)
        later = [other for other in self.active() if other.number > revision.number and set(other.layers) & set(revision.layers)]
        return later[::-1]

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
        with self._writing():
            self._expect(onto)
            digest, size = self._store(write)
            record = _Record(
                kind="patch",
                parent=onto,
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

    def revert(self, reference: str, *, onto: str | None = None, message: str = "") -> Revision:
        """Append a revision that takes a patch out of effect, and check it out.

        onto  the newest revision the caller knows (None: do not check)

        Raises RevisionError when there is no such patch, it is not in effect, or later patches were solved on top of it; DamagedError when
        a delta that stays is not whole; WorkspaceError as `commit` does.
        """
        with self._writing():
            self._expect(self.head if onto is None else onto)
            revision = self.show(reference)
            if revision.kind == "revert":
                active = self.active()
                newest = f"the newest patch in effect is {active[-1].id[:10]}" if active else "no patch is in effect"
                raise RevisionError(
                    f"revision {revision.id[:10]} is itself a revert of {str(revision.reverts)[:10]}; to have that patch "
                    f"again, patch again ({newest})"
                )
            if revision.state != "active":
                raise RevisionError(f"revision {revision.id[:10]} is not in effect ({revision.state}); `factsmith log` shows which are")
            blockers = self.blockers(revision.id)
            if blockers:
                names = ", ".join(later.id[:10] for later in blockers)
                raise RevisionError(
                    f"revision {revision.id[:10]} cannot be taken out alone: {names} changed the same layers later and "
                    f"{'was' if len(blockers) == 1 else 'were'} solved on top of it; revert {names} first (newest first), "
                    f"or look at the model before all of them with `factsmith checkout {revision.parent[:10]}`"
                )
            for other in self.active():
                if other.id != revision.id:
                    self.delta_folder(other)
            record = _Record(
                kind="revert",
                parent=self.head,
                created=_now(),
                message=_one_line(message or f"revert {revision.id[:10]}: {revision.message}"),
                base=self.fingerprint,
                method=revision.method,
                config={},
                facts=[fact.to_dict() for fact in revision.facts],
                layers=list(revision.layers),
                moments=None,
                report={},
                delta=None,
                delta_bytes=0,
                reverts=revision.id,
            )
            identity = self._append(record)
        return self.show(identity)

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
        with _explained(self.folder):
            if not self._writable:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            with _transaction(self._db):
                yield

    def _check_schema(self) -> None:
        (application,) = self._db.execute("PRAGMA application_id").fetchone()
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if application != _APPLICATION_ID:
            raise WorkspaceError(
                f"{self.folder / 'ledger.db'} is empty or was not made by factsmith; put it back from a copy, "
                "or make a workspace elsewhere with `factsmith init MODEL FOLDER`"
            )
        if version != _SCHEMA_VERSION:
            raise WorkspaceError(
                f"{self.folder} has ledger format {version}, this factsmith reads format {_SCHEMA_VERSION}; "
                "upgrade factsmith with `pip install -U factsmith`"
            )

    def _pointers(self) -> tuple[str, str]:
        with _explained(self.folder):
            newest, current = self._db.execute(
                "SELECT (SELECT id FROM revisions ORDER BY seq DESC LIMIT 1), current FROM workspace"
            ).fetchone()
        return newest or BASE, current

    def _number(self, identity: str) -> int:
        """The place of a revision in the history; 0 for "base"."""
        with _explained(self.folder):
            row = self._db.execute("SELECT seq FROM revisions WHERE id = ?", (identity,)).fetchone()
        if row is None and identity != BASE:
            raise DamagedError(f"{self.folder} is checked out at {identity[:10]}, which its history does not hold; {self._restore}")
        return 0 if row is None else int(row[0])

    def _select(self, condition: str, *values: object) -> list[Revision]:
        """The revisions for which an SQL condition on `entry` and the revert `undo` of it holds, oldest first."""
        with _explained(self.folder), _snapshot(self._db):
            here = self._number(self.current)
            rows = self._db.execute(
                "SELECT entry.seq, entry.id, entry.parent, entry.reverts, entry.delta, entry.record, undo.id, undo.seq "
                f"FROM revisions AS entry LEFT JOIN revisions AS undo ON undo.reverts = entry.id WHERE {condition} ORDER BY entry.seq",
                values,
            ).fetchall()
        revisions = []
        for number, identity, *columns, undo, undone in rows:
            record = self._checked(identity, columns)
            state: State = "later" if number > here else "reverted" if undo is not None and undone <= here else "active"
            fields = {**vars(record), "facts": self._facts(identity, record), "layers": tuple(record.layers)}
            revisions.append(Revision(id=identity, number=number, state=state, reverted_by=undo, **fields))
        return revisions

    def _checked(self, identity: str, columns: Sequence[Any]) -> _Record:
        """A row's record, once it matches its id and says the same as the columns beside it."""
        parent, reverts, delta, text = columns
        try:
            if hashlib.sha256(str(text).encode()).hexdigest() != identity:
                raise ValueError("its record does not match its id")
            record = _Record.model_validate_json(text)
            if (record.parent, record.reverts, record.delta) != (parent, reverts, delta):
                raise ValueError("its record and its columns disagree")
        except ValueError as error:  # pydantic's is one too
            problem = "; ".join(str(error).splitlines())
            raise DamagedError(f"revision {str(identity)[:10]} is damaged: {problem}; {self._restore}") from None
        return record

    def _facts(self, identity: str, record: _Record) -> tuple[Fact, ...]:
        try:
            return tuple(Fact.from_dict(fact) for fact in record.facts)
        except FactError as error:
            raise DamagedError(f"revision {identity[:10]} holds a fact that cannot be read ({error}); {self._restore}") from None

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
        for leftover in deltas.glob(".staging-*"):  # of a process that died: whoever holds the write lock is the only one staging
            shutil.rmtree(leftover, ignore_errors=True)
        staging = deltas / f".staging-{secrets.token_hex(8)}"
        try:
            write(staging)
            digest, size = _digest(staging)
            for file in staging.iterdir():
                _flush(file)
            flush_folder(staging)
            target = deltas / digest
            if target.exists() and _digest(target)[0] != digest:
                shutil.rmtree(target)
            if not target.exists():
                staging.rename(target)
                flush_folder(deltas)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        return digest, size

    def _append(self, record: _Record) -> str:
        try:
            text = json.dumps(record.model_dump(), ensure_ascii=False, sort_keys=True, allow_nan=False)
            identity = hashlib.sha256(text.encode()).hexdigest()
        except (TypeError, ValueError) as error:
            raise InputError(
                f"config, facts and report are kept as JSON in UTF-8, finite numbers only; got something else: {error}"
            ) from None
        self._db.execute(
            "INSERT INTO revisions (id, parent, reverts, delta, record) VALUES (?, ?, ?, ?, ?)",
            (identity, record.parent, record.reverts, record.delta, text),
        )
        self._db.execute("UPDATE workspace SET current = ?", (identity,))
        return identity


def _open(file: Path, wait: float) -> tuple[sqlite3.Connection, bool]:
    """A connection, and whether it can write."""
    db = sqlite3.connect(f"file:{quote(str(file.resolve()))}?mode=rw", uri=True, timeout=wait, isolation_level=None)
    try:
        db.execute("PRAGMA synchronous = FULL")
        db.execute("SELECT count(*) FROM sqlite_master").fetchone()
        return db, os.access(file, os.W_OK) and os.access(file.parent, os.W_OK)
    except sqlite3.OperationalError as error:
        db.close()
        if not any(word in str(error) for word in ("readonly", "unable to open")) or os.access(file.parent, os.W_OK):
            raise
    # A write-ahead-log database in a folder that cannot be written: no one can be writing to it, so it can be read as it lies.
    return sqlite3.connect(f"file:{quote(str(file.resolve()))}?immutable=1", uri=True, timeout=wait, isolation_level=None), False


@contextlib.contextmanager
def _transaction(db: sqlite3.Connection) -> Iterator[None]:
    """Hold the write lock; all of the block is recorded, or none of it."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


@contextlib.contextmanager
def _snapshot(db: sqlite3.Connection) -> Iterator[None]:
    """Let several reads see one moment, also while another process writes."""
    if db.in_transaction:
        yield
        return
    db.execute("BEGIN")
    try:
        yield
    finally:
        if db.in_transaction:
            db.execute("ROLLBACK")


@contextlib.contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """Turn what SQLite and the file system report into errors of ours that say what to do."""
    try:
        yield
    except FactsmithError:
        raise
    except sqlite3.Error as error:
        _explain_database(error, folder)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise WorkspaceError(f"the disk is full: nothing was recorded in {folder}; free some space and run this again") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise WorkspaceError(f"{folder} cannot be written ({error.strerror}); make it writable, or use a copy of it") from error
        raise WorkspaceError(f"cannot write to {folder}: {error.strerror or error}") from error


def _explain_database(error: sqlite3.Error, folder: Path) -> NoReturn:
    text = str(error)
    if "locked" in text or "busy" in text:
        raise WorkspaceError(
            f"another process is writing to {folder}; nothing was recorded; wait for it to finish and run this again"
        ) from error
    if "full" in text:
        raise WorkspaceError(f"the disk is full: nothing was recorded in {folder}; free some space and run this again") from error
    if "readonly" in text or "unable to open" in text or "disk I/O" in text:
        raise WorkspaceError(f"{folder} cannot be written ({text}); make it writable, or use a copy of it") from error
    if "malformed" in text or "not a database" in text or "no such table" in text or "no such column" in text:
        raise DamagedError(f"{folder / 'ledger.db'} is damaged ({text}); restore it from a backup") from error
    raise WorkspaceError(f"the ledger in {folder} refused: {text}") from error


def _digest(folder: Path) -> tuple[str, int]:
    """sha256 over the names and contents of a folder's files, and their size in bytes; names that begin with a dot do not count."""
    total = hashlib.sha256()
    size = 0
    for file in sorted(entry for entry in folder.iterdir() if not entry.name.startswith(".")):
        content = hashlib.sha256()
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                content.update(block)
                size += len(block)
        total.update(f"{file.name}\0{content.hexdigest()}\n".encode())
    return total.hexdigest(), size


def _flush(file: Path) -> None:
    with file.open("rb") as stream:
        os.fsync(stream.fileno())


def _statements(script: str) -> Iterator[str]:
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 200 else line[:199] + "…"
