"""A ledger's checks of its files, and the removal of those that nothing needs.

with Ledger("my-workspace") as ledger:
    ledger.verify().deltas
    ledger.gc(dry_run=True)
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from ..core.errors import DamagedError, FactsmithError
from ..core.leftovers import leftovers, remove_leftovers
from .blobs import Blob, Blobs
from .database import Database
from .history import named_deltas
from .records import Records
from .revision import Integrity, Revision, Status, Unrecorded
from .unrecorded import unrecorded


class Housekeeping:
    """The part of `Ledger` that looks after files."""

    folder: Path
    model: str
    dtype: str
    fingerprint: str
    _blobs: Blobs
    _database: Database
    _records: Records
    _together: bool

    def verify(self) -> Integrity:
        """Check the database, every record, the chain of parents, and every delta's sha256.

        Raises:
            DamagedError: at the first fault.
        """
        self._database.check()
        revisions = self._records.history()
        for revision in revisions:
            for delta in revision.deltas:
                self._check_delta(delta, revision)
        named = named_deltas(revisions)
        digests = self._blobs.digests()
        orphans = tuple(digest for digest in digests if digest not in named)
        return Integrity(
            revisions=len(revisions),
            deltas=len(digests) - len(orphans),
            orphans=orphans,
            unrecorded=unrecorded(map(self._blobs.path, orphans)),
        )

    def status(self) -> Status:
        """Return a summary of the workspace, after a full check (`verify`).

        Raises:
            DamagedError: at the first fault.
        """
        revisions = self._records.history()
        return Status(
            folder=self.folder,
            model=self.model,
            dtype=self.dtype,
            fingerprint=self.fingerprint,
            head=self._records.head,
            current=self._records.current,
            active=tuple(each for each in revisions if each.carried is not None),
            integrity=self.verify(),
        )

    def unrecorded(self) -> tuple[Unrecorded, ...]:
        """Return the deltas that no revision names, and that were patches (`recover_patches`)."""
        return unrecorded(self._blobs.loose(named_deltas(self._records.history())))

    def gc(self, *, dry_run: bool = False, patches: bool = False) -> tuple[str, ...]:
        """Delete the files that no revision names, such as those of an export that was killed.

        Everything that can be checked out stays. So does a delta without a revision if it can be
        read as a patch (`unrecorded`): its revision may have been lost.

        Args:
            dry_run: Only look, and delete nothing.
            patches: Delete the patches without a revision, too.

        Returns:
            The names of the folders, deleted or not.

        Raises:
            DamagedError: when a record cannot be read.
            WorkspaceError: when the folder cannot be written.
        """
        with contextlib.nullcontext() if dry_run else self._database.writing():
            loose = self._blobs.loose(named_deltas(self._records.history()))
            kept = set() if patches else {patch.delta for patch in unrecorded(loose)}
            loose = [entry for entry in loose if entry.name not in kept]
            unfinished = leftovers(self.folder)
            if not dry_run:
                self._blobs.remove(loose)
                remove_leftovers(self.folder)
        return tuple(entry.name for entry in (*loose, *unfinished))

    def settle(self) -> None:
        """Take back what an interrupted call of this ledger left unfinished."""
        self._together = False
        self._database.settle()

    def _remove_new(self) -> None:
        """Remove the deltas that were written for a revision that was not recorded."""
        if not self._blobs.new:
            return
        # Under the lock: until then another process can record the same delta.
        with contextlib.suppress(FactsmithError), self._database.writing():
            named = named_deltas(self._records.history())
            self._blobs.remove([entry for entry in self._blobs.new if entry.name not in named])

    def _check_delta(self, delta: str, revision: Revision) -> Blob:
        """Check that a delta of a revision is whole."""
        try:
            return self._blobs.check(delta)
        except DamagedError as error:
            raise DamagedError(
                f"The delta of revision {revision.id[:10]} is damaged: {error}. Restore that "
                "folder from a backup, or go back with `factsmith checkout "
                f"{revision.parent[:10]}`."
            ) from None
