"""The head of a GGUF file: its fields, and the list of its tensors. No tensor is read.

    header = read_header(Path("model.gguf"))
    header.architecture, header.fields["general.name"], header.tensors[0].shape

A file may come from anyone, so each count and each offset is compared with the size of the file
before it is used. The layout is that of versions 2 and 3 of the format, little-endian:

    "GGUF", version (u32), n_tensors (u64), n_fields (u64)
    fields       key, type (u32), value
    tensors      name, n_dims (u32), dims (u64 each, the fastest first), type (u32), offset (u64)
    padding up to the alignment, followed by the data, to which the offsets refer
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from ..core.errors import InputError, ModelError

MAGIC = b"GGUF"

SUFFIX = ".gguf"

_VERSIONS = (2, 3)

_SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
"""{type of a field: its layout}. Text is 8, a list 9."""

_TEXT, _LIST = 8, 9

_MOST_DIMS = 4


@dataclass(frozen=True)
class Listed:
    """A field that is a list: the type of its entries, and how many there are."""

    type: int
    count: int


@dataclass(frozen=True)
class TensorEntry:
    """One tensor as the file lists it.

    Attributes:
        name: Its name, such as "blk.0.ffn_down.weight".
        shape: Its shape in PyTorch's order: (d_model, d_ff) for a down-projection.
        type: The number of its ggml type, such as 0 for F32.
        offset: Where it begins, counted from the beginning of the data.
        start: Where its entry in the list begins, counted from the beginning of the file.
        end: Where its entry ends.
    """

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int
    start: int
    end: int

    @property
    def n_numbers(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class Header:
    """The head of a file.

    Attributes:
        path: The file.
        n_bytes: Its size.
        version: The version of the format.
        fields: {key: value}. A list is `Listed`, without its entries.
        spans: {key: (start, end)}, where a field is in the file.
        tensors: The tensors in the order in which they are listed.
        fields_end: Where the fields end and the list of tensors begins.
        data_start: Where the data begins.
        alignment: What each tensor's offset is a multiple of.
    """

    path: Path
    n_bytes: int
    version: int
    fields: dict[str, Any]
    spans: dict[str, tuple[int, int]]
    tensors: tuple[TensorEntry, ...]
    fields_end: int
    data_start: int
    alignment: int

    @property
    def architecture(self) -> str:
        """The name of the architecture, as llama.cpp has it."""
        return str(self.fields.get("general.architecture", ""))

    def sizes(self) -> list[int]:
        """Return how many bytes each tensor has room for: up to the next one, or to the end."""
        starts = sorted({each.offset for each in self.tensors})
        ends = dict(zip(starts, [*starts[1:], self.n_bytes - self.data_start], strict=True))
        return [ends[each.offset] - each.offset for each in self.tensors]


def is_gguf(path: Path) -> bool:
    """Return whether a file begins as a GGUF file does, or has its suffix."""
    if path.suffix.lower() == SUFFIX:
        return path.is_file()
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def read_header(path: Path) -> Header:
    """Read the head of a GGUF file.

    Raises:
        ModelError: when it is not a GGUF file, is of another version, or is damaged.
    """
    try:
        with path.open("rb") as file:
            if not path.stat().st_size:
                raise ModelError(f"{path} is empty; copy or download it again")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return _Reader(path, content).header()
    except OSError as error:
        raise ModelError(
            f"{path} cannot be read ({error.strerror}); give a file that can be read"
        ) from None


class _Reader:
    """Reads a file from its beginning, and never beyond its end."""

    def __init__(self, path: Path, content: mmap.mmap) -> None:
        self.path, self.content, self.at = path, content, 0

    def header(self) -> Header:
        """Return the head of the file."""
        n_tensors, n_fields, version = self._beginning()
        fields: dict[str, Any] = {}
        spans: dict[str, tuple[int, int]] = {}
        for _ in range(n_fields):
            start, key = self.at, self._text()
            if key in fields:
                self._damaged(f"it has the field {key!r} twice")
            fields[key] = self._value(self._number("<I"))
            spans[key] = (start, self.at)
        fields_end = self.at
        tensors = tuple(self._tensor() for _ in range(n_tensors))
        alignment = fields.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            self._damaged(f"its alignment is {alignment!r}")
        header = Header(
            path=self.path,
            n_bytes=len(self.content),
            version=version,
            fields=fields,
            spans=spans,
            tensors=tensors,
            fields_end=fields_end,
            data_start=-(-self.at // alignment) * alignment,
            alignment=alignment,
        )
        self._check(header)
        return header

    def _beginning(self) -> tuple[int, int, int]:
        if (magic := self.content[: len(MAGIC)]) != MAGIC:
            raise ModelError(
                f"{self.path} is not a GGUF file: it begins with {magic!r} instead of {MAGIC!r}; "
                "give a GGUF file, or the folder of a transformers model"
            )
        self.at = len(MAGIC)
        version = self._number("<I")
        if version not in _VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS
            what = "big-endian" if swapped else f"of version {version}"
            raise ModelError(
                f"{self.path} is a GGUF file that is {what}; little-endian files of the versions "
                f"{' and '.join(map(str, _VERSIONS))} can be read. Convert the model again with a "
                "newer llama.cpp"
            )
        n_tensors, n_fields = self._number("<Q"), self._number("<Q")
        # A field has at least 13 bytes, and a tensor's entry 24.
        self._need(13 * n_fields + 24 * n_tensors)
        return n_tensors, n_fields, version

    def _check(self, header: Header) -> None:
        """Check that the tensors are where the list says, and that the file is a whole."""
        names = [each.name for each in header.tensors]
        if len(set(names)) < len(names):
            self._damaged("it lists a tensor twice")
        room = header.n_bytes - header.data_start
        for each in header.tensors:
            # The smallest types have about 1.5 bits a number.
            if each.offset % header.alignment or each.offset + each.n_numbers // 8 > room:
                self._damaged(f"the tensor {each.name} is not where it should be", cut=True)

    def _need(self, n_bytes: int) -> None:
        if n_bytes > len(self.content) - self.at:
            self._damaged("it ends too early", cut=True)

    def _damaged(self, what: str, *, cut: bool = False) -> NoReturn:
        known = f" ({len(self.content):,} bytes)" if cut else ""
        raise ModelError(f"{self.path} is damaged: {what}{known}; copy or download it again")

    def _number(self, layout: str) -> Any:
        size = struct.calcsize(layout)
        self._need(size)
        (value,) = struct.unpack_from(layout, self.content, self.at)
        self.at += size
        return value

    def _text(self) -> str:
        n_bytes = self._number("<Q")
        self._need(n_bytes)
        raw = self.content[self.at : self.at + n_bytes]
        self.at += n_bytes
        return raw.decode("utf-8", errors="replace")

    def _value(self, type: int) -> Any:
        if type in _SCALARS:
            return self._number(_SCALARS[type])
        if type == _TEXT:
            return self._text()
        if type != _LIST:
            self._damaged(f"it has a field of the unknown type {type}")
        inner, count = self._number("<I"), self._number("<Q")
        if inner in _SCALARS:
            size = count * struct.calcsize(_SCALARS[inner])
            self._need(size)
            self.at += size
        elif inner == _TEXT:
            self._need(8 * count)
            for _ in range(count):
                n_bytes = self._number("<Q")
                self._need(n_bytes)
                self.at += n_bytes
        else:
            self._damaged(f"it has a list of the unknown type {inner}")
        return Listed(inner, count)

    def _tensor(self) -> TensorEntry:
        start, name = self.at, self._text()
        n_dims = self._number("<I")
        if not 1 <= n_dims <= _MOST_DIMS:
            self._damaged(f"the tensor {name!r:.80} has {n_dims} dimensions")
        dims = [self._number("<Q") for _ in range(n_dims)]
        type, offset = self._number("<I"), self._number("<Q")
        return TensorEntry(name, tuple(reversed(dims)), type, offset, start, self.at)


# ── which files are a model ───────────────────────────────────────────────────────────────────────


def check_is_model(header: Header) -> None:
    """Check that a file holds a whole model.

    Raises:
        InputError: when it is one part of a model in several files.
        ModelError: when it holds something else, such as an adapter, or nothing at all.
    """
    fields = header.fields
    parts = fields.get("split.count", 0)
    if isinstance(parts, int) and parts > 1:
        raise InputError(
            f"{header.path} is one of {parts} parts of a model; join them first with llama.cpp: "
            f"`llama-gguf-split --merge {header.path.name} model.gguf`, and give that file"
        )
    kind = fields.get("general.type", "model")
    if kind != "model":
        article = "an" if str(kind)[:1] in "aeiou" else "a"
        raise ModelError(
            f"{header.path} holds {article} {kind!s:.40}, not a model; give the GGUF file of the "
            "model itself"
        )
    if not header.architecture:
        raise ModelError(
            f"{header.path} does not say what architecture it is; convert the model again with "
            "llama.cpp"
        )
    if not header.tensors:
        raise ModelError(
            f"{header.path} holds no tensors, only a vocabulary; give the GGUF file of a model"
        )
