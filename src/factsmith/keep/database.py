"""The SQLite file of a workspace: its model, its revisions, and the one that is checked out.

    database = Database(Path("my-workspace"), wait=5.0)
    with database.writing():                      # the write lock; all of the block, or nothing
        database.append(identity, parent, record)
    with database.reading():                      # several reads that see one moment
        head, current = database.pointers()
        rows = database.rows()

The file has two tables. `workspace` holds one row: the model, its fingerprint, the revision that is
checked out, and a checksum of all of these. `revisions` holds one row for each revision: its place
in the history, its id, the id of its parent, and its record as JSON. Triggers refuse to delete or
change a revision.

Errors of SQLite and of the file system are turned into errors that say what to do (`explained`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ..core.errors import DamagedError, WorkspaceError
from ..core.files import flush_folder, make_folder
from .connection import connect, prepare, snapshot, statements, transaction
from .explained import FILE as FILE
from .explained import explained, holds_patches, restoring

_log = logging.getLogger(__name__)

SCHEMA_VERSION = 3

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
    current      TEXT NOT NULL,
    seal         TEXT NOT NULL
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
""",
    2: "ALTER TABLE workspace ADD COLUMN seal TEXT NOT NULL DEFAULT '';",
}
"""The statements that bring a ledger of each older format to the next one.

In format 1 a column said which patch a revert takes out, and a patch could be reverted only once
and as a whole. Since format 2 the records say it. Since format 3 the workspace's row has a
checksum.
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
        obstacle: Why nothing can be written. None: it can.
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
            with explained(folder):
                check_no_patches(folder)
            raise WorkspaceError(
                f"{folder} is not a workspace: it has no {FILE}. Make one with "
                f"`factsmith init MODEL {folder}`, or in Python with `Workbench(lm, folder)`."
            )
        with explained(folder):
            self.connection, self.obstacle = connect(self.file, wait)
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
            if not (folder / FILE).is_file() or not (folder / FILE).stat().st_size:
                check_no_patches(folder)  # before anything is written
            make_folder(folder)
            make_folder(folder / "deltas")
            # Made here, the file has the permissions of every new file, and SQLite gives its other
            # files the same.
            (folder / FILE).open("ab").close()
            # A crash leaves an empty file, and the workspace can be made again.
            connection = prepare(folder / FILE, wait)
            with contextlib.closing(connection), transaction(connection):
                _check_unused(connection, folder)
                for statement in statements(SCHEMA):
                    connection.execute(statement)
                connection.execute(
                    "INSERT INTO workspace VALUES (1, ?, ?, ?, ?, ?, ?)",
                    (*workspace, current, _seal(workspace, current)),
                )
                connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            flush_folder(folder)

    def close(self) -> None:
        """Close the connection."""
        self.connection.close()

    def settle(self) -> None:
        """Roll back a transaction that an interruption left open."""
        with explained(self.folder):
            if self.connection.in_transaction:
                self.connection.execute("ROLLBACK")

    @property
    def restore(self) -> str:
        """The advice for a damaged file."""
        return restoring(self.folder)

    # ── transactions ──────────────────────────────────────────────────────────────────────────────

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Let every read of a block see the same moment, also while another process writes."""
        with explained(self.folder), snapshot(self.connection):
            yield

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the write lock during a block. All that it writes is recorded, or nothing.

        A ledger of an older format is brought up to date first.

        Raises:
            WorkspaceError: when the workspace cannot be written, or another process holds the lock.
        """
        with explained(self.folder):
            if self.obstacle is not None:
                raise self.obstacle
            with transaction(self.connection):
                self._migrate()
                yield

    # ── reading ───────────────────────────────────────────────────────────────────────────────────

    def workspace(self) -> Workspace:
        """Return the model of the workspace."""
        return self._workspace()[0]

    def pointers(self) -> tuple[str | None, str]:
        """Return the id of the newest revision, if there is one, and what is checked out."""
        with self.reading():
            row = self.connection.execute(
                "SELECT id FROM revisions ORDER BY seq DESC LIMIT 1"
            ).fetchone()
            return row and str(row[0]), self._workspace()[1]

    def _workspace(self) -> tuple[Workspace, str]:
        """Return the model and what is checked out, after a check of the row's checksum."""
        with explained(self.folder):
            (version,) = self.connection.execute("PRAGMA user_version").fetchone()
            columns = self.connection.execute("PRAGMA table_info(workspace)").fetchall()
            has_seal = any(name == "seal" for _, name, *_ in columns)
            seal = "seal" if has_seal else "NULL"
            row = self.connection.execute(
                f"SELECT model, dtype, fingerprint, created, current, {seal} FROM workspace"
            ).fetchone()
        if row is None:
            raise DamagedError(f"{self.file} has lost the row of its model. {self.restore}")
        *texts, stated = row
        is_whole = all(isinstance(text, str) for text in texts) and has_seal == (version >= 3)
        if is_whole and has_seal:
            is_whole = stated == _seal(Workspace(*texts[:4]), texts[4])
        if not is_whole:
            raise DamagedError(
                f"{self.file} is damaged: its row of the model and of what is checked out does not "
                f"match its checksum. {self.restore}"
            )
        return Workspace(*texts[:4]), texts[4]

    def ids(self) -> list[str]:
        """Return the id of every revision, oldest first."""
        with explained(self.folder):
            rows = self.connection.execute("SELECT id FROM revisions ORDER BY seq").fetchall()
        return [str(identity) for (identity,) in rows]

    def rows(self) -> list[Row]:
        """Return every row of the history, oldest first."""
        with explained(self.folder):
            rows = self.connection.execute(
                "SELECT seq, id, parent, record FROM revisions ORDER BY seq"
            ).fetchall()
        if not all(isinstance(number, int) for number, *_ in rows):
            raise DamagedError(f"The revisions in {self.file} have no order. {self.restore}")
        return [Row(number, *map(str, texts)) for number, *texts in rows]

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

    def put_back(self, row: Row) -> None:
        """Insert a lost revision where it was in the history; nothing else is checked out."""
        self.connection.execute(
            "INSERT INTO revisions (seq, id, parent, record) VALUES (?, ?, ?, ?)", row
        )

    def check_out(self, identity: str) -> None:
        """Note which revision is checked out."""
        seal = _seal(self.workspace(), identity)
        self.connection.execute("UPDATE workspace SET current = ?, seal = ?", (identity, seal))
        _log.info("%s: at revision %s", self.folder, identity)

    # ── the format ────────────────────────────────────────────────────────────────────────────────

    def _check_format(self) -> None:
        """Refuse files of other programs and newer formats."""
        (application,) = self.connection.execute("PRAGMA application_id").fetchone()
        (version,) = self.connection.execute("PRAGMA user_version").fetchone()
        if application != APPLICATION_ID:
            other = "Or make a workspace in another folder with `factsmith init MODEL FOLDER`."
            raise WorkspaceError(
                f"{self.file} is empty or was not made by factsmith. {self.restore}"
                f"{'' if holds_patches(self.folder) else ' ' + other}"
            )
        if not 1 <= version <= SCHEMA_VERSION:
            raise WorkspaceError(
                f"{self.folder} has ledger format {version}, and this factsmith reads formats 1 to "
                f"{SCHEMA_VERSION}. Upgrade factsmith with `pip install -U factsmith`."
            )

    def _migrate(self) -> None:
        """Bring an older format up to date, under the lock."""
        (version,) = self.connection.execute("PRAGMA user_version").fetchone()
        if version >= SCHEMA_VERSION:
            return
        workspace, current = self._workspace()
        while version < SCHEMA_VERSION:
            for statement in statements(MIGRATIONS[version]):
                self.connection.execute(statement)
            version += 1
            self.connection.execute(f"PRAGMA user_version = {version}")
        self.connection.execute("UPDATE workspace SET seal = ?", (_seal(workspace, current),))


def _seal(workspace: Workspace, current: str) -> str:
    """Return the sha256 (hex) of what the workspace's row says."""
    return hashlib.sha256(json.dumps([*workspace, current]).encode()).hexdigest()


def check_no_patches(folder: Path) -> None:
    """Check that a folder without a ledger has no patches either. Raises WorkspaceError."""
    if holds_patches(folder):
        raise WorkspaceError(f"{folder} holds patches but no ledger. {restoring(folder)}")


def _check_unused(connection: sqlite3.Connection, folder: Path) -> None:
    if connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
        raise WorkspaceError(
            f"{folder} already holds a ledger. Open it as it is, or choose another folder."
        )
    check_no_patches(folder)
