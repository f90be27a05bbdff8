"""Exports as a patch folder: the deltas themselves, for another workspace of the same model.

export_patch(lm, [first, second], "my-patch")      # 0001/, 0002/ and a manifest
Workbench(lm, "another-workspace").import_patches("my-patch")
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

from ...core.errors import NumericsError
from ...core.progress import Progress, tell
from ...edit.delta import Delta
from ...model.language_model import LanguageModel
from ...model.turns import asking
from .contents import Contents, Origin
from .folder import numbered, read_patch
from .manifest import write_manifest
from .record import Export
from .staging import staged


@asking(grad=True, changes=True)
def export_patch(
    lm: LanguageModel,
    deltas: Delta | Iterable[Delta],
    folder: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    origins: Sequence[Origin] = (),
    progress: Progress | None = None,
) -> Export:
    """Write deltas for another workspace of the same model, and compare what was written.

    Each delta is saved in a folder of its own, with its facts, settings and targets. The whole is
    read back with `read_patch`, and every tensor must be equal bit for bit.

    Args:
        lm: The model, without the deltas.
        deltas: One delta or several, in the order in which they are added.
        folder: A new folder to write into.
        overwrite: Whether to replace an earlier export in the folder.
        origins: Where the deltas come from, one for each, for the manifest.
        progress: Gets what is being done.

    Raises:
        InputError: when there is no delta, a delta does not fit, or the folder holds other files.
        UnsupportedModelError: when the model is masked, or a layer cannot be edited.
        NumericsError: when a delta that was read back differs.
        WorkspaceError: when the folder cannot be written. After every error the folder is as it
            was before.
    """
    contents = Contents.of(lm, deltas, origins)
    with staged(folder, overwrite) as staging:
        tell(progress, "writing the patches", 0, len(contents.deltas))
        for i, delta in enumerate(contents.deltas):
            delta.save(staging / numbered(i))
        files = write_manifest(staging, "patch", contents)
        patches = read_patch(staging, fingerprint=lm.fingerprint).patches
        for delta, saved in zip(contents.deltas, patches, strict=True):
            if not equal_deltas(delta, saved.delta):
                raise NumericsError(
                    "A patch that was read back differs from the one that was written. Nothing was "
                    "kept; please report this."
                )
    return Export.of(folder, "patch", contents, files, dtype="float32")


def equal_deltas(a: Delta, b: Delta) -> bool:
    """Return whether two deltas have the same facts and the same tensors, bit for bit."""
    return _described(a) == _described(b) and a.digest == b.digest


def _described(delta: Delta) -> tuple[Any, ...]:
    """Return what a delta holds besides its tensors."""
    rows = {layer: rows.facts for layer, rows in delta.appended.items()}
    return delta.method, delta.facts, delta.fingerprint, set(delta.layers), rows
