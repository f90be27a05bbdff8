"""The database of a workspace: its format, its transactions and its error messages."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from factsmith.core.errors import DamagedError, LedgerError, WorkspaceError
from factsmith.keep.ledger import BASE, Ledger
from ledgers import FACT, FINGERPRINT, commit, delta_of


def test_create_interrupted_can_be_repeated(tmp_path: Path) -> None:
    (tmp_path / "ledger.db").touch()  # the remains of a crash before the one transaction
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
    with pytest.raises(WorkspaceError, match=r"format 99.*Upgrade"):
        Ledger(ledger.folder)


_FORMAT_1 = """
CREATE TABLE revisions (
    seq INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, parent TEXT NOT NULL UNIQUE,
    reverts TEXT UNIQUE REFERENCES revisions (id), delta TEXT, record TEXT NOT NULL
);
CREATE TRIGGER revisions_keep BEFORE DELETE ON revisions BEGIN SELECT RAISE(ABORT, 'no'); END;
CREATE TRIGGER revisions_stay BEFORE UPDATE ON revisions BEGIN SELECT RAISE(ABORT, 'no'); END;
"""


def test_a_ledger_of_format_1_is_brought_up_to_date(ledger: Ledger) -> None:
    first, second = commit(ledger, "one"), commit(ledger, "two")
    undo = ledger.revert(second.id)
    ledger.close()
    file = ledger.folder / "ledger.db"
    # Format 1 wrote a table with two more columns, and reverts without changes.
    with sqlite3.connect(file) as db:
        rows = db.execute("SELECT seq, id, parent, record FROM revisions ORDER BY seq").fetchall()
        db.executescript(
            "DROP TABLE revisions; ALTER TABLE workspace DROP COLUMN seal; PRAGMA user_version = 1;"
        )
        db.executescript(_FORMAT_1)
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
    shutil.rmtree(ledger.folder / "records")  # older versions kept no copies of the records
    copy = ledger.folder.with_name("copy")
    shutil.copytree(ledger.folder, copy)
    for entry in (copy, copy / "deltas"):
        entry.chmod(0o555)
    for folder in (copy, ledger.folder):  # a read-only one is read without an upgrade
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
        assert db.execute("PRAGMA user_version").fetchone() == (3,)
        with pytest.raises(sqlite3.IntegrityError, match="never rewritten"):
            db.execute("UPDATE revisions SET record = 'x'")
    db.close()


def test_the_database_itself_refuses_to_rewrite_history(ledger: Ledger) -> None:
    commit(ledger, "one")
    with sqlite3.connect(ledger.folder / "ledger.db") as db:
        for statement in ("DELETE FROM revisions", "UPDATE revisions SET record = ''"):
            with pytest.raises(sqlite3.IntegrityError, match="never rewritten"):
                db.execute(statement)
    db.close()


@pytest.mark.parametrize("statement", ["BEGIN IMMEDIATE", "BEGIN", "COMMIT"])
def test_a_ctrl_c_after_any_statement_leaves_no_transaction_open(
    ledger: Ledger, statement: str
) -> None:
    first, db = commit(ledger, "one"), ledger._database.connection

    class Interrupted:
        """The connection, with a Ctrl-C after each statement."""

        def __getattr__(self, name: str) -> object:
            return getattr(db, name)

        def execute(self, sql: str, *rest: object) -> object:
            done = db.execute(sql, *rest)
            if sql == statement:
                raise KeyboardInterrupt
            return done

    ledger._database.connection = Interrupted()  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        if statement == "BEGIN":
            ledger.log()
        else:
            commit(ledger, "two")
    ledger._database.connection = db
    assert not db.in_transaction
    assert (
        len(ledger.log()) == (2 if statement == "COMMIT" else 1) and ledger.log()[-1].id == first.id
    )
    commit(ledger, "three")  # the lock is free


def test_a_locked_ledger_is_reported(ledger: Ledger) -> None:
    holder = sqlite3.connect(ledger.folder / "ledger.db", isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    with Ledger(ledger.folder, wait=0.05) as other:
        with pytest.raises(WorkspaceError, match="another process is writing"):
            commit(other, "one")
        assert other.log() == []  # reading goes on
        holder.execute("ROLLBACK")
        holder.close()
        commit(other, "one")


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
            "DROP TRIGGER revisions_keep; DROP TRIGGER revisions_stay; "
            f"PRAGMA foreign_keys = OFF; {statement}"
        )
    db.close()
    with pytest.raises(DamagedError), Ledger(ledger.folder) as opened:
        opened.verify()


@pytest.mark.parametrize(
    "content", [b"", b"not a database at all, but long enough to look at" * 40]
)
def test_a_file_that_is_not_a_database(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "ledger.db").write_bytes(content)
    with pytest.raises(LedgerError):
        Ledger(tmp_path)


def test_a_full_database_leaves_nothing(ledger: Ledger) -> None:
    """SQLite's limit acts as a full disk. The transaction fails after the delta is written."""
    commit(ledger, "one")
    (pages,) = ledger._database.connection.execute("PRAGMA page_count").fetchone()
    ledger._database.connection.execute(f"PRAGMA max_page_count = {pages}")
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
        integrity.deltas == 1 and integrity.orphans == ()
    )  # the delta that was already written is gone


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
    # pytest's folders are private, and the other user must pass through them.
    for parent in ledger.folder.parents:
        if parent.stat().st_uid == os.getuid() and not parent.stat().st_mode & 0o001:
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
