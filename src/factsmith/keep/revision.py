"""What a ledger is made of: what is stored of a revision, and what is handed out of it. Values only; `ledger.Ledger` keeps them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic

from ..core.fact import Fact

Kind = Literal["patch", "revert"]

State = Literal["active", "reverted", "later"]


class StoredChange(pydantic.BaseModel):
    """What becomes of a patch in a later revision."""

    model_config = pydantic.ConfigDict(strict=True, extra="forbid")

    delta: Annotated[str, pydantic.Field(pattern="^[0-9a-f]{64}$")] | None
    delta_bytes: int
    facts: list[int]


class StoredRecord(pydantic.BaseModel):
    """What is kept of a revision, and what its id is the sha256 of."""

    model_config = pydantic.ConfigDict(strict=True, extra="forbid")

    kind: Kind
    parent: str
    created: str
    message: str
    base: str
    method: str
    config: dict[str, Any]
    facts: list[dict[str, Any]]
    layers: list[int]
    moments: str | None
    report: dict[str, Any]
    delta: Annotated[str, pydantic.Field(pattern="^[0-9a-f]{64}$")] | None
    delta_bytes: int
    reverts: str | None
    changes: dict[str, StoredChange] = {}

    @property
    def changed(self) -> dict[str, StoredChange]:
        """Its changes; a revert of format 1 took one patch out whole."""
        whole = self.reverts is not None and not self.changes
        return (
            {str(self.reverts): StoredChange(delta=None, delta_bytes=0, facts=[])}
            if whole
            else self.changes
        )


@dataclass(frozen=True, kw_only=True)
class Change:
    """What a revert made of a patch: the sha256 of its delta from then on (None: out of effect), and which of its facts are in it."""

    delta: str | None
    delta_bytes: int
    facts: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Revision:
    """One entry of the history.

    id           sha256 hex of the record; any unique prefix of at least four digits names it
    parent       id of the entry before it, or "base"
    number       1 for the first entry
    kind         "patch" (adds a delta) or "revert" (takes facts out, or brings back what another revert took)
    state        "active" (in effect where the workspace is checked out), "reverted", or "later" (comes after the checked-out entry)
    created      UTC, ISO 8601
    message      one line
    base         fingerprint of the unpatched model
    method       name of the editing method; for a revert, that of the reverted entry
    config       its settings, plain JSON values
    facts        what was written, or taken out
    layers       the layers touched
    moments      digest of the second moments used, or None
    report       the evaluation kept with the entry, plain JSON values
    delta        sha256 of the delta's files; None for a revert
    delta_bytes  their size
    reverts      id of the entry that a revert takes out; None for a patch
    changes      of a revert: {patch id: what it made of it}, for every patch that it touched; those on top of others were solved again
    reverted_by  id of the newest revert that took this entry out whole (in effect or not), or None
    carried      sha256 of the delta that the model carries for this patch where it is looked at: its own, or one solved again. None: none
    in_effect    the facts of a patch that are in effect there
    """

    id: str
    parent: str
    number: int
    kind: Kind
    state: State
    created: str
    message: str
    base: str
    method: str
    config: Mapping[str, Any]
    facts: tuple[Fact, ...]
    layers: tuple[int, ...]
    moments: str | None
    report: Mapping[str, Any]
    delta: str | None
    delta_bytes: int
    reverts: str | None
    changes: Mapping[str, Change]
    reverted_by: str | None
    carried: str | None
    in_effect: tuple[Fact, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able fields."""
        facts = {
            name: [fact.to_dict() for fact in getattr(self, name)]
            for name in ("facts", "in_effect")
        }
        changes = {
            patch: {**vars(change), "facts": list(change.facts)}
            for patch, change in self.changes.items()
        }
        return {**vars(self), **facts, "layers": list(self.layers), "changes": changes}


@dataclass(frozen=True, kw_only=True)
class Step:
    """What becomes of one patch when something is taken out, or back in.

    patch   as it is now
    facts   indices of its facts that are in effect afterwards; None: the patch is out of effect
    delta   sha256 of a delta that is there already and can be used as it is; None: it goes, or is solved again
    """

    patch: Revision
    facts: tuple[int, ...] | None
    delta: str | None

    @property
    def solve(self) -> bool:
        """Whether its delta has to be solved again: some of its facts go, or what it was solved on top of does."""
        return self.facts is not None and self.delta is None


@dataclass(frozen=True, kw_only=True)
class Integrity:
    """What `Ledger.verify` counted: revisions read, delta folders checked against their sha256, and those that no revision names."""

    revisions: int
    deltas: int
    orphans: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able fields."""
        return {**vars(self), "orphans": list(self.orphans)}


@dataclass(frozen=True, kw_only=True)
class Status:
    """A workspace at a glance.

    folder, model, dtype, fingerprint  as in `Ledger`
    head, current                      ids of the newest and of the checked-out revision, or "base"
    active                             the patches in effect, oldest first
    integrity                          what was counted while every record and every delta's sha256 was checked
    """

    folder: Path
    model: str
    dtype: str
    fingerprint: str
    head: str
    current: str
    active: tuple[Revision, ...]
    integrity: Integrity

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able fields; the active patches by their ids."""
        active = [revision.id for revision in self.active]
        return {
            **vars(self),
            "folder": str(self.folder.resolve()),
            "active": active,
            "integrity": self.integrity.to_dict(),
        }
