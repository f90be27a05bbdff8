"""keep.blobs."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import stat
from pathlib import Path

from ..core.files import file_digest
from .revision import Revision


def deltas_of(revision: Revision) -> list[str]:
    """The deltas that a revision names."""
    return [
        delta
        for delta in (revision.delta, *(change.delta for change in revision.changes.values()))
        if delta is not None
    ]


def is_whole(folder: Path) -> bool:
    """Whether a delta's folder is there and holds what its name says."""
    try:
        return folder_digest(folder)[0] == folder.name
    except OSError:
        return False


def remove(entry: Path) -> None:
    """Delete a folder or file if it is there; of a link the link."""
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry)
    else:
        entry.unlink(missing_ok=True)


def folder_digest(folder: Path) -> tuple[str, int]:
    """sha256 over the names and contents of a folder's files, and their size in bytes; names that begin with a dot do not count.

    Raises OSError for what cannot be read, and for links, pipes and devices: what is in a workspace lies in it.
    """
    total = hashlib.sha256()
    size = 0
    if not stat.S_ISDIR(folder.lstat().st_mode):
        raise OSError(errno.EINVAL, "it is no plain folder")
    for file in sorted(entry for entry in folder.iterdir() if not entry.name.startswith(".")):
        held = file.lstat()
        if not stat.S_ISREG(held.st_mode):
            raise OSError(errno.EINVAL, f"{file.name} is no plain file")
        size += held.st_size
        total.update(f"{file.name}\0{file_digest(file)}\n".encode())
    return total.hexdigest(), size


def flush_file(file: Path) -> None:
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
