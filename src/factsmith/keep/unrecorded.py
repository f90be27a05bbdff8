"""Deltas that no revision names, and that were patches all the same.

    with Workbench(lm, "my-workspace") as bench:
        for patch in bench.ledger.unrecorded():
            print(patch.facts)
        recover_patches(bench)             # commits those that fit onto the weights

A commit that was killed leaves such a delta. So does a ledger.db that lost revisions of which there
were no copies (`copies`). The delta's own edit.json says what it is: method, layers and facts. What
it does not say is where it was in the history. That follows from the weights that it was made on.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import WorkspaceError
from ..core.fact import Fact
from ..core.files import record_digest
from .revision import Revision, Unrecorded

if TYPE_CHECKING:
    from .workbench import Workbench

_MOST_JSON = 64 * 2**20


def unrecorded(folders: Iterable[Path]) -> tuple[Unrecorded, ...]:
    """Return those of some delta folders that are patches; of the others nothing is known."""
    described = (_described(folder) for folder in folders)
    return tuple(patch for patch in described if patch is not None)


def recover_patches(bench: Workbench) -> tuple[Revision, ...]:
    """Commit the patches without a record that fit onto the model's weights, one after another.

    A patch fits if it was made on just these weights. So patches come back in the order in which
    they were made. Those that fit nowhere stay, and so does their place among the unrecorded.

    Args:
        bench: The workbench, at the newest revision.

    Returns:
        The new revisions. Their reports are empty, and their messages begin with "recovered".

    Raises:
        WorkspaceError: when the workspace cannot be written, or an older revision is checked out.
        DamagedError: when a delta is not whole.
    """
    from ..edit.delta import Delta

    bench.ledger.expect(bench.ledger.head)
    revisions: list[Revision] = []
    waiting = list(bench.ledger.unrecorded())
    while fitting := [each for each in waiting if each.fingerprint == bench.lm.fingerprint]:
        if len(fitting) > 1:
            raise WorkspaceError(
                f"{len(fitting)} patches without a record were made on the same weights: "
                f"{'; '.join(map(str, fitting))}. Move the folders of all but one out of "
                f"{bench.ledger.folder / 'deltas'}, then run this again."
            )
        patch = fitting[0]
        delta = Delta.load(bench.ledger.folder / "deltas" / patch.delta)
        message = f"recovered: {'; '.join(patch.facts) or patch.method}"
        revisions.append(bench.commit(delta, message=message))
        waiting.remove(patch)
    return tuple(revisions)


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
        return Unrecorded(
            delta=folder.name,
            method=str(record["method"]),
            facts=tuple(str(Fact.from_dict(fact)) for fact in facts),
            layers=tuple(map(int, record["layers"])),
            fingerprint=str(record["fingerprint"]),
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
