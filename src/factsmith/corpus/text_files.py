"""Parquet, lines of JSON and plain text as a corpus, on any filesystem that fsspec knows.

    texts = read_texts("s3://bucket/corpus/*.parquet", column="text")
    texts = read_texts(["news.jsonl.gz", "books.txt"])
    second_moments(lm, texts, [3])

The order of the corpus is that of the files, by name within a folder or pattern, and of their rows.
Nothing is held: rows are read as they are needed. Where the executor in use has several machines,
they read and tokenize; the order, and each token, are the same.
"""

from __future__ import annotations

import importlib
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import IO, Any, Literal, TypeAlias

import fsspec

from ..core.checks import check_items
from ..core.errors import FactsmithError, InputError, first_line
from ..core.filetext import encoding_of
from ..core.tables import counted
from .paragraphs import paragraphs_of

Format: TypeAlias = Literal["parquet", "jsonl", "text"]
"""How a file holds its texts."""

_ENDINGS: dict[str, Format] = {
    ".parquet": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".txt": "text",
    ".text": "text",
}
_PACKED = (".gz", ".bz2", ".xz", ".zst")
_ROWS = 1024
"""Rows of a Parquet file that are decoded together."""
_BUFFER = 2**20
"""Bytes of a Parquet file that are read ahead."""
_LOOKED_INTO = 32
"""Files that are opened before any is used. Opening thousands at an address takes minutes."""


@dataclass(frozen=True)
class Unit:
    """What one machine reads by itself: a file, or a row group of a Parquet file.

    Attributes:
        path: The file, with its scheme.
        format: How it holds its texts.
        column: The name of the column or field.
        group: The row group. None: the whole file.
    """

    path: str
    format: Format
    column: str
    group: int | None = None

    def __iter__(self) -> Iterator[str]:
        """Yield the texts.

        Raises:
            InputError: The file cannot be read, or a row holds no text.
        """
        with _errors(self.path):
            yield from _READERS[self.format](self)


class TextFiles:
    """The texts of files. It can be iterated any number of times.

    Attributes:
        paths: The files, with their schemes, in the order of the corpus.
    """

    def __init__(self, units: Sequence[Unit], versions: Sequence[str]) -> None:
        """Take the units of all files, and a line for each file that names its version."""
        self.units, self._versions = tuple(units), tuple(versions)
        self.paths = list(dict.fromkeys(unit.path for unit in units))

    @property
    def is_shared(self) -> bool:
        """Whether other processes can read the files: not those in this one's memory."""
        return not any(path.startswith("memory:") for path in self.paths)

    def __repr__(self) -> str:
        first = f", {self.paths[0]!r}" if self.paths else ""
        return f"TextFiles({counted(len(self.paths), 'file')}{first})"

    def __iter__(self) -> Iterator[str]:
        """Yield the texts in order.

        Raises:
            InputError: A file cannot be read, or a row holds no text.
        """
        for unit in self.units:
            yield from unit

    def identity(self) -> list[str]:
        """Return a line for each file that changes when the file does."""
        return list(self._versions)


def read_texts(
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    *,
    column: str = "text",
    format: Format | None = None,
) -> TextFiles:
    """Return the texts of files as a corpus.

    Args:
        paths: Files, folders or patterns such as "s3://bucket/*.parquet", or several of them. A
            scheme that fsspec knows says where they are; without one they are on this machine.
        column: The column of a Parquet file, or the field of a line of JSON, that holds the text.
            Rows where it is null are left out.
        format: "parquet", "jsonl" or "text" (blank lines separate texts). None: by the ending of
            each file: .parquet, .jsonl, .ndjson, .json, .txt, or one of these followed by .gz.

    Raises:
        InputError: There is no such file, no such column, no package for the filesystem or the
            format, or the format of a file is not known.
    """
    several = "files, folders or patterns"
    given = (
        [paths] if isinstance(paths, (str, os.PathLike)) else check_items(paths, "paths", several)
    )
    if wrong := [path for path in given if not isinstance(path, (str, os.PathLike))]:
        raise InputError(f"paths holds {wrong[0]!r:.60}; give {several}", argument="paths")
    if not given:
        raise InputError("paths is empty; give at least one file, folder or pattern")
    if format is not None and format not in _READERS:
        raise InputError(
            f'format is {format!r}; give "parquet", "jsonl" or "text", or None for what the names '
            "of the files say",
            argument="format",
        )
    units: list[Unit] = []
    versions: list[str] = []
    for path in given:
        for file, version in _files(os.fspath(path), format):
            versions.append(version)
            unit = Unit(file, format or _format_of(file), column)
            units += _units(unit) if len(versions) <= _LOOKED_INTO else [unit]
    return TextFiles(units, versions)


def is_address(path: str) -> bool:
    """Return whether a path needs `read_texts`: it has a scheme, or is no plain text."""
    packed = path.lower().endswith(_PACKED)
    return "://" in path or packed or _known(path) in ("parquet", "jsonl")


# ── which files ───────────────────────────────────────────────────────────────────────────────────


def _files(path: str, format: Format | None) -> list[tuple[str, str]]:
    """Return the files that a path stands for, each with a line that names its version."""
    with _errors(path):
        system, inner = fsspec.core.url_to_fs(path)
        if any(sign in inner for sign in "*?[") and not system.exists(inner):
            names = sorted(name for name in system.glob(inner) if system.isfile(name))
        elif system.isdir(inner):
            names = sorted(
                name
                for name in system.find(inner)
                if not PurePosixPath(name).name.startswith((".", "_"))
                and (format is not None or _known(name))
            )
        else:
            names = [inner] if system.exists(inner) else []
    if not names:
        raise InputError(
            f"there is no file at {path} whose texts can be read; give a file, a folder or a "
            "pattern such as data/*.parquet",
            argument="paths",
        )
    files = []
    for name in names:
        with _errors(name):
            details = system.info(name)
            file = system.unstrip_protocol(name)
        changed = details.get("ETag") or details.get("etag") or details.get("mtime") or ""
        files.append((file, f"{file} {details.get('size')} {changed}"))
    return files


def _known(path: str) -> Format | None:
    """Return the format that a file's name says, if it says one."""
    bare = path.lower()
    for packed in _PACKED:
        bare = bare.removesuffix(packed)
    return _ENDINGS.get(PurePosixPath(bare).suffix)


def _format_of(path: str) -> Format:
    known = _known(path)
    if known is None:
        raise InputError(
            f"the name of {path} does not say what it holds; rename it to end in .parquet, .jsonl "
            'or .txt, or give format="parquet", "jsonl" or "text"',
            argument="format",
        )
    return known


def _units(file: Unit) -> list[Unit]:
    """Return a file in pieces that can be read apart, after a look at its columns."""
    if file.format != "parquet":
        next(iter(file), None)  # raises an error for a file that cannot be read
        return [file]
    with _errors(file.path), _parquet(file) as table:
        groups = range(table.num_row_groups)
    return [Unit(file.path, file.format, file.column, group) for group in groups]


# ── how each format is read ───────────────────────────────────────────────────────────────────────


def _parquet_texts(unit: Unit) -> Iterator[str]:
    groups = None if unit.group is None else [unit.group]
    with _parquet(unit) as table:
        row = 0
        for batch in table.iter_batches(_ROWS, row_groups=groups, columns=[unit.column]):
            for value in batch.column(0).to_pylist():
                row += 1
                if value is not None:
                    where = f"row {row}" + ("" if groups is None else f" of group {unit.group}")
                    yield _text(value, unit, where)


@contextmanager
def _parquet(unit: Unit) -> Iterator[Any]:
    """Open a Parquet file that has the column."""
    try:
        module = importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise InputError(
            f"reading {unit.path} needs pyarrow, which is not installed; install it with: "
            "pip install pyarrow"
        ) from None
    # Without a buffer's size a whole row group is held, which is often the whole file.
    with (
        fsspec.open(unit.path, "rb") as stream,
        module.ParquetFile(stream, pre_buffer=False, buffer_size=_BUFFER) as table,
    ):
        names = table.schema_arrow.names
        if unit.column not in names:
            raise InputError(
                f"{unit.path} has no column {unit.column!r}; its columns are "
                f"{', '.join(map(repr, names))}. Name the one that holds the text",
                argument="column",
            )
        yield table


def _json_texts(unit: Unit) -> Iterator[str]:
    with _lines(unit.path) as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            where = f"line {number}"
            try:
                value = json.loads(line)
            except ValueError as error:
                raise InputError(
                    f"{unit.path}, {where}: {error}; expected one JSON object a line"
                ) from None
            if not isinstance(value, dict):
                raise InputError(
                    f"{unit.path}, {where}: it holds a {type(value).__name__}; expected one JSON "
                    "object a line"
                )
            if unit.column not in value:
                raise InputError(
                    f"{unit.path}, {where}: there is no field {unit.column!r}; its fields are "
                    f"{', '.join(map(repr, value))}. Name the one that holds the text",
                    argument="column",
                )
            if value[unit.column] is not None:
                yield _text(value[unit.column], unit, where)


def _plain_texts(unit: Unit) -> Iterator[str]:
    with _lines(unit.path) as stream:
        yield from paragraphs_of(stream)


@contextmanager
def _lines(path: str) -> Iterator[IO[str]]:
    """Open a file as lines of UTF-8, or of what its byte order mark says."""
    with fsspec.open(path, "rb", compression="infer") as raw:
        stream = io.BufferedReader(raw)
        with io.TextIOWrapper(stream, encoding=encoding_of(stream.peek(4)[:4])) as lines:
            yield lines


def _text(value: object, unit: Unit, where: str) -> str:
    if not isinstance(value, str):
        raise InputError(
            f"{unit.path}, {where}: {unit.column!r} holds a {type(value).__name__}; expected a text"
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{unit.path}, {where}: {unit.column!r} holds half a character at position "
            f"{error.start} (a lone surrogate); write the file again in UTF-8"
        ) from None
    return value


_READERS: dict[str, Callable[[Unit], Iterator[str]]] = {
    "parquet": _parquet_texts,
    "jsonl": _json_texts,
    "text": _plain_texts,
}


@contextmanager
def _errors(path: str) -> Iterator[None]:
    """Turn errors of files, filesystems and formats into InputErrors."""
    try:
        yield
    except FactsmithError:
        raise
    except ImportError as error:
        scheme = path.partition("://")[0]
        raise InputError(
            f"{path} cannot be read: {first_line(error)}. Install the package that fsspec names "
            f"for {scheme}://"
        ) from None
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not in UTF-8 ({error.reason}); save it in UTF-8 and try again",
            argument="paths",
        ) from None
    except Exception as error:  # filesystems raise errors of their own libraries
        reason = first_line(error)[:300]
        raise InputError(
            f"{path} cannot be read: {type(error).__name__}: {reason}; check the address, your "
            "rights, whether the file is whole, and whether every machine that reads can see it",
            argument="paths",
        ) from None
