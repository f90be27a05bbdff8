"""Many processes that write to one workspace at once lose nothing."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from factsmith.keep.ledger import BASE, Ledger
from faults.processes import run_apart
from faults.spaces import linux_only

pytestmark = linux_only


@pytest.mark.parametrize("disk", ["ledgers", "network"])
def test_eight_ledgers_at_once_lose_nothing(tmp_path: Path, disk: str) -> None:
    """On a local disk, and on a network disk, where reading waits for a write, too."""
    _check_crowd(
        run_apart(disk, str(tmp_path / "space"), "8", "6")["crowd"],
        tmp_path / "space",
        8 * (6 + 2),
    )


def test_workbenches_at_once_lose_nothing(with_models: tuple[Path, dict[str, Any]]) -> None:
    folder, counted = with_models
    _check_crowd(counted["crowd"], folder / "crowd", 8 * 3)


def _check_crowd(crowd: list[dict[str, Any]], space: Path, n_revisions: int) -> None:
    """Check that processes met, and that all reported revisions form one line of history."""
    reported = [identity for one in crowd for identity in one["ids"]]
    refused = sum((Counter(one["refused"]) for one in crowd), Counter[str]())
    assert len(set(reported)) == len(reported) == n_revisions
    assert refused, "no two processes wrote at the same time"
    with Ledger(space) as ledger:
        log = ledger.log()[::-1]
        assert sorted(revision.id for revision in log) == sorted(reported), (
            "the ledger has the reported revisions"
        )
        assert [revision.parent for revision in log] == [
            BASE,
            *(revision.id for revision in log[:-1]),
        ], "each revision follows the one before"
        for one in crowd:
            places = [next(r.number for r in log if r.id == identity) for identity in one["ids"]]
            assert places == sorted(places), "the order of the revisions of one process"
        assert ledger.verify().revisions == len(reported)
        ledger.gc(patches=True)
        assert ledger.verify().orphans == () and not list((space / "deltas").glob(".*"))
