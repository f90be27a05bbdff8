"""A copy of every record, as a text file in the workspace: the proof that it was committed.

    copies = Copies(workspace)
    copies.keep(database)                 # after a commit
    lost = copies.ids() - set(database.ids())

SQLite keeps the newest revisions in ledger.db-wal until it joins the files. A backup that leaves
that file out has an older history, and nothing in ledger.db says so. The copies do. A copy is
written after its revision is committed, never before. So a copy without a revision in ledger.db is
of a revision that was lost, and never of a commit that was killed.

records/<sha256>.json holds a record. Its name is the revision's id: the sha256 of its content.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Collection
from pathlib import Path

from ..core.errors import DamagedError, FactsmithError
from ..core.files import flush_folder, make_folder, write_file
from .database import Database
from .revision import StoredRecord

FOLDER = "records"

_NAME = re.compile(r"([0-9a-f]{64})\.json")

_MOST = 64 * 2**20
"""The largest copy that is read, in bytes."""


class Copies:
    """The copies of a workspace's records.

    Attributes:
        folder: The folder that holds them.
    """

    def __init__(self, workspace: Path) -> None:
        self.folder = workspace / FOLDER

    def ids(self) -> set[str]:
        """Return the ids of the revisions that have a copy. Raises OSError."""
        if not self.folder.is_dir():
            return set()
        matches = (_NAME.fullmatch(entry.name) for entry in self.folder.iterdir())
        return {match[1] for match in matches if match}

    def read(self, identity: str) -> tuple[StoredRecord, str]:
        """Return a record and its text.

        Raises:
            DamagedError: when the copy cannot be read, or is not that record.
        """
        file = self._file(identity)
        try:
            if not file.is_file() or file.stat().st_size > _MOST:
                raise ValueError("it is not a record")
            text = file.read_text(encoding="utf-8")
            if hashlib.sha256(text.encode()).hexdigest() != identity:
                raise ValueError("it does not match its name")
            return StoredRecord.model_validate_json(text), text
        except (OSError, ValueError) as error:  # errors of pydantic are ValueErrors
            problem = "; ".join(str(error).splitlines())[:300]
            raise DamagedError(f"{file} is damaged: {problem}") from None

    def keep(self, database: Database) -> None:
        """Write the copies that are missing; what fails is left for the next commit."""
        with contextlib.suppress(OSError, FactsmithError):
            missing = set(database.ids()) - self.ids()
            if not missing:
                return
            make_folder(self.folder)
            for row in database.rows():
                # A damaged record vouches for nothing.
                is_whole = hashlib.sha256(row.record.encode()).hexdigest() == row.id
                if row.id in missing and is_whole:
                    write_file(self._file(row.id), row.record.encode())

    def give_up(self, identities: Collection[str]) -> None:
        """Move copies into a folder of their own, where they prove nothing. Raises OSError."""
        place = self.folder / "given-up"
        make_folder(place)
        for identity in identities:
            file = self._file(identity)
            file.rename(place / file.name)
        flush_folder(place)
        flush_folder(self.folder)

    def _file(self, identity: str) -> Path:
        return self.folder / f"{identity}.json"
