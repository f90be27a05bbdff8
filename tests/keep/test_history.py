"""A history is replayed from its records alone, without files, database or model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from factsmith.core.errors import DamagedError, InputError, RevisionError
from factsmith.core.fact import Fact
from factsmith.keep.history import (
    Entry,
    check_chain,
    check_solved,
    moved_facts,
    named_deltas,
    read_entry,
    seen_from,
    undoing,
)
from factsmith.keep.revision import BASE, Revision, Step, StoredChange, StoredRecord
from ledgers import FINGERPRINT


def digest(text: str) -> str:
    """A stand-in for the sha256 of a delta."""
    return hashlib.sha256(text.encode()).hexdigest()


class Line:
    """A history that a test extends with stand-in entries."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []

    @property
    def newest(self) -> int:
        return len(self.entries)

    def _append(self, **fields: Any) -> Entry:
        record = StoredRecord(
            parent=self.entries[-1].id if self.entries else BASE,
            created="2026-01-02T03:04:05+00:00",
            message="",
            base=FINGERPRINT,
            method="rome",
            config={},
            moments=None,
            report={},
            delta_bytes=0,
            **fields,
        )
        identity, text = record.sealed()
        self.entries.append(read_entry(self.newest + 1, identity, record.parent, text))
        return self.entries[-1]

    def patch(self, name: str, layers: Sequence[int] = (1,), n_facts: int = 1) -> str:
        """Add a patch and return its id."""
        facts = [Fact(f"Subject{i}", "{} is", name).to_dict() for i in range(n_facts)]
        return self._append(
            kind="patch", facts=facts, layers=list(layers), delta=digest(name), reverts=None
        ).id

    def undo(self, identity: str, facts: Sequence[int] | None = None) -> tuple[str, list[Step]]:
        """Add a revert and return its id and its steps. Patches solved again get new deltas."""
        steps = undoing(self.entries, self.newest, identity, facts)
        changes = {}
        for step in steps:
            delta = digest(f"{self.newest} {step.patch.id}") if step.solve else step.delta
            if delta != step.patch.carried:
                changes[step.patch.id] = StoredChange(
                    delta=delta, delta_bytes=0, facts=list(step.facts or ())
                )
        moved = [fact.to_dict() for fact in moved_facts(steps)]
        entry = self._append(
            kind="revert", facts=moved, layers=[], delta=None, reverts=identity, changes=changes
        )
        return entry.id, steps

    def active(self, number: int | None = None) -> dict[str, Revision]:
        """The patches in effect at a place. With None, at the newest."""
        seen = seen_from(self.entries, self.newest if number is None else number)
        return {each.id: each for each in seen if each.carried is not None}


def solved(steps: Sequence[Step]) -> list[str]:
    return [step.patch.id for step in steps if step.solve]


def test_an_entry_is_seen_from_every_place() -> None:
    line = Line()
    one, two = line.patch("one"), line.patch("two", (2,))
    gone, _ = line.undo(one)
    states = [[each.state for each in seen_from(line.entries, n)] for n in range(4)]
    assert states == [
        ["later", "later", "later"],
        ["active", "later", "later"],
        ["active", "active", "later"],
        ["reverted", "active", "active"],
    ]
    assert [list(line.active(n)) for n in range(4)] == [[], [one], [one, two], [two]]
    assert line.active(2)[one].carried == digest("one")
    assert [each.reverted_by for each in seen_from(line.entries, 0)] == [gone, None, None]


def test_patches_on_a_change_are_solved_again() -> None:
    line = Line()
    first = line.patch("first", (1,))
    apart, above, higher = (
        line.patch("apart", (5,)),
        line.patch("above", (1, 2)),
        line.patch("higher", (2,)),
    )
    _, steps = line.undo(first)
    assert [(step.patch.id, step.facts, step.solve) for step in steps] == [
        (first, None, False),
        (apart, (0,), False),
        (above, (0,), True),
        (higher, (0,), True),  # not on top of the first, but on top of the changed one
    ]
    after = line.active()
    assert list(after) == [apart, above, higher] and after[apart].carried == digest("apart")
    assert all(after[each].carried != after[each].delta for each in (above, higher))


def test_undoing_the_newest_restores_the_earlier_deltas() -> None:
    line = Line()
    first, above = line.patch("first"), line.patch("above")
    line.undo(first, facts=None)
    before = {patch: each.carried for patch, each in line.active().items()}
    last = line.patch("last")
    gone, steps = line.undo(last)
    assert solved(steps) == [] and {p: r.carried for p, r in line.active().items()} == before
    back, steps = line.undo(gone)
    assert solved(steps) == [] and list(line.active()) == [above, last]
    assert seen_from(line.entries, line.newest)[line.newest - 2].reverted_by == back


def test_some_facts_are_reverted_and_restored() -> None:
    line = Line()
    patch, above = line.patch("patch", n_facts=3), line.patch("above")
    part, steps = line.undo(patch, [0, 2])
    assert solved(steps) == [patch, above]
    assert [fact.subject for fact in moved_facts(steps)] == ["Subject0", "Subject2"]
    assert line.active()[patch].indices_in_effect == (1,)
    line.patch("later", (7,))
    _, steps = line.undo(part)
    assert line.active()[patch].indices_in_effect == (0, 1, 2) and solved(steps) == [patch, above]


def test_edits_of_neurons_on_a_change_are_made_again() -> None:
    line = Line()
    first, bare = line.patch("first"), line.patch("bare", n_facts=0)
    apart, last = line.patch("apart", (5,), n_facts=0), line.patch("last")
    _, steps = line.undo(first)
    assert solved(steps) == [bare, last] and line.active()[apart].carried == digest("apart")
    gone, _ = line.undo(bare)
    line.patch("another", (9,))
    _, steps = line.undo(gone)
    assert solved(steps) == [bare, last] and line.active()[bare].indices_in_effect == ()


def test_other_patches_can_be_named_to_solve_again() -> None:
    line = Line()
    first, apart = line.patch("first", (1,)), line.patch("apart", (5,))
    above, free = line.patch("above", (5, 6)), line.patch("free", (7,))
    assert solved(undoing(line.entries, 4, first)) == []
    assert solved(undoing(line.entries, 4, first, also=[apart])) == [apart, above]
    assert solved(undoing(line.entries, 4, free, also=[apart])) == [], (
        "the state before the newest revision is restored unchanged"
    )


def test_two_equal_facts_of_a_patch_are_two() -> None:
    line = Line()
    fact = Fact("Subject", "{} is", "a").to_dict()
    patch = line._append(
        kind="patch", facts=[fact, fact], layers=[1], delta=digest("x"), reverts=None
    ).id
    line.undo(patch, [0])
    assert line.active()[patch].indices_in_effect == (1,)


def test_an_impossible_revert_is_refused() -> None:
    line = Line()
    patch = line.patch("patch", n_facts=2)
    gone, _ = line.undo(patch)
    cases: list[tuple[int, str, list[int] | None, str]] = [
        (2, patch, None, r"not in effect \(reverted\)"),
        (0, patch, None, r"not in effect \(later\).*checkout latest"),
        (1, gone, None, r"not in effect \(later\).*checkout latest"),
        (2, gone, [0], "Leave the facts out"),
        (1, patch, [2], r"facts is \[2\], but .* in effect are \[0, 1\]. Name one or more"),
        (1, patch, [], "Name one or more"),
    ]
    for current, identity, facts, words in cases:
        with pytest.raises(RevisionError, match=words):
            undoing(line.entries, current, identity, facts)
    line.undo(gone)
    with pytest.raises(RevisionError, match="was undone already"):
        undoing(line.entries, line.newest, gone)


def test_a_revert_needs_exactly_the_deltas_to_solve_again() -> None:
    line = Line()
    first, above, apart = line.patch("first"), line.patch("above"), line.patch("apart", (5,))
    steps = undoing(line.entries, 3, first)
    revision = steps[0].patch
    check_solved(revision, steps, {above})
    with pytest.raises(RevisionError, match=f"changes what {above[:10]} was solved on top of"):
        check_solved(revision, steps, set())
    with pytest.raises(InputError, match=f"a new delta for {apart[:10]}") as caught:
        check_solved(revision, steps, {above, apart})
    assert caught.value.argument == "solved"


def test_every_named_delta_counts() -> None:
    line = Line()
    first, above = line.patch("first"), line.patch("above")
    line.undo(first)
    names = named_deltas(seen_from(line.entries, 0))
    assert names == {digest("first"), digest("above"), digest(f"2 {above}")}


def _altered(entry: Entry, **changes: Any) -> tuple[str, str]:
    """Return an id and a matching text with other values."""
    text = json.dumps({**entry.record.model_dump(), **changes})
    return hashlib.sha256(text.encode()).hexdigest(), text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kind": "revert"}, "the other way round"),
        ({"delta": None}, "the other way round"),
        ({"delta": "../x"}, "pattern"),
        ({"facts": [{"subject": ""}]}, "damaged"),
        ({"more": 1}, "more"),
        ({"parent": "ffff"}, "another parent"),
    ],
)
def test_a_record_that_makes_no_sense_is_damaged(changes: Mapping[str, Any], words: str) -> None:
    line = Line()
    line.patch("one")
    identity, text = _altered(line.entries[0], **changes)
    with pytest.raises(DamagedError, match=words):
        read_entry(1, identity, BASE, text)
    with pytest.raises(DamagedError, match="does not match its id"):
        read_entry(1, line.entries[0].id, BASE, text)


@pytest.mark.parametrize(
    ("patch", "facts", "words"),
    [("ab" * 32, [], "not an earlier patch"), (None, [0, 3], r"facts \[0, 3\] of .* has 2")],
)
def test_a_revert_names_existing_patches_and_facts(
    patch: str | None, facts: list[int], words: str
) -> None:
    line = Line()
    one = line.patch("one", n_facts=2)
    line.undo(one)
    change = {"delta": digest("x"), "delta_bytes": 0, "facts": facts}
    identity, text = _altered(line.entries[1], changes={patch or one: change})
    line.entries[1] = read_entry(2, identity, one, text)
    with pytest.raises(DamagedError, match=words):
        seen_from(line.entries, 0)


def test_the_chain_of_parents_is_checked() -> None:
    line = Line()
    line.patch("one")
    line.patch("two")
    check_chain(line.entries, BASE, FINGERPRINT)
    with pytest.raises(DamagedError, match="names base as its parent"):
        check_chain([line.entries[0], line.entries[0]], BASE, FINGERPRINT)
    with pytest.raises(DamagedError, match="was made for the model"):
        check_chain(line.entries, BASE, "cd" * 32)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.booleans(),
            st.frozensets(st.integers(0, 3), min_size=1, max_size=2),
            st.integers(0, 3),
            st.integers(0, 10**6),
        ),
        min_size=1,
        max_size=12,
    )
)
def test_what_the_steps_say_is_what_is_seen_afterwards(
    moves: list[tuple[bool, frozenset[int], int, int]],
) -> None:
    """Random patches and reverts. A revert of the newest entry restores the state before it."""
    line = Line()
    for is_patch, layers, n_facts, choice in moves:
        if is_patch or not line.entries:
            line.patch(f"patch {line.newest}", sorted(layers), n_facts)
            continue
        target = line.entries[choice % line.newest].id
        before = line.active()
        try:
            gone, steps = line.undo(target)
        except RevisionError:
            continue
        after = line.active()
        expected = {step.patch.id: step.facts for step in steps if step.facts is not None}
        assert {patch: each.indices_in_effect for patch, each in after.items()} == expected
        for step in steps:
            if not step.solve and step.facts is not None:
                assert after[step.patch.id].carried == step.delta
        back = undoing(line.entries, line.newest, gone)
        assert solved(back) == []
        restored = {step.patch.id: step.delta for step in back if step.delta is not None}
        assert restored == {patch: each.carried for patch, each in before.items()}
