"""The rows of a run, in memory and in the file rows.jsonl of its folder.

    store = Store.open(Path("runs/memit"), made_from, {"model": "atlas", "skipped": 0, "units": 3})
    if not store.has("memit", 0):
        store.add(Unit("memit", 0, rows, continuations, notes))
    Store.read(Path("runs/memit")).rows

The first line of the file says what the run is made from. Then come the lines of one edit after the
other: its rows, its continuations, and a line that ends the edit and holds their checksum. Edits
are appended and flushed to disk, so a killed run loses only the edit that it was at.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pydantic

from ..core.errors import DamagedError, FingerprintError, InputError, WorkspaceError
from ..core.files import write_file
from ..core.identity import same_model
from .rows import Continuation, Row, finite_numbers

FORMAT = "evaluation 4"
"""The format of the file, named in its first line."""

_FILE = "rows.jsonl"


class Unit(NamedTuple):
    """Everything that belongs to one edit of an editor, or to the base model before that edit."""

    editor: str
    number: int
    """Number of the edit, from 0."""
    rows: Sequence[Row]
    continuations: Sequence[Continuation]
    notes: Mapping[str, float]
    failure: str = ""
    """The reason why the edit could not be made; "" if it was made."""
    unusable: Mapping[str, str] = {}
    """{record: reason} of the records that could not be asked about, or were not written."""


class Store:
    """The rows of a run.

    Attributes:
        header: The fields of the first line.
        path: The file. None: the rows are in memory only.
        rows: All rows, in the order in which they were asked.
        continuations: All continuations.
        notes: {(editor, unit): {name: number}} of every finished edit.
        failed: {(editor, unit): reason} of the edits that could not be made.
        unusable: {(editor, unit): {record: reason}} of the records that could not be asked about
            (editor base), or were not written with the other records of an edit.
        descriptions: {editor: its settings in words}; "" for an editor without any.
    """

    def __init__(self, header: Mapping[str, Any], path: Path | None = None) -> None:
        self.header, self.path = dict(header), path
        self.rows: list[Row] = []
        self.continuations: list[Continuation] = []
        self.notes: dict[tuple[str, int], dict[str, float]] = {}
        self.failed: dict[tuple[str, int], str] = {}
        self.unusable: dict[tuple[str, int], dict[str, str]] = {}
        self.descriptions: dict[str, str] = {}
        self._size = 0
        """Bytes of the file after the last write, by which another writer is noticed."""

    @classmethod
    def read(cls, folder: Path) -> Store:
        """Return the finished edits that a folder keeps. The file is not changed.

        Raises:
            InputError: when the folder has no such file.
            DamagedError: when the file cannot be read as rows.
            WorkspaceError: when the file cannot be opened.
        """
        path = folder / _FILE
        with _file_errors(path):
            if not path.is_file():
                raise InputError(
                    f"{folder} holds no {_FILE}; give a folder in which `evaluate` kept its rows",
                    argument="folder",
                )
            header, *lines = _read_lines(path)
            store = cls(_parse_header(path, header), path)
            store._load(lines)
        return store

    @classmethod
    def open(
        cls, folder: Path | None, made_from: Mapping[str, Any], about: Mapping[str, Any]
    ) -> Store:
        """Begin a run in a folder, or go on with the run that it holds.

        Args:
            folder: The folder, made if it is missing. None: keep the rows in memory.
            made_from: The fields of the header that must be equal for a run to go on.
            about: Further fields of the header.

        Raises:
            FingerprintError: when the folder holds a run of another model.
            InputError: when it holds a run that is made from something else.
            DamagedError: when the file cannot be read as rows.
            WorkspaceError: when the file cannot be written.
        """
        store = cls({**made_from, **about}, None if folder is None else folder / _FILE)
        if store.path is None:
            return store
        header = json.dumps(store.header, ensure_ascii=False)
        with _file_errors(store.path):
            store.path.parent.mkdir(parents=True, exist_ok=True)
            is_kept = store.path.is_file() and store.path.stat().st_size
            kept_header, *lines = _read_lines(store.path) if is_kept else [header]
            _check_origin(store.path, _parse_header(store.path, kept_header), made_from)
            content = ("\n".join([header, *store._load(lines)]) + "\n").encode()
            write_file(store.path, content)  # without the rows of an edit that was not finished
            store._size = len(content)
        return store

    def _load(self, lines: Sequence[str]) -> list[str]:
        """Take the finished edits into memory and return their lines.

        Only the last line can be torn. Any other line that cannot be read is an error.
        """
        finished: list[str] = []
        begun: list[str] = []
        for number, line in enumerate(lines, start=2):
            try:
                entry = json.loads(line)
                if not isinstance(entry, dict):
                    raise TypeError("the line is no row")
                if "ends" in entry:
                    self._load_unit(begun, entry)
                    finished += [*begun, line]
                    begun = []
                else:
                    begun.append(line)
            except (ValueError, TypeError, KeyError) as error:  # pydantic raises a ValueError
                if number <= len(lines):
                    reason = "; ".join(str(error).splitlines()[:3])
                    raise DamagedError(
                        f"{self.path}, line {number}, cannot be read ({reason}); "
                        "delete the file to begin again"
                    ) from None
        return finished

    def _load_unit(self, lines: Sequence[str], end: Mapping[str, Any]) -> None:
        """Take one finished edit into memory: its lines, and the entry that ends it."""
        at = (str(end["ends"]), int(end["unit"]))
        if end["sha256"] != _checksum(lines):
            raise ValueError(f"the rows of {at[0]}, edit {at[1]}, do not match their checksum")
        if at in self.notes:
            raise ValueError(f"{at[0]}, edit {at[1]}, occurs twice")
        for line in lines:
            if "texts" in json.loads(line, parse_constant=_refuse_constant):
                self.continuations.append(_CONTINUATION.validate_json(line, strict=True))
            else:
                self.rows.append(_ROW.validate_json(line, strict=True))
        self.notes[at] = finite_numbers(end["notes"])
        self.descriptions.setdefault(at[0], str(end["by"]))
        if end.get("failed"):
            self.failed[at] = str(end["failed"])
        if end.get("unusable"):
            self.unusable[at] = {str(one): str(why) for one, why in end["unusable"].items()}

    def check_editor(self, editor: str, description: str) -> None:
        """Note the settings of an editor.

        Raises:
            InputError: when the file has rows of an editor of this name with other settings.
        """
        kept = self.descriptions.setdefault(editor, description)
        if kept and description and kept != description:
            raise InputError(
                f"{self.path} has rows of {editor} with other settings: {kept} there, "
                f"{description} here; choose another folder",
                argument="folder",
            )

    @property
    def settings(self) -> dict[str, str]:
        """{editor: its settings in words}, of the editors that have some."""
        return {editor: text for editor, text in self.descriptions.items() if text}

    def has(self, editor: str, unit: int) -> bool:
        """Return whether an edit is finished."""
        return (editor, unit) in self.notes

    def add(self, unit: Unit) -> None:
        """Keep a finished edit.

        Raises:
            WorkspaceError: when the file cannot be written, or another process writes it too.
        """
        at = (unit.editor, unit.number)
        self.rows += unit.rows
        self.continuations += unit.continuations
        self.notes[at] = dict(unit.notes)
        if unit.failure:
            self.failed[at] = unit.failure
        if unit.unusable:
            self.unusable[at] = dict(unit.unusable)
        if self.path is not None:
            self._append(self.path, self._lines_of(unit))

    def _lines_of(self, unit: Unit) -> list[str]:
        """Return the lines of an edit, the line that ends it included."""
        lines = [
            json.dumps(vars(row), ensure_ascii=False) for row in (*unit.rows, *unit.continuations)
        ]
        end: dict[str, Any] = {
            "ends": unit.editor,
            "unit": unit.number,
            "notes": dict(unit.notes),
            "by": self.descriptions.get(unit.editor, ""),
            "sha256": _checksum(lines),
        }
        if unit.failure:
            end["failed"] = unit.failure
        if unit.unusable:
            end["unusable"] = dict(unit.unusable)
        return [*lines, json.dumps(end, ensure_ascii=False)]

    def _append(self, path: Path, lines: Sequence[str]) -> None:
        """Write lines to the end of the file and flush them to disk."""
        content = ("\n".join(lines) + "\n").encode()
        try:
            with path.open("ab") as file:
                if file.seek(0, os.SEEK_END) != self._size:
                    raise WorkspaceError(
                        f"another process writes to {path} too; "
                        "let one run finish, or choose another folder",
                        argument="folder",
                    )
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            self._size += len(content)
        except OSError as error:
            raise WorkspaceError(
                f"{path} cannot be written: {error.strerror}; "
                "make room, and start the run again to go on"
            ) from None


_ROW = pydantic.TypeAdapter(Row)

_CONTINUATION = pydantic.TypeAdapter(Continuation)


@contextmanager
def _file_errors(path: Path) -> Iterator[None]:
    """Raise the errors of a file that cannot be used as ours."""
    try:
        yield
    except OSError as error:
        raise WorkspaceError(
            f"{path} cannot be used: {error.strerror}; "
            "choose a folder that can be read and written",
            argument="folder",
        ) from None
    except UnicodeDecodeError as error:
        raise DamagedError(
            f"{path} is no text ({error.reason}); delete it to begin again"
        ) from None


def _read_lines(path: Path) -> list[str]:
    """Return the lines of a file, split at line feeds alone.

    The last line may end inside a character. It is returned as far as it can be read.
    """
    *lines, last = path.read_bytes().removesuffix(b"\n").split(b"\n")
    return [*(line.decode() for line in lines), last.decode(errors="replace")]


def _parse_header(path: Path, line: str) -> dict[str, Any]:
    """Return the fields of the first line."""
    try:
        header = json.loads(line)
    except ValueError:
        header = None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise DamagedError(
            f"{path} holds no evaluation of this version; choose another folder, or delete the file"
        )
    return header


def _check_origin(path: Path, header: Mapping[str, Any], made_from: Mapping[str, Any]) -> None:
    """Raise an error unless the header agrees with what a run is made from."""
    for name, value in made_from.items():
        if header.get(name) == value:
            continue
        if name == "fingerprint" and same_model(str(header.get(name)), value):
            continue
        difference = f"{name} is {header.get(name)!r} there, {value!r} here"
        if name in ("records", "texts"):  # digests, which say nothing to a reader
            difference = f"its {name} differ (another suite, sample, seed or text)"
        message = f"{path} holds another run: {difference}; choose another folder"
        error = FingerprintError if name == "fingerprint" else InputError
        raise error(message, argument="folder")


def _checksum(lines: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no number")
