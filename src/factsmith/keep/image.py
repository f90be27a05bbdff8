"""The committed content of a SQLite file, read as plain bytes: no lock and no other file is needed.

    connection = sqlite3.connect(":memory:")
    connection.deserialize(image(Path("my-workspace/ledger.db")))

SQLite opens a database with a write-ahead log only where it can make files next to it. Otherwise it
can skip the log, and then shows an old state. So this module reads both files and puts the pages of
the log over those of the database, as SQLite does (https://sqlite.org/fileformat2.html#walformat).
A transaction that was not finished is left out.
"""

from __future__ import annotations

import struct
import sys
import time
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ..core.errors import WorkspaceError

_TRIES = 20
_PAUSE = 0.1

_JOURNAL_MAGIC = bytes.fromhex("d9d505f920a163d7")

_LOG_MAGIC = 0x377F0682
"""Of a log with little-endian checksums. One more: with big-endian ones."""

_LOG_FORMAT = 3007000


class _Frame(NamedTuple):
    """One page in a log: its number, the pages of the database after it or 0, and its content."""

    page: int
    n_pages: int
    content: bytes


def image(file: Path) -> bytes:
    """Return the content of a database with all that is committed in its write-ahead log.

    Args:
        file: The database.

    Raises:
        OSError: when a file cannot be read.
        WorkspaceError: when another process keeps writing, or stopped in the middle of a write.
    """
    log_file = file.with_name(f"{file.name}-wal")
    for _ in range(_TRIES):
        log = _content(log_file)
        content = file.read_bytes()
        # A checkpoint writes pages of the log into the database. Where the log stayed the same,
        # these pages are covered by it.
        if log == _content(log_file) and not _is_written(file):
            return _without_log(_joined(content, log))
        time.sleep(_PAUSE)
    raise WorkspaceError(
        f"{file} is being written by another process, or a write was interrupted. Wait until it "
        "has finished. If none is running, open the workspace once where it can be written."
    )


def _content(file: Path) -> bytes:
    return file.read_bytes() if file.exists() else b""


def _is_written(file: Path) -> bool:
    """Return whether a rollback journal says that a write has begun and has not finished."""
    journal = file.with_name(f"{file.name}-journal")
    if not journal.exists():
        return False
    with journal.open("rb") as stream:
        return stream.read(len(_JOURNAL_MAGIC)) == _JOURNAL_MAGIC


def _without_log(content: bytes) -> bytes:
    """Return the content with a header that says that there is no write-ahead log."""
    return content[:18] + b"\x01\x01" + content[20:] if len(content) >= 20 else content


def _joined(content: bytes, log: bytes) -> bytes:
    """Return the content of a database with the committed pages of its log."""
    pages: dict[int, bytes] = {}
    committed: dict[int, bytes] = {}
    n_pages = 0
    for frame in _frames(log):
        pages[frame.page] = frame.content
        if frame.n_pages:
            committed.update(pages)
            pages.clear()
            n_pages = frame.n_pages
    if not n_pages:
        return content
    size = len(next(iter(committed.values())))
    joined = bytearray(content[: n_pages * size].ljust(n_pages * size, b"\0"))
    for page, text in committed.items():
        if page <= n_pages:
            joined[(page - 1) * size : page * size] = text
    return bytes(joined)


def _frames(log: bytes) -> Iterator[_Frame]:
    """Yield the valid frames of a log, up to the first that is torn or of an earlier round."""
    if len(log) < 32:
        return
    magic, version, size, _, *salts, first, second = struct.unpack(">8I", log[:32])
    if magic not in (_LOG_MAGIC, _LOG_MAGIC + 1) or version != _LOG_FORMAT:
        return
    is_big = magic == _LOG_MAGIC + 1
    checksum = _checksum(log[:24], (0, 0), is_big)
    if checksum != (first, second) or size not in {2**power for power in range(9, 17)}:
        return
    for start in range(32, len(log) - size - 23, size + 24):
        head, content = log[start : start + 24], log[start + 24 : start + 24 + size]
        page, n_pages, *frame_salts, first, second = struct.unpack(">6I", head)
        checksum = _checksum(head[:8] + content, checksum, is_big)
        if not page or frame_salts != salts or checksum != (first, second):
            return
        yield _Frame(page, n_pages, content)


def _checksum(content: bytes, before: tuple[int, int], is_big: bool) -> tuple[int, int]:
    """Return the checksum of a log, which goes on from that of the bytes before."""
    words = array("I", content)
    if is_big != (sys.byteorder == "big"):
        words.byteswap()
    first, second = before
    for even, odd in zip(words[::2], words[1::2], strict=True):
        first = (first + even + second) & 0xFFFFFFFF
        second = (second + odd + first) & 0xFFFFFFFF
    return first, second
