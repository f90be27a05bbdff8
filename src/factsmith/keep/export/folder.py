"""The folders that exports are: staged beside their place, described by a manifest, and those that hold patches read again.

with staged("my-patch", overwrite=False) as folder:      # renamed to my-patch at the end, or gone
    delta.save(folder / "0001")
    describe(folder, "patch", lm, [delta], [Origin()])
for saved in read_patch("my-patch").patches:
    saved.delta, saved.origin.message

factsmith.json                  what is in the folder: the model, the patches and their facts, size and sha256 of every file
0001/edit.json                  a patch folder's deltas, in their order, as `Delta.save` writes them
0001/delta.safetensors
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import pydantic
import safetensors

from ...core.errors import DamagedError, FingerprintError, InputError, WorkspaceError
from ...core.fact import Fact
from ...core.files import (
    check_writable,
    file_digest,
    flush_folder,
    folder_path,
    record_digest,
    write_file,
)
from ...core.tables import Shown, Table, counted
from ...edit.delta import Delta
from ...model.language_model import LanguageModel
from .contents import Origin

Format = Literal["checkpoint", "adapter", "patch"]

FORMATS: tuple[Format, ...] = get_args(Format)

_MANIFEST = "factsmith.json"

_MANIFEST_FORMAT = 1

_DELTA_FILES = ("delta.safetensors", "edit.json")  # of `Delta.save`

_MOST_JSON = 64 * 2**20

_MOST_BYTES = 8 * 2**30


@dataclass(frozen=True, kw_only=True)
class SavedPatch:
    """One patch of a folder: its delta, and where it comes from."""

    delta: Delta
    origin: Origin


@dataclass(frozen=True, kw_only=True, repr=False)
class PatchFolder(Shown):
    """What `read_patch` found.

    folder       where
    model        name of the model that the patches were made for, its `dtype`, and its `fingerprint` without any patch
    patches      in the order in which they were made: a later one may stand on earlier ones
    """

    folder: Path
    model: str
    dtype: str
    fingerprint: str
    patches: tuple[SavedPatch, ...]

    def tables(self) -> list[Table]:
        """The patches, oldest first."""
        rows = [
            (
                str(i),
                p.delta.method,
                ", ".join(map(str, sorted(p.delta.layers))),
                str(len(p.delta.facts)),
                p.origin.message,
            )
            for i, p in enumerate(self.patches, 1)
        ]
        title = f"{counted(len(rows), 'patch', 'es')} for {self.model} ({self.dtype}, fingerprint {self.fingerprint[:10]})"
        return [
            Table(
                title, {"": ">", "method": "<", "layers": "<", "facts": ">", "message": "<"}, rows
            )
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able fields; the deltas' tensors are left out."""
        described = [
            {
                **vars(p.origin),
                "method": p.delta.method,
                "layers": sorted(p.delta.layers),
                "facts": [fact.to_dict() for fact in p.delta.facts],
            }
            for p in self.patches
        ]
        return {**vars(self), "folder": str(self.folder.resolve()), "patches": described}


# ---- writing --------------------------------------------------------------------------------------------------------------------------


_Sha256 = Annotated[str, pydantic.Field(pattern="^[0-9a-f]{64}$")]

_Count = Annotated[int, pydantic.Field(ge=0)]


class _Strict(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(strict=True, extra="forbid")


class _File(_Strict):
    bytes: _Count
    sha256: _Sha256


class _Entry(_Strict):
    """One patch as the manifest describes it."""

    method: str
    layers: list[_Count]
    facts: list[dict[str, Any]]
    revision: _Sha256 | None
    message: str
    moments: _Sha256 | None


class _Manifest(_Strict):
    """What factsmith.json holds."""

    factsmith: Format
    format: int
    model: str
    dtype: str
    fingerprint: _Sha256
    patches: list[_Entry]
    files: dict[str, _File]
    read_back: dict[str, Any] | None


def numbered(i: int) -> str:
    """The folder of a patch, counted from 0."""
    return f"{i + 1:04d}"


def describe(
    staging: Path,
    format: Format,
    lm: LanguageModel,
    deltas: Sequence[Delta],
    origins: Sequence[Origin],
    found: Mapping[str, Any] | None = None,
) -> dict[str, int]:
    """Write the manifest of what is in a folder; {name: bytes} of all files, it included. found: how it was read back, if it was.

    Raises InputError for an origin that cannot be noted.
    """
    files = {
        path.relative_to(staging).as_posix(): path
        for path in sorted(staging.rglob("*"))
        if path.is_file()
    }
    record = {
        "factsmith": format,
        "format": _MANIFEST_FORMAT,
        "model": lm.name,
        "dtype": str(lm.dtype).removeprefix("torch."),
        "fingerprint": lm.fingerprint,
        "patches": [
            {
                "method": delta.method,
                "layers": sorted(delta.layers),
                "facts": [fact.to_dict() for fact in delta.facts],
                **vars(origin),
            }
            for delta, origin in zip(deltas, origins or [Origin()] * len(deltas), strict=True)
        ],
        "files": {
            name: {"bytes": path.stat().st_size, "sha256": file_digest(path)}
            for name, path in files.items()
        },
        "read_back": None if found is None else dict(found),
    }
    try:
        _Manifest.model_validate_json(json.dumps(record, ensure_ascii=False))
    except ValueError as error:
        raise InputError(
            f"the origin of a patch cannot be noted: {'; '.join(str(error).splitlines())[:300]}"
        ) from None
    write_file(staging / _MANIFEST, as_json({**record, "sha256": record_digest(record)}))
    return {name: (staging / name).stat().st_size for name in [*files, _MANIFEST]}


@contextlib.contextmanager
def staged(folder: str | os.PathLike[str], overwrite: bool) -> Iterator[Path]:
    """A new folder beside `folder` to write into; at the end of the block it takes its place, or else nothing of it is left."""
    given = folder_path(folder)
    if given.is_symlink():
        raise InputError(f"{given} is a link; choose the name of a new folder")
    target = given.resolve()
    _check_target(target, overwrite)
    check_writable(target.parent)
    made = [parent for parent in (target.parent, *target.parent.parents) if not parent.exists()]
    staging = target.with_name(f".{target.name}.{secrets.token_hex(8)}")
    older = target.with_name(f".{target.name}.{secrets.token_hex(8)}")
    try:
        with _explained(folder):
            staging.mkdir(parents=True)
        with _explained(folder):
            yield staging
        with _explained(folder):
            for path in staging.rglob("*"):
                if path.is_file():
                    with path.open("rb") as file:
                        os.fsync(file.fileno())
            _check_target(target, overwrite)  # somebody may have written there meanwhile
            if target.is_dir():
                target.rename(older)
            try:
                staging.rename(target)
            except BaseException:
                if older.is_dir():
                    older.rename(target)
                raise
            flush_folder(target.parent)
        made = []
        shutil.rmtree(older, ignore_errors=True)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()


def _check_target(target: Path, overwrite: bool) -> None:
    """Raises InputError unless a folder may be written there: nothing is there, or nothing in it, or an export that may be replaced."""
    if target.exists() and not target.is_dir():
        raise InputError(f"{target} is a file; choose the name of a new folder")
    if not target.is_dir():
        return
    if target in (Path.cwd(), *Path.cwd().parents):
        raise InputError(f"{target} is the folder you are in; choose the name of a new folder")
    held = {
        path.relative_to(target).as_posix()
        for path in target.rglob("*")
        if not path.is_dir() or path.is_symlink()
    }
    if not held and not any(target.iterdir()):
        return
    try:
        manifest = _manifest(target)
    except (DamagedError, InputError):
        raise InputError(
            f"{target} holds files that are no export of factsmith's; choose the name of a new folder"
        ) from None
    if strange := sorted(held - manifest.files.keys() - {_MANIFEST}):
        raise InputError(
            f"{target} is an earlier export, but holds {strange[0]!r} too, which is not of it; choose the name of a new folder"
        )
    if not overwrite:
        raise InputError(
            f"{target} is an earlier export; overwrite it (--overwrite), or choose the name of a new folder"
        )


@contextlib.contextmanager
def _explained(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Turn what the file system reports into a WorkspaceError that says what to do."""
    try:
        yield
    except (OSError, safetensors.SafetensorError) as error:
        text = str(error)
        if (
            isinstance(error, OSError) and error.errno == errno.ENOSPC
        ) or f"os error {errno.ENOSPC}" in text:
            raise WorkspaceError(
                f"the disk is full: nothing was written to {folder}; free some space and run this again"
            ) from error
        why = (error.strerror if isinstance(error, OSError) else None) or text
        raise WorkspaceError(
            f"cannot write {folder}: {why}; nothing was left of it: choose a folder that can be written"
        ) from error


# ---- reading patches ------------------------------------------------------------------------------------------------------------------


def read_patch(
    folder: str | os.PathLike[str], *, fingerprint: str | None = None, max_bytes: int = _MOST_BYTES
) -> PatchFolder:
    """Read what `export_patch` wrote, from whomever it comes: files are data, and nothing in them is run or followed.

    fingerprint  of the unpatched model that the patches are for; another one is refused before any tensor is read
    max_bytes    refuse what is larger

    Only the manifest and, for each patch, edit.json and delta.safetensors may be there, as plain files: no links, no other names. Sizes,
    checksums and shapes are checked before tensors are read. Raises DamagedError for all that does not hold, InputError for a folder that
    is none or holds another kind of export, FingerprintError for another model's.
    """
    path = folder_path(folder)
    if not path.is_dir():
        raise InputError(
            f"{path} is no folder; expected one that `factsmith export --format patch` wrote"
        )
    manifest = _manifest(path)
    if manifest.factsmith != "patch":
        raise InputError(
            f"{path} holds {'an' if manifest.factsmith == 'adapter' else 'a'} {manifest.factsmith}; expected a patch"
        )
    if fingerprint is not None and manifest.fingerprint != fingerprint:
        raise FingerprintError(
            f"{path} was made for {manifest.model!r} in {manifest.dtype}, fingerprint {manifest.fingerprint[:10]}; got a model with "
            f"{fingerprint[:10]}: load the model that it was made for, in the same dtype"
        )
    expected = {
        f"{numbered(i)}/{name}" for i in range(len(manifest.patches)) for name in _DELTA_FILES
    }
    if not expected or set(manifest.files) != expected:
        raise _damaged(
            path,
            f"its manifest names {len(manifest.files)} files for {len(manifest.patches)} patches, and not the right ones",
        )
    if sum(file.bytes for file in manifest.files.values()) > max_bytes:
        raise InputError(
            f"{path} holds more than {max_bytes:,} bytes; read it with a larger max_bytes if that is meant"
        )
    _check_listing(path, manifest)
    saved = []
    for i, entry in enumerate(manifest.patches):
        place = path / numbered(i)
        for name in _DELTA_FILES:
            stated = manifest.files[f"{numbered(i)}/{name}"]
            if name.endswith(".json") and stated.bytes > _MOST_JSON:
                raise _damaged(
                    path,
                    f"{numbered(i)}/{name} has {stated.bytes:,} bytes, and {_MOST_JSON:,} are the most",
                )
            if file_digest(place / name) != stated.sha256:
                raise _damaged(path, f"{numbered(i)}/{name} does not match its checksum")
        try:
            delta = Delta.load(place)
        except DamagedError as error:
            raise _damaged(path, str(error)) from None
        described = (entry.method, sorted(entry.layers), _facts(path, entry))
        if described != (delta.method, sorted(delta.layers), delta.facts):
            raise _damaged(path, f"{numbered(i)} is not the patch that its manifest describes")
        saved.append(
            SavedPatch(
                delta=delta,
                origin=Origin(
                    revision=entry.revision, message=entry.message, moments=entry.moments
                ),
            )
        )
    return PatchFolder(
        folder=path,
        model=manifest.model,
        dtype=manifest.dtype,
        fingerprint=manifest.fingerprint,
        patches=tuple(saved),
    )


def _manifest(folder: Path) -> _Manifest:
    """The manifest of an export, checked by itself; raises DamagedError."""
    file = folder / _MANIFEST
    try:
        entry = file.lstat()
        if not stat.S_ISREG(entry.st_mode):
            raise ValueError("it is no plain file")
        if entry.st_size > _MOST_JSON:
            raise ValueError(f"it has {entry.st_size:,} bytes, and {_MOST_JSON:,} are the most")
        record = json.loads(file.read_bytes(), parse_constant=_refused)
        if not isinstance(record, dict) or record.get("factsmith") not in FORMATS:
            raise ValueError("it is no manifest")
        if record.get("format") != _MANIFEST_FORMAT:
            raise ValueError(
                f"it has format {record.get('format')!r}, and this factsmith reads {_MANIFEST_FORMAT}: pip install -U factsmith"
            )
        if record.pop("sha256", None) != record_digest(record):
            raise ValueError("it does not match its checksum")
        return _Manifest.model_validate(record)
    except FileNotFoundError:
        raise DamagedError(
            f"no {_MANIFEST} in {folder}; expected a folder that `factsmith export` wrote"
        ) from None
    except (
        OSError,
        ValueError,
        RecursionError,
    ) as error:  # ValueError: UTF-8, JSON, and what pydantic finds
        raise _damaged(
            folder, f"{_MANIFEST} cannot be used: {'; '.join(str(error).splitlines())}"
        ) from None


def _check_listing(folder: Path, manifest: _Manifest) -> None:
    """Raises DamagedError unless a folder holds the manifest's files, as plain files of the stated sizes, and nothing else."""
    places = {numbered(i) for i in range(len(manifest.patches))}
    found = set()
    try:
        for where, wanted in [
            ("", places),
            *((place, set(_DELTA_FILES)) for place in sorted(places)),
        ]:
            if where and not stat.S_ISDIR((folder / where).lstat().st_mode):
                raise _damaged(folder, f"{where} is no plain folder")
            with os.scandir(folder / where) as entries:
                for entry in entries:
                    name = f"{where}/{entry.name}" if where else entry.name
                    if entry.name not in wanted and name != _MANIFEST:
                        raise _damaged(folder, f"it holds {name!r}, which is not of it")
                    if not where:
                        continue
                    held = entry.stat(follow_symlinks=False)
                    if not stat.S_ISREG(held.st_mode):
                        raise _damaged(folder, f"{name} is no plain file")
                    if held.st_size != manifest.files[name].bytes:
                        raise _damaged(
                            folder,
                            f"{name} has {held.st_size:,} bytes; expected {manifest.files[name].bytes:,}",
                        )
                    found.add(name)
    except OSError as error:
        raise _damaged(folder, f"it cannot be read: {error.strerror}") from None
    if missing := sorted(manifest.files.keys() - found):
        raise _damaged(folder, f"{missing[0]} is missing")


def _facts(folder: Path, entry: _Entry) -> tuple[Fact, ...]:
    try:
        return tuple(Fact.from_dict(fields) for fields in entry.facts)
    except InputError as error:
        raise _damaged(folder, f"{_MANIFEST} holds a fact that cannot be read ({error})") from None


def _damaged(folder: Path, what: str) -> DamagedError:
    what = what if len(what) <= 400 else f"{what[:399]}…"
    return DamagedError(f"{folder}: {what}; have it exported or sent again")


def as_json(record: Any) -> bytes:
    """A file's content: JSON as people read it, finite numbers only."""
    return (json.dumps(record, ensure_ascii=False, indent=2, allow_nan=False) + "\n").encode()


def _refused(constant: str) -> None:
    raise ValueError(f"it holds {constant}, which is no number")
