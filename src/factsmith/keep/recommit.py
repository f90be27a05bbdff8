"""Patches that lost their record, committed again.

with Workbench(lm, "my-workspace") as bench:
    bench.ledger.unrecorded()          # what there is
    recover_patches(bench)             # commits those that fit onto the weights
"""

from __future__ import annotations

from ..core.errors import WorkspaceError
from ..edit.delta import Delta
from .revision import Revision
from .workbench import Workbench


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
