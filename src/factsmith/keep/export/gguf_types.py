"""The types of ggml: how many bytes numbers have in them, and what the bytes mean."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...model.gguf_header import TensorEntry


def dequantised(type: int, data: Any, shape: tuple[int, ...]) -> Tensor:
    """Return the numbers of a tensor as float32, from the bytes of its type."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

    kind = GGMLQuantizationType(type)
    block, n_bytes = GGML_QUANT_SIZES[kind]
    plain = {"F32": np.float32, "F16": np.float16}.get(kind.name)
    raw = np.frombuffer(bytes(data), np.uint8)
    rows = raw.view(plain) if plain is not None else raw.reshape(-1, shape[-1] // block * n_bytes)
    return torch.from_numpy(np.array(dequantize(rows, kind), np.float32)).reshape(shape)


def type_name(type: int) -> str:
    """Return the name of a type, such as "Q4_1"."""
    from gguf import GGMLQuantizationType

    return str(GGMLQuantizationType(type).name)


def block_of(type: int | str) -> int:
    """Return how many numbers a type takes at a time, by its number or its name."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    kind = GGMLQuantizationType[type] if isinstance(type, str) else GGMLQuantizationType(type)
    return int(GGML_QUANT_SIZES[kind][0])


def n_bytes_of_row(type: int, n: int) -> int:
    """Return how many bytes a row of n numbers has; n is a multiple of the type's block."""
    from gguf import GGML_QUANT_SIZES

    block, n_bytes = GGML_QUANT_SIZES[type]
    return int(n // block * n_bytes)


def n_bytes_of(entry: TensorEntry) -> int:
    """Return how many bytes the data of a tensor has."""
    return n_bytes_of_row(entry.type, entry.n_numbers)
