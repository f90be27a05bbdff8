"""Several exports in one folder: all of them are there, or none.

    with staged("adapters", False, check_several) as folder:
        export(lm, first, folder / "5c1e02aa91f0", "adapter")
        export(lm, second, folder / "77a0d41c35be", "adapter")

This module says which folder may hold several; `staging` writes it.
"""

from __future__ import annotations

import os
from pathlib import Path

from ...core.errors import InputError
from ...core.files import check_writable, folder_path
from .manifest import FILE
from .single import SUFFIX, check_file
from .staging import check_target


def check_several(folder: str | os.PathLike[str], overwrite: bool) -> Path:
    """Return the folder of several exports as a full path, after a check that it can be written.

    Raises:
        InputError: when the target may not be replaced.
        WorkspaceError: when it cannot be written.
    """
    given = folder_path(folder)
    if given.is_symlink() or (given.exists() and not given.is_dir()):
        raise _refusal(f"{given} is a link or a file")
    target = given.resolve()
    if target in (Path.cwd(), *Path.cwd().parents):
        raise _refusal(f"{target} is the current folder or one above it")
    check_writable(target.parent)
    entries = sorted(target.iterdir()) if target.is_dir() else []
    for entry in entries:
        _check_entry(target, entry)
    if entries and not overwrite:
        raise InputError(
            f"{target} holds earlier exports. Allow to overwrite all of them, or choose the name "
            "of a new folder.",
            argument="overwrite",
        )
    return target


def _check_entry(target: Path, entry: Path) -> None:
    """Raise InputError unless an entry of a folder is an export, or the manifest of one."""
    export = entry
    if entry.is_file() and entry.name.endswith(f"{SUFFIX}.{FILE}"):
        export = entry.with_name(entry.name.removesuffix(f".{FILE}"))
    try:
        if entry.is_dir():
            check_target(export, overwrite=True)
            is_export = any(export.iterdir())
        else:
            check_file(export, overwrite=True)
            is_export = export.is_file()
    except InputError:
        is_export = False
    if not is_export:
        raise _refusal(f"{target} holds {entry.name!r}, which is not an export by factsmith")


def _refusal(why: str) -> InputError:
    return InputError(f"{why}. Choose the name of a new folder.", argument="folder")
