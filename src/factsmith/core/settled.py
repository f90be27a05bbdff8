"""Compute under known switches of torch, whatever the caller has set.

    with settled(): ...            # no gradients
    with settled(grad=True): ...   # gradients

    @settled(grad=True)            # the same for a function
    def search(...): ...

Callers may be inside `torch.no_grad`, `torch.inference_mode` or `torch.autocast`, or have another
default device. Each of these changes the numbers or ends in an error of torch. Inside the block
none is in effect. Afterwards all are as before. The switches belong to the current thread.

The default dtype is shared by all threads, so it is left alone. Every tensor names its own dtype.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

_CPU = torch.device("cpu")
_KINDS = ("cpu", "cuda", "mps", "xpu")


@contextmanager
def settled(*, grad: bool = False) -> Generator[None, None, None]:
    """Compute with plain tensors, in the dtypes that the code names, on the devices it names.

    Args:
        grad: Whether gradients are recorded.
    """
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        for kind in _KINDS:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device() != _CPU:
            stack.enter_context(_CPU)
        stack.enter_context(torch.set_grad_enabled(grad))
        yield


def as_numbers(values: Any) -> Tensor:
    """Return an array of numbers as a tensor. Floats in a list become float32, as torch's default.

    Raises:
        TypeError, ValueError, RuntimeError: They are not numbers.
    """
    tensor = torch.as_tensor(values).detach()
    if tensor.is_floating_point() and not isinstance(values, (Tensor, np.ndarray)):
        tensor = torch.as_tensor(values, dtype=torch.float32)
    return tensor
