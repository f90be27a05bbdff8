"""Deltas that no revision names, and that were patches all the same.

    for patch in ledger.unrecorded():
        print(patch.delta, patch.facts)

A commit that was killed leaves such a delta. So does a ledger.db that lost revisions of which there
were no copies (`copies`). The delta's own edit.json says what it is: method, layers and facts. What
it does not say is where it was in the history (`recommit`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..core.fact import Fact
from ..core.files import record_digest
from .revision import Unrecorded

_MOST_JSON = 64 * 2**20


def unrecorded(folders: Iterable[Path]) -> tuple[Unrecorded, ...]:
    """Return those of some delta folders that are patches; of the others nothing is known."""
    described = (_described(folder) for folder in folders)
    return tuple(patch for patch in described if patch is not None)


def _described(folder: Path) -> Unrecorded | None:
    """Read the edit.json of a delta folder; None if it has none that matches its checksum."""
    file = folder / "edit.json"
    try:
        if not file.is_file() or file.stat().st_size > _MOST_JSON:
            return None
        record = json.loads(file.read_bytes())
        if record.pop("sha256") != record_digest(record):
            return None
        facts: Sequence[dict[str, Any]] = record["facts"]
        appended: dict[str, Any] = record.get("appended", {})
        return Unrecorded(
            delta=folder.name,
            method=str(record["method"]),
            facts=tuple(str(Fact.from_dict(fact)) for fact in facts),
            layers=tuple(sorted({*map(int, record["layers"]), *map(int, appended)})),
            fingerprint=str(record["fingerprint"]),
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
