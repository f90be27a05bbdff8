"""Connections to a ledger's SQLite file, on any disk, and transactions on them.

    opened = connect(Path("my-workspace/ledger.db"), wait=5.0)
    with transaction(opened.connection):
        opened.connection.execute(...)

A ledger is written with a write-ahead log, so that reading goes on while another process writes.
A network disk has no shared memory for such a log. There the ledger has a rollback journal, and
reading waits for a write. Where the files cannot be opened at all, as on a read-only or a full
disk, the committed content is read as plain bytes (`image`).
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from .image import image


class Opened(NamedTuple):
    """A connection.

    Attributes:
        connection: The connection. Transactions are explicit.
        obstacle: Why nothing can be written. None: it can.
    """

    connection: sqlite3.Connection
    obstacle: Exception | None


def connect(file: Path, wait: float) -> Opened:
    """Open a ledger's file for reading and, if that is possible, for writing.

    Args:
        file: The file. It must exist.
        wait: How many seconds to wait for another process that writes.

    Raises:
        sqlite3.Error: when it is locked, or is not a database.
        OSError: when it cannot be read.
        WorkspaceError: when another process keeps writing to it.
    """
    try:
        connection = _open(file, wait)
    except sqlite3.OperationalError as error:
        if is_locked(error):
            raise
        obstacle: Exception = error
    else:
        can_write = os.access(file, os.W_OK) and os.access(file.parent, os.W_OK)
        return Opened(connection, None if can_write else _denied())
    if _lacks_shared_memory(obstacle):
        with contextlib.suppress(sqlite3.OperationalError):
            leave_log(file, wait)
            return Opened(_open(file, wait), None)
    connection = sqlite3.connect(":memory:", isolation_level=None)
    try:
        connection.deserialize(image(file))
        connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except BaseException:
        connection.close()
        raise
    return Opened(connection, obstacle)


def prepare(file: Path, wait: float) -> sqlite3.Connection:
    """Open a new file for writing, and give it a write-ahead log if its disk can have one.

    Raises:
        sqlite3.Error: when the file cannot be written, or locks cannot be had on its disk.
    """
    connection = _connection(file, wait)
    try:
        # The journal mode cannot change inside a transaction. Some disks refuse a log at this
        # statement, some ignore it, and some refuse the first use of the log. A file with content
        # is somebody's, and stays as it is.
        if not file.stat().st_size and not is_on_network(file):
            connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except sqlite3.OperationalError as error:
        connection.close()
        if is_locked(error):
            raise
        leave_log(file, wait)
        connection = _connection(file, wait)
    except BaseException:
        connection.close()
        raise
    return connection


def leave_log(file: Path, wait: float) -> None:
    """Give a file a rollback journal instead of its write-ahead log, whose content is kept.

    Raises:
        sqlite3.OperationalError: when another process uses it, or it cannot be written.
    """
    with contextlib.closing(_connection(file, wait)) as connection:
        # The one process that has the file needs no shared memory to read the log.
        connection.execute("PRAGMA locking_mode = EXCLUSIVE")
        connection.execute("PRAGMA journal_mode = DELETE")
        connection.execute("SELECT count(*) FROM sqlite_master").fetchone()


def is_locked(error: sqlite3.Error) -> bool:
    """Return whether another process holds a lock."""
    return any(word in str(error) for word in ("is locked", "busy"))


def is_on_network(file: Path) -> bool:
    """Return whether a file is on a network disk, as far as the system says it.

    Several machines share such a disk, and a write-ahead log is for the processes of one.
    """
    try:
        lines = _MOUNTS.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return False
    kinds: dict[str, str] = {}
    for line in lines:
        before, _, after = line.partition(" - ")
        place = re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), before.split(" ")[4])
        kinds[place] = after.split(" ")[0]
    folders = [str(folder) for folder in file.resolve().parents]
    kind = next((kinds[folder] for folder in folders if folder in kinds), "")
    return kind.removeprefix("fuse.") in _NETWORK_DISKS


_MOUNTS = Path("/proc/self/mountinfo")

_NETWORK_DISKS = (
    *("9p", "afs", "beegfs", "ceph", "cifs", "glusterfs", "gpfs", "juicefs", "lustre", "ncpfs"),
    *("nfs", "nfs4", "orangefs", "panfs", "pvfs2", "quobyte", "rclone", "s3fs", "gcsfuse", "smb3"),
    *("smbfs", "sshfs", "weka", "wekafs"),
)


def _open(file: Path, wait: float) -> sqlite3.Connection:
    """Open a file that exists, and read from it."""
    connection = _connection(file, wait)
    try:
        connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except BaseException:
        connection.close()
        raise
    return connection


def _connection(file: Path, wait: float) -> sqlite3.Connection:
    address = f"file:{quote(str(file.resolve()))}?mode=rw"
    connection = sqlite3.connect(address, uri=True, timeout=wait, isolation_level=None)
    # With a rollback journal, FULL does not flush the folder after a commit. EXTRA does.
    connection.execute("PRAGMA synchronous = EXTRA")
    return connection


def _denied() -> PermissionError:
    return PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def _lacks_shared_memory(error: Exception) -> bool:
    """Return whether an error says that a disk has no shared memory for a write-ahead log."""
    names = ("SQLITE_PROTOCOL", "SQLITE_IOERR_SHMMAP", "SQLITE_IOERR_SHMLOCK")
    return "locking protocol" in str(error) or getattr(error, "sqlite_errorname", "") in names


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


def statements(script: str) -> Iterator[str]:
    """Yield the statements of a script, one by one."""
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""
