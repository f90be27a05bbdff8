"""The folder of what can be made again, such as the index of a model.

cache_folders()      [the folder to use, a folder of earlier versions]
cached("index")      where a folder of it is, or is to go
read_cache()         what it holds, with sizes
clear_cache()        deletes it
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import platformdirs

from .errors import InputError, WorkspaceError
from .tables import Shown, Table

VARIABLE = "FACTSMITH_CACHE"
"""The environment variable that names the folder."""


def cache_folders() -> list[Path]:
    """Return the cache folder, followed by those where earlier versions kept their files.

    The folder is $FACTSMITH_CACHE, or the user's cache folder of the platform: for example
    ~/.cache/factsmith on Linux ($XDG_CACHE_HOME counts there), ~/Library/Caches/factsmith on macOS,
    and %LOCALAPPDATA%\\factsmith\\Cache on Windows.
    """
    if named := os.environ.get(VARIABLE):
        return [Path(named).expanduser()]
    earlier = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "factsmith"
    return list(dict.fromkeys([platformdirs.user_cache_path("factsmith", False), earlier]))


def cached(name: str | Path) -> Path:
    """Return where the cache keeps a file or folder: where it is already, or where it is to go."""
    places = [folder / name for folder in cache_folders()]
    return next((place for place in places if place.exists()), places[0])


KINDS = {
    "moments": "second moments of the bundled text",
    "index": "indices: what the neurons of a model match and promote",
    "gguf": "converted GGUF files",
}
"""{a folder of the cache: what it holds}."""

MODEL_FILE = "model.txt"
"""A file in the folder of a model with the model's name, for people."""


@dataclass(frozen=True)
class Cached:
    """One file or folder of the cache: what is kept for a model.

    Attributes:
        kind: One of KINDS.
        path: Where it is.
        n_bytes: The size of its files.
        changed: When the newest of them was written.
        model: The name of the model when it was written; "" if unknown.
    """

    kind: str
    path: Path
    n_bytes: int
    changed: datetime
    model: str = ""


@dataclass(frozen=True, repr=False)
class CacheContent(Shown):
    """What the cache holds.

    Attributes:
        folders: The folders that were looked into.
        entries: What is kept, kind by kind.
        deleted: Whether it was deleted.
    """

    folders: tuple[Path, ...]
    entries: tuple[Cached, ...]
    deleted: bool = False

    @property
    def n_bytes(self) -> int:
        """The size of all entries."""
        return sum(entry.n_bytes for entry in self.entries)

    def tables(self) -> list[Table]:
        """A row for each entry, and the sum."""
        verb = "deleted" if self.deleted else "kept"
        if not self.entries:
            return [Table(f"nothing is kept in {self.folders[0]}", {})]
        rows = [
            (
                entry.kind,
                entry.model or entry.path.name,
                in_megabytes(entry.n_bytes),
                f"{entry.changed:%Y-%m-%d}",
                str(entry.path),
            )
            for entry in self.entries
        ]
        columns = {"kind": "<", "model": "<", "MB": ">", "written": "<", "path": "<"}
        total = f"{in_megabytes(self.n_bytes)} MB in all. All of it can be made again"
        return [Table(f"{verb} in the cache", columns, rows, note=total)]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "folders": [str(folder) for folder in self.folders],
            "bytes": self.n_bytes,
            "deleted": self.deleted,
            "entries": [
                {
                    "kind": entry.kind,
                    "model": entry.model,
                    "path": str(entry.path),
                    "bytes": entry.n_bytes,
                    "written": entry.changed.isoformat(timespec="seconds"),
                }
                for entry in self.entries
            ],
        }


def in_megabytes(n_bytes: int) -> str:
    """Return a size as "4.7"; what is smaller than 0.1 MB as "0.1"."""
    return f"{max(n_bytes / 1e6, 0.1):,.1f}"


def read_cache(kinds: Sequence[str] = ()) -> CacheContent:
    """Return what the cache holds, the largest entries of each kind first.

    Args:
        kinds: Some of KINDS. (): all.

    Raises:
        InputError: There is no such kind.
    """
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise InputError(
            f"the cache has no {unknown[0]!r}; expected some of {', '.join(KINDS)}",
            argument="kinds",
        )
    folders = cache_folders()
    entries = [
        entry
        for kind in KINDS
        if not kinds or kind in kinds
        for folder in folders
        for entry in _entries(folder / kind)
    ]
    return CacheContent(tuple(folders), tuple(entries))


def clear_cache(kinds: Sequence[str] = ()) -> CacheContent:
    """Delete what the cache holds, and return it.

    Args:
        kinds: Some of KINDS. (): all.

    Raises:
        InputError: There is no such kind.
        WorkspaceError: Something cannot be deleted.
    """
    content = read_cache(kinds)
    for entry in content.entries:
        try:
            if entry.path.is_dir() and not entry.path.is_symlink():
                shutil.rmtree(entry.path)
            else:
                entry.path.unlink(missing_ok=True)
        except OSError as error:
            raise WorkspaceError(
                f"cannot delete {entry.path}: {error.strerror or error}; delete it by hand"
            ) from None
    return CacheContent(content.folders, content.entries, deleted=True)


def _entries(folder: Path) -> Iterator[Cached]:
    """Yield the entries of one kind, the largest first."""
    entries = []
    for path in folder.iterdir() if folder.is_dir() else ():
        files = [path, *(path.rglob("*") if path.is_dir() else ())]
        stats = [file.stat() for file in files if file.is_file()]
        if stats:
            changed = datetime.fromtimestamp(max(stat.st_mtime for stat in stats)).astimezone()
            n_bytes = sum(stat.st_size for stat in stats)
            entries.append(Cached(folder.name, path, n_bytes, changed, _model_of(path)))
    yield from sorted(entries, key=lambda entry: (-entry.n_bytes, entry.path))


def _model_of(path: Path) -> str:
    try:
        return (path / MODEL_FILE).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""
