"""A process killed at any moment leaves a whole workspace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from faults.ledger_kills import KINDS
from faults.processes import KILLS, run_apart
from faults.spaces import linux_only

pytestmark = linux_only


def test_kill_at_any_moment_of_a_ledgers_work(tmp_path: Path) -> None:
    counted = run_apart("ledger", str(tmp_path), "1", str(KILLS["ledger"]), str(KILLS["lines"]))
    assert counted["kills"] == KILLS["ledger"] + KILLS["lines"] >= 200
    hit = counted["hit"]
    assert all(hit.get(kind, 0) >= 5 for kind in KINDS), (
        f"too few kills in one kind of operation: {hit}"
    )
    assert sum(hit[kind] for kind in KINDS) > 0.5 * counted["kills"], (
        f"most kills came between operations: {hit}"
    )
    assert counted["unreported"] and counted["leftovers"], f"no kill left anything: {counted}"


def test_kill_at_any_moment_of_a_workbenchs_work(with_models: tuple[Path, dict[str, Any]]) -> None:
    counted = with_models[1]["killed"]
    assert counted["kills"] == KILLS["workbench"] >= 200 and counted["revisions"] >= 20
    hit = counted["hit"]
    assert (
        hit.get("commit", 0) >= 30
        and hit.get("middle", 0) >= 10
        and sum(hit[kind] for kind in hit if kind != "nothing") >= 100
    ), hit
