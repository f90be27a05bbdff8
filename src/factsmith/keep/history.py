"""The history of a workspace, as pure functions over its records.

    entries = [read_entry(row.number, row.id, row.parent, row.record) for row in rows]
    revisions = seen_from(entries, 3)               # every revision, as it is after entry 3
    steps = undoing(entries, 3, revisions[0].id)    # what a revert of the first would do

A history is one line of entries, oldest first. A patch adds a delta. A revert changes the deltas of
earlier patches: it takes a patch out of effect, brings it back, or replaces its delta by one that
holds fewer facts or was solved again. So the patches in effect after an entry follow from replaying
the entries up to it.

A patch that updates weights is solved on top of the patches before it. When one of these changes,
every later patch that updates one of its layers must be solved again, edits of neurons included: an
erased value is the value of then subtracted. `undoing` finds these patches; it solves nothing.

Appended neurons are rows of their own. A patch that appends neurons (`Revision.appended`) is never
solved again: its rows stay, bit for bit, and those of facts that go are dropped. No other patch is
solved again because such rows go or come. Low-rank patches keep to their rule among themselves.

This module knows no database and no files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..core.errors import DamagedError, InputError, RevisionError
from ..core.fact import Fact
from .revision import Change, Revision, RevisionState, Step, StoredRecord

Indices = tuple[int, ...] | None
"""The facts of a patch that are in effect, by their indices; None: the patch is out of effect."""


@dataclass(frozen=True)
class Entry:
    """One record of the history, read and checked.

    Attributes:
        number: Its place in the history. The first entry has number 1.
        id: The sha256 (hex) of its text.
        record: What the text says.
        facts: The facts of the record.
    """

    number: int
    id: str
    record: StoredRecord
    facts: tuple[Fact, ...]


@dataclass(frozen=True)
class Carried:
    """What the model carries for one patch: the sha256 of a delta, and the facts in it."""

    delta: str
    facts: tuple[int, ...]


# ── reading ───────────────────────────────────────────────────────────────────────────────────────


def read_entry(number: int, identity: str, parent: str, text: str) -> Entry:
    """Read one record and check it against its id and the id of its parent.

    Raises:
        DamagedError: when the record does not match its id or its parent, or makes no sense.
    """
    try:
        if hashlib.sha256(text.encode()).hexdigest() != identity:
            raise ValueError("its record does not match its id")
        record = StoredRecord.model_validate_json(text)
        if record.parent != parent:
            raise ValueError("its record names another parent than its row does")
        is_revert, has_delta = record.reverts is not None, record.delta is not None
        if (is_revert, has_delta) != (record.kind == "revert", record.kind == "patch"):
            raise ValueError(
                "a patch has a delta and reverts nothing, and a revert is the other way round"
            )
        facts = tuple(Fact.from_dict(fact) for fact in record.facts)
    except ValueError as error:  # errors of pydantic and of facts are ValueErrors too
        problem = "; ".join(str(error).splitlines())
        raise DamagedError(f"Revision {identity[:10]} is damaged: {problem}") from None
    return Entry(number, identity, record, facts)


def seen_from(entries: Sequence[Entry], number: int) -> list[Revision]:
    """Return every revision, oldest first, as seen from the entry with this number.

    Args:
        entries: The whole history, oldest first.
        number: The place to look from. 0: the base, before every entry.

    Raises:
        DamagedError: when a revert speaks of a patch or a fact that does not exist.
    """
    _check_changes(entries)
    carried = _carried_after(entry for entry in entries if entry.number <= number)
    reverted_by = _reverted_by(entries)
    return [
        _revision(entry, number, carried.get(entry.id), reverted_by.get(entry.id))
        for entry in entries
    ]


def check_chain(entries: Iterable[Entry], first: str, base: str) -> None:
    """Check that each entry follows its parent, and was made for the same model.

    Args:
        entries: The whole history, oldest first.
        first: The parent of the first entry.
        base: The fingerprint of the unpatched model.

    Raises:
        DamagedError: at the first entry of which this is not true.
    """
    parent = first
    for entry in entries:
        if entry.record.parent != parent:
            raise DamagedError(
                f"Revision {entry.id[:10]} follows {parent[:10]}, but names "
                f"{entry.record.parent[:10]} as its parent"
            )
        if entry.record.base != base:
            raise DamagedError(
                f"Revision {entry.id[:10]} was made for the model {entry.record.base[:10]}, and "
                f"the workspace is for {base[:10]}"
            )
        parent = entry.id


def _check_changes(entries: Iterable[Entry]) -> None:
    n_facts: dict[str, int] = {}
    for entry in entries:
        for patch, change in entry.record.changed.items():
            if patch not in n_facts:
                raise DamagedError(
                    f"Revision {entry.id[:10]} is damaged: it changes {patch[:10]}, which is not "
                    "an earlier patch"
                )
            if any(not 0 <= i < n_facts[patch] for i in change.facts):
                raise DamagedError(
                    f"Revision {entry.id[:10]} is damaged: it keeps facts {change.facts} of "
                    f"{patch[:10]}, which has {n_facts[patch]}"
                )
        if entry.record.kind == "patch":
            n_facts[entry.id] = len(entry.facts)


def _carried_after(entries: Iterable[Entry]) -> dict[str, Carried]:
    """Replay entries: what the model carries after them, by the id of the patch."""
    carried: dict[str, Carried] = {}
    for entry in entries:
        if entry.record.delta is not None:
            carried[entry.id] = Carried(entry.record.delta, tuple(range(len(entry.facts))))
        for patch, change in entry.record.changed.items():
            if change.delta is None:
                carried.pop(patch, None)
            else:
                carried[patch] = Carried(change.delta, tuple(change.facts))
    return carried


def _reverted_by(entries: Iterable[Entry]) -> dict[str, str]:
    """Return, for each entry that is undone completely, the id of the newest revert that did it."""
    reverted_by: dict[str, str] = {}
    for entry in entries:
        record = entry.record
        if record.reverts is not None and record.reverts not in record.changed:
            reverted_by[record.reverts] = entry.id  # the revert of a revert
        for patch, change in record.changed.items():
            if change.delta is None:
                reverted_by[patch] = entry.id
            else:
                reverted_by.pop(patch, None)
    return reverted_by


def _revision(
    entry: Entry, number: int, carried: Carried | None, reverted_by: str | None
) -> Revision:
    record = entry.record
    state: RevisionState = "active"
    if entry.number > number:
        state = "later"
    elif record.kind == "patch" and carried is None:
        state = "reverted"
    changes = {
        patch: Change(delta=each.delta, delta_bytes=each.delta_bytes, facts=tuple(each.facts))
        for patch, each in record.changed.items()
    }
    return Revision(
        id=entry.id,
        number=entry.number,
        state=state,
        reverted_by=reverted_by,
        carried=None if carried is None else carried.delta,
        in_effect=() if carried is None else tuple(entry.facts[i] for i in carried.facts),
        **{
            **vars(record),
            "facts": entry.facts,
            "layers": tuple(record.layers),
            "changes": changes,
            "appended": dict(record.appended),
        },
    )


def named_deltas(revisions: Iterable[Revision]) -> set[str]:
    """Return the sha256 of every delta that a revision names."""
    return {delta for revision in revisions for delta in revision.deltas}


# ── undoing ───────────────────────────────────────────────────────────────────────────────────────


def undoing(
    entries: Sequence[Entry],
    current: int,
    identity: str,
    facts: Sequence[int] | None = None,
    also: Collection[str] = (),
) -> list[Step]:
    """Return what a revert would do to each patch, in the order of the history.

    Undoing a patch takes its facts out of effect. Undoing a revert brings back the facts it took
    out, and takes out those it brought back. Undoing the newest revision restores the deltas that
    were carried before it. Otherwise a patch is solved again if some of its facts go or come, or if
    it touches a layer in which an earlier patch changes: it was solved on top of that patch. In
    another layer it may rest on the change, too. That shows when its facts are asked, and `also`
    names such patches. Appended neurons are not solved again, and nothing is because of them: some
    of a patch's rows are dropped, or all come back.

    Args:
        entries: The whole history, oldest first.
        current: The number of the entry that is checked out. 0: the base.
        identity: The id of the entry to undo.
        facts: The indices of the patch's facts to take out. None: all of them.
        also: The ids of patches to solve again in any case. The state before the newest revision is
            restored without them.

    Returns:
        One step for each patch that is in effect before or after the revert.

    Raises:
        RevisionError: when the entry is not in effect, or has no such facts in effect.
    """
    now = seen_from(entries, current)
    revision = next(each for each in now if each.id == identity)
    before = {each.id: each for each in seen_from(entries, revision.number - 1)}
    patches = [each for each in now if each.kind == "patch"]
    wanted = {patch.id: patch.indices_in_effect for patch in patches}
    if revision.kind == "patch":
        wanted[revision.id] = _facts_left(revision, facts)
    elif facts is not None:
        raise RevisionError(
            f"Revision {revision.id[:10]} is a revert, and a revert is undone as a whole. Leave "
            "the facts out.",
            argument="facts",
        )
    else:
        wanted |= _facts_restored(revision, wanted, before)
    if revision.number == current == entries[-1].number:
        return _steps_back(patches, wanted, before)
    return _steps_ahead(patches, wanted, also)


def _facts_left(patch: Revision, facts: Sequence[int] | None) -> Indices:
    """Return the facts of a patch that stay when some of them, or all, are taken out."""
    present = patch.indices_in_effect
    if present is None or patch.state != "active":
        advice = (
            "Check out the latest revision first (`factsmith checkout latest`)."
            if patch.state == "later"
            else "`factsmith log` shows the revisions that are."
        )
        raise RevisionError(f"Revision {patch.id[:10]} is not in effect ({patch.state}). {advice}")
    taken = set(present if facts is None else facts)
    if facts is not None and (not taken or not taken <= set(present)):
        raise RevisionError(
            f"facts is {sorted(taken)}, but the facts of revision {patch.id[:10]} in effect are "
            f"{list(present)}. Name one or more of these.",
            argument="facts",
        )
    return tuple(i for i in present if i not in taken) or None


def _facts_restored(
    revert: Revision, present: Mapping[str, Indices], before: Mapping[str, Revision]
) -> dict[str, Indices]:
    """Return the facts in effect of each patch whose facts a revert moved, once it is undone."""
    if revert.state == "later":
        raise RevisionError(
            f"Revision {revert.id[:10]} is not in effect (later). Check out the latest revision "
            "first (`factsmith checkout latest`)."
        )
    restored: dict[str, Indices] = {}
    for identity, change in revert.changes.items():
        patch = before[identity]
        earlier = patch.indices_in_effect
        later = None if change.delta is None else change.facts
        if earlier == later:
            continue  # the patch was only solved again
        if not patch.facts:
            restored[identity] = earlier  # an edit of neurons is in effect as a whole, or not
            continue
        taken = set(earlier or ()) - set(later or ())
        brought = set(later or ()) - set(earlier or ())
        facts = (set(present[identity] or ()) | taken) - brought
        restored[identity] = tuple(sorted(facts)) or None
    if all(facts == present[identity] for identity, facts in restored.items()):
        raise RevisionError(
            f"Revision {revert.id[:10]} was undone already. `factsmith log` shows the patches in "
            "effect; each of them can be reverted by its own id."
        )
    return restored


def _steps_back(
    patches: Iterable[Revision], wanted: Mapping[str, Indices], before: Mapping[str, Revision]
) -> list[Step]:
    """Return the steps to the state before the newest revision, with the very deltas of then."""
    return [
        Step(patch=patch, facts=wanted[patch.id], delta=before[patch.id].carried)
        for patch in patches
        if patch.carried is not None or before[patch.id].carried is not None
    ]


def _steps_ahead(
    patches: Iterable[Revision], wanted: Mapping[str, Indices], also: Collection[str]
) -> list[Step]:
    """Return the steps to a new state; a patch above a layer that changed is solved again.

    A patch of appended neurons keeps its rows, and gets those of its facts back that were dropped.
    """
    steps: list[Step] = []
    changed_layers: set[int] = set()
    for patch in patches:
        facts = wanted[patch.id]
        if facts is None and patch.carried is None:
            continue
        delta = None
        if patch.appended:
            if facts == patch.indices_in_effect:
                delta = patch.carried
            elif facts == tuple(range(len(patch.facts))):
                delta = patch.delta
            steps.append(Step(patch=patch, facts=facts, delta=delta))
            continue
        rests_on_change = patch.id in also or bool(changed_layers & set(patch.layers))
        if facts == patch.indices_in_effect and not rests_on_change:
            delta = patch.carried
        else:
            changed_layers |= set(patch.layers)
        steps.append(Step(patch=patch, facts=facts, delta=delta))
    return steps


def moved_facts(steps: Iterable[Step]) -> list[Fact]:
    """Return the facts that come into effect or leave it, in the order of the history."""
    return [
        step.patch.facts[i]
        for step in steps
        for i in sorted(set(step.patch.indices_in_effect or ()) ^ set(step.facts or ()))
    ]


def check_solved(revision: Revision, steps: Iterable[Step], solved: Collection[str]) -> None:
    """Check that exactly the patches that must be solved again were.

    Args:
        revision: The entry that is undone.
        steps: The steps that `undoing` returns for that entry.
        solved: The ids of the patches that were solved again.

    Raises:
        RevisionError: when one is missing.
        InputError: when there is one too many.
    """
    needed = [step.patch.id for step in steps if step.solve]
    if missing := [identity[:10] for identity in needed if identity not in solved]:
        raise RevisionError(
            f"Undoing {revision.id[:10]} changes what {', '.join(missing)} was solved on top of. "
            "Revert with a Workbench, which solves it again."
        )
    if extra := sorted(identity[:10] for identity in set(solved) - set(needed)):
        raise InputError(
            f"solved has a new delta for {', '.join(extra)}, which does not change. Give deltas "
            "for the steps of `undoing` that say so.",
            argument="solved",
        )
