"""A GGUF file again, with some of its tensors replaced: everything else is the same bytes.

    numbers = read_tensor(header, entry)                               # float32, dequantised
    write_replaced(header, target, {name: quantised(numbers, "Q8_0")})
    check_replaced(header, target, {name: ...})                        # byte for byte

The fields are copied, except for bytes that the caller gives. A new tensor may have another size,
so the offsets of those after it change; their bytes do not. A tensor may also be padded with zeros
in its own type (`gguf_padding`).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeAlias

import numpy as np
from torch import Tensor

from ...core.errors import InputError, NumericsError
from ...model.gguf_header import Header, TensorEntry, read_header
from .gguf_padding import Padding, is_padded, write_padded
from .gguf_types import dequantised, n_bytes_of, n_bytes_of_row

TYPES = ("F16", "Q8_0", "BF16", "F32")
"""The types in which a replaced tensor can be written."""

_BLOCK = 1 << 24


@dataclass(frozen=True)
class Replacement:
    """The data of one tensor in a file.

    Attributes:
        type: The number of its ggml type.
        shape: Its shape in PyTorch's order.
        data: Its bytes.
    """

    type: int
    shape: tuple[int, ...]
    data: bytes


Change: TypeAlias = Replacement | Padding


def check_type(name: str | None) -> str:
    """Return the type of replaced tensors; raises InputError for one that cannot be written."""
    if name is None:
        return TYPES[0]
    if not isinstance(name, str) or name.upper() not in TYPES:
        raise InputError(
            f"tensor_type is {name!r}: it must be {', '.join(TYPES[:-1])} or {TYPES[-1]}.",
            argument="tensor_type",
        )
    return name.upper()


def quantised(numbers: Tensor, type: str) -> Replacement:
    """Return a matrix as the bytes of a type.

    Raises:
        InputError: when its rows cannot be cut into the blocks of the type.
        NumericsError: when a number is too large for the type.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quantize

    kind = getattr(GGMLQuantizationType, type)
    block, _ = GGML_QUANT_SIZES[kind]
    if numbers.shape[-1] % block:
        raise InputError(
            f"tensor_type is {type!r}, which takes {block} numbers at a time, and a row of the "
            f"patched tensor has {numbers.shape[-1]}. Write it in F16.",
            argument="tensor_type",
        )
    with np.errstate(over="ignore"):
        data = quantize(numbers.detach().cpu().float().contiguous().numpy(), kind)
    if not bool(dequantised(int(kind), data, tuple(numbers.shape)).isfinite().all()):
        raise NumericsError(
            f"A patched tensor has numbers too large for {type}. Write it in BF16 or F32.",
            argument="tensor_type",
        )
    return Replacement(int(kind), tuple(numbers.shape), data.tobytes())


def entry_of(header: Header, name: str) -> TensorEntry | None:
    """Return a tensor's entry by its name; None if the file does not have it."""
    return next((each for each in header.tensors if each.name == name), None)


def read_tensor(header: Header, entry: TensorEntry) -> Tensor:
    """Return the numbers of a tensor as float32; raises OSError."""
    with header.path.open("rb") as file:
        file.seek(header.data_start + entry.offset)
        return dequantised(entry.type, file.read(n_bytes_of(entry)), entry.shape)


def write_replaced(
    header: Header,
    target: Path,
    changes: Mapping[str, Change],
    fields: Mapping[int, bytes] | None = None,
) -> None:
    """Write a file with some tensors replaced or padded.

    Args:
        header: The head of the file to copy.
        target: The new file.
        changes: {name: what replaces or pads a tensor}.
        fields: {place in the file: bytes of the fields to write there}. None: they stay.

    Raises:
        OSError: when it cannot be read or written.
    """
    placed, offset = {}, 0
    by_place = sorted(header.tensors, key=lambda each: each.offset)
    for each in by_place:
        placed[each.name] = offset
        offset += _aligned(_size(each, changes.get(each.name)), header.alignment)
    with header.path.open("rb") as source, target.open("wb") as file:
        file.write(_head(source, header, fields))
        for each in header.tensors:
            change = changes.get(each.name)
            source.seek(each.start)
            shape = each.shape if change is None else change.shape
            file.write(source.read(each.end - each.start)[: -12 - 8 * len(each.shape)])
            file.write(struct.pack(f"<{len(shape)}Q", *reversed(shape)))
            kind = each.type if change is None else change.type
            file.write(struct.pack("<IQ", kind, placed[each.name]))
        file.write(b"\0" * (header.data_start - file.tell()))
        for each in by_place:
            change = changes.get(each.name)
            if change is None:
                _copy(source, file, header.data_start + each.offset, n_bytes_of(each))
            elif isinstance(change, Padding):
                write_padded(source, file, header.data_start + each.offset, each, change)
            else:
                file.write(change.data)
            file.write(b"\0" * (-(file.tell() - header.data_start) % header.alignment))


def _size(entry: TensorEntry, change: Change | None) -> int:
    if change is None:
        return n_bytes_of(entry)
    if isinstance(change, Replacement):
        return len(change.data)
    return math.prod(change.shape[:-1]) * n_bytes_of_row(change.type, change.shape[-1])


def _head(source: BinaryIO, header: Header, fields: Mapping[int, bytes] | None) -> bytes:
    """Return the beginning of a file up to the list of tensors, with some bytes changed."""
    source.seek(0)
    head = bytearray(source.read(header.fields_end))
    for at, content in (fields or {}).items():
        head[at : at + len(content)] = content
    return bytes(head)


def check_replaced(
    header: Header,
    target: Path,
    changes: Mapping[str, Change],
    fields: Mapping[int, bytes] | None = None,
) -> Header:
    """Check that a file is another one except for its changes, byte for byte; return its head.

    The library gguf reads it as well. The bytes of replaced tensors are not compared.

    Args:
        header: The head of the file that was copied.
        target: The new file.
        changes: As for `write_replaced`.
        fields: As for `write_replaced`.

    Raises:
        NumericsError: when anything else differs.
    """
    from gguf import GGUFReader

    new = read_header(target)
    with header.path.open("rb") as before, target.open("rb") as after:
        head = _head(before, header, fields)
        if new.spans != header.spans or head != after.read(header.fields_end):
            raise _differs("a field")
        for old, entry in zip(header.tensors, new.tensors, strict=False):
            change = changes.get(old.name)
            shape = old.shape if change is None else change.shape
            if (old.name, shape) != (entry.name, entry.shape):
                raise _differs(old.name)
            if isinstance(change, Replacement):
                continue
            places = (header.data_start + old.offset, new.data_start + entry.offset)
            if change is None:
                same = _same(before, after, *places, n_bytes_of(old))
            else:
                same = is_padded(before, after, places, old, change)
            if old.type != entry.type or not same:
                raise _differs(old.name)
    try:
        names = [each.name for each in GGUFReader(target).tensors]
    except Exception as error:  # the library raises all kinds of errors
        raise _differs(f"the whole ({error})") from error
    if names != [each.name for each in header.tensors]:
        raise _differs("the list of tensors")
    return new


def _differs(what: str) -> NumericsError:
    return NumericsError(
        f"The file that was written differs from its base: {what}. Nothing was kept; please report "
        "this."
    )


def _aligned(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


def _pieces(file: BinaryIO, start: int, size: int) -> Iterator[bytes]:
    file.seek(start)
    while size > 0 and (piece := file.read(min(_BLOCK, size))):
        size -= len(piece)
        yield piece


def _copy(source: BinaryIO, target: BinaryIO, start: int, size: int) -> None:
    for piece in _pieces(source, start, size):
        target.write(piece)


def _same(a: BinaryIO, b: BinaryIO, at: int, other: int, size: int) -> bool:
    """Return whether two files have the same bytes at two places."""
    done = 0
    while done < size:
        n = min(_BLOCK, size - done)
        a.seek(at + done)
        b.seek(other + done)
        piece = a.read(n)
        if len(piece) < n or piece != b.read(n):
            return False
        done += n
    return True
