"""The ledger keeps its revisions, and refuses an operation that would lose one."""

from __future__ import annotations

import errno
import hashlib
import json
import re
import shutil
import sqlite3
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from factsmith.core.errors import DamagedError, InputError, RevisionError, WorkspaceError
from factsmith.core.fact import Fact
from factsmith.keep.ledger import BASE, LATEST, Ledger
from ledgers import FACT, FINGERPRINT, commit, delta_of, state_of


def test_create_then_open(ledger: Ledger) -> None:
    with Ledger(ledger.folder) as again:
        assert (again.model, again.fingerprint, again.head, again.current) == (
            "gpt2",
            FINGERPRINT,
            BASE,
            BASE,
        )
        assert again.log() == [] and again.active() == []
        assert again.verify().revisions == 0


def test_create_refuses_an_existing_workspace(ledger: Ledger, tmp_path: Path) -> None:
    commit(ledger, "one")
    before = state_of(ledger.folder)
    with pytest.raises(WorkspaceError, match="already holds a ledger"):
        Ledger.create(ledger.folder, model="other", fingerprint="00" * 32)
    assert state_of(ledger.folder) == before
    with pytest.raises(WorkspaceError, match="factsmith init"):
        Ledger(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(WorkspaceError):
        Ledger.create(tmp_path / "file", model="gpt2", fingerprint=FINGERPRINT)


def test_commit_is_read_back(ledger: Ledger) -> None:
    first, second = commit(ledger, "one"), commit(ledger, "two", (0, 2))
    assert [r.id for r in ledger.log()] == [second.id, first.id]
    assert (first.parent, second.parent, ledger.head, ledger.current) == (
        BASE,
        first.id,
        second.id,
        second.id,
    )
    assert (
        first.facts == (FACT,)
        and first.config == {"layer": 1, "lr": 0.5}
        and second.layers == (0, 2)
    )
    assert (
        first.report == {"exact": 1.0} and first.moments == "cd" * 32 and first.base == FINGERPRINT
    )
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", first.created)
    assert (ledger.delta_folder(first) / "delta.safetensors").read_bytes() == b"one" * 100
    assert first.delta_bytes == sum(p.stat().st_size for p in ledger.delta_folder(first).iterdir())
    assert [r.id for r in ledger.active()] == [first.id, second.id]
    assert json.loads(json.dumps(first.to_dict()))["facts"][0]["subject"] == "Danielle Darrieux"


def test_an_id_is_the_hash_of_a_record_that_names_its_parent(ledger: Ledger) -> None:
    first, second = commit(ledger, "one"), commit(ledger, "two")
    with sqlite3.connect(ledger.folder / "ledger.db") as db:
        records = [text for (text,) in db.execute("SELECT record FROM revisions ORDER BY seq")]
    db.close()
    assert [hashlib.sha256(text.encode()).hexdigest() for text in records] == [first.id, second.id]
    assert json.loads(records[1])["parent"] == first.id


def test_message_is_made_from_the_facts(ledger: Ledger) -> None:
    revision = ledger.commit(delta_of("x"), onto=BASE, method="rome", facts=[FACT], layers=[1])
    assert revision.message == "The mother tongue of Danielle Darrieux is → English"


def test_revert_is_recorded_and_takes_effect(ledger: Ledger) -> None:
    first, second = commit(ledger, "one"), commit(ledger, "two")
    undo = ledger.revert(LATEST)
    assert (undo.kind, undo.reverts, undo.parent, undo.delta) == (
        "revert",
        second.id,
        second.id,
        None,
    )
    assert [r.id for r in ledger.active()] == [first.id]
    assert (
        ledger.show(second.id).state == "reverted" and ledger.show(second.id).reverted_by == undo.id
    )
    assert [r.kind for r in ledger.log()] == ["revert", "patch", "patch"]
    with pytest.raises(RevisionError, match="not in effect"):
        ledger.revert(second.id)
    again = commit(ledger, "two")  # the same delta again is a new revision on the same files
    assert again.id != second.id and again.delta == second.delta
    assert [r.id for r in ledger.active()] == [first.id, again.id]
    assert ledger.verify().deltas == 2


def test_a_revert_is_reverted(ledger: Ledger) -> None:
    """A revert of the newest restores the same deltas. A revert of an older one solves again."""
    first, second = commit(ledger, "one", n_facts=3), commit(ledger, "two")
    gone = ledger.revert(LATEST)
    back = ledger.revert(gone.id)
    assert [(r.id, r.carried) for r in ledger.active()] == [
        (first.id, first.delta),
        (second.id, second.delta),
    ]
    assert (
        ledger.show(gone.id).reverted_by == back.id and ledger.show(second.id).reverted_by is None
    )
    with pytest.raises(RevisionError, match="was undone already"):
        ledger.revert(gone.id)
    out = ledger.revert(back.id)  # the revert is reverted in turn, and so on
    assert [r.id for r in ledger.active()] == [first.id] and ledger.show(
        second.id
    ).reverted_by == out.id
    ledger.revert(out.id)
    assert [(r.id, r.carried) for r in ledger.active()] == [
        (first.id, first.delta),
        (second.id, second.delta),
    ]
    part = ledger.revert(
        first.id, facts=[1], solved={first.id: delta_of("one'"), second.id: delta_of("two'")}
    )
    ledger.revert(second.id)
    with pytest.raises(RevisionError, match="a Workbench"):
        ledger.revert(part.id)
    ledger.revert(part.id, solved={first.id: delta_of("one again")})
    (now,) = ledger.active()
    assert (
        now.id == first.id
        and now.in_effect == first.facts
        and "one again" in (ledger.delta_folder(now) / "edit.json").read_text()
    )
    with pytest.raises(RevisionError, match="Leave the facts out"):
        ledger.revert(part.id, facts=[0])


def test_some_facts_of_a_patch_are_taken_out(ledger: Ledger) -> None:
    first, apart, later = (
        commit(ledger, "one", (1,), n_facts=3),
        commit(ledger, "apart", (5,)),
        commit(ledger, "later", (1, 2)),
    )
    steps = ledger.undoing(first.id, [0, 2])
    assert [(step.patch.id, step.facts, step.solve) for step in steps] == [
        (first.id, (1,), True),
        (apart.id, (0,), False),
        (later.id, (0,), True),
    ]
    before = state_of(ledger.folder)
    for solved in (
        {},
        {first.id: delta_of("x")},
        {first.id: delta_of("x"), later.id: delta_of("y"), apart.id: delta_of("z")},
    ):
        with pytest.raises((RevisionError, InputError)):
            ledger.revert(first.id, facts=[0, 2], solved=solved)
    for facts in ([3], [], [-1]):
        with pytest.raises(RevisionError, match="Name one or more"):
            ledger.undoing(first.id, facts)
    assert state_of(ledger.folder)["rows"] == before["rows"]
    undo = ledger.revert(
        first.id, facts=[0, 2], solved={first.id: delta_of("one'"), later.id: delta_of("later'")}
    )
    assert (
        undo.facts == (first.facts[0], first.facts[2])
        and set(undo.changes) == {first.id, later.id}
        and undo.layers == (1, 2)
    )
    now = {r.id: r for r in ledger.active()}
    assert list(now) == [first.id, apart.id, later.id]
    assert now[first.id].in_effect == (first.facts[1],) and now[first.id].reverted_by is None
    assert now[first.id].carried != first.delta and now[apart.id].carried == apart.delta
    assert json.loads((ledger.delta_folder(now[later.id]) / "edit.json").read_text()) == {
        "name": "later'"
    }
    assert ledger.verify().deltas == 5 and json.loads(json.dumps(undo.to_dict()))["changes"][
        first.id
    ]["facts"] == [1]
    (earlier,) = (r for r in ledger.active(later.id) if r.id == first.id)
    assert earlier.carried == first.delta and earlier.in_effect == first.facts, (
        "an earlier place shows the earlier state"
    )
    with pytest.raises(RevisionError, match="in effect"):
        ledger.undoing(first.id, [0])
    shutil.rmtree(ledger.delta_folder(now[later.id]))
    with pytest.raises(DamagedError, match=undo.id[:10]):
        ledger.verify()


def test_patches_without_facts_go_and_come_back(ledger: Ledger) -> None:
    """Edits of neurons write no fact. They are made again where a patch below them changes."""
    first = commit(ledger, "one")
    bare = ledger.commit(
        delta_of("neurons"),
        onto=ledger.head,
        method="erase",
        facts=[],
        layers=[1],
        message="neurons",
    )
    last = commit(ledger, "last")
    gone = ledger.revert(bare.id, solved={last.id: delta_of("last'")})
    assert [r.id for r in ledger.active()] == [first.id, last.id] and ledger.show(
        bare.id
    ).state == "reverted"
    ledger.revert(first.id, solved={last.id: delta_of("last''")})
    again = {bare.id: delta_of("neurons again"), last.id: delta_of("last again")}
    back = ledger.revert(gone.id, solved=again)
    assert [(r.id, r.carried == r.delta) for r in ledger.active()] == [
        (bare.id, False),
        (last.id, False),
    ] and back.facts == ()
    with pytest.raises(RevisionError, match="was undone already"):
        ledger.revert(gone.id)
    out = ledger.revert(back.id)
    assert [r.id for r in ledger.active()] == [last.id]
    ledger.revert(out.id)
    ledger.revert(last.id)
    ledger.revert(bare.id)
    assert ledger.active() == [] and ledger.verify().revisions == 10


def test_several_commits_are_one_or_none(ledger: Ledger) -> None:
    first = commit(ledger, "one")

    def three(last: Callable[[Path], object]) -> None:
        with ledger.together(first.id):
            for n, write in enumerate((delta_of("two"), delta_of("three"), last)):
                ledger.commit(
                    write,
                    onto=first.id,
                    method="rome",
                    facts=[Fact(f"Entity{n}", "{} is", "a")],
                    layers=[1],
                )

    def full(folder: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(WorkspaceError, match="nothing was recorded"):
        three(full)
    assert [r.id for r in ledger.log()] == [first.id] and ledger.current == first.id
    three(delta_of("four"))
    assert len(ledger.log()) == 4 and ledger.verify().revisions == 4
    with pytest.raises(WorkspaceError, match="somebody committed"):
        three(delta_of("five"))


def test_revert_in_the_middle(ledger: Ledger) -> None:
    first, apart, later = (
        commit(ledger, "one", (1,)),
        commit(ledger, "apart", (5,)),
        commit(ledger, "later", (1, 2)),
    )
    before = state_of(ledger.folder)
    with pytest.raises(RevisionError, match=f"changes what {later.id[:10]} was solved on top of"):
        ledger.revert(first.id)
    assert state_of(ledger.folder) == before
    ledger.revert(apart.id)  # nothing later touches layer 5
    assert [r.id for r in ledger.active()] == [first.id, later.id]
    ledger.revert(first.id, solved={later.id: delta_of("later'")})
    (now,) = ledger.active()
    assert now.id == later.id and now.carried != later.delta and now.state == "active"
    ledger.revert(later.id)
    assert ledger.active() == []


def test_checkout_moves_without_rewriting(ledger: Ledger) -> None:
    first, second = commit(ledger, "one"), commit(ledger, "two")
    undo = ledger.revert(second.id)
    for reference, expected in (
        (BASE, []),
        (first.id, [first]),
        (second.id[:8], [first, second]),
        (undo.id, [first]),
        (LATEST, [first]),
    ):
        assert ledger.checkout(reference) == ledger.current
        assert [r.id for r in ledger.active()] == [r.id for r in expected]
        assert [r.id for r in ledger.active(reference)] == [r.id for r in expected]
        assert len(ledger.log()) == 3
    ledger.checkout(second.id)
    assert [r.state for r in ledger.log()] == ["later", "active", "active"]
    for write in (lambda: commit(ledger, "three"), lambda: ledger.revert(first.id)):
        with pytest.raises(WorkspaceError, match="checkout latest"):
            write()


def test_a_damaged_delta_can_be_taken_out(ledger: Ledger) -> None:
    first, second = commit(ledger, "one", (1,)), commit(ledger, "two", (2,))
    file = ledger.delta_folder(second) / "delta.safetensors"
    file.write_bytes(b"")
    with pytest.raises(DamagedError):
        ledger.revert(first.id)  # the model would keep the damaged one
    ledger.checkout(first.id)
    with pytest.raises(DamagedError):
        ledger.checkout(LATEST)
    assert ledger.current == first.id
    ledger._database.check_out(second.id)
    ledger.revert(second.id)  # the damaged one is reverted
    assert [r.id for r in ledger.active()] == [first.id]


def test_expect_raises_the_error_of_commit(ledger: Ledger) -> None:
    ledger.expect(BASE)
    first = commit(ledger, "one")
    with pytest.raises(WorkspaceError, match="somebody committed"):
        ledger.expect(BASE)
    ledger.expect(first.id)
    assert len(ledger.log()) == 1


def test_two_processes_cannot_both_commit(ledger: Ledger) -> None:
    with Ledger(ledger.folder) as other:
        onto = other.head
        mine = commit(ledger, "mine")
        with pytest.raises(WorkspaceError, match=f"somebody committed {mine.id[:10]}"):
            commit(other, "theirs", onto=onto)
        with pytest.raises(WorkspaceError, match="somebody committed"):
            other.revert(mine.id, onto=onto)
        assert [r.id for r in other.log()] == [mine.id]
        commit(other, "theirs")  # control: a commit after a checkout succeeds


def test_reports_must_be_json(ledger: Ledger) -> None:
    for report in ({"p": float("nan")}, {"p": object()}, {"p": "\ud800"}):
        with pytest.raises(InputError):
            ledger.commit(
                delta_of("x"), onto=BASE, method="rome", facts=[FACT], layers=[1], report=report
            )
    assert ledger.log() == []


class Histories(RuleBasedStateMachine):
    """Random histories agree with a simple model of them.

    The model after each entry is {patch: (its facts in effect, the name of its delta)}.
    """

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.ledger = Ledger.create(self.folder / "space", model="gpt2", fingerprint=FINGERPRINT)
        self.ids: list[str] = [BASE]
        self.states: list[dict[str, tuple[frozenset[int], str]]] = [{}]
        self.layers: dict[str, frozenset[int]] = {}
        self.size: dict[str, int] = {}
        self.undid: dict[
            str, dict[str, tuple[frozenset[int], frozenset[int]]]
        ] = {}  # the patches that a revert removed and restored
        self.at = 0

    def teardown(self) -> None:
        self.ledger.close()
        shutil.rmtree(self.folder)

    def _append(self, identity: str, state: dict[str, tuple[frozenset[int], str]]) -> None:
        self.ids.append(identity)
        self.states.append(state)
        self.at = len(self.ids) - 1

    def _name(self) -> str:
        return f"delta {len(self.ids)}"

    @precondition(lambda self: self.at == len(self.ids) - 1)
    @rule(
        layers=st.frozensets(st.integers(0, 3), min_size=1, max_size=2), n_facts=st.integers(1, 3)
    )
    def commit(self, layers: frozenset[int], n_facts: int) -> None:
        revision = commit(self.ledger, self._name(), tuple(sorted(layers)), n_facts=n_facts)
        self.layers[revision.id], self.size[revision.id] = layers, n_facts
        self._append(
            revision.id, self.states[-1] | {revision.id: (frozenset(range(n_facts)), self._name())}
        )

    @rule(where=st.integers(0, 10**6))
    def checkout(self, where: int) -> None:
        self.at = where % len(self.ids)
        assert self.ledger.checkout(self.ids[self.at]) == self.ids[self.at]

    @rule()
    def latest(self) -> None:
        self.at = len(self.ids) - 1
        self.ledger.checkout(LATEST)

    @rule()
    def reopen(self) -> None:
        self.ledger.close()
        self.ledger = Ledger(self.folder / "space")

    @rule()
    def collect(self) -> None:
        delta_of("loose")(self.ledger.folder / "deltas" / ("0" * 64))
        assert self.ledger.gc() == ("0" * 64,)

    @rule(which=st.integers(0, 10**6), some=st.integers(1, 7))
    def revert(self, which: int, some: int) -> None:
        if not self.ids[1:]:
            return
        target = self.ids[1 + which % (len(self.ids) - 1)]
        if self.at != len(self.ids) - 1:
            with pytest.raises((WorkspaceError, RevisionError)):
                self.ledger.revert(target)
            return
        now, name = self.states[-1], self._name()
        wanted = {patch: facts for patch, (facts, _) in now.items()}
        asked: list[int] | None = None
        if target in self.size:
            if target not in now:
                with pytest.raises(RevisionError, match="not in effect"):
                    self.ledger.revert(target)
                return
            asked = [i for i in sorted(wanted[target]) if some >> i & 1] or None
            wanted[target] = wanted[target] - set(wanted[target] if asked is None else asked)
        else:
            for patch, (lost, won) in self.undid[target].items():
                wanted[patch] = (wanted.get(patch, frozenset()) | lost) - won
            if {p: f for p, f in wanted.items() if f} == {p: f for p, (f, _) in now.items()}:
                with pytest.raises(RevisionError, match="was undone already"):
                    self.ledger.revert(target)
                return
        after: dict[str, tuple[frozenset[int], str]] = {}
        moved: frozenset[int] = frozenset()
        again = []
        if target == self.ids[-1] and asked is None:
            after = self.states[-2]
        else:
            for patch in (each for each in self.ids if each in self.size):
                facts = wanted.get(patch, frozenset())
                if (facts, moved & self.layers[patch]) == (
                    now.get(patch, (frozenset(), ""))[0],
                    frozenset(),
                ):
                    after |= {patch: now[patch]} if facts else {}
                    continue
                if facts or patch in now:
                    moved |= self.layers[patch]
                if facts:
                    again.append(patch)
                    after[patch] = (facts, f"{name} {patch[:6]}")
        undo = self.ledger.revert(
            target, facts=asked, solved={patch: delta_of(f"{name} {patch[:6]}") for patch in again}
        )
        sides = {
            patch: [state.get(patch, (frozenset[int](), ""))[0] for state in (now, after)]
            for patch in {*now, *after}
        }
        self.undid[undo.id] = {
            patch: (was - became, became - was) for patch, (was, became) in sides.items()
        }
        self._append(undo.id, after)

    @invariant()
    def agrees(self) -> None:
        assert (self.ledger.current, self.ledger.head) == (self.ids[self.at], self.ids[-1])
        for place in {self.at, len(self.ids) - 1, len(self.ids) // 2}:
            state = {}
            for patch in self.ledger.active(self.ids[place]):
                name = json.loads((self.ledger.delta_folder(patch) / "edit.json").read_text())[
                    "name"
                ]
                state[patch.id] = (
                    frozenset(patch.facts.index(fact) for fact in patch.in_effect),
                    name,
                )
            assert state == self.states[place]
        assert [revision.id for revision in self.ledger.log()] == self.ids[:0:-1]
        self.ledger.verify()


Histories.TestCase.settings = settings(
    max_examples=25, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)


test_random_histories_agree_with_a_plain_model = Histories.TestCase


def test_nothing_fails_after_a_revision_is_recorded(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading may fail right after it, as where another process locks a network disk."""
    database, real = ledger._database, ledger._database.connection

    class Locked:
        """The connection, locked from the first commit on."""

        done = False

        def __getattr__(self, name: str) -> object:
            return getattr(real, name)

        def execute(self, sql: str, *rest: object) -> object:
            if self.done:
                raise sqlite3.OperationalError("database is locked")
            self.done = sql == "COMMIT"
            return real.execute(sql, *rest)

    for write in (lambda: commit(ledger, "one"), lambda: ledger.revert("latest")):
        monkeypatch.setattr(database, "connection", Locked())
        revision = write()
        with pytest.raises(WorkspaceError, match="another process is writing"):
            ledger.log()
        monkeypatch.setattr(database, "connection", real)
        assert ledger.log()[0] == revision
