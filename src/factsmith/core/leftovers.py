"""Hidden folders of exports: who holds one, and which of them a dead process left.

    with held(parent, "my-adapter", WRITING) as staging:
        ...                                        # no other process removes it meanwhile
    remove_leftovers(parent)                       # those that nobody holds

A folder is held by a lock of the kernel on the folder itself, which ends with its process, however
that ends. The name says on which machine it is held: locks of other machines cannot be seen. Where
a lock cannot be had or seen, a folder counts as left once nothing in it changed for a week.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import re
import secrets
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

WRITING = "writing"
"""A new export that is not yet whole."""

OLDER = "older"
"""An earlier export that is being replaced."""

_NAME = re.compile(
    r"\.(?P<target>.+)\.(?P<kind>writing|older)-(?P<machine>[0-9a-f]{8}|unlocked)-[0-9a-f]{16}"
)

_SECONDS = 7 * 24 * 3600.0


@contextlib.contextmanager
def held(parent: Path, target: str, kind: str, *, source: Path | None = None) -> Iterator[Path]:
    """Yield a hidden folder that this process holds. It may be gone at the end of the block.

    Args:
        parent: The folder to make it in, which is made if it is missing.
        target: The name of the folder that is exported.
        kind: WRITING or OLDER.
        source: A folder to rename. None: a new folder is made.

    Raises:
        OSError: when it cannot be made.
    """
    folder, lock = _taken(parent, target, kind, source)
    try:
        yield folder
    finally:
        if lock is not None:
            os.close(lock)


def remove_leftovers(parent: Path) -> tuple[str, ...]:
    """Remove the hidden folders in a folder that no process holds, and return their names.

    An earlier export that was moved aside is put back if its place is empty.
    """
    return tuple(entry.name for entry in leftovers(parent) if _removed(entry))


def leftovers(parent: Path) -> list[Path]:
    """Return the hidden folders in a folder that no process holds."""
    try:
        entries = sorted(entry for entry in parent.iterdir() if entry.name.startswith("."))
    except OSError:
        return []
    return [entry for entry in entries if _is_left(entry)]


def _taken(parent: Path, target: str, kind: str, source: Path | None) -> tuple[Path, int | None]:
    """Make or rename a folder and lock it: return it, and the lock if the disk has locks."""
    for _ in range(10):
        folder = _named(parent, target, kind, _machine())
        if source is None:
            folder.mkdir(parents=True)
        else:
            source.rename(folder)
        lock, is_free = _lock(folder)
        if lock is None and is_free:
            unlocked = _named(parent, target, kind, "unlocked")
            folder.rename(unlocked)
            return unlocked, None
        if lock is not None and folder.is_dir():
            return folder, lock
        # Another process took it for a leftover before it was locked.
        if lock is not None:
            os.close(lock)
    raise OSError(f"{parent} is being cleaned up by another process")


def _named(parent: Path, target: str, kind: str, machine: str) -> Path:
    return parent / f".{target}.{kind}-{machine}-{secrets.token_hex(8)}"


def _is_left(folder: Path) -> bool:
    match = _NAME.fullmatch(folder.name)
    if match is None or folder.is_symlink() or not folder.is_dir():
        return False
    if match["machine"] != _machine():
        return _is_old(folder)
    lock, _ = _lock(folder)
    if lock is not None:
        os.close(lock)
    return lock is not None


def _removed(folder: Path) -> bool:
    """Remove a leftover while it is locked; return whether it is gone."""
    match = _NAME.fullmatch(folder.name)
    lock, is_free = _lock(folder)
    if not is_free:
        return False
    try:
        target = folder.with_name(match["target"]) if match and match["kind"] == OLDER else None
        if target is not None and not target.exists():
            with contextlib.suppress(OSError):
                folder.rename(target)
        else:
            shutil.rmtree(folder, ignore_errors=True)
        return not folder.exists()
    finally:
        if lock is not None:
            os.close(lock)


def _is_old(folder: Path) -> bool:
    """Return whether nothing in a folder changed for a week."""
    try:
        changed = max(entry.lstat().st_mtime for entry in (folder, *folder.rglob("*")))
    except OSError:
        return False
    return time.time() - changed > _SECONDS


def _lock(folder: Path) -> tuple[int | None, bool]:
    """Lock a folder: return the lock, if there is one, and whether no other process holds it."""
    if sys.platform == "win32":
        return None, True
    import fcntl

    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return None, False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        return None, not isinstance(error, BlockingIOError)
    return descriptor, True


def _machine() -> str:
    """Return 8 hex digits for the machine since it was started: what sees one another's locks."""
    try:
        start = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
    except OSError:
        start = platform.node()
    return hashlib.sha256(start.encode()).hexdigest()[:8]
