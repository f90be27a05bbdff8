"""judge.store."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pydantic

from ..core.errors import DamagedError, FingerprintError, InputError, WorkspaceError
from ..core.files import write_file
from .rows import Continuation, Row, finite_numbers

if TYPE_CHECKING:
    pass


FORMAT = "evaluation 4"


class Store:
    """Rows and notes, in memory and in rows.jsonl of a folder, if any: a line a row, and behind each edit's rows a line that ends it."""

    def __init__(
        self,
        folder: Path | None,
        made_from: Mapping[str, Any] | None,
        told: Mapping[str, Any] | None = None,
    ) -> None:
        """made_from: what a folder's rows must be of; None: whatever they are of, and they are only read. told: said beside it."""
        self.path = None if folder is None else folder / "rows.jsonl"
        self.header: dict[str, Any] = {**(made_from or {}), **(told or {})}
        self.rows: list[Row] = []
        self.written: list[Continuation] = []
        self.notes: dict[tuple[str, int], dict[str, float]] = {}
        self.failed: dict[tuple[str, int], str] = {}
        self.described: dict[str, str] = {}
        self.size = 0  # of the file, as it was left
        if self.path is None:
            return
        first = json.dumps(self.header, ensure_ascii=False)
        try:
            if made_from is None:
                if not self.path.is_file():
                    raise InputError(
                        f"{folder} holds no rows.jsonl; expected a folder that `evaluate` kept its rows in"
                    )
                lines = self._lines()
                self.header = self._check(lines[0], {})
                self._take(lines[1:])
                return
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lines = self._lines() if self.path.is_file() and self.path.stat().st_size else [first]
            self._check(lines[0], made_from)
            content = ("\n".join([first, *self._take(lines[1:])]) + "\n").encode()
            write_file(self.path, content)  # without the rows of an edit that was not finished
            self.size = len(content)
        except OSError as error:
            raise WorkspaceError(
                f"cannot use {self.path}: {error.strerror}; choose a folder that can be read and written"
            ) from None
        except UnicodeDecodeError as error:
            raise DamagedError(
                f"{self.path} is no text ({error.reason}); delete it to begin again"
            ) from None

    def _lines(self) -> list[str]:
        """As they stand, split at line feeds alone; of the last, which may be torn inside a character, what can be read."""
        assert self.path is not None
        *lines, last = self.path.read_bytes().removesuffix(b"\n").split(b"\n")
        return [*(line.decode() for line in lines), last.decode(errors="replace")]

    def _check(self, line: str, made_from: Mapping[str, Any]) -> dict[str, Any]:
        try:
            held = json.loads(line)
        except ValueError:
            held = None
        if not isinstance(held, dict) or held.get("format") != FORMAT:
            raise DamagedError(
                f"{self.path} holds no evaluation, or an earlier version's; choose another folder, or delete it"
            )
        for name, value in made_from.items():
            if held.get(name) != value:
                error = FingerprintError if name == "fingerprint" else InputError
                there = f"{name} is {held.get(name)!r} there, {value!r} here"
                if name in ("records", "texts"):
                    there = f"its {name} are others (another suite, sample, seed or text)"
                raise error(f"{self.path} is of another run: {there}; choose another folder")
        return held

    def _take(self, lines: Sequence[str]) -> list[str]:
        """Rows of finished edits into memory; the lines that hold them."""
        kept: list[str] = []
        begun: list[str] = []
        for number, line in enumerate(lines, 2):
            try:
                entry = json.loads(line)
                if not isinstance(entry, dict):
                    raise TypeError("it is no row")
                if "ends" not in entry:
                    begun.append(line)
                    continue
                at = (str(entry["ends"]), int(entry["unit"]))
                if entry["sha256"] != _checksum(begun):
                    raise ValueError(
                        f"the rows of {at[0]}, edit {at[1]}, do not match their checksum"
                    )
                if at in self.notes:
                    raise ValueError(f"{at[0]}, edit {at[1]}, is there twice")
                for each in begun:
                    if "texts" in json.loads(each, parse_constant=_no_number):
                        self.written.append(_CONTINUATION.validate_json(each, strict=True))
                    else:
                        self.rows.append(_ROW.validate_json(each, strict=True))
                self.notes[at] = finite_numbers(entry["notes"])
                self.described.setdefault(at[0], str(entry["by"]))
                if entry.get("failed"):
                    self.failed[at] = str(entry["failed"])
                kept += [*begun, line]
                begun = []
            except (ValueError, TypeError, KeyError) as error:  # pydantic's is a ValueError
                if number <= len(lines):  # only the last line can be torn
                    why = "; ".join(str(error).splitlines()[:3])
                    raise DamagedError(
                        f"{self.path}, line {number}, cannot be read ({why}); delete the file to begin again"
                    ) from None
        return kept

    def check_editor(self, editor: str, description: str) -> None:
        """Raises InputError where rows of an editor of this name are there that was another."""
        held = self.described.setdefault(editor, description)
        if held and description and held != description:
            raise InputError(
                f"{self.path} has rows of {editor} with other settings: {held} there, {description} here; choose another folder"
            )

    @property
    def settings(self) -> dict[str, str]:
        """{editor: its description} of those that have one."""
        return {editor: text for editor, text in self.described.items() if text}

    def has(self, editor: str, unit: int) -> bool:
        """Whether an edit's rows are there."""
        return (editor, unit) in self.notes

    def add(
        self,
        editor: str,
        unit: int,
        rows: Sequence[Row],
        texts: Sequence[Continuation],
        notes: Mapping[str, float],
        failed: str = "",
    ) -> None:
        """Keep what belongs to an edit."""
        self.rows += rows
        self.written += texts
        self.notes[editor, unit] = dict(notes)
        if failed:
            self.failed[editor, unit] = failed
        if self.path is None:
            return
        lines = [json.dumps(vars(row), ensure_ascii=False) for row in (*rows, *texts)]
        end = {
            "ends": editor,
            "unit": unit,
            "notes": dict(notes),
            "by": self.described.get(editor, ""),
            "sha256": _checksum(lines),
        }
        lines.append(json.dumps(end | ({"failed": failed} if failed else {}), ensure_ascii=False))
        content = ("\n".join(lines) + "\n").encode()
        try:
            with self.path.open("ab") as file:
                if file.seek(0, os.SEEK_END) != self.size:
                    raise WorkspaceError(
                        f"somebody else writes to {self.path}, too; let one run finish, or choose another folder"
                    )
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            self.size += len(content)
        except OSError as error:
            raise WorkspaceError(
                f"cannot write {self.path}: {error.strerror}; make room, and start again to go on"
            ) from None


def _checksum(lines: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number")


_ROW = pydantic.TypeAdapter(Row)

_CONTINUATION = pydantic.TypeAdapter(Continuation)
