"""Writing a folder that is there whole, or not at all.

    with staged("my-patch", overwrite=False) as folder:
        delta.save(folder / "0001")
        write_manifest(folder, "patch", contents)

The block writes into a hidden folder next to the target. At the end of the block that folder is
flushed to disk and renamed to the target. After an exception it is deleted, and an earlier export
at the target is as it was. Hidden folders that a killed process left next to the target are removed
first (`leftovers`).
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import safetensors

from ...core.errors import DamagedError, InputError, WorkspaceError
from ...core.files import check_writable, flush_folder, folder_path, settle_folder
from ...core.leftovers import OLDER, WRITING, held, remove_leftovers
from .manifest import FILE, read_manifest


@contextlib.contextmanager
def staged(
    folder: str | os.PathLike[str],
    overwrite: bool,
    check: Callable[[str | os.PathLike[str], bool], Path] | None = None,
) -> Iterator[Path]:
    """Yield a new, hidden folder, which becomes `folder` at the end of the block.

    Args:
        folder: The target: a new folder, an empty one, or an earlier export.
        overwrite: Whether to replace what is in it.
        check: Returns the target as a full path if it may be replaced. None: `check_target`.

    Raises:
        InputError: when the target may not be replaced.
        WorkspaceError: when something cannot be written.
    """
    checked = check_target if check is None else check
    target = checked(folder, overwrite)

    def put(staging: Path) -> None:
        checked(target, overwrite)  # it may have changed in the meantime
        put_folder(staging, target)

    with hidden_folder(target, folder, put) as staging:
        yield staging


@contextlib.contextmanager
def hidden_folder(
    target: Path, shown: str | os.PathLike[str], put: Callable[[Path], object]
) -> Iterator[Path]:
    """Yield a new, hidden folder next to `target`, and put its content there after the block.

    Args:
        target: Where the content goes.
        shown: The target as errors name it.
        put: Called with the hidden folder, once its content is on the disk.

    Raises:
        WorkspaceError: when something cannot be written.
    """
    remove_leftovers(target.parent)
    parents = [parent for parent in (target.parent, *target.parent.parents) if not parent.exists()]
    try:
        with contextlib.ExitStack() as stack:
            with explained(shown):
                staging = stack.enter_context(held(target.parent, target.name, WRITING))
            stack.callback(shutil.rmtree, staging, ignore_errors=True)
            with explained(shown):
                yield staging
            with explained(shown):
                settle_folder(staging)
                put(staging)
                for parent in parents:
                    flush_folder(parent.parent)
        parents = []
    finally:
        for parent in parents:
            with contextlib.suppress(OSError):
                parent.rmdir()


def check_target(folder: str | os.PathLike[str], overwrite: bool) -> Path:
    """Return the folder of an export as a full path, after a check that it can be written.

    Raises:
        InputError: when the target may not be replaced.
        WorkspaceError: when it cannot be written.
    """
    given = folder_path(folder)
    if given.is_symlink():
        raise _refusal(f"{given} is a link")
    target = given.resolve()
    _check_target(target, overwrite)
    check_writable(target.parent)
    return target


def put_folder(staging: Path, target: Path) -> None:
    """Rename a folder to the target. If that fails, what was at the target is there again."""
    with contextlib.ExitStack() as stack:
        older = None
        if target.is_dir():
            older = stack.enter_context(held(target.parent, target.name, OLDER, source=target))
        try:
            staging.rename(target)
        except BaseException:
            if older is not None:
                older.rename(target)
            raise
        flush_folder(target.parent)
        if older is not None:
            shutil.rmtree(older, ignore_errors=True)


def _check_target(target: Path, overwrite: bool) -> None:
    """Raise InputError unless the target is new, empty, or an export that may be replaced."""
    if target.exists() and not target.is_dir():
        raise _refusal(f"{target} is a file")
    if not target.is_dir():
        return
    if target in (Path.cwd(), *Path.cwd().parents):
        raise _refusal(f"{target} is the current folder or one above it")
    files = {
        path.relative_to(target).as_posix()
        for path in target.rglob("*")
        if not path.is_dir() or path.is_symlink()
    }
    if not files and not any(target.iterdir()):
        return
    try:
        manifest = read_manifest(target)
    except (DamagedError, InputError):
        raise _refusal(f"{target} holds files that are not an export by factsmith") from None
    if strange := sorted(files - manifest.files.keys() - {FILE}):
        raise _refusal(
            f"{target} is an earlier export, but {strange[0]!r} in it does not belong to it"
        )
    if not overwrite:
        raise InputError(
            f"{target} is an earlier export. Allow to overwrite it, or choose the name of a new "
            "folder.",
            argument="overwrite",
        )


def _refusal(why: str) -> InputError:
    return InputError(f"{why}. Choose the name of a new folder.", argument="folder")


@contextlib.contextmanager
def explained(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Turn errors of the file system into a WorkspaceError that says what to do."""
    try:
        yield
    except (OSError, safetensors.SafetensorError) as error:
        text = str(error)
        is_full = isinstance(error, OSError) and error.errno == errno.ENOSPC
        if is_full or f"os error {errno.ENOSPC}" in text:
            raise WorkspaceError(
                f"The disk is full: nothing was written to {folder}. Free some space, then run "
                "this again."
            ) from error
        reason = (error.strerror if isinstance(error, OSError) else None) or text
        raise WorkspaceError(
            f"Cannot write {folder}: {reason}. Nothing was written; choose a folder that can be "
            "written."
        ) from error
