"""Take something out of the middle: solve again what was solved on top of it, and prove that what
stays still holds.

Later patches were solved on the model that carried the earlier ones. The ledger keeps their v_star
and their settings, so they are solved again in closed form, without a gradient. Patches of the same
layers are solved again in any case; those of other layers, if one of their facts would be lost. If
a fact would be lost all the same, the targets of its patch are searched again.

Appended neurons are rows. Taking out such a patch, or some of its facts, drops their rows and
solves nothing: the other rows and every low-rank patch stay, bit for bit. And no change of a
low-rank patch solves appended neurons again. What stays is asked in any case. So a fact that rested
on what went is named, and the revert needs force.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from ..core.errors import InputError, NumericsError
from ..core.progress import Progress, tell
from ..core.tables import counted
from ..corpus.moments_store import moments_digest, recorded_moments
from ..edit.delta import Delta
from ..edit.inputs import Moments
from ..edit.neurons import edits_neurons
from ..edit.resolve import resolve
from ..model.turns import asking
from ..patch.bench import Bench
from ..patch.proof import ask, prove
from ..patch.recipe import Sources
from ..patch.verification import Check
from .asked import held_when_kept, said
from .carried import Carried, newest_facts
from .ledger import Ledger
from .revision import Revision, Step


@dataclass(frozen=True)
class Undoing:
    """What the model carries after a revert.

    Attributes:
        deltas: {patch id: its delta}, in ledger order.
        changed: The ids of the patches that have a new delta: those that were solved again, and
            those of appended neurons of which some rows are dropped.
        solves: Whether patches may be solved again. Not where only appended neurons come or go.
        solved: The ids of the patches that were solved again.
        also: Those of them that touch no layer of a patch that changed: their facts would have been
            lost.
        report: What every fact that stays is answered, and what was solved again.
    """

    deltas: dict[str, Delta]
    changed: tuple[str, ...] = ()
    solves: bool = True
    solved: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    report: dict[str, Any] = field(default_factory=dict)


def revert_in_ledger(
    folder: str | os.PathLike[str],
    reference: str,
    facts: Sequence[int] | None = None,
    *,
    message: str = "",
    ask: bool = True,
) -> Revision | None:
    """Record a revert without the model, where no patch is in effect afterwards.

    Args:
        folder: The workspace.
        reference: The revision's id, a unique prefix, or "latest".
        facts: Indices of the patch's facts that go. None: all.
        message: One line for the log.
        ask: Whether the facts that stay have to be asked.

    Returns:
        The revert. None: what stays has to be asked, or solved again, and that needs
        `Workbench.revert`.

    Raises:
        RevisionError: There is no such patch or fact in effect.
        WorkspaceError: The workspace cannot be written.
    """
    with Ledger(folder) as ledger:
        steps = ledger.undoing(reference, facts)
        if any(step.solve or (ask and step.facts is not None) for step in steps):
            return None
        return ledger.revert(reference, facts=facts, message=message)


@asking(grad=True, changes=True)
def undo(
    bench: Bench,
    carried: Carried,
    target: Revision,
    facts: Sequence[int] | None,
    sources: Sources,
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> Undoing:
    """Work out what the model carries without a patch, or without some of its facts; nothing is
    recorded.

    A patch in another layer may rest on what goes, too. So every fact that stays is asked, and the
    patches of those that would be lost are solved again: in closed form, then with another search.

    Args:
        bench: The workbench.
        carried: What its model carries; it is as before when this returns.
        target: The revision to take out, or the revert to take back.
        facts: Indices of the patch's facts that go. None: all.
        sources: Second moments for patches that must be solved again. None given: those they were
            made with.
        force: Go on when a fact that stays would be lost.
        progress: Called with the step's name, how much is done, and how much there is.

    Raises:
        RevisionError: There is no such patch or fact in effect.
        InputError: The second moments are not those that a patch was made with.
        NumericsError: A fact that stays would be lost.
    """
    attempt = _Attempt(bench, carried, sources, progress)
    undoing, lost = attempt.without(target, facts)
    trouble = ""
    while lost and not trouble and attempt.tries_harder(undoing, lost):
        try:
            undoing, lost = attempt.without(target, facts)
        except InputError as error:  # the moments are gone, or the settings cannot be read
            trouble = f". What they are from cannot be solved again: {error}"
    if lost and not force:
        again = f", though {_patches(undoing.solved)} solved again" if undoing.solved else ""
        raise NumericsError(
            f"taking out {target.id[:10]} would lose {counted(len(lost), 'fact')} that should "
            f"stay{again}: {said(lost)}{trouble}. Nothing was recorded; force it, and write again "
            "what was lost"
        )
    return attempt.with_report(undoing, lost)


class _Attempt:
    """Works out reverts, and asks what stays."""

    def __init__(
        self, bench: Bench, carried: Carried, sources: Sources, progress: Progress | None
    ) -> None:
        self.bench, self.carried, self.sources = bench, carried, sources
        self.progress = progress
        self._held = held_when_kept(carried.ledger.log())
        self._now = newest_facts(carried.deltas.values())
        self._also: set[str] = set()
        self._searched: set[str] = set()
        self._solved: dict[tuple[str, bool, tuple[str, ...]], Delta] = {}

    def tries_harder(self, undoing: Undoing, lost: Sequence[Check]) -> bool:
        """Return whether more can be done for facts that would be lost.

        Their patches are solved again in closed form; where that was done, their targets are
        searched again. The state before the newest revision is restored without either. So are
        appended neurons, and what stays when some are dropped.
        """
        texts = {check.prompt for check in lost}
        revisions = {revision.id: revision for revision in self.carried.ledger.log()}
        owners = {
            fact.text: revisions[patch]
            for patch, delta in undoing.deltas.items()
            for fact in delta.facts
            if fact.text in texts
        }
        if not undoing.solves:
            return False
        patches = {patch.id for patch in owners.values() if not patch.appended}
        kept = patches - set(undoing.solved)
        if kept - self._also:
            self._also |= kept
            return True
        again = (patches & set(undoing.solved)) - self._searched
        self._searched |= again
        return bool(again)

    def without(self, target: Revision, facts: Sequence[int] | None) -> tuple[Undoing, list[Check]]:
        """Return what is carried afterwards, and the checks of facts that would be lost."""
        ledger = self.carried.ledger
        every = ledger.undoing(target.id, facts, self._also)
        moved = [step for step in every if step.facts != step.patch.indices_in_effect]
        steps = [step for step in every if step.facts is not None]
        changed = tuple(step.patch.id for step in steps if step.solve)
        again = tuple(step.patch.id for step in steps if step.solve and not step.patch.appended)
        if changed:
            ledger.expect(self.carried.at)  # before the work, not after it
        deltas: dict[str, Delta] = {}
        for step in steps:
            if step.delta is not None:
                deltas[step.patch.id] = self.carried.delta_of(step.patch, step.delta)
            else:
                doing = "dropping rows" if step.patch.appended else "solving again"
                tell(self.progress, doing, len(deltas), len(steps))
                deltas[step.patch.id] = self._solve_again(step, list(deltas.values()))
        undoing = Undoing(
            deltas,
            changed=changed,
            solves=not all(step.patch.appended for step in moved),
            solved=again,
            also=tuple(sorted(self._also & set(again))),
        )
        return undoing, self._lost(undoing)

    def _lost(self, undoing: Undoing) -> list[Check]:
        """Return the checks of facts that stay or come back, and would not hold any more.

        Of a fact that is in effect now, the model says whether it holds now. Of one that comes
        back, the records say whether it held.
        """
        facts = newest_facts(undoing.deltas.values())
        with self.carried.exactly(undoing.deltas.values()):
            failed = ask(self.bench.lm, facts, self.progress).failed()
        texts = {check.prompt for check in failed}
        staying = [fact for fact in facts if fact.text in texts and fact in self._now]
        held = {check.prompt: check.held for check in ask(self.bench.lm, staying).checks}
        return [
            check
            for check in failed
            if held.get(check.prompt, self._held.get((check.prompt, check.wanted, check.forget)))
        ]

    def with_report(self, undoing: Undoing, lost: Sequence[Check]) -> Undoing:
        """Return the same with its report: the proof of what stays, and what was solved again."""
        facts = newest_facts(undoing.deltas.values())

        def after() -> AbstractContextManager[None]:
            return self.carried.exactly(undoing.deltas.values())

        if undoing.solved:
            proof = prove(self.bench.lm, facts, after, progress=self.progress)
        else:
            with after():
                proof = ask(self.bench.lm, facts, self.progress)
        report = {
            "asked": len(facts),
            "solved_again": list(undoing.solved),
            "lost": [check.in_words for check in lost],
        }
        if lost:
            report["forced"] = True
        return dataclasses.replace(undoing, report=proof.to_dict() | report if facts else {})

    def _solve_again(self, step: Step, below: Sequence[Delta]) -> Delta:
        """The delta of a patch, or of the facts of it that stay, on top of other deltas than
        before.
        """
        if step.patch.appended:
            original = Delta.load(self.carried.ledger.delta_folder(step.patch, step.patch.delta))
            staying = [original.facts[i] for i in step.facts or ()]
            return resolve(self.bench.lm, original, staying, moments={})
        search = step.patch.id in self._searched
        known = (step.patch.id, search, tuple(delta.digest for delta in below))
        if known not in self._solved:
            original = Delta.load(self.carried.ledger.delta_folder(step.patch, step.patch.delta))
            if not step.patch.facts and not edits_neurons(original):
                return original  # not from a method of this library: it is added unchanged
            moments = self._moments(step.patch) if step.patch.facts else {}
            with self.carried.exactly(below):
                self._solved[known] = resolve(
                    self.bench.lm,
                    original,
                    [original.facts[i] for i in step.facts or ()],
                    moments=moments,
                    beneath=self.carried.on_base(below),
                    search=search,
                    progress=self.progress,
                )
        return self._solved[known]

    def _moments(self, patch: Revision) -> Moments:
        """The second moments that a patch was made with, or those that were given."""
        if self.sources.moments is not None:
            return self.sources.moments
        if patch.moments is not None:
            folder = self.carried.ledger.folder / "moments"
            if (recorded := recorded_moments(folder, patch.layers, patch.moments)) is not None:
                return recorded
        moments = self.bench.moments(patch.layers, self.sources, self.progress)
        if patch.moments not in (None, moments_digest(moments, patch.layers)):
            raise InputError(
                f"{patch.id[:10]} has to be solved again, and the second moments that it was made "
                "with are not in the workspace any more; "
                "give them, or put them back into the workspace's moments folder",
                argument="moments",
            )
        return moments


def _patches(ids: Sequence[str]) -> str:
    """Return "1 patch was" or "2 patches were"."""
    return f"{counted(len(ids), 'patch', 'es')} {'was' if len(ids) == 1 else 'were'}"
