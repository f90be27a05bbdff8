"""Export what a workspace's model carries, now or at other revisions.

    export_state(carried, "my-adapter", "adapter", "5c1e")     # the patches in effect at 5c1e
    export_states(carried, "adapters", ["5c1e", "77a0"], "adapter")     # adapters/5c1e02aa91f0, ...

The ledger's checkout does not move: the deltas in effect at the revision are read from the ledger,
and are put onto the base weights while the export is written.
"""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..core.checks import check_text
from ..core.errors import InputError
from ..core.progress import Progress, tell
from .carried import Carried
from .export.contents import Origin, State
from .export.formats import FILES, check_export, export
from .export.naming import loaded_from
from .export.record import Export
from .export.several import check_several
from .export.single import SUFFIX
from .export.staging import staged
from .ledger import Ledger
from .revision import Revision

DIGITS = 12
"""Digits of a revision's id that the names of several exports have."""


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
    reference = None if revision is None else check_text(revision, "revision")
    identity = carried.at if reference is None else carried.ledger.resolve(reference)
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


def export_states(
    carried: Carried,
    folder: str | os.PathLike[str],
    revisions: Iterable[str],
    format: str,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> tuple[Export, ...]:
    """Write an export of each of several revisions into one folder: all of them, or none.

    Args:
        carried: The model and the ledger. The model is as before when this returns.
        folder: A new folder. Each export is in it under the first twelve digits of its revision,
            followed by ".gguf" in the formats of GGUF.
        revisions: As `revision` of `export_state`, each of another state.
        format: As for `formats.export`.
        overwrite: Whether to replace all exports that are in the folder.
        progress: Gets what is being done.
        options: As for `formats.export`.

    Raises:
        InputError: when no revision is given, one is given twice, or the folder may not be
            replaced; and what `export_state` raises. Nothing is written then.
    """
    identities = distinct_revisions(carried.ledger, revisions)
    check_export(folder, format, overwrite=overwrite, several=True, **options)
    _check_no_base(carried, folder, options.get("base"))
    suffix = SUFFIX if format in FILES else ""
    made = []
    with staged(folder, overwrite, check_several) as staging:
        for number, identity in enumerate(identities):
            tell(progress, "exporting revisions", number, len(identities))
            name = f"{identity[:DIGITS]}{suffix}"
            written = export_state(
                carried, staging / name, format, identity, progress=progress, **options
            )
            made.append(dataclasses.replace(written, folder=Path(folder) / name))
    return tuple(made)


def distinct_revisions(ledger: Ledger, references: Iterable[str]) -> list[str]:
    """Return the ids of several revisions.

    Raises:
        InputError: when no revision is given, or one is given twice.
        RevisionError: when there is no such revision.
    """
    if isinstance(references, str):
        raise InputError(
            f"revisions is {references!r}: it must be a list of revisions. To export one revision, "
            "give it as `revision` of `export`.",
            argument="revisions",
        )
    identities = [ledger.resolve(check_text(each, "a revision")) for each in references]
    if not identities:
        raise InputError(
            "revisions is empty. Give at least one revision; `factsmith log` lists them.",
            argument="revisions",
        )
    names = Counter(identity[:DIGITS] for identity in identities)
    if twice := [name for name, count in names.items() if count > 1]:
        raise InputError(
            f"revisions has {twice[0]} twice. Give each revision once.", argument="revisions"
        )
    return identities


def _check_no_base(carried: Carried, folder: str | os.PathLike[str], base: object) -> None:
    """Raise InputError if the folder that is replaced holds the base model."""
    target = Path(folder).resolve()
    lm = carried.lm
    places = [loaded_from(lm), *([] if lm.gguf is None else [lm.gguf.path]), base or ""]
    for place in filter(None, map(str, places)):
        if Path(place).exists() and target in (
            Path(place).resolve(),
            *Path(place).resolve().parents,
        ):
            raise InputError(
                f"{target} holds the base model, {place}. Choose the name of a new folder.",
                argument="folder",
            )


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
