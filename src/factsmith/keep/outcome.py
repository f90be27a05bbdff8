"""keep.outcome."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..core.tables import Shown, Table
from ..edit.delta import Delta
from ..judge.drift import Drift
from ..patch.gates import GateResult, gates_table
from ..patch.proof import Verification
from ..patch.proposal import Proposal
from .revision import Revision


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Outcome(Shown):
    """What `Workbench.apply` did: the proposal, and the revision that keeps it (None: nothing was to be written, see `warnings`).

    gates   how it stood with each gate that was asked, if any
    drift   what the patch changed of everything else, where a gate asked for it
    forced  whether it was kept though a gate failed, or what it met was a conflict
    made    what is to be known of paraphrases and neighbours that were made, in words
    room    what `capacity` has to say of all patches with this one, where it nears the measured breaking point; None: nothing
    """

    proposal: Proposal
    revision: Revision | None
    gates: tuple[GateResult, ...] = ()
    drift: Drift | None = None
    forced: bool = False
    room: str | None = None
    made: tuple[str, ...] = ()

    @property
    def failures(self) -> tuple[str, ...]:
        """Which facts are in conflict, which second moments say too little, which gate failed and which fact failed where, in words."""
        conflicts = tuple(f"conflict: {why}" for why in self.proposal.plan.contradictions)
        thin = tuple(f"text: {why}" for why in self.proposal.thin.values())
        return (
            conflicts
            + thin
            + tuple(
                f"{gate.name}: {why}"
                for gate in self.gates
                if not gate.passed
                for why in gate.failures
            )
        )

    @property
    def delta(self) -> Delta | None:
        """The change, or None."""
        return self.proposal.delta

    @property
    def verification(self) -> Verification | None:
        """Its proof, or None."""
        return self.proposal.verification

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the caller should know, in words."""
        return (*self.proposal.warnings, *self.made, *(() if self.room is None else (self.room,)))

    def tables(self) -> list[Table]:
        """The proposal's, under what became of it."""
        kept = (
            "nothing was written"
            if self.revision is None
            else f"committed as {self.revision.id[:10]}"
        )
        gates = [gates_table(self.gates)] if self.gates else []
        room = [] if self.room is None else [Table(self.room, {})]
        return [Table(kept, {}), *gates, *self.proposal.tables(), *room]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able fields."""
        return {
            "proposal": self.proposal.to_dict(),
            "revision": self.revision and self.revision.to_dict(),
            "gates": [gate.to_dict() for gate in self.gates],
            "drift": self.drift and self.drift.to_dict(),
            "forced": self.forced,
            "failures": list(self.failures),
            "room": self.room,
            "made": list(self.made),
        }
