"""Take something out of the middle: solve again what was solved on top of it, and prove that what
stays still holds.

Later patches were solved on the model that carried the earlier ones. The ledger keeps their v_star
and their settings, so they are solved again in closed form, without a gradient.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..core.errors import InputError, NumericsError
from ..core.progress import Progress, tell
from ..core.tables import counted
from ..corpus.moments_store import moments_digest
from ..edit.delta import Delta
from ..edit.resolve import resolve
from ..model.answers import first_phrase
from ..patch.bench import Bench
from ..patch.proof import held_before, prove
from ..patch.recipe import Sources
from .carried import Carried, newest_facts
from .ledger import Ledger
from .revision import Revision, Step


@dataclass(frozen=True)
class Undoing:
    """What the model carries after a revert.

    Attributes:
        deltas: {patch id: its delta}, in ledger order.
        solved: The ids of the patches that were solved again.
        report: The proof that what stays still holds; {} where nothing was solved again.
    """

    deltas: dict[str, Delta]
    solved: tuple[str, ...] = ()
    report: dict[str, Any] = field(default_factory=dict)


def revert_in_ledger(
    folder: str | os.PathLike[str],
    reference: str,
    facts: Sequence[int] | None = None,
    *,
    message: str = "",
) -> Revision | None:
    """Record a revert without the model, where nothing has to be solved again.

    Args:
        folder: The workspace.
        reference: The revision's id, a unique prefix, or "latest".
        facts: Indices of the patch's facts that go. None: all.
        message: One line for the log.

    Returns:
        The revert. None: patches have to be solved again, and that needs `Workbench.revert`.

    Raises:
        RevisionError: There is no such patch or fact in effect.
        WorkspaceError: The workspace cannot be written.
    """
    with Ledger(folder) as ledger:
        if any(step.solve for step in ledger.undoing(reference, facts)):
            return None
        return ledger.revert(reference, facts=facts, message=message)


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
    steps = [step for step in carried.ledger.undoing(target.id, facts) if step.facts is not None]
    again = tuple(step.patch.id for step in steps if step.solve)
    if again:
        carried.ledger.expect(carried.at)  # before the work, not after it
    deltas: dict[str, Delta] = {}
    for step in steps:
        if step.delta is not None:
            deltas[step.patch.id] = carried.delta_of(step.patch, step.delta)
        else:
            tell(progress, "solving again", len(deltas), len(steps))
            below = list(deltas.values())
            deltas[step.patch.id] = _solve_again(bench, carried, step, below, sources, progress)
    if not again:
        return Undoing(deltas)
    tell(progress, "verifying", 0, None)
    proof = prove(bench.lm, newest_facts(deltas.values()), lambda: carried.exactly(deltas.values()))
    lost = [check for check in proof.failed("prompt") if held_before(check)]
    if lost and not force:
        raise NumericsError(
            f"taking out {target.id[:10]} would lose {counted(len(lost), 'fact')} that should "
            "stay, the first: "
            f"{lost[0].prompt!r} would be answered {first_phrase(lost[0].after)!r}. Nothing was "
            "recorded; force it, and write again what "
            "was lost"
        )
    return Undoing(deltas, again, proof.to_dict())


def _solve_again(
    bench: Bench,
    carried: Carried,
    step: Step,
    below: Sequence[Delta],
    sources: Sources,
    progress: Progress | None,
) -> Delta:
    """The delta of a patch, or of the facts of it that stay, on top of other deltas than before."""
    patch = step.patch
    original = Delta.load(carried.ledger.delta_folder(patch, patch.delta))
    moments = sources.moments
    if moments is None:
        moments = bench.moments(patch.layers, sources, progress)
        if patch.moments not in (None, moments_digest(moments, patch.layers)):
            raise InputError(
                f"{patch.id[:10]} has to be solved again, and the second moments that it was made "
                "with are not in the workspace any more; "
                "give them, or put them back into the workspace's moments folder",
                argument="moments",
            )
    with carried.exactly(below):
        return resolve(
            bench.lm,
            original,
            [original.facts[i] for i in step.facts or ()],
            moments=moments,
            beneath=carried.on_base(below),
            progress=progress,
        )
