"""The records of a ledger: how a revision is stored, and how it is shown.

    revision = ledger.show("latest")
    revision.state, revision.message, [str(fact) for fact in revision.facts]

`StoredRecord` is the JSON text in the database. A revision's id is the sha256 of that text.
`Revision` is the same record as seen from one place in the history: it also says whether the patch
is in effect there, and which delta the model carries for it. Everything here is a plain value.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic

from ..core.errors import InputError
from ..core.fact import Fact
from ..core.tables import counted

BASE = "base"
"""The name of the unpatched model, before every revision."""

LATEST = "latest"
"""The name of the newest revision."""

RevisionKind = Literal["patch", "revert"]

RevisionState = Literal["active", "reverted", "later"]

_Sha256 = Annotated[str, pydantic.Field(pattern="^[0-9a-f]{64}$")]


# ── stored ────────────────────────────────────────────────────────────────────────────────────────


class StoredChange(pydantic.BaseModel):
    """What a revert does to one patch, as it is stored."""

    model_config = pydantic.ConfigDict(strict=True, extra="forbid")

    delta: _Sha256 | None
    delta_bytes: int
    facts: list[int]


class StoredRecord(pydantic.BaseModel):
    """A revision as it is stored; its id is the sha256 of this record."""

    model_config = pydantic.ConfigDict(strict=True, extra="forbid")

    kind: RevisionKind
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
    delta: _Sha256 | None
    delta_bytes: int
    reverts: str | None
    changes: dict[str, StoredChange] = {}
    appended: dict[int, int] = {}

    @property
    def changed(self) -> dict[str, StoredChange]:
        """What the revision does to earlier patches, by their ids.

        Ledgers of format 1 stored no changes: there a revert took one whole patch out of effect.
        """
        if self.reverts is None or self.changes:
            return self.changes
        return {self.reverts: StoredChange(delta=None, delta_bytes=0, facts=[])}

    def sealed(self) -> tuple[str, str]:
        """Return the id of the record, and the text that it is the sha256 of.

        Raises:
            InputError: when a value cannot be written as JSON in UTF-8.
        """
        # A record without appended neurons is the text that it was before there were any.
        fields = self.model_dump(exclude=None if self.appended else {"appended"})
        try:
            text = json.dumps(fields, ensure_ascii=False, sort_keys=True, allow_nan=False)
            return hashlib.sha256(text.encode()).hexdigest(), text
        except (TypeError, ValueError) as error:
            raise InputError(
                f"A record cannot be stored as JSON: {error}. Give config, facts and report as "
                "JSON values: finite numbers, and text that can be written as UTF-8."
            ) from None


def one_line(message: str) -> str:
    """Return a message as one line of at most 200 characters."""
    line = " ".join(message.split())
    return line if len(line) <= 200 else line[:199] + "…"


# ── shown ─────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, kw_only=True)
class Change:
    """What a revert does to one patch.

    Attributes:
        delta: The sha256 of the patch's delta from this revert on. None: it goes out of effect.
        delta_bytes: The size of that delta's files.
        facts: The indices of the patch's facts that stay in effect.
    """

    delta: str | None
    delta_bytes: int
    facts: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Revision:
    """One entry of the history, as seen from one place in it.

    Attributes:
        id: The sha256 (hex) of the record. A unique prefix of at least four digits names it too.
        parent: The id of the entry before it, or "base".
        number: Its place in the history. The first entry has number 1.
        kind: "patch" adds a delta. "revert" takes facts out of effect, or brings back facts that
            another revert took out.
        state: "active": in effect at this place. "reverted": taken out of effect. "later": it comes
            after this place.
        created: The UTC time of the commit, in ISO 8601.
        message: One line.
        base: The fingerprint of the unpatched model.
        method: The name of the editing method. A revert has the method of the entry it undoes.
        config: The settings of the method, as plain JSON values.
        facts: The facts that were written, or that the revert moved.
        layers: The layers that changed.
        moments: The sha256 of the second moments that were used, or None.
        report: The evaluation stored with the entry, as plain JSON values.
        delta: The sha256 of the delta's files. None for a revert.
        delta_bytes: The size of these files.
        reverts: The id of the entry that a revert undoes. None for a patch.
        changes: For a revert: what it does to each patch that it touches, by the patch's id. Later
            patches that were solved on top of others are among them.
        appended: {layer: number of neurons} of a patch that only appends neurons. Empty for a patch
            that updates weights, and for a revert.
        reverted_by: The id of the newest revert that took this entry out completely, or None. That
            revert may be undone or come later.
        carried: The sha256 of the delta that the model carries for this patch at this place: the
            patch's own delta, or one that was solved again. None: the model carries none.
        in_effect: The facts of the patch that are in effect at this place.
    """

    id: str
    parent: str
    number: int
    kind: RevisionKind
    state: RevisionState
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
    appended: Mapping[int, int]
    reverted_by: str | None
    carried: str | None
    in_effect: tuple[Fact, ...]

    @property
    def size(self) -> str:
        """The number of appended neurons, in words; "" for an entry that appends none."""
        return counted(sum(self.appended.values()), "neuron") if self.appended else ""

    @property
    def deltas(self) -> tuple[str, ...]:
        """The sha256 of every delta that the revision names: its own, and those of its changes."""
        named = (self.delta, *(change.delta for change in self.changes.values()))
        return tuple(delta for delta in named if delta is not None)

    @property
    def indices_in_effect(self) -> tuple[int, ...] | None:
        """The indices of the facts that are in effect; None if the patch is out of effect."""
        if self.carried is None:
            return None
        kept = {id(fact) for fact in self.in_effect}  # a patch may hold two equal facts
        return tuple(i for i, fact in enumerate(self.facts) if id(fact) in kept)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        facts = {
            name: [fact.to_dict() for fact in getattr(self, name)]
            for name in ("facts", "in_effect")
        }
        changes = {
            patch: {**vars(change), "facts": list(change.facts)}
            for patch, change in self.changes.items()
        }
        return {
            **vars(self),
            **facts,
            "layers": list(self.layers),
            "changes": changes,
            "appended": {str(layer): n for layer, n in self.appended.items()},
        }


@dataclass(frozen=True, kw_only=True)
class Step:
    """What a revert would do to one patch.

    Attributes:
        patch: The patch as it is now.
        facts: The indices of its facts that are in effect afterwards. None: the patch goes out of
            effect.
        delta: The sha256 of a delta in the workspace that the model carries for it afterwards.
            None: the patch goes out of effect, or gets a new delta.
    """

    patch: Revision
    facts: tuple[int, ...] | None
    delta: str | None

    @property
    def solve(self) -> bool:
        """Whether the patch gets a new delta.

        It does if some of its facts go, or if a delta changes that it was solved on top of. Of a
        patch that appends neurons the new delta is made of rows that there are; any other is solved
        again.
        """
        return self.facts is not None and self.delta is None


@dataclass(frozen=True, kw_only=True)
class Unrecorded:
    """A delta that no revision names, and that its edit.json describes.

    Attributes:
        delta: The sha256 of its files.
        method: The name of the editing method.
        facts: The facts as texts, such as "Paris is → Rome".
        layers: The layers that change.
        fingerprint: The fingerprint of the weights that it was made on.
    """

    delta: str
    method: str
    facts: tuple[str, ...]
    layers: tuple[int, ...]
    fingerprint: str

    def __str__(self) -> str:
        """Return it in a line."""
        facts = "; ".join(self.facts[:2]) or "no facts"
        more = f"; {len(self.facts) - 2} more" if len(self.facts) > 2 else ""
        layers = ", ".join(map(str, self.layers))
        return f"{self.delta[:10]} {self.method}, layer {layers}: {facts}{more}"

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return {**vars(self), "facts": list(self.facts), "layers": list(self.layers)}


@dataclass(frozen=True, kw_only=True)
class Integrity:
    """The counts of a full check of a workspace.

    Attributes:
        revisions: How many records were read and checked.
        deltas: How many delta folders in the workspace are named by a revision.
        orphans: The sha256 of the delta folders that no revision names.
        unrecorded: Those of them that are patches: their revisions may have been lost.
    """

    revisions: int
    deltas: int
    orphans: tuple[str, ...]
    unrecorded: tuple[Unrecorded, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        patches = [patch.to_dict() for patch in self.unrecorded]
        return {**vars(self), "orphans": list(self.orphans), "unrecorded": patches}


@dataclass(frozen=True, kw_only=True)
class Status:
    """A summary of a workspace.

    Attributes:
        folder: The workspace.
        model: The name or path of its model.
        dtype: The dtype of its model, such as "float32".
        fingerprint: The sha256 (hex) of the unpatched model.
        head: The id of the newest revision, or "base".
        current: The id of the revision that is checked out, or "base".
        active: The patches in effect, oldest first.
        integrity: The counts of the full check that was made for this summary.
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
        """Return the fields as plain JSON values; the active patches as their ids."""
        active = [revision.id for revision in self.active]
        return {
            **vars(self),
            "folder": str(self.folder.resolve()),
            "active": active,
            "integrity": self.integrity.to_dict(),
        }
