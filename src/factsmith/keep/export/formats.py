"""Exports: a patched model for programs that know nothing of factsmith, and patches for another workspace.

    made = export_adapter(lm, delta, "my-adapter")           # PEFT LoRA on the down-projections: kilobytes beside the untouched model
    made = export_checkpoint(lm, delta, "my-model")          # the whole model, merged, as `save_pretrained` writes it
    made = export_patch(lm, delta, "my-patch")               # the deltas themselves, with all that a workspace keeps of them
    for saved in read_patch("my-patch").patches:
        saved.delta, saved.origin.message

Every export is a folder with a `factsmith.json` that says what is in it. It is written beside its place, read back, and only then renamed
into it: it is there whole and checked, or not at all. Checkpoints and adapters are read back by plain transformers and peft in a process
of its own that never imports factsmith, and compared with the patched model in memory; patches are compared bit for bit.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from ...core.errors import InputError
from ...core.progress import Progress
from ...edit.delta import Delta
from ...model.language_model import LanguageModel
from .adapter import export_adapter
from .checkpoint import export_checkpoint
from .contents import Origin
from .folder import FORMATS
from .patch import export_patch
from .record import Export

# ---- writing --------------------------------------------------------------------------------------------------------------------------


def export(
    lm: LanguageModel,
    deltas: Delta | Iterable[Delta],
    folder: str | os.PathLike[str],
    format: str = "checkpoint",
    *,
    dtype: torch.dtype | None = None,
    rank: int | None = None,
    base: str | None = None,
    verify: bool = True,
    overwrite: bool = False,
    origins: Sequence[Origin] = (),
    progress: Progress | None = None,
) -> Export:
    """One of the three formats by its name; an option that the format does not take raises InputError, as does an unknown format."""
    kept: dict[str, Any] = {"overwrite": overwrite, "origins": origins, "progress": progress}
    if format == "adapter":
        return export_adapter(
            lm, deltas, folder, rank=rank, dtype=dtype, base=base, verify=verify, **kept
        )
    if rank is not None or base is not None:
        raise InputError(f"rank and base are options of an adapter; a {format} takes neither")
    if format == "checkpoint":
        return export_checkpoint(lm, deltas, folder, dtype=dtype, verify=verify, **kept)
    if format != "patch":
        raise InputError(
            f"format is {format!r}; expected {', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
        )
    if dtype is not None:
        raise InputError(f"a patch is kept in float32 as it was made; got dtype {dtype}")
    return export_patch(lm, deltas, folder, **kept)
