"""A GGUF file again, with some of its tensors replaced: everything else is the same bytes.

    numbers = read_tensor(header, "blk.5.ffn_down.weight")             # float32, dequantised
    write_replaced(header, target, {name: quantised(numbers, "Q8_0")})
    check_replaced(header, target, {name})                             # byte for byte

The fields are copied as they are. A new tensor may have another size, so the offsets of those after
it change; their bytes do not.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from ...core.errors import InputError, NumericsError
from ...model.gguf_header import Header, TensorEntry, read_header

TYPES = ("F16", "Q8_0", "BF16", "F32")
"""The types in which a replaced tensor can be written."""

_BLOCK = 1 << 24


@dataclass(frozen=True)
class Replacement:
    """The data of one tensor in a file.

    Attributes:
        type: The number of its ggml type.
        data: Its bytes.
    """

    type: int
    data: bytes


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
    return Replacement(int(kind), data.tobytes())


def dequantised(type: int, data: Any, shape: tuple[int, ...]) -> Tensor:
    """Return the numbers of a tensor as float32, from the bytes of its type."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

    kind = GGMLQuantizationType(type)
    block, n_bytes = GGML_QUANT_SIZES[kind]
    plain = {"F32": np.float32, "F16": np.float16}.get(kind.name)
    raw = np.frombuffer(bytes(data), np.uint8)
    rows = raw.view(plain) if plain is not None else raw.reshape(-1, shape[-1] // block * n_bytes)
    return torch.from_numpy(np.array(dequantize(rows, kind), np.float32)).reshape(shape)


def entry_of(header: Header, name: str) -> TensorEntry | None:
    """Return a tensor's entry by its name; None if the file does not have it."""
    return next((each for each in header.tensors if each.name == name), None)


def n_bytes_of(entry: TensorEntry) -> int:
    """Return how many bytes the data of a tensor has."""
    from gguf import GGML_QUANT_SIZES

    block, n_bytes = GGML_QUANT_SIZES[entry.type]
    return int(entry.n_numbers // block * n_bytes)


def read_tensor(header: Header, entry: TensorEntry) -> Tensor:
    """Return the numbers of a tensor as float32; raises OSError."""
    with header.path.open("rb") as file:
        file.seek(header.data_start + entry.offset)
        return dequantised(entry.type, file.read(n_bytes_of(entry)), entry.shape)


def write_replaced(header: Header, target: Path, changes: Mapping[str, Replacement]) -> None:
    """Write a file with some tensors replaced; raises OSError."""
    placed, offset = {}, 0
    by_place = sorted(header.tensors, key=lambda each: each.offset)
    for each in by_place:
        change = changes.get(each.name)
        size = n_bytes_of(each) if change is None else len(change.data)
        placed[each.name] = (each.type if change is None else change.type, offset)
        offset += _padded(size, header.alignment)
    with header.path.open("rb") as source, target.open("wb") as file:
        _copy(source, file, 0, header.fields_end)
        for each in header.tensors:
            source.seek(each.start)
            file.write(source.read(each.end - each.start)[:-12])
            file.write(struct.pack("<IQ", *placed[each.name]))
        file.write(b"\0" * (header.data_start - file.tell()))
        for each in by_place:
            change = changes.get(each.name)
            if change is None:
                _copy(source, file, header.data_start + each.offset, n_bytes_of(each))
            else:
                file.write(change.data)
            file.write(b"\0" * (-(file.tell() - header.data_start) % header.alignment))


def check_replaced(header: Header, target: Path, changed: Collection[str]) -> Header:
    """Check that a file is another one but for some tensors, byte for byte; return its head.

    The library gguf reads it as well.

    Raises:
        NumericsError: when anything else differs.
    """
    from gguf import GGUFReader

    new = read_header(target)
    with header.path.open("rb") as before, target.open("rb") as after:
        if new.spans != header.spans or not _same(before, after, 0, 0, header.fields_end):
            raise _differs("a field")
        for old, entry in zip(header.tensors, new.tensors, strict=False):
            if (old.name, old.shape) != (entry.name, entry.shape):
                raise _differs(old.name)
            if old.name in changed:
                continue
            places = (header.data_start + old.offset, new.data_start + entry.offset)
            if old.type != entry.type or not _same(before, after, *places, n_bytes_of(old)):
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


def _padded(size: int, alignment: int) -> int:
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
