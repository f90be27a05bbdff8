"""The delta folders of a workspace, each named by the sha256 of its content.

    blobs = Blobs(workspace / "deltas")
    blob = blobs.add(delta.save)          # writes, flushes, renames into place
    blobs.check(blob.digest)              # raises DamagedError when a file is missing or changed
    blobs.remove(blobs.loose(named))      # everything that no revision names

A new delta is written into a folder whose name begins with ".staging-", flushed to disk, and only
then renamed to its sha256. So a folder that is named by a sha256 holds a whole delta. A process
that dies leaves a staging folder at most; the next one that writes removes it.
"""

from __future__ import annotations

import errno
import hashlib
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NamedTuple

from ..core.errors import DamagedError
from ..core.files import file_digest, flush_folder, make_folder, settle_folder

_STAGING = ".staging-"

_SHA256 = re.compile(r"[0-9a-f]{64}")


class Blob(NamedTuple):
    """A delta in the workspace.

    Attributes:
        digest: The sha256 (hex) over the names and contents of its files.
        n_bytes: The size of its files.
    """

    digest: str
    n_bytes: int


class Blobs:
    """The delta folders of a workspace.

    `add` and `remove` may be called only while the workspace's write lock is held.

    Attributes:
        folder: The folder that holds the delta folders.
        new: The folders that were added.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.new: list[Path] = []

    def path(self, digest: str) -> Path:
        """Return the folder of a delta, whether it exists or not."""
        return self.folder / digest

    def add(self, write: Callable[[Path], object]) -> Blob:
        """Store a delta. If its folder exists already and is damaged, the new one replaces it.

        Args:
            write: Writes the delta's files into the folder it is given, such as `delta.save`.

        Raises:
            OSError: when something cannot be written. Nothing is left then.
        """
        make_folder(self.folder)
        for leftover in self.folder.glob(f"{_STAGING}*"):  # of a process that died
            shutil.rmtree(leftover, ignore_errors=True)
        staging = self.folder / f"{_STAGING}{secrets.token_hex(8)}"
        try:
            write(staging)
            settle_folder(staging)
            blob = folder_blob(staging)
            target = self.path(blob.digest)
            if not self._is_whole(blob.digest):
                if not target.exists():
                    self.new.append(target)
                remove(target)
                staging.rename(target)
                flush_folder(self.folder)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        return blob

    def check(self, digest: str) -> Blob:
        """Check that a delta is whole, and return it.

        Raises:
            DamagedError: when its folder is missing, cannot be read or holds other content.
        """
        folder = self.path(digest)
        try:
            if not folder.exists() and not folder.is_symlink():
                raise DamagedError(f"{folder} is missing")
            blob = folder_blob(folder)
        except OSError as error:
            raise DamagedError(f"{folder} cannot be read: {error.strerror}") from None
        if blob.digest != digest:
            raise DamagedError(f"{folder} has other content, with sha256 {blob.digest[:10]}")
        return blob

    def digests(self) -> list[str]:
        """Return the names of all delta folders, in order."""
        return [entry.name for entry in self._entries() if _SHA256.fullmatch(entry.name)]

    def loose(self, named: Collection[str]) -> list[Path]:
        """Return the delta folders that are not among the named ones, and all staging folders."""
        return [
            entry
            for entry in self._entries()
            if entry.name.startswith(_STAGING)
            or (_SHA256.fullmatch(entry.name) and entry.name not in named)
        ]

    def remove(self, entries: Collection[Path]) -> None:
        """Delete delta folders. Raises OSError."""
        for entry in entries:
            remove(entry)
        if entries:
            flush_folder(self.folder)

    def _entries(self) -> list[Path]:
        return sorted(self.folder.iterdir()) if self.folder.is_dir() else []

    def _is_whole(self, digest: str) -> bool:
        try:
            return folder_blob(self.path(digest)).digest == digest
        except OSError:
            return False


def folder_blob(folder: Path) -> Blob:
    """Compute the sha256 and the size of a folder's files; names that begin with a dot are skipped.

    Raises:
        OSError: when something cannot be read, or is a link, a pipe, a device or a folder: every
            file of a workspace must lie in it.
    """
    total = hashlib.sha256()
    n_bytes = 0
    if not stat.S_ISDIR(folder.lstat().st_mode):
        raise OSError(errno.EINVAL, "it is a link or a file, where a folder is expected")
    for file in sorted(entry for entry in folder.iterdir() if not entry.name.startswith(".")):
        status = file.lstat()
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, f"{file.name} is not a regular file")
        n_bytes += status.st_size
        total.update(f"{file.name}\0{file_digest(file)}\n".encode())
    return Blob(total.hexdigest(), n_bytes)


def remove(entry: Path) -> None:
    """Delete a folder or a file, if there is one. Of a link, delete the link alone."""
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry)
    else:
        entry.unlink(missing_ok=True)
