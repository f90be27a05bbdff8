"""The ledger: which patches a model carries, in which order, kept in a folder. It knows no model.

    ledger = Ledger.create("my-workspace", model="gpt2", fingerprint=lm.fingerprint)
    revision = ledger.commit(delta.save, onto=ledger.head, method="rome", facts=[fact], layers=[1])
    for revision in ledger.log():
        print(revision.id[:10], revision.state, revision.message)

A workspace folder holds:

    ledger.db              SQLite: the model, the revisions, and which of them is checked out
    deltas/<sha256>/       one folder for each delta, named by its content: JSON and safetensors
    records/<sha256>.json  a copy of each record, named by the revision's id

The history is one line. Revisions are appended and never rewritten; a revert is a revision too. A
revision's id is the sha256 of its record, and the record names its parent, so one id vouches for
everything before it.

The order of a commit: the delta's files are written, flushed and renamed into place (`blobs`); then
one SQLite transaction records them (`database`); then a copy of the record is kept (`copies`). So a
crash leaves at most a delta that no revision names, and never a revision whose delta is missing. A
revision that has a copy and is not in ledger.db was lost, and the ledger does not open without it
(`recovery`). The patches in effect follow from the records (`history`).
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..core.errors import DamagedError, RevisionError, WorkspaceError
from ..core.fact import Fact
from .blobs import Blobs
from .copies import Copies
from .database import Database, Workspace
from .explained import explained
from .history import check_solved, moved_facts, undoing
from .housekeeping import Housekeeping
from .records import Records
from .recovery import check_nothing_lost
from .revision import BASE as BASE
from .revision import LATEST as LATEST
from .revision import Revision, Step, StoredChange, StoredRecord, one_line


class Ledger(Housekeeping):
    """The records of one workspace folder; a context manager that closes them on exit.

    Attributes:
        folder: The workspace.
        model: The name or path that its model is loaded from.
        dtype: The dtype that the model is loaded in, such as "float32". The fingerprint depends on
            it.
        fingerprint: The sha256 (hex) of the model before any patch.
        created: The UTC time at which the workspace was made, in ISO 8601.
    """

    def __init__(self, folder: str | os.PathLike[str], *, wait: float = 5.0) -> None:
        """Open a workspace.

        Args:
            folder: The workspace.
            wait: How many seconds to wait for another process that is writing.

        Raises:
            WorkspaceError: when the folder is not a workspace, was made by a newer version, is
                locked or cannot be read.
            DamagedError: when its database is broken, or a revision in it was changed or taken out,
                or revisions were lost (`recovery`).
        """
        self.folder = Path(folder)
        self._blobs = Blobs(self.folder / "deltas")
        self._copies = Copies(self.folder)
        self._together = False
        with explained(self.folder):
            # Before the database is read: a copy is written after its commit.
            copied = self._copies.ids()
        self._database = Database(self.folder, wait)
        self._records = Records(self._database)
        try:
            workspace = self._database.workspace()
            check_nothing_lost(self.folder, self._checked_ids(copied), copied)
        except BaseException:
            self.close()
            raise
        self.model, self.dtype, self.fingerprint, self.created = workspace

    @classmethod
    def create(
        cls,
        folder: str | os.PathLike[str],
        *,
        model: str,
        fingerprint: str,
        dtype: str = "float32",
        wait: float = 5.0,
    ) -> Ledger:
        """Make a workspace and open it.

        Args:
            folder: The workspace. It is made if there is no such folder.
            model: The name or path that the model is loaded from.
            fingerprint: The sha256 (hex) of the model before any patch.
            dtype: The dtype that the model is loaded in.
            wait: How many seconds to wait for another process that is writing.

        Raises:
            WorkspaceError: when the folder is a workspace already, or cannot be written.
        """
        workspace = Workspace(model, dtype, fingerprint, _now())
        Database.create(Path(folder), workspace, BASE, wait)
        return cls(folder, wait=wait)

    def _checked_ids(self, copied: Collection[str]) -> list[str]:
        """Return the ids in ledger.db; say in an error if `recover` may put something back."""
        try:
            return self._records.check()
        except DamagedError as error:
            if not set(copied) - set(self._database.ids()):
                raise
            problem = str(error).removesuffix(self._database.restore)
            raise DamagedError(
                f"{problem}The folder `records` has a revision that ledger.db lacks. Run "
                f"`factsmith recover -w {self.folder}`, which puts it back if the hashes prove its "
                "place."
            ) from None

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the database. The ledger cannot be used afterwards."""
        self._database.close()

    # ── reading ───────────────────────────────────────────────────────────────────────────────────

    @property
    def head(self) -> str:
        """The id of the newest revision, or "base"."""
        return self._records.head

    @property
    def current(self) -> str:
        """The id of the revision that is checked out, or "base".

        It is the newest revision, unless `checkout` chose another one.
        """
        return self._records.current

    def log(self) -> list[Revision]:
        """Return every revision, newest first.

        Raises:
            DamagedError: when a record does not match its id.
        """
        return self._records.history()[::-1]

    def show(self, reference: str) -> Revision:
        """Return one revision.

        Args:
            reference: Its id, a unique prefix of at least four digits, or "latest".

        Raises:
            RevisionError: when there is no such revision, or more than one.
        """
        identity = self.resolve(reference)
        if identity == BASE:
            raise RevisionError(
                f"{reference!r} is the unpatched model, which has no record. `factsmith log` lists "
                "the revisions."
            )
        return next(revision for revision in self._records.history() if revision.id == identity)

    def active(self, reference: str | None = None) -> list[Revision]:
        """Return the patches in effect at a revision, oldest first: the order they are added in.

        Args:
            reference: The revision, or "base". None: the one that is checked out.
        """
        return [
            revision
            for revision in self._records.history(reference)
            if revision.carried is not None
        ]

    def resolve(self, reference: str) -> str:
        """Return the full id of a revision, or "base".

        Args:
            reference: An id, a unique prefix of at least four digits, "latest" or "base".

        Raises:
            RevisionError: when there is no such revision, or more than one.
        """
        return self._records.resolve(reference)

    def delta_folder(self, revision: Revision, delta: str | None = None) -> Path:
        """Return the folder of a patch's delta, after checking its sha256.

        Args:
            revision: The patch.
            delta: The sha256 of the delta. None: the one that is carried for the patch, or the
                patch's own delta if none is carried.

        Raises:
            DamagedError: when a file is missing or changed.
            RevisionError: when the revision is a revert.
        """
        if revision.kind == "revert":
            raise RevisionError(
                f"Revision {revision.id[:10]} is a revert and has no delta. Ask for that of the "
                f"revision it undoes, {str(revision.reverts)[:10]}."
            )
        blob = self._check_delta(str(delta or revision.carried or revision.delta), revision)
        return self._blobs.path(blob.digest)

    def undoing(
        self, reference: str, facts: Sequence[int] | None = None, also: Collection[str] = ()
    ) -> list[Step]:
        """Return what reverting a revision would do: one step for each patch, oldest first.

        Args:
            reference: A patch, whose facts go; or a revert, which is undone as a whole.
            facts: The indices of the patch's facts that go. None: all of them.
            also: The ids of patches to solve again in any case.

        Raises:
            RevisionError: as `history.undoing` does.
        """
        identity = self.show(reference).id
        entries, current = self._records.read()
        with self._records.restorable():
            return undoing(entries, current, identity, facts, also)

    # ── writing ───────────────────────────────────────────────────────────────────────────────────

    def expect(self, onto: str) -> None:
        """Raise now what `commit` with this `onto` would raise after the work.

        Raises:
            WorkspaceError: when the workspace cannot be written, is locked, or has moved on.
        """
        with self._database.writing():
            self._expect(onto)

    def commit(  # house: the fields of a record, by their names
        self,
        write: Callable[[Path], object],
        *,
        onto: str,
        method: str,
        facts: Sequence[Fact],
        layers: Sequence[int],
        appended: Mapping[int, int] | None = None,
        config: Mapping[str, Any] | None = None,
        moments: str | None = None,
        report: Mapping[str, Any] | None = None,
        message: str = "",
    ) -> Revision:
        """Append a patch and check it out.

        Args:
            write: Writes the delta's files into the folder it is given, such as `delta.save`.
            onto: The newest revision that the caller knows: the patch was solved on top of it.
            method: The name of the editing method.
            facts: The facts that were written.
            layers: The layers that change.
            appended: {layer: number of neurons} of a patch that only appends neurons. None: it
                updates weights.
            config: The settings of the method, as plain JSON values.
            moments: The sha256 of the second moments that were used.
            report: The evaluation to store, as plain JSON values.
            message: One line. "": made from the facts.

        Raises:
            WorkspaceError: when the history has moved on since `onto`, an older revision is checked
                out, or the folder cannot be written (read-only, disk full, locked). Nothing is
                recorded then.
            InputError: when config, facts or report cannot be stored as JSON.
        """
        with self.together(onto):
            digest, n_bytes = self._store(write)
            identity = self._append(
                kind="patch",
                message=message or ", ".join(map(str, facts)),
                method=method,
                config=dict(config or {}),
                facts=[fact.to_dict() for fact in facts],
                layers=sorted(int(layer) for layer in layers),
                appended=dict(appended or {}),
                moments=moments,
                report=dict(report or {}),
                delta=digest,
                delta_bytes=n_bytes,
                reverts=None,
            )
            # Inside the block: after it nothing may fail, since the revision is recorded.
            return self.show(identity)

    @contextlib.contextmanager
    def together(self, onto: str) -> Iterator[None]:
        """Make the commits inside a block one: all of them are recorded, or nothing is.

        Raises:
            WorkspaceError: as `commit` with this `onto` does.
        """
        if self._together:
            yield  # the block around this one has checked `onto` already
            return
        with self._writing():
            self._expect(onto)
            self._together = True
            try:
                yield
            finally:
                self._together = False

    def revert(
        self,
        reference: str,
        *,
        facts: Sequence[int] | None = None,
        solved: Mapping[str, Callable[[Path], object]] | None = None,
        also: Collection[str] = (),
        onto: str | None = None,
        report: Mapping[str, Any] | None = None,
        message: str = "",
    ) -> Revision:
        """Append a revision that undoes an earlier one, and check it out.

        Args:
            reference: A patch, whose facts go out of effect; or a revert, which is undone.
            facts: The indices of the patch's facts that go. None: all of them.
            solved: For each step of `undoing` that must be solved again: {patch id: a function
                that writes the new delta's files}.
            also: As for `undoing`.
            onto: The newest revision that the caller knows. None: any.
            report: The evaluation to store, as plain JSON values.
            message: One line. "": made from the message of the revision that is undone.

        Raises:
            RevisionError: as `undoing` does, and when a delta that must be solved again is missing.
            DamagedError: when a delta that stays is not whole.
            WorkspaceError: as `commit` does.
        """
        solved = dict(solved or {})
        with self._writing():
            self._expect(self.head if onto is None else onto)
            revision, steps = self.show(reference), self.undoing(reference, facts, also)
            check_solved(revision, steps, solved)
            changes = self._changes(steps, solved)
            moved = moved_facts(steps)
            some = "" if facts is None else f" {len(moved)} of {len(revision.facts)} facts of"
            layers = {
                layer for step in steps if step.patch.id in changes for layer in step.patch.layers
            }
            identity = self._append(
                kind="revert",
                message=message or f"revert{some} {revision.id[:10]}: {revision.message}",
                method=revision.method,
                config={},
                facts=[fact.to_dict() for fact in moved],
                layers=sorted(layers),
                moments=None,
                report=dict(report or {}),
                delta=None,
                delta_bytes=sum(changes[patch].delta_bytes for patch in solved),
                reverts=revision.id,
                changes=changes,
            )
            # Inside the block: after it nothing may fail, since the revision is recorded.
            return self.show(identity)

    def checkout(self, reference: str) -> str:
        """Note which revision the model is to carry; the history does not change.

        Args:
            reference: A revision, "latest" or "base".

        Returns:
            The full id of the revision, or "base".

        Raises:
            RevisionError: when there is no such revision.
            DamagedError: when a delta that the revision needs is not whole. Nothing changes then.
        """
        with self._writing():
            identity = self.resolve(reference)
            for revision in self.active(identity):
                self.delta_folder(revision)
            self._database.check_out(identity)
        return identity

    # ── inside ────────────────────────────────────────────────────────────────────────────────────

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Hold the write lock during a block. All of it is recorded, or nothing is and no new delta
        is left; then copies of the new records are kept.
        """
        self._blobs.new.clear()
        try:
            with self._database.writing():
                yield
        except BaseException:
            self._remove_new()
            raise
        self._copies.keep(self._database)

    def _expect(self, onto: str) -> None:
        """Refuse to append unless the newest revision is `onto` and is checked out."""
        head, current = self.head, self.current
        if current != head and onto in (current, head):
            raise WorkspaceError(
                f"{self.folder} is checked out at {current[:10]}, but its newest revision is "
                f"{head[:10]}. Check that out first, with `factsmith checkout latest`."
            )
        if head != onto:
            raise WorkspaceError(
                f"{self.folder} has moved on from {onto[:10]}: somebody committed {head[:10]}. "
                "Look at it with `factsmith log`, then run this again."
            )

    def _changes(
        self, steps: Sequence[Step], solved: Mapping[str, Callable[[Path], object]]
    ) -> dict[str, StoredChange]:
        """Store the new deltas of some steps, check those that stay, and return what changes."""
        changes: dict[str, StoredChange] = {}
        for step in steps:
            patch, digest, n_bytes = step.patch, step.delta, 0
            if step.solve:
                digest, n_bytes = self._store(solved[patch.id])
            elif step.delta is not None:
                digest, n_bytes = self._check_delta(step.delta, patch)
            if step.solve or digest != patch.carried:
                changes[patch.id] = StoredChange(
                    delta=digest, delta_bytes=n_bytes, facts=list(step.facts or ())
                )
        return changes

    def _store(self, write: Callable[[Path], object]) -> tuple[str, int]:
        """Write a delta's files into the workspace, and return their sha256 and their size."""
        return self._blobs.add(write)

    def _append(self, *, message: str, **fields: Any) -> str:
        """Append a record after the newest revision, and return its id."""
        record = StoredRecord(
            parent=self.head,
            created=_now(),
            base=self.fingerprint,
            message=one_line(message),
            **fields,
        )
        identity, text = record.sealed()
        self._database.append(identity, record.parent, text)
        return identity


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
