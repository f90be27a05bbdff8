"""The ledger keeps what it was given, refuses what would lose something, and survives being killed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from factsmith.core.errors import (
    DamagedError,
    InputError,
    LedgerError,
    RevisionError,
    WorkspaceError,
)
from factsmith.core.fact import Fact
from factsmith.keep.ledger import BASE, LATEST, Ledger
from factsmith.keep.revision import Revision

FINGERPRINT = "ab" * 32
FACT = Fact(
    "Danielle Darrieux",
    "The mother tongue of {} is",
    "English",
    neighbours=("The mother tongue of Léon Blum is",),
)


def delta_of(text: str) -> Callable[[Path], None]:
    """Stands for `delta.save`: the ledger sees files, not tensors."""

    def write(folder: Path) -> None:
        folder.mkdir()
        (folder / "edit.json").write_text(json.dumps({"name": text}))
        (folder / "delta.safetensors").write_bytes(text.encode() * 100)

    return write


def commit(
    ledger: Ledger,
    text: str,
    layers: tuple[int, ...] = (1,),
    *,
    onto: str | None = None,
    n_facts: int = 1,
) -> Revision:
    return ledger.commit(
        delta_of(text),
        onto=ledger.head if onto is None else onto,
        method="rome",
        config={"layer": layers[0], "lr": 0.5},
        facts=[FACT, *(Fact(f"Subject{n}", "{} is", text) for n in range(1, n_facts))],
        layers=layers,
        moments="cd" * 32,
        report={"exact": 1.0},
        message=text,
    )


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger.create(tmp_path / "space", model="gpt2", fingerprint=FINGERPRINT) as made:
        yield made


def state_of(folder: Path) -> dict[str, str]:
    """Everything a workspace holds, read without the ledger: sha256 of each delta file, and the rows of the database."""
    state = {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in (folder / "deltas").rglob("*")
        if p.is_file()
    }
    with sqlite3.connect(folder / "ledger.db") as db:
        state["rows"] = repr(
            db.execute("SELECT * FROM revisions").fetchall()
            + db.execute("SELECT * FROM workspace").fetchall()
        )
    db.close()
    return state


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


def test_create_refuses_what_is_there(ledger: Ledger, tmp_path: Path) -> None:
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


def test_create_interrupted_can_be_repeated(tmp_path: Path) -> None:
    (tmp_path / "ledger.db").touch()  # what a crash before the one transaction leaves
    with pytest.raises(WorkspaceError):
        Ledger(tmp_path)
    with Ledger.create(tmp_path, model="gpt2", fingerprint=FINGERPRINT) as made:
        assert made.head == BASE


def test_strangers_and_newer_formats_are_refused(ledger: Ledger, tmp_path: Path) -> None:
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    with sqlite3.connect(stranger / "ledger.db") as db:
        db.execute("CREATE TABLE accounts (id)")
    db.close()
    with pytest.raises(WorkspaceError, match="not made by factsmith"):
        Ledger(stranger)
    with pytest.raises(WorkspaceError):
        Ledger.create(stranger, model="gpt2", fingerprint=FINGERPRINT)
    ledger.close()
    with sqlite3.connect(ledger.folder / "ledger.db") as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(WorkspaceError, match=r"format 99.*upgrade"):
        Ledger(ledger.folder)


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


def test_references(ledger: Ledger) -> None:
    first, second = commit(ledger, "one"), commit(ledger, "two")
    assert ledger.show(first.id[:6]).id == first.id and ledger.show(LATEST).id == second.id
    assert ledger.resolve(BASE) == BASE
    for bad in ("zzzz", "abc", "", "../../etc", "f" * 64, BASE):
        with pytest.raises(RevisionError):
            ledger.show(bad)


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
    again = commit(ledger, "two")  # the same delta once more: a new revision on the same files
    assert again.id != second.id and again.delta == second.delta
    assert [r.id for r in ledger.active()] == [first.id, again.id]
    assert ledger.verify().deltas == 2


def test_a_revert_is_reverted(ledger: Ledger) -> None:
    """The newest brings the very deltas back; an older one what it took out, solved again where something came between."""
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
    with pytest.raises(RevisionError, match="undone already"):
        ledger.revert(gone.id)
    out = ledger.revert(back.id)  # what brought it back is reverted in turn, and so on
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
    with pytest.raises(RevisionError, match="leave the facts out"):
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
        with pytest.raises(RevisionError, match="name some"):
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
        "seen from before, it is what it was"
    )
    with pytest.raises(RevisionError, match="in effect"):
        ledger.undoing(first.id, [0])
    shutil.rmtree(ledger.delta_folder(now[later.id]))
    with pytest.raises(DamagedError, match=undo.id[:10]):
        ledger.verify()


def test_patches_without_facts_go_and_come_back(ledger: Ledger) -> None:
    """Edits of neurons write no fact: they are taken out and brought back as they are, and nothing beneath them makes them another."""
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
    back = ledger.revert(gone.id, solved={last.id: delta_of("last again")})
    assert [(r.id, r.carried == r.delta) for r in ledger.active()] == [
        (bare.id, True),
        (last.id, False),
    ] and back.facts == ()
    with pytest.raises(RevisionError, match="undone already"):
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


@pytest.mark.parametrize("statement", ["BEGIN IMMEDIATE", "BEGIN", "COMMIT"])
def test_a_ctrl_c_behind_any_statement_leaves_no_transaction_open(
    ledger: Ledger, statement: str
) -> None:
    first, db = commit(ledger, "one"), ledger._db

    class Interrupted:
        """The connection, with a Ctrl-C as soon as the statement is done."""

        def __getattr__(self, name: str) -> object:
            return getattr(db, name)

        def execute(self, sql: str, *rest: object) -> object:
            done = db.execute(sql, *rest)
            if sql == statement:
                raise KeyboardInterrupt
            return done

    ledger._db = Interrupted()  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        if statement == "BEGIN":
            ledger.log()
        else:
            commit(ledger, "two")
    ledger._db = db
    assert not db.in_transaction
    assert (
        len(ledger.log()) == (2 if statement == "COMMIT" else 1) and ledger.log()[-1].id == first.id
    )
    commit(ledger, "three")  # the lock is free


def test_gc_takes_what_nobody_names(ledger: Ledger) -> None:
    first = commit(ledger, "one", n_facts=2)
    ledger.revert(first.id, facts=[0], solved={first.id: delta_of("one'")})
    deltas, kept = ledger.folder / "deltas", state_of(ledger.folder)
    delta_of("loose")(deltas / ("0" * 64))
    (deltas / ".staging-1").mkdir()
    (deltas / "notes.txt").write_text("not ours")
    assert ledger.gc(dry_run=True) == (".staging-1", "0" * 64) and (deltas / ("0" * 64)).is_dir()
    assert ledger.gc() == (".staging-1", "0" * 64) and ledger.gc() == ()
    (deltas / "notes.txt").unlink()
    assert state_of(ledger.folder) == kept and ledger.verify().orphans == ()


def test_a_ledger_of_format_1_is_brought_up_to_date(ledger: Ledger) -> None:
    first, second = commit(ledger, "one"), commit(ledger, "two")
    undo = ledger.revert(second.id)
    ledger.close()
    file = ledger.folder / "ledger.db"
    with sqlite3.connect(
        file
    ) as db:  # as format 1 wrote it: a table with two columns more, and reverts without changes
        rows = db.execute("SELECT seq, id, parent, record FROM revisions ORDER BY seq").fetchall()
        db.executescript("DROP TABLE revisions; PRAGMA user_version = 1;")
        db.executescript(
            """CREATE TABLE revisions (seq INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, parent TEXT NOT NULL UNIQUE,
                                       reverts TEXT UNIQUE REFERENCES revisions (id), delta TEXT, record TEXT NOT NULL);
               CREATE TRIGGER revisions_keep BEFORE DELETE ON revisions BEGIN SELECT RAISE(ABORT, 'no'); END;
               CREATE TRIGGER revisions_stay BEFORE UPDATE ON revisions BEGIN SELECT RAISE(ABORT, 'no'); END;"""
        )
        ids: dict[str, str] = {}
        for seq, identity, parent, text in rows:
            record = {k: v for k, v in json.loads(text).items() if k != "changes"}
            record["parent"] = ids.get(parent, parent)
            record["reverts"] = ids.get(record["reverts"], record["reverts"])
            old = json.dumps(record, ensure_ascii=False, sort_keys=True)
            ids[identity] = hashlib.sha256(old.encode()).hexdigest()
            columns = (
                seq,
                ids[identity],
                record["parent"],
                record["reverts"],
                record["delta"],
                old,
            )
            db.execute("INSERT INTO revisions VALUES (?, ?, ?, ?, ?, ?)", columns)
        db.execute("UPDATE workspace SET current = ?", (ids[undo.id],))
    db.close()
    copy = ledger.folder.with_name("copy")
    shutil.copytree(ledger.folder, copy)
    for entry in (copy, copy / "deltas"):
        entry.chmod(0o555)
    for folder in (copy, ledger.folder):  # one that cannot be written is read as it is
        with Ledger(folder) as opened:
            assert [r.id for r in opened.active()] == [ids[first.id]] and opened.show(
                ids[second.id]
            ).state == "reverted"
            assert [r.id for r in opened.active(ids[second.id])] == [ids[first.id], ids[second.id]]
            opened.verify()
    for entry in (copy, copy / "deltas"):
        entry.chmod(0o755)
    with Ledger(ledger.folder) as opened:
        opened.revert(ids[undo.id])
        commit(opened, "three")
        assert len(opened.active()) == 3
    with sqlite3.connect(file) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (2,)
        with pytest.raises(sqlite3.IntegrityError, match="never rewritten"):
            db.execute("UPDATE revisions SET record = 'x'")
    db.close()


def test_revert_in_the_middle(ledger: Ledger) -> None:
    first, apart, later = (
        commit(ledger, "one", (1,)),
        commit(ledger, "apart", (5,)),
        commit(ledger, "later", (1, 2)),
    )
    before = state_of(ledger.folder)
    with pytest.raises(RevisionError, match=f"leaves {later.id[:10]} on top of what is gone"):
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


class Histories(RuleBasedStateMachine):
    """Random histories beside a plain model of them: after each entry {patch: (its facts in effect, the name of its delta)}."""

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
        ] = {}  # revert: what it took out, and what it brought back
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
                with pytest.raises(RevisionError, match="undone already"):
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
            found = {}
            for patch in self.ledger.active(self.ids[place]):
                name = json.loads((self.ledger.delta_folder(patch) / "edit.json").read_text())[
                    "name"
                ]
                found[patch.id] = (
                    frozenset(patch.facts.index(fact) for fact in patch.in_effect),
                    name,
                )
            assert found == self.states[place]
        assert [revision.id for revision in self.ledger.log()] == self.ids[:0:-1]
        self.ledger.verify()


Histories.TestCase.settings = settings(
    max_examples=25, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)
test_random_histories_agree_with_a_plain_model = Histories.TestCase


def test_a_damaged_delta_can_be_left_behind(ledger: Ledger) -> None:
    first, second = commit(ledger, "one", (1,)), commit(ledger, "two", (2,))
    file = ledger.delta_folder(second) / "delta.safetensors"
    file.write_bytes(b"")
    with pytest.raises(DamagedError):
        ledger.revert(first.id)  # would leave the model with the damaged one
    ledger.checkout(first.id)
    with pytest.raises(DamagedError):
        ledger.checkout(LATEST)
    assert ledger.current == first.id
    ledger._db.execute("UPDATE workspace SET current = ?", (second.id,))
    ledger.revert(second.id)  # what is damaged goes
    assert [r.id for r in ledger.active()] == [first.id]


def test_expect_raises_what_commit_would(ledger: Ledger) -> None:
    ledger.expect(BASE)
    first = commit(ledger, "one")
    with pytest.raises(WorkspaceError, match="somebody committed"):
        ledger.expect(BASE)
    ledger.expect(first.id)
    assert len(ledger.log()) == 1


def test_the_database_itself_refuses_to_rewrite_history(ledger: Ledger) -> None:
    commit(ledger, "one")
    with sqlite3.connect(ledger.folder / "ledger.db") as db:
        for statement in ("DELETE FROM revisions", "UPDATE revisions SET record = ''"):
            with pytest.raises(sqlite3.IntegrityError, match="never rewritten"):
                db.execute(statement)
    db.close()


def test_two_processes_cannot_both_commit(ledger: Ledger) -> None:
    with Ledger(ledger.folder) as other:
        onto = other.head
        mine = commit(ledger, "mine")
        with pytest.raises(WorkspaceError, match=f"somebody committed {mine.id[:10]}"):
            commit(other, "theirs", onto=onto)
        with pytest.raises(WorkspaceError, match="somebody committed"):
            other.revert(mine.id, onto=onto)
        assert [r.id for r in other.log()] == [mine.id]
        commit(other, "theirs")  # control: once they look, they may


def test_a_locked_ledger_says_so(ledger: Ledger) -> None:
    holder = sqlite3.connect(ledger.folder / "ledger.db", isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    with Ledger(ledger.folder, wait=0.05) as other:
        with pytest.raises(WorkspaceError, match="another process is writing"):
            commit(other, "one")
        assert other.log() == []  # reading goes on
        holder.execute("ROLLBACK")
        holder.close()
        commit(other, "one")


@pytest.mark.parametrize("harm", ["flip", "truncate", "remove", "swap", "extra"])
def test_a_damaged_delta_is_named(ledger: Ledger, harm: str) -> None:
    first, second = commit(ledger, "one"), commit(ledger, "two")
    file = ledger.delta_folder(first) / "delta.safetensors"
    if harm == "flip":
        file.write_bytes(b"O" + file.read_bytes()[1:])
    elif harm == "truncate":
        file.write_bytes(file.read_bytes()[:-1])
    elif harm == "remove":
        shutil.rmtree(file.parent)
    elif harm == "swap":
        shutil.copy(ledger.delta_folder(second) / "delta.safetensors", file)
    else:
        (file.parent / "more.json").write_text("{}")
    with pytest.raises(DamagedError, match=first.id[:10]):
        ledger.delta_folder(first)
    with pytest.raises(DamagedError):
        ledger.verify()
    assert ledger.delta_folder(second).is_dir()
    if harm != "extra":
        commit(ledger, "one")  # writing the same delta again heals it
        assert ledger.verify().deltas == 2


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE revisions SET record = replace(record, 'English', 'Spanish') WHERE seq = 1",
        "UPDATE revisions SET parent = 'ffff' WHERE seq = 1",
        "DELETE FROM revisions WHERE seq = 1",
        "UPDATE workspace SET current = 'ffff'",
        "DROP TABLE revisions",
        "DELETE FROM workspace",
    ],
)
def test_a_damaged_database_is_noticed(ledger: Ledger, statement: str) -> None:
    commit(ledger, "one"), commit(ledger, "two")
    ledger.close()
    with sqlite3.connect(ledger.folder / "ledger.db") as db:
        db.executescript(
            f"DROP TRIGGER revisions_keep; DROP TRIGGER revisions_stay; PRAGMA foreign_keys = OFF; {statement}"
        )
    db.close()
    with pytest.raises(DamagedError), Ledger(ledger.folder) as opened:
        opened.verify()


def test_a_forged_record_is_data(ledger: Ledger) -> None:
    """A record that matches its id may still say nonsense: an error of ours, no path outside the workspace, no traceback."""
    commit(ledger, "one")
    ledger.close()
    for change in (
        {"delta": "../../../etc"},
        {"layers": ["1"]},
        {"facts": [{"subject": ""}]},
        {"facts": 3},
        {"kind": "x"},
        {"kind": "revert"},
        {"changes": {"ab": {"delta": "../x", "delta_bytes": 1, "facts": []}}},
        {"report": None},
    ):
        folder = ledger.folder.with_name(f"forged-{next(iter(change))}")
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(ledger.folder, folder)
        with sqlite3.connect(folder / "ledger.db") as db:
            (text,) = db.execute("SELECT record FROM revisions").fetchone()
            record = {**json.loads(text), **change}
            text = json.dumps(record)
            db.execute("DROP TRIGGER revisions_stay")
            identity = hashlib.sha256(text.encode()).hexdigest()
            db.execute("UPDATE revisions SET record = ?, id = ?", (text, identity))
            db.execute("UPDATE workspace SET current = ?", (identity,))
        db.close()
        with pytest.raises(DamagedError), Ledger(folder) as opened:
            opened.log()


@pytest.mark.parametrize(
    "content", [b"", b"not a database at all, but long enough to look at" * 40]
)
def test_a_file_that_is_no_database(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "ledger.db").write_bytes(content)
    with pytest.raises(LedgerError):
        Ledger(tmp_path)


class _StopError(Exception):
    pass


@pytest.mark.parametrize(
    "exception", [OSError(28, "No space left on device"), KeyboardInterrupt(), _StopError()]
)
def test_a_write_that_fails_leaves_nothing(ledger: Ledger, exception: BaseException) -> None:
    commit(ledger, "one")
    before = state_of(ledger.folder)

    def write(folder: Path) -> None:
        delta_of("two")(folder)
        raise exception

    expected = WorkspaceError if isinstance(exception, OSError) else type(exception)
    with pytest.raises(expected, match="disk is full" if isinstance(exception, OSError) else None):
        ledger.commit(write, onto=ledger.head, method="rome", facts=[FACT], layers=[1])
    assert state_of(ledger.folder) == before
    commit(ledger, "two")


def test_a_full_database_leaves_nothing(ledger: Ledger) -> None:
    """SQLite's own limit stands for the full disk: the transaction fails after the delta's files are in place."""
    commit(ledger, "one")
    (pages,) = ledger._db.execute("PRAGMA page_count").fetchone()
    ledger._db.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(WorkspaceError, match="disk is full"):
        ledger.commit(
            delta_of("two"),
            onto=ledger.head,
            method="rome",
            facts=[FACT],
            layers=[1],
            report={"long": "x" * 50_000},
        )
    assert [r.message for r in ledger.log()] == ["one"]
    integrity = ledger.verify()
    assert (
        integrity.deltas == 1 and len(integrity.orphans) == 1
    )  # the orphan that the commit order allows


def test_reports_must_be_json(ledger: Ledger) -> None:
    for report in ({"p": float("nan")}, {"p": object()}, {"p": "\ud800"}):
        with pytest.raises(InputError):
            ledger.commit(
                delta_of("x"), onto=BASE, method="rome", facts=[FACT], layers=[1], report=report
            )
    assert ledger.log() == []


_READ_ONLY = """
import os, sys
from factsmith.keep.ledger import Ledger
from factsmith.core.errors import WorkspaceError
if os.getuid() == 0:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
with Ledger(sys.argv[1]) as ledger:
    print(len(ledger.log()), ledger.verify().deltas)
    commit = lambda: ledger.commit(print, onto=ledger.head, method="m", facts=[], layers=[])
    for write in (lambda: ledger.revert("latest"), lambda: ledger.checkout("base"), commit):
        try:
            write()
        except WorkspaceError as error:
            assert "cannot be written" in str(error), error
        else:
            raise SystemExit("wrote")
try:
    Ledger.create(sys.argv[1] + "/deeper", model="m", fingerprint="f")
except WorkspaceError as error:
    assert "cannot be written" in str(error), error
else:
    raise SystemExit("wrote")
"""


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX permissions")
def test_a_read_only_folder_can_be_read(ledger: Ledger) -> None:
    commit(ledger, "one")
    ledger.close()
    paths = [ledger.folder, *ledger.folder.rglob("*")]
    for path in paths:
        path.chmod(0o555 if path.is_dir() else 0o444)
    for parent in list(ledger.folder.parents)[
        :3
    ]:  # pytest's folders are private; the other user has to get through
        if parent.stat().st_uid == os.getuid():
            parent.chmod(0o755)
    try:
        done = subprocess.run(
            [sys.executable, "-c", _READ_ONLY, str(ledger.folder)],
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        for path in paths:
            path.chmod(0o755 if path.is_dir() else 0o644)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["1", "1"]


_WORK = """
import os, random, signal, sys, time
from factsmith.core.errors import WorkspaceError
from factsmith.core.fact import Fact
from factsmith.keep.ledger import Ledger

fact = Fact("A", "{} is", "B")

def work(name, steps, out):
    with Ledger(sys.argv[1], wait=60) as ledger:
        for step in range(steps):
            def write(folder):
                folder.mkdir()
                (folder / "delta.safetensors").write_bytes(f"{name} {step}".encode() * 5000)
            while True:
                try:
                    revision = ledger.commit(write, onto=ledger.head, method="rome", facts=[fact], layers=[1])
                    break
                except WorkspaceError as error:
                    if "somebody committed" not in str(error):
                        raise
            os.write(out, revision.id.encode() + b"\\n")
            if name == "killed" and step % 2:
                os.write(out, ledger.revert(revision.id).id.encode() + b"\\n")
"""

_KILLS = (
    _WORK
    + """
random.seed(int(sys.argv[2]))
for round_ in range(int(sys.argv[3])):
    read, write = os.pipe()
    child = os.fork()
    if not child:
        work("killed", 10**9, write)
    os.close(write)
    lines = os.read(read, 65)  # one commit is reported; then it may die anywhere in the next few
    time.sleep(random.random() * 0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while more := os.read(read, 65536):
        lines += more
    os.close(read)
    print(lines.decode(), end="")
"""
)


@pytest.mark.skipif(os.name != "posix", reason="needs fork and SIGKILL")
def test_kill_in_the_middle_of_commits(ledger: Ledger) -> None:
    """Some dozens of kills at moments spread over commits and reverts: what was reported is there, everything there is whole."""
    kills = 40
    done = subprocess.run(
        [sys.executable, "-c", _KILLS, str(ledger.folder), "0", str(kills)],
        capture_output=True,
        text=True,
        check=True,
    )
    reported = done.stdout.split()
    with Ledger(ledger.folder) as opened:
        integrity = opened.verify()
        ids = [r.id for r in opened.log()]
        assert len(set(reported)) == len(reported) >= kills
        assert set(reported) <= set(ids)
        assert (
            len(ids) - len(reported) <= kills
        )  # at most the one entry in flight at each kill went unreported
        assert integrity.revisions == len(ids) == opened.log()[0].number
        commit(opened, "after")
    assert not any((ledger.folder / "deltas").glob(".staging-*"))


def test_processes_at_once_lose_nothing(ledger: Ledger) -> None:
    script = _WORK + "work(sys.argv[2], 5, 1)"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(ledger.folder), str(n)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for n in range(3)
    ]
    outputs = [process.communicate(timeout=60)[0].split() for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    committed = sorted(identity for output in outputs for identity in output)
    assert len(committed) == 15 and committed == sorted(r.id for r in ledger.log())
    assert ledger.verify().deltas == 15
