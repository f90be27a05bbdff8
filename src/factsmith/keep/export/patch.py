"""keep.export.patch."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

from ...core.errors import NumericsError
from ...core.progress import Progress, tell
from ...edit.delta import Delta
from ...model.language_model import LanguageModel
from .contents import Origin
from .folder import describe, numbered, read_patch, staged
from .record import Export, checked_deltas, described, equal_weights


def export_patch(
    lm: LanguageModel,
    deltas: Delta | Iterable[Delta],
    folder: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    origins: Sequence[Origin] = (),
    progress: Progress | None = None,
) -> Export:
    """The deltas for another workspace of the same model: 0001/, 0002/ ... as `Delta.save` writes them, in their order, and a manifest.

    They are read back by `read_patch` and compared bit for bit. Arguments and errors as of `export_checkpoint`.
    """
    deltas = checked_deltas(lm, deltas, origins)
    with staged(folder, overwrite) as staging:
        tell(progress, "writing the patches", 0, len(deltas))
        for i, delta in enumerate(deltas):
            delta.save(staging / numbered(i))
        files = describe(staging, "patch", lm, deltas, origins)
        again = [saved.delta for saved in read_patch(staging, fingerprint=lm.fingerprint).patches]
        for ours, theirs in zip(deltas, again, strict=True):
            if not equal_weights(ours, theirs):
                raise NumericsError(
                    "a patch read back is not the one that was written; nothing was kept: please report it"
                )
    return described(folder, "patch", lm, deltas, files, dtype="float32")
