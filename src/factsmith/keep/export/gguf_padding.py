"""Zeros in a tensor of a GGUF file, in the type that it has.

    change = Padding.of(entry, (576, 1600))              # 64 columns more
    write_padded(source, target, start, entry, change)
    is_padded(before, after, (start, other), entry, change)

A block of zero bytes holds zeros in every type of ggml: its scale is zero. That is asked of the
library gguf before anything is written. No number of the tensor is quantised again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from ...core.errors import UnsupportedModelError
from ...model.gguf_header import TensorEntry
from .gguf_types import block_of, dequantised, n_bytes_of_row, type_name

_ROWS = 1024


@dataclass(frozen=True)
class Padding:
    """Zeros at the end of each row of a tensor, or rows of zeros.

    Attributes:
        type: The number of the tensor's ggml type.
        shape: Its new shape in PyTorch's order.
        parts: In how many equal parts the rows lie, each of which gets rows of zeros at its end: 2
            if a gate and an up-projection lie in one tensor.
    """

    type: int
    shape: tuple[int, ...]
    parts: int = 1

    @classmethod
    def of(cls, entry: TensorEntry, shape: tuple[int, ...], parts: int = 1) -> Padding:
        """Return the padding of a tensor.

        Raises:
            UnsupportedModelError: when the library gguf cannot say what zeros are in this type.
        """
        try:
            block = block_of(entry.type)
            data = bytes(n_bytes_of_row(entry.type, block))
            is_zero = not dequantised(entry.type, data, (1, block)).any()
        except NotImplementedError:
            is_zero = False
        if not is_zero:
            raise UnsupportedModelError(
                f"{entry.name} is in {type_name(entry.type)}, in which the library gguf cannot "
                "write zeros. Export a checkpoint, and convert it with llama.cpp."
            )
        return cls(entry.type, shape, parts)


def _rows_of(entry: TensorEntry, padding: Padding) -> tuple[int, int, int, int]:
    """Return rows and bytes of a row, before and after; numbers by themselves are short rows."""
    if len(entry.shape) == 1:
        size = n_bytes_of_row(entry.type, 1)
        return entry.shape[0], size, padding.shape[0], size
    (rows, columns), (new_rows, new_columns) = entry.shape, padding.shape
    sizes = (n_bytes_of_row(entry.type, columns), n_bytes_of_row(entry.type, new_columns))
    return rows, sizes[0], new_rows, sizes[1]


def _blocks(rows: int, parts: int) -> Iterator[tuple[int, int]]:
    """Yield (how many rows to copy, 1 if a part ends after them), in order."""
    per_part = rows // parts
    for _ in range(parts):
        for start in range(0, per_part, _ROWS):
            n = min(_ROWS, per_part - start)
            yield n, int(start + n == per_part)


def write_padded(
    source: BinaryIO, target: BinaryIO, start: int, entry: TensorEntry, padding: Padding
) -> None:
    """Copy a tensor that begins at `start`, with zeros; raises OSError."""
    rows, size, new_rows, new_size = _rows_of(entry, padding)
    source.seek(start)
    for n, ends in _blocks(rows, padding.parts):
        copied = np.frombuffer(source.read(n * size), np.uint8).reshape(n, size)
        target.write(np.pad(copied, ((0, 0), (0, new_size - size))).tobytes())
        target.write(bytes(ends * (new_rows - rows) // padding.parts * new_size))


def is_padded(
    before: BinaryIO, after: BinaryIO, starts: tuple[int, int], entry: TensorEntry, padding: Padding
) -> bool:
    """Return whether a tensor is another one with zeros, byte for byte.

    Args:
        before: The file with the tensor.
        after: The file with the padded tensor.
        starts: Where it begins in each.
        entry: The tensor.
        padding: The zeros.
    """
    rows, size, new_rows, new_size = _rows_of(entry, padding)
    before.seek(starts[0])
    after.seek(starts[1])
    for n, ends in _blocks(rows, padding.parts):
        old = np.frombuffer(before.read(n * size), np.uint8).reshape(n, size)
        new = after.read(n * new_size)
        if len(new) < n * new_size:
            return False
        table = np.frombuffer(new, np.uint8).reshape(n, new_size)
        added = ends * (new_rows - rows) // padding.parts * new_size
        zeros = after.read(added)
        if not np.array_equal(table[:, :size], old) or table[:, size:].any():
            return False
        if len(zeros) < added or any(zeros):
            return False
    return True
