"""Helpers for tests of workspaces: a fact, deltas that are only files, and a look at the folder."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

from factsmith.core.fact import Fact
from factsmith.keep.database import Workspace, _seal
from factsmith.keep.ledger import Ledger
from factsmith.keep.revision import Revision

FINGERPRINT = "ab" * 32


FACT = Fact(
    "Danielle Darrieux",
    "The mother tongue of {} is",
    "English",
    neighbours=("The mother tongue of Léon Blum is",),
)


def delta_of(text: str) -> Callable[[Path], None]:
    """Return a stand-in for `delta.save`: the ledger sees files, not tensors."""

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
    """Commit a stand-in delta with this text and some facts."""
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


def state_of(folder: Path) -> dict[str, str]:
    """Return all that a workspace holds, read without the ledger: file digests and rows."""
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


def lose_records(folder: Path, kept: int) -> None:
    """Leave the first records in ledger.db, and no copies, as a loss with an earlier version."""
    shutil.rmtree(folder / "records")
    with contextlib.closing(sqlite3.connect(folder / "ledger.db")) as db, db:
        db.execute("DROP TRIGGER revisions_keep")
        db.execute("DELETE FROM revisions WHERE seq > ?", (kept,))
        (current,) = db.execute("SELECT id FROM revisions ORDER BY seq DESC").fetchone()
        texts = db.execute("SELECT model, dtype, fingerprint, created FROM workspace").fetchone()
        db.execute(
            "UPDATE workspace SET current = ?, seal = ?",
            (current, _seal(Workspace(*texts), current)),
        )
