"""The records of a workspace, read from its database and checked.

    records = Records(database)
    records.resolve("0a8b")                 # the full id of the revision that begins with it
    records.history("latest")               # every revision, as seen from the newest
    entries, number = records.read("base")  # the same before it is replayed (`history`)

Each record is parsed once for as long as the ledger is open: records never change. The chain of
hashes is checked whenever the records are read.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterator, Sequence

from ..core.errors import DamagedError, RevisionError
from ..core.explain import short
from .database import Database, Row
from .history import Entry, check_chain, read_entry, seen_from
from .revision import BASE, LATEST, Revision

_PREFIX = re.compile(r"[0-9a-f]{4,64}")


class Records:
    """The records in a database, each read and checked once."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._entries: dict[Row, Entry] = {}

    @property
    def head(self) -> str:
        """The id of the newest revision, or "base"."""
        return self._database.pointers()[0] or BASE

    @property
    def current(self) -> str:
        """The id of the revision that is checked out, or "base"."""
        return self._database.pointers()[1]

    def resolve(self, reference: str) -> str:
        """Return the full id of a revision, or "base".

        Args:
            reference: An id, a unique prefix of at least four digits, "latest" or "base".

        Raises:
            RevisionError: when there is no such revision, or more than one.
        """
        if reference == BASE:
            return BASE
        if reference == LATEST:
            return self.head
        if not _PREFIX.fullmatch(reference):
            raise RevisionError(
                f"{short(reference)} names no revision. Give `base`, `latest`, or at least four "
                "hex digits of an id from `factsmith log`."
            )
        matches = [each for each in self._database.ids() if each.startswith(reference)]
        if not matches:
            raise RevisionError(
                f"No revision has an id that begins with {short(reference)}. `factsmith log` lists "
                "the revisions."
            )
        if len(matches) > 1:
            raise RevisionError(
                f"{reference!r} is ambiguous: {', '.join(each[:12] for each in matches)} begin "
                "with it. Give more digits."
            )
        return matches[0]

    def read(self, reference: str | None = None) -> tuple[list[Entry], int]:
        """Return every entry, oldest first, and the number of one revision.

        Args:
            reference: The revision, or "base". None: the one that is checked out.

        Raises:
            RevisionError: when there is no such revision.
            DamagedError: when a record does not match its id or makes no sense.
        """
        with self._database.reading():
            rows, number = self._place(reference)
        with self.restorable():
            check_rows(rows)
            for row in rows:
                if row not in self._entries:
                    self._entries[row] = read_entry(row.number, row.id, row.parent, row.record)
            entries = [self._entries[row] for row in rows]
            check_chain(entries, BASE, self._database.workspace().fingerprint)
        return entries, number

    def check(self) -> list[str]:
        """Check the chain of hashes and that its end is known; return the ids, oldest first.

        Raises:
            DamagedError: when a revision was changed, exchanged or taken out.
        """
        with self._database.reading():
            rows, _ = self._place(None)
        with self.restorable():
            check_rows(rows)
        return [row.id for row in rows]

    def history(self, reference: str | None = None) -> list[Revision]:
        """Return every revision, oldest first, as seen from one of them; as `read`."""
        entries, number = self.read(reference)
        with self.restorable():
            return seen_from(entries, number)

    @contextlib.contextmanager
    def restorable(self) -> Iterator[None]:
        """Say how to repair the file, in an error about a record."""
        try:
            yield
        except DamagedError as error:
            raise DamagedError(f"{error}. {self._database.restore}") from None

    def _place(self, reference: str | None) -> tuple[list[Row], int]:
        """Return every row, and the number of one revision."""
        identity = self.current if reference is None else self.resolve(reference)
        rows = self._database.rows()
        numbers = {row.id: row.number for row in rows}
        if identity != BASE and identity not in numbers:
            raise DamagedError(
                f"{self._database.folder} is checked out at {identity[:10]}, but its history has "
                f"no such revision. {self._database.restore}"
            )
        return rows, numbers.get(identity, 0)


def check_rows(rows: Sequence[Row]) -> None:
    """Check that each row matches its id and follows the row before it; nothing is parsed.

    Raises:
        DamagedError: at the first row of which this is not true.
    """
    parent = BASE
    for number, row in enumerate(rows, 1):
        if hashlib.sha256(row.record.encode()).hexdigest() != row.id:
            raise DamagedError(
                f"Revision {row.id[:10]} is damaged: its record does not match its id"
            )
        if row.parent != parent or row.number != number:
            raise DamagedError(
                f"Revision {row.id[:10]} is number {row.number} and follows {row.parent[:10]}, "
                f"but place {number} of the history follows {parent[:10]}: a revision was taken "
                "out, added or moved"
            )
        parent = row.id
