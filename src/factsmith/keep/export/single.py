"""Writing an export that is one file: it is there whole, or not at all.

    with staged_file("patched.gguf", overwrite=False) as folder:
        write(folder / "patched.gguf")
        write_manifest(folder, "gguf", contents)

The block writes into a hidden folder next to the target, as `staged` does. At its end the file is
flushed to disk and renamed to the target, and the manifest to "patched.gguf.factsmith.json".
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from ...core.errors import DamagedError, InputError
from ...core.files import check_writable, flush_folder, folder_path
from .manifest import FILE, read_manifest
from .staging import hidden_folder

SUFFIX = ".gguf"


def manifest_of(target: Path) -> Path:
    """Return where the manifest of a single file is."""
    return target.with_name(f"{target.name}.{FILE}")


def as_placed(files: Mapping[str, int], file: str | os.PathLike[str]) -> dict[str, int]:
    """Return the sizes that `write_manifest` gave, the manifest under its name next to the file."""
    manifest = manifest_of(Path(file)).name
    return {manifest if name == FILE else name: size for name, size in files.items()}


@contextlib.contextmanager
def staged_file(file: str | os.PathLike[str], overwrite: bool) -> Iterator[Path]:
    """Yield a new, hidden folder, whose file of that name becomes `file` at the end of the block.

    Args:
        file: The target: a new file, or an earlier export.
        overwrite: Whether to replace an earlier export.

    Raises:
        InputError: when the target may not be replaced.
        WorkspaceError: when something cannot be written.
    """
    target = check_file(file, overwrite)

    def put(staging: Path) -> None:
        check_file(target, overwrite)  # it may have changed in the meantime
        # The manifest first: a manifest without its file is no obstacle next time.
        (staging / FILE).replace(manifest_of(target))
        (staging / target.name).replace(target)
        flush_folder(target.parent)

    with hidden_folder(target, target, put) as staging:
        yield staging


def check_file(file: str | os.PathLike[str], overwrite: bool) -> Path:
    """Return the file of an export as a full path, after a check that it can be written.

    Raises:
        InputError: when the target may not be replaced, or is not named as a GGUF file.
        WorkspaceError: when it cannot be written.
    """
    given = folder_path(file)
    if given.suffix.lower() != SUFFIX:
        raise _refusal(f"{given} does not end in {SUFFIX}")
    if given.is_symlink():
        raise _refusal(f"{given} is a link")
    target = given.resolve()
    if target.is_dir():
        raise _refusal(f"{target} is a folder")
    if target.exists():
        if not _is_export(target):
            raise _refusal(f"{target} is not an export by factsmith")
        if not overwrite:
            raise InputError(
                f"{target} is an earlier export. Allow to overwrite it, or choose the name of a "
                "new file.",
                argument="overwrite",
            )
    check_writable(target.parent)
    return target


def check_not_base(file: str | os.PathLike[str], *bases: Path | None) -> None:
    """Raise InputError if an export would replace the file that it is made from."""
    target = folder_path(file).resolve()
    if any(base is not None and base.resolve() == target for base in bases):
        raise _refusal(f"{target} is the base file itself")


def _is_export(target: Path) -> bool:
    try:
        manifest = read_manifest(target.parent, manifest_of(target).name)
    except (DamagedError, InputError):
        return False
    return set(manifest.files) == {target.name}


def _refusal(why: str) -> InputError:
    return InputError(
        f"{why}. Choose the name of a new file, such as patched.gguf.", argument="folder"
    )
