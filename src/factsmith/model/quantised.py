"""Quantised models: recognized and refused, because rounding would lose an edit.

if (packed := packed_format(module)) is not None:
    raise quantised_error(name, packed)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.errors import UnsupportedModelError


def packed_format(module: Any) -> str | None:
    """Return how a model's weights are quantised; None if they are plain numbers."""
    if getattr(module, "is_quantized", False):  # transformers' own mark; `dequantize` removes it
        return str(getattr(module, "quantization_method", "packed weights"))
    for part in module.modules():
        if type(part).__module__.startswith("torch.ao.nn.quantized"):
            # Its weights are not parameters.
            return f"{type(part).__module__}.{type(part).__name__}"
        weights = list(part.parameters(recurse=False))
        for weight in weights:
            if weight.dim() >= 2 and (not weight.is_floating_point() or weight.element_size() < 2):
                return str(weight.dtype)
            if type(weight.data).__torch_dispatch__ is not Tensor.__torch_dispatch__:
                # A tensor subclass keeps numbers in its own format.
                return type(weight.data).__name__
        if not any(weight.dim() >= 2 for weight in weights):
            for buffer in part.buffers(recurse=False):
                if (
                    buffer.dim() == 2
                    and min(buffer.shape) > 1
                    and buffer.dtype in (torch.int8, torch.uint8, torch.int32)
                ):
                    return str(buffer.dtype)
    return None


def quantised_error(name: str, how: str) -> UnsupportedModelError:
    """Return the error for a model that is quantised in some format."""
    return UnsupportedModelError(
        f"{name} is quantised ({how}): rounding would lose a change of its weights, so they cannot "
        "be read or edited. Load the checkpoint it was made from, in 16 or 32 bits, and quantise "
        "the edited model"
    )
