"""Exports by the name of their format.

    made = export(lm, delta, "my-adapter", "adapter")      # PEFT LoRA: kilobytes (adapter.py)
    made = export(lm, delta, "my-model", "checkpoint")     # the whole model, merged (checkpoint.py)
    made = export(lm, delta, "my-patch", "patch")          # for another workspace (patch.py)
    made = export(lm, delta, "patched.gguf", "gguf")       # the base GGUF file, patched
    made = export(lm, delta, "patch.gguf", "gguf-adapter") # a LoRA for llama.cpp

Every export is a folder or a GGUF file, with a manifest (`manifest`). It is written next to its
place, read back, and only then renamed, so it is there whole and checked, or not at all (`staging`,
`single`). Checkpoints and adapters are read back by plain transformers and peft in a separate
process that never imports factsmith, and compared with the patched model in memory (`readback`).
Patches are compared bit for bit. GGUF files are compared byte for byte with their base, and what
they change is put into the model in memory and asked (`inmemory`).

A new format needs its name in `manifest.Format`, a module that writes its folder, and a row here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from ...core.errors import InputError
from ...edit.delta import Delta
from ...edit.delta_folder import stated_neurons
from ...model.gguf_reading import check_libraries
from ...model.language_model import LanguageModel
from .adapter import check_peft, check_rank, export_adapter
from .checkpoint import export_checkpoint
from .contents import check_no_neurons
from .gguf_adapter import check_factors, export_gguf_adapter
from .gguf_file import export_gguf
from .gguf_writing import check_type
from .manifest import FORMATS, Format
from .patch import export_patch
from .record import Export
from .several import check_several
from .single import check_file
from .staging import check_target

FILES: tuple[Format, ...] = ("gguf", "gguf-adapter")
"""The formats whose export is a file."""

_WRITERS: Mapping[Format, Callable[..., Export]] = {
    "checkpoint": export_checkpoint,
    "adapter": export_adapter,
    "patch": export_patch,
    "gguf": export_gguf,
    "gguf-adapter": export_gguf_adapter,
}

_OPTIONS: Mapping[Format, tuple[str, ...]] = {
    "checkpoint": ("dtype",),
    "adapter": ("dtype", "rank", "base"),
    "patch": (),
    "gguf": ("tensor_type", "base"),
    "gguf-adapter": ("dtype", "rank", "base"),
}
"""The options that not every format has."""


def export(
    lm: LanguageModel,
    deltas: Delta | Iterable[Delta],
    folder: str | os.PathLike[str],
    format: str = "checkpoint",
    *,
    verify: bool = True,
    **options: Any,
) -> Export:
    """Write the model with deltas, or the deltas alone, in one of the formats.

    Args:
        lm: The model, without the deltas. It is unchanged afterwards, also after an exception.
        deltas: One delta or several, in the order in which they are added.
        folder: A new folder to write into, or a new file for the formats of GGUF.
        format: "checkpoint", "adapter", "patch", "gguf" or "gguf-adapter".
        verify: Whether to read the export back and compare it. A patch is always compared.
        options: Options of `export_checkpoint`, `export_adapter`, `export_patch`, `export_gguf` or
            `export_gguf_adapter`. None: not given.

    Raises:
        InputError: when there is no such format, or it has no such option; and what these functions
            raise.
    """
    kind = _checked_format(format)
    given = {name: value for name, value in options.items() if value is not None}
    _check_options(kind, given)
    if kind != "patch":
        given["verify"] = verify
    return _WRITERS[kind](lm, deltas, folder, **given)


def check_export(
    folder: str | os.PathLike[str],
    format: str = "checkpoint",
    *,
    verify: bool = True,
    overwrite: bool = False,
    several: bool = False,
    **options: Any,
) -> None:
    """Check the arguments of `export` before there is a model.

    Args:
        folder: As for `export`; a folder in any case if there are several exports.
        format: As for `export`.
        verify: As for `export`.
        overwrite: As for the functions of the formats.
        several: Whether several exports are to be written into the folder.
        options: As for `export`.

    Raises:
        InputError: when there is no such format, it has no such option, a value is not valid, the
            folder may not be replaced, or peft is needed and not installed.
        ModelError: when the library gguf is needed and not installed.
        WorkspaceError: when the folder cannot be written.
    """
    kind = _checked_format(format)
    _check_options(kind, {name: value for name, value in options.items() if value is not None})
    if kind == "adapter":
        check_rank(options.get("rank"))
        if verify:
            check_peft()
    if kind == "gguf":
        check_type(options.get("tensor_type"))
    if kind == "gguf-adapter":
        check_rank(options.get("rank"))
        check_factors(options.get("dtype"))
    if kind in FILES:
        check_libraries()
    place = check_several if several else check_file if kind in FILES else check_target
    place(folder, overwrite)


def check_saved(folders: Iterable[Path], format: str) -> None:
    """Check that a format can hold saved deltas, before there is a model.

    Args:
        folders: Their folders, as `Delta.save` writes them.
        format: The format.

    Raises:
        InputError: when one appends neurons, and the format is an adapter.
        DamagedError: when the record of one cannot be read.
    """
    kind = _checked_format(format)
    if kind in ("adapter", "gguf-adapter"):
        check_no_neurons(kind, sum(map(stated_neurons, folders)))


def _checked_format(format: str) -> Format:
    """Return the format; raises InputError where there is no such one."""
    for known in FORMATS:
        if format == known:
            return known
    raise InputError(
        f"format is {format!r}: it must be {', '.join(FORMATS[:-1])} or {FORMATS[-1]}.",
        argument="format",
    )


def _check_options(format: Format, given: Mapping[str, Any]) -> None:
    """Raise InputError for an option that the format does not have."""
    allowed = {*_OPTIONS[format], "overwrite", "origins", "progress"}
    for name in sorted(given.keys() - allowed):
        takers = [other for other in FORMATS if name in _OPTIONS[other]]
        raise InputError(
            f"{name} is {given[name]!r}, but a {format} has no {name}."
            + (f" It is an option of: {', '.join(takers)}." if takers else ""),
            argument=name,
        )
