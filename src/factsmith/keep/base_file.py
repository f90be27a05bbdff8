"""base.json of a workspace: the GGUF file that its model was loaded from.

The fingerprint decides whether a model fits a workspace. This file says which file to look for, and
whether a file of that name has changed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.errors import DamagedError, WorkspaceError
from ..core.files import write_file

if TYPE_CHECKING:  # `status` reads the record, and need not wait for torch
    from ..model.gguf import GgufFile

_FORMAT = 1

NAME = "base.json"


@dataclass(frozen=True, kw_only=True)
class BaseFile:
    """A GGUF file, as a workspace remembers it.

    Attributes:
        name: Its name, without the folder.
        bytes: Its size.
        sha256: The sha256 (hex) of its content.
    """

    name: str
    bytes: int
    sha256: str

    def __str__(self) -> str:
        """Return the file in one line."""
        return f"{self.name}, {self.bytes:,} bytes, sha256 {self.sha256[:10]}"


def write_base_file(folder: Path, file: GgufFile | None) -> None:
    """Record the GGUF file of a new workspace's model; None: it is not from one."""
    if file is None:
        return
    record = {
        "format": _FORMAT,
        "name": file.path.name,
        "bytes": file.n_bytes,
        "sha256": file.sha256,
    }
    try:
        write_file(folder / NAME, (json.dumps(record, ensure_ascii=False) + "\n").encode())
    except OSError as error:
        raise WorkspaceError(
            f"cannot write {folder / NAME}: {error.strerror}; make the workspace writable"
        ) from None


def read_base_file(folder: Path) -> BaseFile | None:
    """Return the GGUF file of a workspace's model; None if it is not from one.

    Raises:
        DamagedError: when the record cannot be used.
    """
    file = folder / NAME
    if not file.is_file():
        return None
    try:
        record = json.loads(file.read_bytes())
        if record["format"] != _FORMAT:
            raise ValueError(f"it has format {record['format']!r}")
        return BaseFile(
            name=str(record["name"]), bytes=int(record["bytes"]), sha256=str(record["sha256"])
        )
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DamagedError(
            f"{file} cannot be used: {error}; delete it: only `status` and messages need it"
        ) from None
