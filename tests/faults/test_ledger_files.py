"""A damaged ledger is refused with a message, or read unchanged."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from factsmith.keep.ledger import BASE, LATEST, Ledger
from faults.fuzz import FUZZ, SEED, TIMES, is_refused, write_new
from faults.spaces import FINGERPRINT, commit, linux_only

pytestmark = linux_only


def test_a_damaged_ledger_is_refused_with_a_message_or_read_unchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes of the database are changed, removed and inserted."""
    # A fixed time, so that a seed repeats its case.
    monkeypatch.setattr("factsmith.keep.ledger._now", lambda: "2026-01-02T03:04:05+00:00")
    with Ledger.create(tmp_path / "space", model="gpt2", fingerprint=FINGERPRINT) as ledger:
        for text, layers in (("one", (1,)), ("two", (1, 2)), ("three", (0,))):
            commit(ledger, text, layers)
        expected = [revision.to_dict() | {"state": ""} for revision in ledger.log()]
    file = ledger.folder / "ledger.db"
    whole, others = (
        file.read_bytes(),
        [file.with_name(f"ledger.db-{end}") for end in ("wal", "shm")],
    )

    def use() -> None:
        with Ledger(ledger.folder) as opened:
            opened.verify()
            log = opened.log()
            assert [revision.to_dict() | {"state": ""} for revision in log] == expected[
                len(expected) - len(log) :
            ]
            opened.active(), opened.status(), opened.gc(dry_run=True)
            opened.checkout(BASE), opened.checkout(LATEST)
            opened.undoing(LATEST)

    assert not is_refused(use, "none")
    refused = 0
    for seed in range(SEED, SEED + FUZZ["ledgers"] * TIMES):
        rng = random.Random(seed)
        content = bytearray(whole)
        for _ in range(rng.choice([1, 1, 3, 20])):
            content[rng.choice([rng.randrange(100), rng.randrange(len(content))])] = rng.randrange(
                256
            )
        if rng.random() < 0.3:
            at = rng.randrange(len(content))
            content[at : at + rng.choice([1, 50, 4096, len(content)])] = rng.randbytes(
                rng.choice([0, 1, 50])
            )
        write_new(file, bytes(content))
        for other in others:
            other.unlink(missing_ok=True)
        refused += is_refused(use, seed)
    assert 0.3 * FUZZ["ledgers"] < refused / TIMES
