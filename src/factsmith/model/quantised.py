"""model.quantised."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.errors import UnsupportedModelError


def packed_format(module: Any) -> str | None:
    """How a model's weights are quantised; None when they are plain numbers."""
    if getattr(module, "is_quantized", False):  # transformers' own mark, taken away by `dequantize`
        return str(getattr(module, "quantization_method", "packed weights"))
    for part in module.modules():
        if type(part).__module__.startswith(
            "torch.ao.nn.quantized"
        ):  # keeps its weights where no parameter shows them
            return f"{type(part).__module__}.{type(part).__name__}"
        own = list(part.parameters(recurse=False))
        for weight in own:
            if weight.dim() >= 2 and (not weight.is_floating_point() or weight.element_size() < 2):
                return str(weight.dtype)
            if (
                type(weight.data).__torch_dispatch__ is not Tensor.__torch_dispatch__
            ):  # numbers in a format of its own
                return type(weight.data).__name__
        if not any(weight.dim() >= 2 for weight in own):
            for buffer in part.buffers(recurse=False):
                if (
                    buffer.dim() == 2
                    and min(buffer.shape) > 1
                    and buffer.dtype in (torch.int8, torch.uint8, torch.int32)
                ):
                    return str(buffer.dtype)
    return None


def quantised_error(name: str, how: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{name} is quantised ({how}): a change of its weights would be lost in rounding, so they can neither be read nor edited; load the "
        "checkpoint it was made from, in 16 or 32 bits, and quantise the edited model"
    )
