"""GGUF files: dequantised once, and kept in the user's cache as a transformers model.

    with converted(source, torch.float32) as (folder, file):     # a Source, a GgufFile
        ...                                                       # load the folder

transformers reads the file, which takes a quarter of a minute for each hundred million weights. So
the result is kept, with everything else that a folder of a model holds, under the sha256 of the
file. The file itself never changes, and nothing in it is run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers

from ..core.cache import MODEL_FILE, cached
from ..core.errors import ModelError, first_line
from ..core.files import file_digest, settle_folder, write_file
from ..core.leftovers import OLDER, WRITING, held, remove_leftovers
from ..core.progress import Progress, note, tell
from .gguf_header import Header, check_is_model, read_header
from .gguf_reading import Conversion, convert, own_dtype
from .source import Source

_FORMAT = 1

_VERSION = transformers.__version__

_RECORD = "factsmith-gguf.json"
"""The file that makes a conversion whole: what it was made from, and its files."""

FOLDER = "gguf"
"""The folder of all conversions in the cache."""


@dataclass(frozen=True, kw_only=True)
class GgufFile:
    """The GGUF file that a model was loaded from.

    Attributes:
        path: The file, as a full path.
        sha256: The sha256 (hex) of its content.
        n_bytes: Its size.
        architecture: What llama.cpp calls its architecture.
        type: The type of most of its weights, such as "Q4_1".
    """

    path: Path
    sha256: str
    n_bytes: int
    architecture: str
    type: str

    def __str__(self) -> str:
        """Return the file in one line."""
        return f"{self.path.name} ({self.type}, {self.n_bytes / 10**6:,.0f} MB)"

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return {**vars(self), "path": str(self.path)}


@contextlib.contextmanager
def converted(
    source: Source, dtype: torch.dtype | str, progress: Progress | None = None
) -> Iterator[tuple[Source, GgufFile]]:
    """Yield the folder of the transformers model that a GGUF file holds, and what the file is.

    The folder is in the cache. Where the cache cannot be written, it is a temporary folder, which
    goes at the end of the block.

    Args:
        source: The file, as `find_source` found it.
        dtype: The dtype that the model is to be loaded in. "auto": the file's own.
        progress: Gets what is being done, and a note about a file that was dequantised.

    Raises:
        ModelError: when the file is damaged, does not hold a model, holds one that transformers
            cannot read from GGUF, or a library is missing.
        InputError: when the file is one of several parts.
    """
    assert source.gguf is not None
    path = source.gguf
    header = read_header(path)
    check_is_model(header)
    tell(progress, f"reading {path.name}", 0, None)
    digest = file_digest(path)
    wanted = own_dtype(header) if isinstance(dtype, str) else dtype
    stored = wanted if wanted in (torch.float16, torch.bfloat16) else torch.float32
    with contextlib.ExitStack() as stack:
        # "auto" takes the dtype that the conversion has.
        place = _kept(digest, [stored] if isinstance(dtype, str) else [stored, torch.float32])
        if place is None:
            conversion = convert(source, header, stored, progress)
            place = stack.enter_context(_saved(conversion, digest, stored, header, progress))
        record = json.loads((place / _RECORD).read_bytes())
        for remark in record["remarks"]:
            note(progress, f"{path.name}: {remark}")
        file = GgufFile(
            path=path.resolve(),
            sha256=digest,
            n_bytes=header.n_bytes,
            architecture=header.architecture,
            type=record["type"],
        )
        yield dataclasses.replace(source, place=str(place), folder=place, gguf=None), file


# ── the cache ─────────────────────────────────────────────────────────────────────────────────────


def _kept(digest: str, dtypes: Sequence[torch.dtype]) -> Path | None:
    """Return a whole conversion of a file in one of some dtypes; None without one.

    One in float32 serves every dtype: rounding on load gives the same bits.
    """
    for each in dict.fromkeys(dtypes):
        place = _place(digest, each)
        if _is_whole(place, digest):
            return place
    return None


def _place(digest: str, dtype: torch.dtype) -> Path:
    """Return where the cache has a conversion. A new transformers may read a file differently."""
    name = f"{digest[:32]}-{_name(dtype)}-{_VERSION}"
    return cached(Path(FOLDER, name))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _is_whole(place: Path, digest: str) -> bool:
    """Return whether a conversion is there as it was written.

    A file that has another time than the record says is read and compared.
    """
    try:
        record = json.loads((place / _RECORD).read_bytes())
        if record["format"] != _FORMAT or record["sha256"] != digest:
            return False
        for name, stated in record["files"].items():
            status = (place / name).stat()
            if status.st_size != stated["bytes"]:
                return False
            same_time = status.st_mtime_ns == stated["time"]
            if not same_time and file_digest(place / name) != stated["sha256"]:
                return False
        if not isinstance(record["type"], str) or not isinstance(record["remarks"], list):
            return False
        return {"config.json", "tokenizer.json"} <= set(record["files"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


@contextlib.contextmanager
def _saved(
    conversion: Conversion,
    digest: str,
    dtype: torch.dtype,
    header: Header,
    progress: Progress | None,
) -> Iterator[Path]:
    """Yield the folder of a new conversion: in the cache, or a temporary one."""
    size = f"{conversion.n_bytes / 10**6:,.0f} MB"
    what = (
        f"{header.path.name} ({conversion.type}, {header.n_bytes / 10**6:,.0f} MB) was dequantised "
        f"to {_name(dtype)}, {size}"
    )
    place = _place(digest, dtype)
    tell(progress, "keeping the dequantised model", 0, None)
    try:
        _keep(conversion, place, digest)
    except (OSError, safetensors.SafetensorError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or first_line(error)
        note(
            progress,
            f"{what}. It cannot be kept in {place.parent} ({reason}), so this is done each time; "
            "set FACTSMITH_CACHE to a folder that can be written and has room.",
        )
        with tempfile.TemporaryDirectory(prefix="factsmith-", ignore_cleanup_errors=True) as name:
            try:
                _write(conversion, Path(name), digest)
            except (OSError, safetensors.SafetensorError) as again:
                raise ModelError(
                    f"{header.path.name} cannot be dequantised: it needs {size} in {place.parent} "
                    f"({reason}) or in {tempfile.gettempdir()} ({first_line(again)}); free some "
                    "space, or set FACTSMITH_CACHE to a folder with more room"
                ) from None
            yield Path(name)
        return
    note(progress, f"{what}. It is kept in {place.parent}, so the next time is quick.")
    yield place


def _keep(conversion: Conversion, place: Path, digest: str) -> None:
    """Put a conversion into the cache, whole or not at all; raises OSError."""
    parent = place.parent
    parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(parent)
    if (free := shutil.disk_usage(parent).free) < conversion.n_bytes + 2**26:
        raise OSError(None, f"only {free / 10**6:,.0f} MB are free")
    with held(parent, place.name, WRITING) as staging:
        try:
            _write(conversion, staging, digest)
            _put(staging, place, digest)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    # What another version of transformers made of this file and dtype is not needed any more.
    for other in parent.glob(f"{place.name.rpartition('-')[0]}-*"):
        if other != place:
            shutil.rmtree(other, ignore_errors=True)


def _write(conversion: Conversion, folder: Path, digest: str) -> None:
    """Write a conversion and its record into a folder; raises OSError and SafetensorError."""
    conversion.save(folder)
    (folder / MODEL_FILE).write_text(f"{conversion.name}\n", encoding="utf-8")
    settle_folder(folder)
    files = {}
    for file in sorted(each for each in folder.iterdir() if each.is_file()):
        status = file.stat()
        files[file.name] = {
            "bytes": status.st_size,
            "time": status.st_mtime_ns,
            "sha256": file_digest(file),
        }
    record: Mapping[str, Any] = {
        "format": _FORMAT,
        "sha256": digest,
        "type": conversion.type,
        "transformers": _VERSION,
        "remarks": conversion.remarks,
        "files": files,
    }
    write_file(folder / _RECORD, json.dumps(record, indent=1).encode())


def _put(staging: Path, place: Path, digest: str) -> None:
    """Rename a folder to its place, unless another process was quicker."""
    with contextlib.ExitStack() as stack:
        if place.exists():
            if _is_whole(place, digest):
                return
            if place.is_dir() and not place.is_symlink():
                older = stack.enter_context(held(place.parent, place.name, OLDER, source=place))
                stack.callback(shutil.rmtree, older, ignore_errors=True)
            else:
                place.unlink()
        try:
            staging.rename(place)
        except OSError:
            if not _is_whole(place, digest):
                raise
