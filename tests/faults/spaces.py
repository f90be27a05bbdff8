"""Workspaces for the fault tests: deltas that are plain files, and the whole state of a folder."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from factsmith.core.fact import Fact
from factsmith.keep.ledger import Ledger
from factsmith.keep.revision import Revision

FINGERPRINT = "ab" * 32

linux_only = pytest.mark.skipif(
    not sys.platform.startswith("linux"),
    reason="needs fork, SIGKILL and RLIMIT_FSIZE of Linux",
)


def delta_of(text: str) -> Callable[[Path], None]:
    """Return a function in place of `delta.save` that writes plain files."""

    def write(folder: Path) -> None:
        folder.mkdir()
        (folder / "edit.json").write_text(json.dumps({"name": text}))
        (folder / "delta.safetensors").write_bytes(text.encode() * 500)

    return write


def commit(
    ledger: Ledger, text: str, layers: tuple[int, ...] = (1,), onto: str | None = None
) -> Revision:
    """Commit a patch of two facts."""
    facts = [Fact("A", "{} is", text), Fact("B", "{} is", text)]
    return ledger.commit(
        delta_of(text),
        onto=ledger.head if onto is None else onto,
        method="rome",
        facts=facts,
        layers=layers,
        message=text,
    )


def whole_state(folder: Path) -> dict[str, str]:
    """Return the state of a workspace, read without the ledger: each file, and the database.

    SQLite's other files come and go with its connections. Their contents are in the database.
    """
    state = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            state[name] = f"link to {path.readlink()}"
        elif path.is_file():
            state[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            state[name] = "folder" if path.is_dir() else "neither"
    for name in ("ledger.db", "ledger.db-wal", "ledger.db-shm"):
        state.pop(name, None)
    db = sqlite3.connect(folder / "ledger.db")
    state["ledger.db"] = "\n".join(
        [*db.iterdump(), repr(db.execute("PRAGMA user_version").fetchall())]
    )
    db.close()
    return state
