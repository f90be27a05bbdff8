"""The SQLite file of a workspace: its model, its revisions, and the one that is checked out.

    database = Database(Path("my-workspace"), wait=5.0)
    with database.writing():                      # the write lock; all of the block, or nothing
        database.append(identity, parent, record)
    with database.reading():                      # several reads that see one moment
        head, current = database.pointers()
        rows = database.rows()

The file has two tables. `workspace` holds one row: the model, its fingerprint, and the revision
that is checked out. `revisions` holds one row for each revision: its place in the history, its id,
the id of its parent, and its record as JSON. Triggers refuse to delete or change a revision.

Errors of SQLite and of the file system are turned into errors that say what to do (`explained`).
"""

from __future__ import annotations

import contextlib
import errno
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, NoReturn
from urllib.parse import quote

from ..core.errors import DamagedError, FactsmithError, WorkspaceError
from ..core.files import flush_folder

FILE = "ledger.db"

SCHEMA_VERSION = 2

APPLICATION_ID = 0x46435453
"""In the file's header, "FCTS": it tells the file from another program's ledger.db."""

_REFUSE = "BEGIN SELECT RAISE(ABORT, 'history is appended, never rewritten'); END;"

_HISTORY = f"""
CREATE TABLE revisions (
    seq      INTEGER PRIMARY KEY,
    id       TEXT NOT NULL UNIQUE,
    parent   TEXT NOT NULL UNIQUE,
    record   TEXT NOT NULL
);
CREATE TRIGGER revisions_keep BEFORE DELETE ON revisions {_REFUSE}
CREATE TRIGGER revisions_stay BEFORE UPDATE ON revisions {_REFUSE}
"""

SCHEMA = (
    """
CREATE TABLE workspace (
    one          INTEGER PRIMARY KEY CHECK (one = 1),
    model        TEXT NOT NULL,
    dtype        TEXT NOT NULL,
    fingerprint  TEXT NOT NULL,
    created      TEXT NOT NULL,
    current      TEXT NOT NULL
);
"""
    + _HISTORY
)

MIGRATIONS = {
    1: f"""
ALTER TABLE revisions RENAME TO older;
DROP TRIGGER revisions_keep;
DROP TRIGGER revisions_stay;
{_HISTORY}
INSERT INTO revisions SELECT seq, id, parent, record FROM older ORDER BY seq;
DROP TABLE older;
"""
}
"""The statements that bring a ledger of each older format to the next one.

In format 1 a column said which patch a revert takes out, and a patch could be reverted only once
and as a whole. Since format 2 the records say it.
"""


class Workspace(NamedTuple):
    """The model of a workspace.

    Attributes:
        model: The name or path that the model is loaded from.
        dtype: The dtype it is loaded in, such as "float32".
        fingerprint: The sha256 (hex) of the model before any patch.
        created: The UTC time at which the workspace was made, in ISO 8601.
    """

    model: str
    dtype: str
    fingerprint: str
    created: str


class Row(NamedTuple):
    """One row of the history.

    Attributes:
        number: Its place; the first row has number 1.
        id: The sha256 (hex) of the record, as the row says.
        parent: The id of the row before it, as the row says.
        record: The record, as JSON text.
    """

    number: int
    id: str
    parent: str
    record: str


class Database:
    """An open ledger.db.

    Attributes:
        folder: The workspace.
        file: The SQLite file in it.
        connection: The connection to SQLite.
        writable: Whether file and folder can be written.
    """

    def __init__(self, folder: Path, wait: float) -> None:
        """Open the file; `wait` is how many seconds to wait for another process that writes.

        Raises:
            WorkspaceError: when it is missing, locked, unreadable, or not a ledger of a known
                format.
            DamagedError: when it is broken.
        """
        self.folder, self.file = folder, folder / FILE
        if not self.file.is_file():
            raise WorkspaceError(
                f"{folder} is not a workspace: it has no {FILE}. Make one with "
                f"`Workbench(lm, folder)`, or with `factsmith init MODEL {folder}`."
            )
        with explained(folder):
            self.connection, self.writable = _connect(self.file, wait)
        try:
            with explained(folder):
                self._check_format()
        except BaseException:
            self.close()
            raise

    @classmethod
    def create(cls, folder: Path, workspace: Workspace, current: str, wait: float) -> None:
        """Write a new ledger.db into a folder, without any revision.

        Args:
            folder: The workspace. It is made if there is no such folder.
            workspace: The model.
            current: What is checked out.
            wait: How many seconds to wait for another process that writes.

        Raises:
            WorkspaceError: when the folder holds a ledger or deltas already, or cannot be written.
        """
        with explained(folder):
            (folder / "deltas").mkdir(parents=True, exist_ok=True)
            connection = sqlite3.connect(folder / FILE, timeout=wait, isolation_level=None)
            with contextlib.closing(connection):
                # The journal mode cannot change inside a transaction. Everything else happens in
                # one, so a crash leaves an empty file, and the workspace can be made again.
                connection.execute("PRAGMA journal_mode = WAL")
                connection.execute("PRAGMA synchronous = FULL")
                with transaction(connection):
                    _check_unused(connection, folder)
                    for statement in _statements(SCHEMA):
                        connection.execute(statement)
                    connection.execute(
                        "INSERT INTO workspace VALUES (1, ?, ?, ?, ?, ?)",
                        (*workspace, current),
                    )
                    connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                    connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            flush_folder(folder)

    def close(self) -> None:
        """Close the connection."""
        self.connection.close()

    @property
    def restore(self) -> str:
        """The advice for a damaged file."""
        return f"Restore {self.file} from a backup."

    # ── transactions ──────────────────────────────────────────────────────────────────────────────

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Let every read of a block see the same moment, also while another process writes."""
        with explained(self.folder), snapshot(self.connection):
            yield

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the write lock during a block. All that it writes is recorded, or nothing.

        Raises:
            WorkspaceError: when the workspace cannot be written, or another process holds the lock.
        """
        with explained(self.folder):
            if not self.writable:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            with transaction(self.connection):
                yield

    # ── reading ───────────────────────────────────────────────────────────────────────────────────

    def workspace(self) -> Workspace:
        """Return the model of the workspace."""
        with explained(self.folder):
            row = self.connection.execute(
                "SELECT model, dtype, fingerprint, created FROM workspace"
            ).fetchone()
        if row is None:
            raise DamagedError(f"{self.file} has lost the row of its model. {self.restore}")
        return Workspace(*map(str, row))

    def pointers(self) -> tuple[str | None, str]:
        """Return the id of the newest revision, if there is one, and what is checked out."""
        with explained(self.folder):
            row = self.connection.execute(
                "SELECT (SELECT id FROM revisions ORDER BY seq DESC LIMIT 1), current "
                "FROM workspace"
            ).fetchone()
        if row is None or not isinstance(row[1], str):
            raise DamagedError(
                f"{self.file} does not say which revision is checked out. {self.restore}"
            )
        return row[0] and str(row[0]), row[1]

    def rows(self) -> list[Row]:
        """Return every row of the history, oldest first."""
        with explained(self.folder):
            rows = self.connection.execute(
                "SELECT seq, id, parent, record FROM revisions ORDER BY seq"
            ).fetchall()
        if not all(isinstance(number, int) for number, *_ in rows):
            raise DamagedError(f"The revisions in {self.file} have no order. {self.restore}")
        return [Row(number, *map(str, texts)) for number, *texts in rows]

    def number(self, identity: str) -> int | None:
        """Return the place of a revision in the history; None if there is no such revision."""
        with explained(self.folder):
            row = self.connection.execute(
                "SELECT seq FROM revisions WHERE id = ?", (identity,)
            ).fetchone()
        return row[0] if row is not None and isinstance(row[0], int) else None

    def ids_from(self, prefix: str) -> list[str]:
        """Return the ids that begin with some hex digits."""
        with explained(self.folder):
            rows = self.connection.execute(
                "SELECT id FROM revisions WHERE substr(id, 1, ?) = ?", (len(prefix), prefix)
            ).fetchall()
        return [str(identity) for (identity,) in rows]

    def check(self) -> None:
        """Let SQLite check the whole file. Raises DamagedError."""
        with explained(self.folder):
            (result,) = self.connection.execute("PRAGMA integrity_check(1)").fetchone()
        if result != "ok":
            raise DamagedError(f"{self.file} is damaged: {result}. {self.restore}")

    # ── writing, inside of `writing` ──────────────────────────────────────────────────────────────

    def append(self, identity: str, parent: str, record: str) -> None:
        """Add a revision to the history, and check it out."""
        self.connection.execute(
            "INSERT INTO revisions (id, parent, record) VALUES (?, ?, ?)",
            (identity, parent, record),
        )
        self.check_out(identity)

    def check_out(self, identity: str) -> None:
        """Note which revision is checked out."""
        self.connection.execute("UPDATE workspace SET current = ?", (identity,))

    # ── the format ────────────────────────────────────────────────────────────────────────────────

    def _check_format(self) -> None:
        """Refuse files of other programs and newer formats; bring an older format up to date."""
        (application,) = self.connection.execute("PRAGMA application_id").fetchone()
        (version,) = self.connection.execute("PRAGMA user_version").fetchone()
        if application != APPLICATION_ID:
            raise WorkspaceError(
                f"{self.file} is empty or was not made by factsmith. Put it back from a copy, or "
                "make a workspace in another folder with `factsmith init MODEL FOLDER`."
            )
        if not 1 <= version <= SCHEMA_VERSION:
            raise WorkspaceError(
                f"{self.folder} has ledger format {version}, and this factsmith reads formats 1 to "
                f"{SCHEMA_VERSION}. Upgrade factsmith with `pip install -U factsmith`."
            )
        # A ledger that cannot be written stays at its format, and can be read all the same.
        if version < SCHEMA_VERSION and self.writable:
            with transaction(self.connection):
                self._migrate()

    def _migrate(self) -> None:
        # Read again, under the lock: another process may have done it in the meantime.
        (version,) = self.connection.execute("PRAGMA user_version").fetchone()
        while version < SCHEMA_VERSION:
            for statement in _statements(MIGRATIONS[version]):
                self.connection.execute(statement)
            version += 1
            self.connection.execute(f"PRAGMA user_version = {version}")


# ── connections and transactions ──────────────────────────────────────────────────────────────────


def _connect(file: Path, wait: float) -> tuple[sqlite3.Connection, bool]:
    """Open a connection; the second value says whether it can write."""
    address = f"file:{quote(str(file.resolve()))}"
    connection = sqlite3.connect(f"{address}?mode=rw", uri=True, timeout=wait, isolation_level=None)
    can_write_folder = os.access(file.parent, os.W_OK)
    try:
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        return connection, os.access(file, os.W_OK) and can_write_folder
    except sqlite3.OperationalError as error:
        connection.close()
        is_denied = any(word in str(error) for word in ("readonly", "unable to open"))
        if can_write_folder or not is_denied:
            raise
    # SQLite cannot open a write-ahead log in a folder that cannot be written. But then nobody is
    # writing, so the file can be read without the log.
    return sqlite3.connect(
        f"{address}?immutable=1", uri=True, timeout=wait, isolation_level=None
    ), False


def _check_unused(connection: sqlite3.Connection, folder: Path) -> None:
    if connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
        raise WorkspaceError(
            f"{folder} already holds a ledger. Open it as it is, or choose another folder."
        )
    if any(not entry.name.startswith(".") for entry in (folder / "deltas").iterdir()):
        raise WorkspaceError(
            f"{folder} holds patches but no ledger. Put {FILE} back from a copy, or choose another "
            "folder."
        )


@contextlib.contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """Hold the write lock during a block. All that it writes is recorded, or nothing."""
    # BEGIN is inside the `try`: a Ctrl-C right after it must not leave the lock held.
    try:
        connection.execute("BEGIN IMMEDIATE")
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


@contextlib.contextmanager
def snapshot(connection: sqlite3.Connection) -> Iterator[None]:
    """Let every read of a block see the same moment, also while another process writes."""
    if connection.in_transaction:
        yield
        return
    try:
        connection.execute("BEGIN")
        yield
    finally:
        if connection.in_transaction:
            connection.execute("ROLLBACK")


def _statements(script: str) -> Iterator[str]:
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""


# ── errors ────────────────────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Turn errors of SQLite and of the file system into errors that say what to do.

    Raises:
        WorkspaceError: when the workspace is locked, cannot be written, or the disk is full.
        DamagedError: when the database is broken.
    """
    try:
        yield
    except FactsmithError:
        raise
    except sqlite3.Error as error:
        _explain_database(error, folder)
    except UnicodeDecodeError:  # in a text of the database, or in SQLite's own message about it
        raise DamagedError(
            f"{folder / FILE} is damaged: it holds text that is not UTF-8. Restore it from a "
            "backup."
        ) from None
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise _disk_full(folder) from error
        reason = error.strerror or str(error)
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise _not_writable(folder, reason) from error
        raise WorkspaceError(
            f"Cannot write to {folder}: {reason}. Check the folder and its disk, then run this "
            "again."
        ) from error


def _explain_database(error: sqlite3.Error, folder: Path) -> NoReturn:
    text = str(error)

    def says(*words: str) -> bool:
        return any(word in text for word in words)

    if says("locked", "busy"):
        raise WorkspaceError(
            f"{folder} is locked: another process is writing to it, and nothing was recorded. Wait "
            "until it has finished, then run this again."
        ) from error
    if says("full"):
        raise _disk_full(folder) from error
    if says("readonly", "unable to open", "disk I/O"):
        raise _not_writable(folder, text) from error
    if says("malformed", "not a database", "no such table", "no such column"):
        raise DamagedError(
            f"{folder / FILE} is damaged: {text}. Restore it from a backup."
        ) from error
    raise WorkspaceError(f"The ledger in {folder} cannot be used: {text}.") from error


def _disk_full(folder: Path) -> WorkspaceError:
    return WorkspaceError(
        f"The disk is full: nothing was recorded in {folder}. Free some space, then run this again."
    )


def _not_writable(folder: Path, reason: str) -> WorkspaceError:
    return WorkspaceError(f"{folder} cannot be written: {reason}. Make it writable, or use a copy.")
