"""The file `texts.sqlite` of an index: full-text search in the texts that triggers refer to.

    write_texts(path, triggers)
    searches(path, triggers)                # whether the file is of these triggers
    numbers = texts_with(path, triggers, folded("capital of"))      # which texts may hold it

The search goes by any three characters in a row. A candidate may hold the characters and not the
phrase, so `phrase` decides. The file only makes the search faster: it is always made again from the
triggers where it is missing or belongs to others.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path

from ..core.errors import DamagedError, WorkspaceError
from ..core.files import write_file
from .phrase import folded
from .triggers import Triggers

TEXTS = "texts.sqlite"
"""The file in the folder of an index."""

_FORMAT = "texts 1"


def write_texts(path: Path, triggers: Triggers) -> None:
    """Write the texts of triggers into a file in one step, and which triggers they are of.

    Raises:
        WorkspaceError: when the file cannot be written.
    """

    def write(temporary: Path) -> None:
        with closing(sqlite3.connect(temporary)) as base, base:
            base.execute(
                "CREATE VIRTUAL TABLE texts "
                "USING fts5(text, content='', tokenize='trigram case_sensitive 1')"
            )
            base.executemany(
                "INSERT INTO texts (rowid, text) VALUES (?, ?)",
                ((i, _searchable(folded(text))) for i, text in enumerate(triggers.texts)),
            )
            base.execute("CREATE TABLE made_from (identity TEXT)")
            base.execute("INSERT INTO made_from VALUES (?)", (_identity(triggers),))

    try:
        write_file(path, write)
    except (OSError, sqlite3.Error) as error:
        raise WorkspaceError(
            f"cannot write {path}: {error}. Choose a folder that can be written."
        ) from None


def searches(path: Path, triggers: Triggers) -> bool:
    """Return whether a file exists, can be read, and is of these triggers."""
    if not path.is_file():
        return False
    try:
        with closing(_read(path)) as base:
            rows = base.execute("SELECT identity FROM made_from").fetchall()
    except sqlite3.DatabaseError:
        return False
    return bool(rows == [(_identity(triggers),)])


def texts_with(path: Path, triggers: Triggers, phrase: str) -> Iterable[int]:
    """Return the numbers of the texts that may hold a phrase, given `folded`.

    A phrase of fewer than three characters may be in any text.

    Raises:
        DamagedError: when the file cannot be searched.
    """
    if len(phrase) < 3:
        return range(len(triggers.texts))
    quoted = _searchable(phrase).replace('"', '""')
    try:
        with closing(_read(path)) as base:
            rows = base.execute(
                "SELECT rowid FROM texts WHERE texts MATCH ?", (f'"{quoted}"',)
            ).fetchall()
    except sqlite3.DatabaseError as error:
        raise DamagedError(
            f"cannot search {path}: {error}. Delete it; it is made again from the triggers."
        ) from None
    return [number for (number,) in rows]


def _read(path: Path) -> sqlite3.Connection:
    """Open a file read-only."""
    return sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)


def _identity(triggers: Triggers) -> str:
    """Return a sha256 over the model, the corpus and the texts kept of it."""
    digest = hashlib.sha256(f"{_FORMAT} {triggers.fingerprint} {triggers.corpus}".encode())
    for text in triggers.texts:
        encoded = text.encode()
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.hexdigest()


def _searchable(text: str) -> str:
    """Return a text without zeros: SQLite would stop there."""
    return text.replace("\0", "\ufffd")
