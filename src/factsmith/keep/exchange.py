"""Take in the patches of another workspace, from a folder that `export` wrote in the format
"patch".
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..core.errors import NumericsError, RevisionError
from ..core.fact import Fact
from ..core.identity import same_model
from ..core.progress import Progress, tell
from ..core.tables import counted
from ..edit.delta import Delta
from ..edit.inputs import Moments
from ..edit.methods import find_method
from ..edit.neurons import edits_neurons
from ..edit.resolve import resolve
from ..patch.bench import Bench
from ..patch.conflicts import compare_facts
from ..patch.proof import held_before, prove
from ..patch.recipe import Sources
from ..patch.verification import Verification
from .asked import said
from .carried import Carried, newest_facts
from .export.folder import SavedPatch, read_patch


@dataclass(frozen=True)
class Arrivals:
    """Patches to commit.

    Attributes:
        deltas: Each delta with its message, in their order.
        report: The proof of all of them together, plain JSON values.
    """

    deltas: list[tuple[Delta, str]] = field(default_factory=list)
    report: dict[str, Any] = field(default_factory=dict)


def read_arrivals(
    bench: Bench,
    carried: Carried,
    folder: str | os.PathLike[str],
    sources: Sources,
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> Arrivals:
    """Read the patches of a folder, and make them fit the model as it is; nothing is recorded.

    A patch made on the very weights that it comes to is taken as it is, and so is one that only
    appends neurons. Any other is solved again for these weights, from its targets and in closed
    form; an edit of neurons is made again. What is already in effect is left out: a patch with all
    its facts, or an edit of neurons. Then the facts of the folder are asked, and all facts in
    effect.

    Args:
        bench: The workbench.
        carried: What its model carries; it is as before when this returns.
        folder: The folder.
        sources: Second moments for patches that must be solved again. None given: the kept ones.
        force: Go on when facts contradict those in effect, do not take, or push out others.
        progress: Called with the step's name, how much is done, and how much there is.

    Raises:
        RevisionError: A fact has another target here.
        NumericsError: A fact does not take, or one that was here would be lost.
        DamagedError: The folder cannot be read. Otherwise as `read_patch`.
    """
    patches = read_patch(folder, fingerprint=carried.ledger.fingerprint).patches
    for patch in patches:
        if patch.delta.facts:
            find_method(patch.delta.method)  # one that is not known could never be solved again
    targets = {fact.asked: fact.wanted for _, fact in bench.facts_in_effect}
    arrivals = Arrivals()
    contradicted = False
    for number, patch in enumerate(patches):
        facts = patch.delta.facts
        tell(progress, "taking in patches", number, len(patches))
        below = [*carried.deltas.values(), *(delta for delta, _ in arrivals.deltas)]
        if facts:
            known = all(targets.get(fact.asked, "") == fact.wanted for fact in facts)
        else:
            known = any(_same_edit(patch.delta, delta) for delta in carried.deltas.values())
        if known:
            continue
        if reason := _contradiction(bench, patch):
            if not force:
                raise RevisionError(f"{folder} has {reason}; revert that first, or force it")
            contradicted = True
        delta = _fitted(bench, carried, patch, below, sources, progress)
        arrivals.deltas.append((delta, patch.origin.message))
        targets |= {fact.asked: fact.wanted for fact in facts}
    if arrivals.deltas:
        proof = _proof(bench, carried, [delta for delta, _ in arrivals.deltas], progress)
        lost = [
            check
            for check in proof.failed("prompt", "earlier")
            if check.role == "prompt" or held_before(bench.lm, check)
        ]
        if lost and not force:
            raise NumericsError(
                f"with the patches of {folder}, {counted(len(lost), 'fact')} would not hold: "
                f"{said(lost)}. Nothing was recorded; force it, or "
                "write the facts with `factsmith apply`"
            )
        arrivals.report.update(
            proof.to_dict()
            | {
                "asked": sum(check.role in ("prompt", "earlier") for check in proof.checks),
                "lost": [check.in_words for check in lost],
                "forced": bool(lost or contradicted),
            }
        )
    return arrivals


def _same_edit(one: Delta, other: Delta) -> bool:
    """Return whether two deltas without facts are one edit, on whatever weights it was made."""
    if other.facts or (one.method, one.touched) != (other.method, other.touched):
        return False
    return one.config == other.config if edits_neurons(one) else one.digest == other.digest


def _contradiction(bench: Bench, patch: SavedPatch) -> str:
    """The first fact of a patch that contradicts one in effect, in words; "" for none."""
    facts, layers = patch.delta.facts, patch.delta.touched
    if not facts:
        return ""
    with bench.on_base():
        moments = bench.kept_moments(layers)
        unknown = [False] * len(facts)
        places = compare_facts(bench.lm, facts, bench.facts_in_effect, layers, moments, unknown)
    for fact, place in zip(facts, places, strict=True):
        if place.standing in ("changed", "conflict"):
            return f"{fact}, but {place.because}"
    return ""


def _fitted(
    bench: Bench,
    carried: Carried,
    patch: SavedPatch,
    below: Sequence[Delta],
    sources: Sources,
    progress: Progress | None,
) -> Delta:
    """A patch's delta for a model that carries `below`: the same one where it was made on these
    weights, or solved again.

    Neurons that it appends stay as they are: they share no weights with what lies below. The proof
    of all patches says whether their facts hold.
    """
    with carried.exactly(below):
        fits = same_model(patch.delta.fingerprint, bench.lm.fingerprint)
    has_facts, only_rows = bool(patch.delta.facts), not patch.delta.layers
    if fits or only_rows or not (has_facts or edits_neurons(patch.delta)):
        return patch.delta
    layers = sorted(patch.delta.layers)
    moments: Moments = {}
    if has_facts:
        moments = sources.moments or bench.moments(layers, sources, progress)
    with carried.exactly(below):
        return resolve(
            bench.lm,
            patch.delta,
            moments=moments,
            beneath=carried.on_base(below),
            progress=progress,
        )


def _proof(
    bench: Bench, carried: Carried, new: Sequence[Delta], progress: Progress | None
) -> Verification:
    """The proof that the new patches take and that the facts in effect still hold."""
    facts: list[Fact] = newest_facts(new)
    earlier = newest_facts(carried.deltas.values())
    deltas = [*carried.deltas.values(), *new]
    return prove(
        bench.lm,
        facts,
        lambda: carried.exactly(deltas),
        asked_again=earlier,
        progress=progress,
    )
