"""The files that --out names: a picture, and the numbers next to it as JSON and CSV."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.documents import document
from ..core.errors import InputError
from ..core.files import write_file
from ..core.sheets import csv_text
from .printing import as_json_text
from .waiting import during

_RECORDS = ("trace", "average", "neurons", "explain")
"""What the key "factsmith" holds in the JSON next to a picture. It marks the file as ours."""


@dataclass(frozen=True)
class Output:
    """The files of one --out.

    Attributes:
        pictures: The pictures.
        curves: The pictures of curves, which an average also has.
        record: The numbers as JSON.
        table: The numbers as CSV.
    """

    pictures: list[Path]
    curves: list[Path]
    record: Path
    table: Path

    @property
    def all(self) -> list[Path]:
        """Every file, in the order in which they are named when they are saved."""
        return [*self.pictures, self.record, self.table, *self.curves]


def output(out: str | None, *, curves: bool = False, inputs: Sequence[Path] = ()) -> Output | None:
    """Return the files that --out names; None without --out.

    Args:
        out: What the user gave.
        curves: Whether there are curves, too.
        inputs: Files that the command reads, which must not be written over.

    Raises:
        InputError: A file cannot be written, or it belongs to somebody else.
    """
    if out is None:
        return None
    from ..show.plots.drawing import check_path

    path = Path(out)
    is_hidden = path.name.startswith(".") and not path.suffix  # ".png", "..": a suffix alone
    if not path.name or is_hidden or out.endswith(("/", os.sep)) or path.is_dir():
        example = Path(*([path] if path.is_dir() else []), "trace")
        raise InputError(
            f"--out {out!r} does not name a file; give a file name, such as {example} or "
            f"{example}.png"
        )
    suffix = "" if path.suffix[1:].isdigit() else path.suffix  # the 2 of "v1.2" is not a suffix
    stem = path.name.removesuffix(suffix)
    endings = [suffix] if suffix else [".png", ".svg"]
    files = Output(
        pictures=[path.with_name(stem + ending) for ending in endings],
        curves=[path.with_name(f"{stem}-curves{ending}") for ending in endings] if curves else [],
        record=path.with_name(f"{stem}.json"),
        table=path.with_name(f"{stem}.csv"),
    )
    for picture in (*files.pictures, *files.curves):
        check_path(picture)
    _check_files(out, files, inputs)
    return files


def save(
    files: Output | None,
    command: str,
    record: Any,
    draw: Callable[[Path], object],
    draw_curves: Callable[[Path], object] | None = None,
) -> list[Path]:
    """Write the pictures and their numbers; return the files.

    Args:
        files: Where to write. None: nowhere.
        command: Whose numbers they are; one of `_RECORDS`.
        record: Has `to_dict()` and `rows()`.
        draw: Draws the picture into a file.
        draw_curves: Draws the curves into a file.
    """
    if files is None:
        return []
    with during("drawing"):
        for picture in files.pictures:
            draw(picture)
        content = as_json_text(document({"factsmith": command, **record.to_dict()})) + "\n"
        write_file(files.record, content.encode())
        # A token that is half of a character cannot be written; it becomes a question mark.
        write_file(files.table, csv_text(record.rows()).encode("utf-8", "replace"))
        if draw_curves is not None:
            for picture in files.curves:
                draw_curves(picture)
    return files.all


def _check_files(out: str, files: Output, inputs: Sequence[Path]) -> None:
    """Raise InputError where a file is a folder, an input, or not a record of an earlier run."""
    for file in files.all:
        if file.is_dir():
            raise InputError(
                f"--out {out!r} would write {file}, which is a folder; choose another name"
            )
        if any(file.exists() and given.exists() and file.samefile(given) for given in inputs):
            raise InputError(
                f"--out {out!r} would write over {file}, the file of facts; choose another name"
            )
    is_ours = _is_record(files.record)
    for file in (files.record, files.table):
        if file.exists() and not is_ours:
            raise InputError(
                f"--out {out!r} would replace {file}, which an earlier run did not write; choose "
                "another name"
            )


def _is_record(path: Path) -> bool:
    """Whether a file holds numbers that this program wrote next to a picture."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and content.get("factsmith") in _RECORDS
