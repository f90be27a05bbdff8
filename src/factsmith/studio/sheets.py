"""Fact files that came from a browser, kept in the workspace so that an address can name them.

    sheets = Sheets(workspace)
    digest = sheets.add("facts.csv", content)       # checked, and named by its sha256
    sheets.read(digest).facts
    sheets.keep(sheet)                              # the path of the same as YAML

The folder `studio/sheets` of the workspace holds the newest ones. A name of a sheet is 64 digits
and nothing else, so no name from an address leads to another file.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

from ..core.errors import FactError, InputError, WorkspaceError
from ..core.factfile import SUFFIXES, FactFile, FactSheet
from ..core.files import make_folder, write_file
from ..core.filetext import decoded

LARGEST = 5_000_000
"""Bytes of a sheet."""

_KEPT = 200
"""Sheets that are kept; the oldest go."""

_DIGEST = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class Sheets:
    """The fact files that one workspace got from browsers.

    Attributes:
        workspace: The folder of the workspace.
    """

    workspace: Path

    @property
    def folder(self) -> Path:
        """The folder of the sheets."""
        return self.workspace / "studio" / "sheets"

    def add(self, name: str, content: bytes) -> str:
        """Keep a file, after a check that it can be read as facts, and return its sha256.

        Args:
            name: The name that the file had. Its suffix says what the file is. "": pasted text,
                which is taken for CSV, JSON or YAML by its first line.
            content: The bytes of the file.

        Raises:
            FactError: when it cannot be read as facts; the message names the file as `name`.
            InputError: when it is empty or too large, or its suffix is unknown.
            WorkspaceError: when it cannot be kept.
        """
        shown = _base_name(name)
        if not content.strip():
            raise InputError(
                f"{shown} is empty; give facts in YAML, JSON, JSON lines or CSV", argument="sheet"
            )
        if len(content) > LARGEST:
            raise InputError(
                f"{shown} has {len(content):,} bytes, and studio takes {LARGEST:,}; split it, or "
                "use `factsmith apply`",
                argument="sheet",
            )
        suffix = _suffix(name, content)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / f"sheet{suffix}"
            file.write_bytes(content)
            try:
                FactFile.sheet(file)
            except FactError as error:
                text = str(error).replace(str(file), shown)
                raise FactError(text, argument="sheet") from None
        return self._write(content, suffix).stem

    def keep(self, sheet: FactSheet) -> Path:
        """Keep what a form says as YAML, and return the path of its file.

        Raises:
            WorkspaceError: when it cannot be kept.
        """
        return self._write(FactFile.text(sheet).encode(), ".yaml")

    def path(self, digest: str) -> Path:
        """Return the path of a sheet.

        Raises:
            InputError: when the name is no sha256, or there is no such sheet.
        """
        if _DIGEST.fullmatch(digest):
            for suffix in SUFFIXES:
                path = self.folder / f"{digest}{suffix}"
                if path.is_file():
                    return path
        raise InputError(
            f"sheet is {digest[:80]!r}: this workspace keeps no such file of facts. Drop the file "
            "into the form again.",
            argument="sheet",
        )

    def read(self, digest: str) -> FactSheet:
        """Return what a sheet says.

        Raises:
            InputError: when there is no such sheet.
            FactError: when it cannot be read as facts.
        """
        return FactFile.sheet(self.path(digest))

    def _write(self, content: bytes, suffix: str) -> Path:
        """Write a file that is named by its sha256, and delete the oldest above the limit."""
        path = self.folder / f"{hashlib.sha256(content).hexdigest()}{suffix}"
        try:
            if path.is_file():
                path.touch()
                return path
            make_folder(self.folder)
            write_file(path, content)
        except OSError as error:
            raise WorkspaceError(
                f"cannot write into {self.folder}: {error.strerror}; make it writable"
            ) from None
        with contextlib.suppress(OSError):
            files = sorted(self.folder.glob("*.*"), key=lambda file: file.stat().st_mtime)
            for file in files[:-_KEPT]:
                file.unlink(missing_ok=True)
        return path


def _base_name(name: str) -> str:
    """Return the last part of a file's name, whatever the system of the browser."""
    return PureWindowsPath(PurePosixPath(name).name).name[:120] or "the text"


def _suffix(name: str, content: bytes) -> str:
    """Return what a file is, as a suffix of fact files.

    Raises:
        InputError: when its name has another suffix.
    """
    suffix = Path(_base_name(name)).suffix.lower() if name else ""
    if suffix in SUFFIXES:
        return suffix
    if suffix not in ("", ".txt"):
        raise InputError(
            f"{_base_name(name)} ends in {suffix}; studio takes files of facts that end in "
            f"{', '.join(SUFFIXES)}",
            argument="sheet",
        )
    with contextlib.suppress(ValueError):
        text = decoded(content).lstrip()
        first = text.partition("\n")[0].lower()
        if text.startswith(("{", "[")):
            return ".json" if _is_json(text) else ".jsonl"
        if "subject" in first and "prompt" in first and ":" not in first:
            return ".csv"
    return ".yaml"


def _is_json(text: str) -> bool:
    """Whether a text in brackets is a document of several lines, and not one value a line."""
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    return len(lines) > 1 and not (lines[0].endswith("}") and lines[1].startswith("{"))
