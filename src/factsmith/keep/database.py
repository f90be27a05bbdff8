"""keep.database."""

from __future__ import annotations

import contextlib
import errno
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn
from urllib.parse import quote

from ..core.errors import DamagedError, FactsmithError, WorkspaceError

SCHEMA_VERSION = 2

APPLICATION_ID = 0x46435453  # "FCTS" in the file's header, so that another program's ledger.db is not taken for ours

_HISTORY = """
CREATE TABLE revisions (
    seq      INTEGER PRIMARY KEY,
    id       TEXT NOT NULL UNIQUE,
    parent   TEXT NOT NULL UNIQUE,
    record   TEXT NOT NULL
);
CREATE TRIGGER revisions_keep BEFORE DELETE ON revisions BEGIN SELECT RAISE(ABORT, 'history is appended, never rewritten'); END;
CREATE TRIGGER revisions_stay BEFORE UPDATE ON revisions BEGIN SELECT RAISE(ABORT, 'history is appended, never rewritten'); END;
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
"""What brings a ledger of a format to the next. 1: a patch could be taken out once, whole, and by a column; now records say all of it."""


def open_database(file: Path, wait: float) -> tuple[sqlite3.Connection, bool]:
    """A connection, and whether it can write."""
    db = sqlite3.connect(
        f"file:{quote(str(file.resolve()))}?mode=rw", uri=True, timeout=wait, isolation_level=None
    )
    try:
        db.execute("PRAGMA synchronous = FULL")
        db.execute("SELECT count(*) FROM sqlite_master").fetchone()
        return db, os.access(file, os.W_OK) and os.access(file.parent, os.W_OK)
    except sqlite3.OperationalError as error:
        db.close()
        if not any(word in str(error) for word in ("readonly", "unable to open")) or os.access(
            file.parent, os.W_OK
        ):
            raise
    # A write-ahead-log database in a folder that cannot be written: no one can be writing to it, so it can be read as it lies.
    return sqlite3.connect(
        f"file:{quote(str(file.resolve()))}?immutable=1",
        uri=True,
        timeout=wait,
        isolation_level=None,
    ), False


@contextlib.contextmanager
def transaction(db: sqlite3.Connection) -> Iterator[None]:
    """Hold the write lock; all of the block is recorded, or none of it."""
    try:  # from before it begins: a Ctrl-C between the two would leave it open, and the lock held
        db.execute("BEGIN IMMEDIATE")
        yield
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


@contextlib.contextmanager
def snapshot(db: sqlite3.Connection) -> Iterator[None]:
    """Let several reads see one moment, also while another process writes."""
    if db.in_transaction:
        yield
        return
    try:
        db.execute("BEGIN")
        yield
    finally:
        if db.in_transaction:
            db.execute("ROLLBACK")


@contextlib.contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Turn what SQLite and the file system report into errors of ours that say what to do."""
    try:
        yield
    except FactsmithError:
        raise
    except sqlite3.Error as error:
        _explain_database(error, folder)
    except UnicodeDecodeError:  # of a text in the database, or of SQLite's own message about it
        raise DamagedError(
            f"{folder / 'ledger.db'} is damaged (a text in it is none); restore it from a backup"
        ) from None
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise WorkspaceError(
                f"the disk is full: nothing was recorded in {folder}; free some space and run this again"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise WorkspaceError(
                f"{folder} cannot be written ({error.strerror}); make it writable, or use a copy of it"
            ) from error
        raise WorkspaceError(f"cannot write to {folder}: {error.strerror or error}") from error


def _explain_database(error: sqlite3.Error, folder: Path) -> NoReturn:
    text = str(error)
    if "locked" in text or "busy" in text:
        raise WorkspaceError(
            f"another process is writing to {folder}; nothing was recorded; wait for it to finish and run this again"
        ) from error
    if "full" in text:
        raise WorkspaceError(
            f"the disk is full: nothing was recorded in {folder}; free some space and run this again"
        ) from error
    if "readonly" in text or "unable to open" in text or "disk I/O" in text:
        raise WorkspaceError(
            f"{folder} cannot be written ({text}); make it writable, or use a copy of it"
        ) from error
    if (
        "malformed" in text
        or "not a database" in text
        or "no such table" in text
        or "no such column" in text
    ):
        raise DamagedError(
            f"{folder / 'ledger.db'} is damaged ({text}); restore it from a backup"
        ) from error
    raise WorkspaceError(f"the ledger in {folder} refused: {text}") from error


def statements(script: str) -> Iterator[str]:
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""
