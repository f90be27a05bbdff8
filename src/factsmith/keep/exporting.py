"""Export what a workspace's model carries, now or at another revision.

    export_state(carried, "my-adapter", "adapter", "5c1e")     # the patches in effect at 5c1e

The ledger's checkout does not move: the deltas in effect at the revision are read from the ledger,
and are put onto the base weights while the export is written.
"""

from __future__ import annotations

import os
from typing import Any

from ..core.errors import InputError
from .carried import Carried
from .export.contents import Origin, State
from .export.formats import export
from .export.record import Export
from .revision import Revision


def export_state(
    carried: Carried,
    folder: str | os.PathLike[str],
    format: str,
    revision: str | None = None,
    **options: Any,
) -> Export:
    """Write the model with the patches in effect at a revision, or these patches alone.

    Args:
        carried: The model and the ledger. The model is as before when this returns.
        folder: A new folder to write into, or a new file for the formats of GGUF.
        format: As for `formats.export`.
        revision: A revision's id, a unique prefix of it, or "latest". None: the revision whose
            weights the model has.
        options: As for `formats.export`.

    Raises:
        RevisionError: when there is no such revision.
        InputError: when no patch is in effect at the revision.
        DamagedError: when a delta is not whole.
    """
    identity = carried.at if revision is None else carried.ledger.resolve(revision)
    active = carried.ledger.active(identity)
    if not active and revision is not None:
        raise InputError(
            f"revision is {revision!r}: no patch is in effect there, so there is nothing to "
            "export. Choose another revision; `factsmith log` lists them.",
            argument="revision",
        )
    deltas = [carried.delta_of(patch) for patch in active]
    origins = []
    if active:
        state = carried.ledger.show(identity)
        origins = [_origin(patch, state) for patch in active]
    with carried.exactly([]):
        return export(carried.lm, deltas, folder, format, origins=origins, **options)


def _origin(patch: Revision, state: Revision) -> Origin:
    """Return where a patch comes from, in an export of a state."""
    return Origin(
        revision=patch.id,
        message=patch.message,
        moments=patch.moments,
        created=patch.created,
        report=patch.report,
        changed=patch.carried != patch.delta,
        state=State(revision=state.id, created=state.created),
    )
