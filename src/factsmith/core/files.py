"""Files and folders: written in one step, checked before work begins, named by their content.

write_file(Path("delta.safetensors"), lambda path: save_file(tensors, path))
check_writable("workspace")
file_digest(Path("delta.safetensors"))      sha256 in hex
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import stat
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .errors import InputError, WorkspaceError


def write_file(path: Path, content: bytes | Callable[[Path], object]) -> None:
    """Write a file in one step: it has the old content or the new, never half of each.

    The content goes to a new file in the same folder, is flushed to disk, and is renamed over the
    old file. The file has the permissions of every new file (the umask).

    Args:
        path: The file.
        content: The bytes, or a function that writes them to a path: for content that is too large
            to hold twice. At that path is an empty file.
    Raises:
        OSError: when the file cannot be written; the old file is left unchanged.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with temporary.open("xb") as file:
            mode = os.fstat(file.fileno()).st_mode
            if isinstance(content, bytes):
                file.write(content)
        if not isinstance(content, bytes):
            content(temporary)
        _settle_file(temporary, mode)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    flush_folder(path.parent)


def settle_folder(folder: Path) -> None:
    """Make all files of a folder durable, with the permissions of every new file (the umask).

    Libraries that write a file under another name and rename it leave files that no colleague can
    read.

    Raises:
        OSError: when something cannot be written.
    """
    probe = folder / f".{secrets.token_hex(8)}"
    try:
        with probe.open("xb") as file:
            mode = os.fstat(file.fileno()).st_mode
    finally:
        probe.unlink(missing_ok=True)
    entries = [entry for entry in folder.rglob("*") if not entry.is_symlink()]
    for entry in entries:
        if entry.is_file():
            _settle_file(entry, mode)
    for entry in (*filter(Path.is_dir, entries), folder):
        flush_folder(entry)


def _settle_file(file: Path, mode: int) -> None:
    """Give a file the permissions of a new one, and flush it to disk."""
    with file.open("r+b") as stream:
        if os.name == "posix":
            os.fchmod(stream.fileno(), stat.S_IMODE(mode))
        os.fsync(stream.fileno())


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, if they are missing, and flush their names to disk.

    Raises:
        OSError: when one cannot be made.
    """
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for each in reversed(missing):
        flush_folder(each.parent)


def folder_path(folder: str | os.PathLike[str]) -> Path:
    """Return a folder as a path.

    Raises:
        InputError: when the folder is not a path.
    """
    if (
        not isinstance(folder, (str, os.PathLike))
        or not os.fspath(folder)
        or "\0" in os.fspath(folder)
    ):
        raise InputError(f"the folder is {folder!r:.60}; expected a path", argument="folder")
    return Path(folder)


def check_writable(folder: str | os.PathLike[str]) -> Path:
    """Return a folder as a path, after a check that it can be written, or made. It stays as it was.

    Raises:
        InputError: when the folder is not a path.
        WorkspaceError: when it cannot be written.
    """
    path = folder_path(folder)
    nearest = path
    try:
        ancestors = (path, *path.absolute().parents)
        nearest = next((place for place in ancestors if place.exists()), path)
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        why = "there is a file of that name" if nearest.is_file() else error.strerror
        raise WorkspaceError(
            f"cannot write into {path}: {why}; choose a folder that can be written"
        ) from None
    return path


def file_digest(path: Path) -> str:
    """Return the sha256 (hex) of a file's content, read piece by piece; raises OSError."""
    content = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            content.update(block)
    return content.hexdigest()


def record_digest(record: Mapping[str, Any]) -> str:
    """Return the sha256 (hex) of JSON-able fields, whatever their order."""
    return hashlib.sha256(
        json.dumps(record, sort_keys=True, ensure_ascii=False).encode()
    ).hexdigest()


def flush_folder(folder: Path) -> None:
    """Make renames in a folder durable. Only POSIX systems need it, and only they allow it.

    Some network disks cannot flush a folder, and a folder above a workspace may be unreadable.
    Neither is an error.
    """
    if os.name != "posix":
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)
