"""Errors of SQLite and of the file system, as errors that say what to do.

with explained(folder):
    connection.execute(...)
"""

from __future__ import annotations

import contextlib
import errno
import sqlite3
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from ..core.errors import DamagedError, FactsmithError, WorkspaceError

FILE = "ledger.db"


def holds_patches(folder: Path) -> bool:
    """Return whether a folder has deltas or copies of records."""
    return any(_has_entries(folder / name) for name in ("deltas", "records"))


def restoring(folder: Path) -> str:
    """Return the advice for a ledger.db that is lost, empty or damaged."""
    backup = f"Restore {folder / FILE} from a backup"
    with contextlib.suppress(OSError):
        if holds_patches(folder):
            has_records = _has_entries(folder / "records")
            what = "`deltas` and `records`" if has_records else "`deltas`"
            patches = "" if has_records else " --patches"
            return (
                f"{backup}. Or build it again: run `factsmith init MODEL NEW` with the same model "
                f"and a new folder, copy {what} from {folder} into it, then run "
                f"`factsmith recover{patches} -w NEW`."
            )
    return f"{backup}."


def _has_entries(folder: Path) -> bool:
    return folder.is_dir() and any(not each.name.startswith(".") for each in folder.iterdir())


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
            f"{folder / FILE} is damaged: it holds text that is not UTF-8. {restoring(folder)}"
        ) from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
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
    if says("locking protocol"):
        raise WorkspaceError(
            f"{folder} is on a disk on which SQLite cannot lock files, as some network disks are: "
            f"{text}. Keep the workspace on a local disk, or mount this one with file locks."
        ) from error
    if says("full") or _is_full(folder):
        raise _disk_full(folder) from error
    if says("readonly", "unable to open", "disk I/O"):
        raise _not_writable(folder, text) from error
    if says("malformed", "not a database", "no such table", "no such column", "duplicate column"):
        raise DamagedError(f"{folder / FILE} is damaged: {text}. {restoring(folder)}") from error
    raise WorkspaceError(f"The ledger in {folder} cannot be used: {text}.") from error


def _is_full(folder: Path) -> bool:
    """Return whether a small file cannot be written for want of space."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(1 << 16))
            file.flush()
    except OSError as error:
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return False


def _disk_full(folder: Path) -> WorkspaceError:
    return WorkspaceError(
        f"The disk is full: nothing was recorded in {folder}. Free some space, then run this again."
    )


def _not_writable(folder: Path, reason: str) -> WorkspaceError:
    return WorkspaceError(f"{folder} cannot be written: {reason}. Make it writable, or use a copy.")
