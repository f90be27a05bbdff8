"""Reading a folder of patches, from whomever it comes.

    for saved in read_patch("my-patch", fingerprint=lm.fingerprint).patches:
        saved.delta, saved.origin.message

    factsmith.json           the manifest: the model, the patches, the sha256 of every file
    0001/edit.json           the first patch, as `Delta.save` writes it
    0001/delta.safetensors
    0002/...

Such a folder is data: nothing in it is run, and no link in it is followed. The manifest, the list
of files, their sizes and their checksums are checked before a tensor is read.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...core.errors import DamagedError, FingerprintError, InputError
from ...core.fact import Fact
from ...core.files import file_digest, folder_path
from ...core.identity import same_model
from ...core.tables import Shown, Table, counted
from ...edit.delta import Delta
from .contents import Origin
from .manifest import FILE, MOST_JSON, Manifest, ManifestPatch, damaged, read_manifest

_DELTA_FILES = ("delta.safetensors", "edit.json")
"""The files of one patch, as `Delta.save` writes them."""

_MOST_BYTES = 8 * 2**30


@dataclass(frozen=True, kw_only=True)
class SavedPatch:
    """One patch of a folder: its delta, and where it comes from."""

    delta: Delta
    origin: Origin


@dataclass(frozen=True, kw_only=True, repr=False)
class PatchFolder(Shown):
    """The patches of a folder.

    Attributes:
        folder: The folder.
        model: The name of the model that the patches were made for.
        dtype: The dtype of that model, such as "float32".
        fingerprint: The sha256 (hex) of that model without any patch.
        patches: The patches in the order in which they were made. A later one may be solved on top
            of earlier ones.
    """

    folder: Path
    model: str
    dtype: str
    fingerprint: str
    patches: tuple[SavedPatch, ...]

    def tables(self) -> list[Table]:
        """Return one table of the patches, oldest first."""
        rows = [
            (
                str(i),
                p.delta.method,
                ", ".join(map(str, p.delta.touched)),
                p.delta.size,
                str(len(p.delta.facts)),
                p.origin.message,
            )
            for i, p in enumerate(self.patches, 1)
        ]
        model = f"{self.model} ({self.dtype}, fingerprint {self.fingerprint[:10]})"
        columns = {"": ">", "method": "<", "layers": "<", "size": "<", "facts": ">", "message": "<"}
        return [Table(f"{counted(len(rows), 'patch', 'es')} for {model}", columns, rows)]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values, without the tensors of the deltas."""
        patches = [
            {
                **p.origin.to_dict(),
                "method": p.delta.method,
                "layers": list(p.delta.touched),
                "rank": p.delta.rank,
                "neurons": p.delta.n_appended,
                "facts": [fact.to_dict() for fact in p.delta.facts],
            }
            for p in self.patches
        ]
        return {**vars(self), "folder": str(self.folder.resolve()), "patches": patches}


def check_patch(folder: str | os.PathLike[str], fingerprint: str | None = None) -> None:
    """Check the manifest and the files' names of a folder of patches; no tensor is read.

    Raises:
        FactsmithError: as `read_patch`.
    """
    _checked_folder(folder, fingerprint, _MOST_BYTES)


def _checked_folder(
    folder: str | os.PathLike[str], fingerprint: str | None, max_bytes: int
) -> tuple[Path, Manifest]:
    """Return a folder of patches and its manifest, after what can be checked without tensors."""
    path = folder_path(folder)
    if not path.is_dir():
        raise InputError(
            f"{path} is not a folder. Give a folder that an export in the format patch wrote."
        )
    manifest = read_manifest(path)
    _check_manifest(path, manifest, fingerprint, max_bytes)
    _check_listing(path, manifest)
    return path, manifest


def numbered(i: int) -> str:
    """Return the name of a patch's folder; patches are counted from 0."""
    return f"{i + 1:04d}"


def read_patch(
    folder: str | os.PathLike[str], *, fingerprint: str | None = None, max_bytes: int = _MOST_BYTES
) -> PatchFolder:
    """Read a folder that `export_patch` wrote, from whomever it comes.

    Args:
        folder: The folder. It may hold the manifest and, for each patch, edit.json and
            delta.safetensors, as regular files, and nothing more.
        fingerprint: The fingerprint of the unpatched model that the patches must be for. None: any.
        max_bytes: The largest size of the patches that is read.

    Raises:
        InputError: when this is not a folder of patches, or it is too large.
        FingerprintError: when the patches are for another model.
        DamagedError: when something in the folder is not as its manifest says.
    """
    path, manifest = _checked_folder(folder, fingerprint, max_bytes)
    return PatchFolder(
        folder=path,
        model=manifest.model,
        dtype=manifest.dtype,
        fingerprint=manifest.fingerprint,
        patches=tuple(_read_saved(path, manifest, i) for i in range(len(manifest.patches))),
    )


def _check_manifest(
    folder: Path, manifest: Manifest, fingerprint: str | None, max_bytes: int
) -> None:
    """Check that a manifest is of patches, for this model, and not too large."""
    if manifest.factsmith != "patch":
        article = "an" if manifest.factsmith == "adapter" else "a"
        raise InputError(
            f"{folder} holds {article} {manifest.factsmith}. Give a folder that an export in the "
            "format patch wrote."
        )
    if fingerprint is not None and not same_model(manifest.fingerprint, fingerprint):
        raise FingerprintError(
            f"{folder} was made for {manifest.model!r} in {manifest.dtype}, fingerprint "
            f"{manifest.fingerprint[:10]}, and this model has {fingerprint[:10]}. Load the model "
            "that it was made for, in the same dtype."
        )
    expected = {
        f"{numbered(i)}/{name}" for i in range(len(manifest.patches)) for name in _DELTA_FILES
    }
    if not expected or set(manifest.files) != expected:
        raise damaged(
            folder,
            f"its manifest has {counted(len(manifest.patches), 'patch', 'es')}, and does not name "
            "the files of these",
        )
    if sum(file.bytes for file in manifest.files.values()) > max_bytes:
        raise InputError(
            f"{folder} holds more than {max_bytes:,} bytes. Read it with a larger max_bytes if it "
            "is meant to be that large.",
            argument="max_bytes",
        )


def _check_listing(folder: Path, manifest: Manifest) -> None:
    """Check that a folder holds the files of its manifest, and nothing more."""
    places = [numbered(i) for i in range(len(manifest.patches))]
    names: set[str] = set()
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name not in places and entry.name != FILE:
                    raise _unnamed(folder, entry.name)
        for place in places:
            if not stat.S_ISDIR((folder / place).lstat().st_mode):
                raise damaged(folder, f"{place} is a link or a file, where a folder is expected")
            with os.scandir(folder / place) as entries:
                for entry in entries:
                    names.add(f"{place}/{entry.name}")
                    _check_file(folder, f"{place}/{entry.name}", entry, manifest)
    except OSError as error:
        raise damaged(folder, f"it cannot be read: {error.strerror}") from None
    if missing := sorted(manifest.files.keys() - names):
        raise damaged(folder, f"{missing[0]} is missing")


def _check_file(folder: Path, name: str, entry: os.DirEntry[str], manifest: Manifest) -> None:
    if name not in manifest.files:
        raise _unnamed(folder, name)
    status, n_bytes = entry.stat(follow_symlinks=False), manifest.files[name].bytes
    if not stat.S_ISREG(status.st_mode):
        raise damaged(folder, f"{name} is not a regular file")
    if status.st_size != n_bytes:
        raise damaged(folder, f"{name} has {status.st_size:,} bytes instead of {n_bytes:,}")


def _unnamed(folder: Path, name: str) -> DamagedError:
    return damaged(folder, f"it holds {name!r}, which its manifest does not name")


def _read_saved(folder: Path, manifest: Manifest, i: int) -> SavedPatch:
    """Read one patch, and compare it with its entry in the manifest."""
    place, entry = numbered(i), manifest.patches[i]
    for name in _DELTA_FILES:
        stated = manifest.files[f"{place}/{name}"]
        if name.endswith(".json") and stated.bytes > MOST_JSON:
            raise damaged(
                folder, f"{place}/{name} has {stated.bytes:,} bytes; {MOST_JSON:,} are the most"
            )
        if file_digest(folder / place / name) != stated.sha256:
            raise damaged(folder, f"{place}/{name} does not match its checksum")
    try:
        delta = Delta.load(folder / place)
    except DamagedError as error:
        raise damaged(folder, str(error)) from None
    described = (entry.method, sorted(entry.layers), _facts(folder, entry), entry.neurons)
    if described != (delta.method, list(delta.touched), delta.facts, delta.n_appended):
        raise damaged(folder, f"{place} is not the patch that its manifest describes")
    origin = Origin(revision=entry.revision, message=entry.message, moments=entry.moments)
    return SavedPatch(delta=delta, origin=origin)


def _facts(folder: Path, entry: ManifestPatch) -> tuple[Fact, ...]:
    try:
        return tuple(Fact.from_dict(fields) for fields in entry.facts)
    except InputError as error:
        raise damaged(folder, f"{FILE} holds a fact that cannot be read: {error}") from None
