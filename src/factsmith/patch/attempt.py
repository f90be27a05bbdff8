"""From facts to the answer whether a patch deserves to be kept: complete, plan, propose, check the
gates. Nothing is kept.

    attempt = attempt_patch(Scratch(lm), facts, gates=Gates())
    attempt.holds, attempt.failures, attempt.delta

`Workbench.apply` is this, and a commit where the patch holds.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ..core.fact import Fact
from ..core.gates import Gates
from ..core.progress import Progress
from ..core.tables import Shown, Table
from ..edit.delta import Delta, read_weights
from ..judge.drift import Drift, drift
from ..model.turns import asking
from .bench import Bench
from .capacity import firing_warning
from .capacity import warning as capacity_warning
from .firing import BUDGET, firing_of, recorded_firing
from .gates import GateResult, check_gates, gates_table, measures_drift
from .plan import Plan, plan
from .proposal import Proposal, propose
from .recipe import Recipe, Sources
from .verification import Verification

_TOKENS, _TOKENS_OF_WORST = 500, 2000
"""Tokens of text for the drift of a gate: a mean needs fewer than a 99 % quantile. On a model of
135 M parameters 2,000 tokens take half a minute."""

_FACTS, _ASKED_FACTS = 50, 200
"""Unrelated facts for the drift, and where a gate asks for them."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Attempt(Shown):
    """A proposal, and whether it deserves to be kept.

    Attributes:
        proposal: The change and its proof.
        gates: How it stood at each gate, if gates were given.
        drift: What the change did to everything else, where a gate asks for it.
        room: A warning where the model nears the measured breaking point with this patch. None: it
            does not.
    """

    proposal: Proposal
    gates: tuple[GateResult, ...] = ()
    drift: Drift | None = None
    room: str | None = None

    @property
    def made(self) -> tuple[str, ...]:
        """Remarks on paraphrases and neighbours that were made."""
        return self.proposal.plan.made

    @property
    def delta(self) -> Delta | None:
        """The change. None: there was nothing to write, or facts are in conflict."""
        return self.proposal.delta

    @property
    def verification(self) -> Verification | None:
        """Its proof. None: there is no delta."""
        return self.proposal.verification

    @property
    def holds(self) -> bool:
        """Whether there is a change, it passed every gate, and enough text says what must stay.

        Without gates: every fact took.
        """
        if self.delta is None or self.proposal.thin:
            return False
        return all(gate.passed for gate in self.gates) if self.gates else not self.proposal.failed

    @property
    def failed(self) -> bool:
        """Whether there was something to write, and it does not deserve to be kept."""
        if self.delta is None:
            return bool(self.proposal.plan.conflicts)
        return not self.holds

    @property
    def failures(self) -> tuple[str, ...]:
        """Which facts are in conflict, which second moments say too little, and which fact failed
        at which gate, in words.
        """
        conflicts = (f"conflict: {why}" for why in self.proposal.plan.contradictions)
        thin = (f"text: {why}" for why in self.proposal.thin.values())
        failed = (gate for gate in self.gates if not gate.passed)
        return (
            *conflicts,
            *thin,
            *(f"{gate.name}: {why}" for gate in failed for why in gate.failures),
        )

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the caller should know, in words."""
        return (*self.proposal.warnings, *self.made, *(() if self.room is None else (self.room,)))

    @property
    def report(self) -> dict[str, Any]:
        """What the ledger keeps of the proof, as plain JSON values."""
        assert self.verification is not None
        report = self.verification.to_dict() | {"seconds": sum(self.proposal.seconds.values())}
        if contradictions := self.proposal.plan.contradictions:
            report["conflicts"] = list(contradictions)
        if self.gates:
            report["gates"] = [gate.to_dict() for gate in self.gates]
        if self.drift is not None:
            report["drift"] = {
                name: value for name, value in self.drift.measures.items() if value is not None
            }
        return report

    def proof_tables(self) -> list[Table]:
        """The gates and the proof, without the warnings."""
        gates = [gates_table(self.gates)] if self.gates else []
        return [*gates, *self.proposal.proof_tables()]

    def tables(self) -> list[Table]:
        """The gates, the proposal, and the warning on room."""
        gates = [gates_table(self.gates)] if self.gates else []
        room = [] if self.room is None else [Table(self.room, {})]
        return [*gates, *self.proposal.tables(), *room]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "proposal": self.proposal.to_dict(),
            "gates": [gate.to_dict() for gate in self.gates],
            "drift": self.drift and self.drift.to_dict(),
            "failures": list(self.failures),
            "room": self.room,
            "made": list(self.made),
        }


@asking(grad=True, changes=True)
def attempt_patch(
    bench: Bench,
    facts: Fact | Iterable[Fact],
    recipe: Recipe | None = None,
    sources: Sources | None = None,
    *,
    gates: Gates | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Attempt:
    """Plan, solve, prove and check the gates; nothing is kept.

    Args:
        bench: The model and what it carries; it is as before when this returns, also after an
            exception.
        facts: The facts to write. What the model already says is asked with the rest, but not
            written.
        recipe: The method and its settings.
        sources: What the edit may draw on.
        gates: What the patch has to pass. Facts without paraphrases or neighbours get some
            (`complete`). None: every fact must take, and the earlier ones must hold.
        force: Solve also where facts are in conflict, and write also what the model already says.
        progress: Called with the step's name, how much is done, and how much there is.

    Raises what `plan` and `propose` raise.
    """
    sources = sources or Sources()
    decided = plan(bench, facts, recipe, sources, gates=gates, force=force, progress=progress)
    if decided.conflicts and not force:
        return Attempt(proposal=Proposal(plan=decided))
    proposal = propose(bench, decided, sources, force=force, progress=progress)
    if proposal.delta is None or proposal.verification is None:
        return Attempt(proposal=proposal)
    room = _room(bench, proposal.delta)
    if gates is None:
        return Attempt(proposal=proposal, room=room)
    change = None
    if measures_drift(gates):
        change = _drift(bench, proposal.delta, decided, sources, gates, progress)
    results = check_gates(gates, proposal.verification, change)
    return Attempt(proposal=proposal, gates=results, drift=change, room=room)


def _drift(
    bench: Bench,
    delta: Delta,
    decided: Plan,
    sources: Sources,
    gates: Gates,
    progress: Progress | None,
) -> Drift:
    """What the change does to everything else, as exactly as the gates need it."""
    asks_facts = gates.kl_facts is not None or gates.changed_share is not None
    return drift(
        bench.lm,
        lambda: bench.carrying(delta),
        texts=sources.texts,
        without=[entry.fact.subject for entry in decided.entries],
        max_tokens=_TOKENS if gates.kl_text_worst is None else _TOKENS_OF_WORST,
        n_facts=_ASKED_FACTS if asks_facts else _FACTS,
        seed=sources.seed,
        progress=progress,
    )


def _room(bench: Bench, delta: Delta) -> str | None:
    """The capacity warning with one more change.

    None: none is due, or the second moments are not at hand.
    """
    deltas = [*bench.beneath, delta]
    layers = sorted({layer for each in deltas for layer in each.layers})
    widened = sorted({layer for each in deltas for layer in each.appended})
    with bench.on_base():
        moments = bench.kept_moments(layers)
        inputs = bench.kept_moments(widened, "inputs") if delta.appended else {}
        weights = read_weights(bench.lm, layers)
    parts = []
    if delta.layers and set(moments) == set(layers):
        parts.append(capacity_warning(deltas, weights, moments))
    known = recorded_firing(deltas)
    if delta.appended and (known is None or known[0] > BUDGET):  # measuring takes a while
        parts.append(firing_warning(firing_of(bench.lm, deltas, inputs)))
    return "; ".join(part for part in parts if part) or None
