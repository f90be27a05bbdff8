"""The manifest of an export: a factsmith.json that says what its folder holds.

    sizes = write_manifest(folder, "patch", contents)      # {name: bytes} of every file
    manifest = read_manifest(folder)
    manifest.factsmith, manifest.fingerprint, manifest.files["0001/edit.json"].sha256

The manifest names the model, the patches with their facts, and the size and the sha256 of every
file. Its last field is a sha256 of itself. It is checked strictly when it is read: a manifest may
come from anyone.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, get_args

import pydantic

from ...core.errors import DamagedError, InputError
from ...core.files import file_digest, folder_path, record_digest, write_file
from .base_model import BaseModel
from .contents import Contents
from .dtypes import dtype_name
from .naming import portable_name
from .readback import ReadBack

Format = Literal["checkpoint", "adapter", "patch", "gguf", "gguf-adapter"]

FORMATS: tuple[Format, ...] = get_args(Format)

FILE = "factsmith.json"

MOST_JSON = 64 * 2**20
"""The largest JSON file that is read from an export, in bytes."""

_FORMAT_NUMBER = 1

_Sha256 = Annotated[str, pydantic.Field(pattern="^[0-9a-f]{64}$")]

_Count = Annotated[int, pydantic.Field(ge=0)]


class _Strict(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(strict=True, extra="forbid")


class ManifestFile(_Strict):
    """One file: its size and its sha256 (hex)."""

    bytes: _Count
    sha256: _Sha256


class ManifestPatch(_Strict):
    """One patch: how it was made, its facts, and where it comes from (`Origin`).

    `layers` are all that it changes, and `neurons` is how many it appends to them.
    """

    method: str
    layers: list[_Count]
    neurons: _Count = 0
    facts: list[dict[str, Any]]
    revision: _Sha256 | None
    message: str
    moments: _Sha256 | None


class ManifestBase(_Strict):
    """A GGUF file that the patches belong to: its name, its size and its sha256 (hex)."""

    name: str
    bytes: _Count
    sha256: _Sha256


class ManifestBaseModel(_Strict):
    """The name of an adapter's base model, and whether its fingerprint was compared."""

    name: str
    revision: str | None
    checked: bool


class Manifest(_Strict):
    """What factsmith.json holds, without its own sha256.

    A manifest has a base file where the model comes from a GGUF file, or the export belongs to one.
    It has a base model if it is a PEFT adapter's. `revision` is the state of the workspace that was
    exported. Earlier versions wrote neither base model nor revision, and patches have none.
    """

    factsmith: Format
    format: int
    model: str
    dtype: str
    fingerprint: _Sha256
    patches: list[ManifestPatch]
    files: dict[str, ManifestFile]
    read_back: dict[str, Any] | None
    base_file: ManifestBase | None = None
    base_model: ManifestBaseModel | None = None
    revision: _Sha256 | None = None


def write_manifest(
    folder: Path,
    format: Format,
    contents: Contents,
    read_back: ReadBack | None = None,
    base_file: ManifestBase | None = None,
    *,
    named: BaseModel | None = None,
) -> dict[str, int]:
    """Write the manifest of a folder.

    Args:
        folder: The folder, with all its other files in it.
        format: What the folder is.
        contents: The model and its patches.
        read_back: How the folder compared with the patched model when it was read back.
        base_file: The GGUF file that the export belongs to. None: the model's, if there is one.
        named: The base model as an adapter names it. None: the export names none.

    Returns:
        {name: bytes} of every file in the folder, the manifest included.

    Raises:
        InputError: when the origin of a patch cannot be recorded.
    """
    lm = contents.lm
    files = {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    record = {
        "factsmith": format,
        "format": _FORMAT_NUMBER,
        "model": str(portable_name(lm)),
        "dtype": dtype_name(lm.dtype),
        "fingerprint": lm.fingerprint,
        "patches": [
            {
                "method": delta.method,
                "layers": list(delta.touched),
                **({"neurons": delta.n_appended} if delta.appended else {}),
                "facts": [fact.to_dict() for fact in delta.facts],
                **origin.to_dict(),
            }
            for delta, origin in zip(contents.deltas, contents.origins, strict=True)
        ],
        "files": {
            name: {"bytes": path.stat().st_size, "sha256": file_digest(path)}
            for name, path in files.items()
        },
        "read_back": None if read_back is None else vars(read_back),
    }
    if base_file is None and lm.gguf is not None:
        file = lm.gguf
        base_file = ManifestBase(name=file.path.name, bytes=file.n_bytes, sha256=file.sha256)
    if base_file is not None:
        record["base_file"] = base_file.model_dump()
    if named is not None:
        record["base_model"] = ManifestBaseModel(
            name=named.name, revision=named.revision, checked=named.checked
        ).model_dump()
    if contents.state is not None and format != "patch":  # earlier versions import patches
        record["revision"] = contents.state.revision
    try:
        Manifest.model_validate_json(json.dumps(record, ensure_ascii=False))
    except ValueError as error:
        raise InputError(
            f"An origin cannot be recorded: {'; '.join(str(error).splitlines())[:300]}. Give a "
            "revision and moments as sha256 in hex, and a message as text.",
            argument="origins",
        ) from None
    write_file(folder / FILE, as_json({**record, "sha256": record_digest(record)}))
    return {name: (folder / name).stat().st_size for name in [*files, FILE]}


def read_manifest(folder: Path, name: str = FILE) -> Manifest:
    """Read and check the manifest of an export; the other files are not looked at.

    Args:
        folder: The folder that holds it.
        name: Its name; that of a single file's manifest has the file's name before it.

    Raises:
        DamagedError: when it is missing, cannot be read, or does not match its checksum.
    """
    file = folder / name
    try:
        entry = file.lstat()
        if not stat.S_ISREG(entry.st_mode):
            raise ValueError("it is not a regular file")
        if entry.st_size > MOST_JSON:
            raise ValueError(f"it has {entry.st_size:,} bytes; {MOST_JSON:,} are the most")
        record = json.loads(file.read_bytes(), parse_constant=_refuse_constant)
        if not isinstance(record, dict) or record.get("factsmith") not in FORMATS:
            raise ValueError("it is not the manifest of an export")
        if record.get("format") != _FORMAT_NUMBER:
            raise ValueError(
                f"it has format {record.get('format')!r}, and this factsmith reads "
                f"{_FORMAT_NUMBER} (pip install -U factsmith)"
            )
        if record.pop("sha256", None) != record_digest(record):
            raise ValueError("it does not match its checksum")
        return Manifest.model_validate(record)
    except FileNotFoundError:
        raise DamagedError(
            f"There is no {name} in {folder}. Give a folder or a file that an export wrote."
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        # UTF-8, JSON and pydantic raise ValueErrors.
        problem = "; ".join(str(error).splitlines())
        raise damaged(folder, f"{FILE} cannot be used: {problem}") from None


def check_files(folder: str | os.PathLike[str]) -> Manifest:
    """Compare every file of an export with its manifest, and return the manifest.

    Checksums show damage and changes; they do not show who wrote a folder.

    Args:
        folder: The folder of an export, or its GGUF file, whose manifest is next to it.

    Raises:
        DamagedError: when the manifest cannot be used, a file is missing or has other bytes, or
            there is a file that the manifest does not name.
    """
    path = folder_path(folder)
    if path.is_file():
        files = {path.name: path}
        manifest = read_manifest(path.parent, f"{path.name}.{FILE}")
    else:
        manifest = read_manifest(path)
        files = {
            each.relative_to(path).as_posix(): each
            for each in sorted(path.rglob("*"))
            if each.is_symlink() or not each.is_dir()
        }
    if strange := sorted(files.keys() - manifest.files.keys() - {FILE}):
        raise damaged(path, f"it holds {strange[0]!r}, which its manifest does not name")
    for name, stated in manifest.files.items():
        file = files.get(name)
        if file is None:
            raise damaged(path, f"{name} is missing")
        if file.is_symlink() or not file.is_file():
            raise damaged(path, f"{name} is not a regular file")
        if file.stat().st_size != stated.bytes or file_digest(file) != stated.sha256:
            raise damaged(path, f"{name} does not match its checksum")
    return manifest


def damaged(folder: Path, what: str) -> DamagedError:
    """Return the error for an export of which something is wrong."""
    what = what if len(what) <= 400 else f"{what[:399]}…"
    return DamagedError(f"{folder} is damaged: {what}. Have it exported or sent again.")


def as_json(record: Any) -> bytes:
    """Return the content of a JSON file for people; raises ValueError for NaN and infinity."""
    return (json.dumps(record, ensure_ascii=False, indent=2, allow_nan=False) + "\n").encode()


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"it holds {constant}, which is not a number")
