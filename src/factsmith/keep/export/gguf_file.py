"""Exports as a GGUF file: the base file with the patched matrices in place of its own.

    made = export_gguf(lm, deltas, "patched.gguf")                       # lm = load("model.gguf")
    made = export_gguf(lm, deltas, "patched.gguf", base="model.gguf")    # lm = load("a-folder")

All other tensors and all fields are those of the base, byte for byte.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ...core.errors import NumericsError
from ...core.progress import Progress, tell
from ...edit.delta import Delta, patched, read_weights
from ...model.gguf_header import Header
from ...model.gguf_reading import check_libraries
from ...model.language_model import LanguageModel
from ...model.turns import asking
from .contents import Contents, Origin
from .gguf_base import Base, find_base
from .gguf_width import widening
from .gguf_writing import (
    Change,
    check_replaced,
    check_type,
    entry_of,
    quantised,
    read_tensor,
    write_replaced,
)
from .inmemory import compare_in_memory
from .manifest import ManifestBase, write_manifest
from .readback import LIMITS
from .record import Export
from .single import as_placed, check_file, check_not_base, staged_file

_LIMITS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""{type: the dtype whose limit holds}. Q8_0 rounds like bfloat16."""


@asking(grad=True, changes=True)
def export_gguf(  # house: public, and named like the other exports
    lm: LanguageModel,
    deltas: Delta | Iterable[Delta],
    folder: str | os.PathLike[str],
    *,
    tensor_type: str | None = None,
    base: str | os.PathLike[str] | None = None,
    verify: bool = True,
    overwrite: bool = False,
    origins: Sequence[Origin] = (),
    progress: Progress | None = None,
) -> Export:
    """Write the GGUF file of the model with the deltas merged into it.

    Args:
        lm: The model, without the deltas. It is unchanged afterwards, also after an exception.
        deltas: One delta or several, in the order in which they are added.
        folder: The new file, which ends in ".gguf".
        tensor_type: The type of the patched matrices: "F16", "Q8_0", "BF16" or "F32". None: F16.
            The types of most files have too few bits for a patch.
        base: The GGUF file of the model. None: the one that it was loaded from.
        verify: Whether to compare the answers of the model with the matrices as they were written
            with those of the patched model. All other bytes are always compared.
        overwrite: Whether to replace an earlier export.
        origins: Where the deltas come from, one for each, for the manifest.
        progress: Gets what is being done.

    Raises:
        InputError: when there is no delta, a delta does not fit, there is no base file, or the file
            may not be replaced.
        FingerprintError: when the base file is not this model.
        UnsupportedModelError: when the model is masked, or llama.cpp has no name for a patched
            matrix.
        NumericsError: when a number is too large for the type, or what was written differs.
        ModelError: when the base file is damaged, or the library gguf is missing.
        WorkspaceError: when the file cannot be written. After every error everything is as it was
            before.
    """
    contents = Contents.of(lm, deltas, origins)
    kind = check_type(tensor_type)
    check_libraries()
    check_file(folder, overwrite)
    tell(progress, "reading the base file", 0, None)
    file = find_base(lm, contents.layers | contents.appended.keys(), base)
    check_not_base(folder, file.header.path, None if lm.gguf is None else lm.gguf.path)
    wide = widening(lm, file, contents.deltas, kind) if contents.appended else None
    with staged_file(folder, overwrite) as staging:
        target = staging / Path(folder).name
        tell(progress, "writing the file", 0, None)
        changes = _changes(file, contents.deltas, kind) if wide is None else wide.changes
        fields = None if wide is None else wide.fields
        write_replaced(file.header, target, changes, fields)
        tell(progress, "reading it back", 0, None)
        head = check_replaced(file.header, target, changes, fields)
        written = _read(head, file)
        comparison = None
        if verify:
            comparison = compare_in_memory(
                lm,
                contents.deltas,
                _as_in_model(lm, file, written),
                max(LIMITS[lm.dtype], LIMITS[_LIMITS.get(kind, torch.bfloat16)]),
                "" if kind == "F32" else "Write the patched tensors in F32.",
                appended=None if wide is None else wide.rows_in(head),
            )
        stated = ManifestBase(
            name=file.header.path.name, bytes=file.header.n_bytes, sha256=file.sha256
        )
        sizes = write_manifest(staging, "gguf", contents, comparison, stated)
    files = as_placed(sizes, folder)
    width = None if wide is None else wide.width
    return Export.of(folder, "gguf", contents, files, dtype=kind, width=width, read_back=comparison)


def _changes(file: Base, deltas: Sequence[Delta], kind: str) -> dict[str, Change]:
    """Return the matrices that deltas without appended neurons change."""
    new = patched(file.weights, deltas)
    return {file.names[layer]: quantised(weight, kind) for layer, weight in new.items()}


def _read(head: Header, file: Base) -> dict[int, Tensor]:
    """Return the patched matrices of a file that was written, without appended neurons."""
    written = {}
    for layer, name in file.names.items():
        entry = entry_of(head, name)
        if entry is None:
            raise NumericsError(
                f"The file that was written lacks {name}. Nothing was kept; please report this."
            )
        written[layer] = read_tensor(head, entry)[:, : file.weights[layer].shape[1]]
    return written


def _as_in_model(lm: LanguageModel, file: Base, written: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """Return the model's matrices plus the change of each, as it was written.

    The base file may be quantised in another way than the model.
    """
    matrices = read_weights(lm, written)
    changed = {}
    for layer, weight in written.items():
        change = (weight - file.weights[layer]).to(lm.device)
        changed[layer] = (matrices[layer].float() + change).to(lm.dtype)
    return changed
