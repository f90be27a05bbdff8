"""Files that are either the old one or the new one, never half of each."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .errors import InputError, WorkspaceError


def write_file(path: Path, content: bytes | Callable[[Path], object]) -> None:
    """Write a file in one step: to a new one beside it, flushed to disk, then renamed over it. Raises OSError; nothing is left then.

    content: the bytes, or a function that writes them to the path given, for what is too large to hold twice.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        if isinstance(content, bytes):
            with temporary.open("xb") as file:
                file.write(content)
        else:
            content(temporary)
        with temporary.open("r+b") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    flush_folder(path.parent)


def folder_path(folder: str | os.PathLike[str]) -> Path:
    """A folder's name as a path; raises InputError for what is none."""
    if (
        not isinstance(folder, (str, os.PathLike))
        or not os.fspath(folder)
        or "\0" in os.fspath(folder)
    ):
        raise InputError(f"the folder is {folder!r:.60}; expected a path")
    return Path(folder)


def check_writable(folder: str | os.PathLike[str]) -> Path:
    """The folder as a path, if files can be written into it, or it can be made; nothing is left there.

    Raises InputError for what is no path, WorkspaceError for what cannot be written.
    """
    path = folder_path(folder)
    there = path
    try:
        there = next((place for place in (path, *path.absolute().parents) if place.exists()), path)
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        why = "there is a file of that name" if there.is_file() else error.strerror
        raise WorkspaceError(
            f"cannot write into {path}: {why}; choose a folder that can be written"
        ) from None
    return path


def file_digest(path: Path) -> str:
    """sha256 (hex) of a file's content, read piece by piece; raises OSError."""
    content = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            content.update(block)
    return content.hexdigest()


def record_digest(record: Mapping[str, Any]) -> str:
    """sha256 (hex) of JSON-able fields, in whatever order they are."""
    return hashlib.sha256(
        json.dumps(record, sort_keys=True, ensure_ascii=False).encode()
    ).hexdigest()


def flush_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    if (
        os.name == "posix"
    ):  # elsewhere a folder cannot be opened, and renames are durable by themselves
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
