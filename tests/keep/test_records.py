"""Records are found by reference. A damaged or forged record is refused with a message."""

from __future__ import annotations

import hashlib
import json
import shutil
import sqlite3

import pytest

from factsmith.core.errors import DamagedError, RevisionError
from factsmith.keep import database
from factsmith.keep.database import Workspace
from factsmith.keep.ledger import BASE, LATEST, Ledger
from ledgers import commit


def test_references(ledger: Ledger) -> None:
    first, second = commit(ledger, "one"), commit(ledger, "two")
    assert ledger.show(first.id[:6]).id == first.id and ledger.show(LATEST).id == second.id
    assert ledger.resolve(BASE) == BASE
    for bad in ("zzzz", "abc", "", "../../etc", "f" * 64, BASE):
        with pytest.raises(RevisionError):
            ledger.show(bad)


def test_a_forged_record_is_data(ledger: Ledger) -> None:
    """A nonsensical record that matches its id is refused, and names no path outside."""
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
        {"changes": {"ab": {"delta": "ab" * 32, "delta_bytes": 1, "facts": []}}},
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
            *texts, _, _ = db.execute(
                "SELECT model, dtype, fingerprint, created, current, seal FROM workspace"
            ).fetchone()
            seal = database._seal(Workspace(*texts), identity)
            db.execute("UPDATE workspace SET current = ?, seal = ?", (identity, seal))
        db.close()
        shutil.rmtree(folder / "records")
        with pytest.raises(DamagedError, match="is damaged"), Ledger(folder) as opened:
            opened.log()
