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

from contextlib import AbstractContextManager, ContextDecorator
from typing import Any

import numpy as np
import torch
from torch import Tensor

_CPU = torch.device("cpu")
_KINDS = ("cpu", "cuda", "mps", "xpu")


class Settled(ContextDecorator):
    """A block or a function under known switches. See `settled`.

    It is no generator: a Ctrl-C between two lines of contextlib would leave the switches as they
    are inside the block.
    """

    def __init__(self, grad: bool) -> None:
        self.grad = grad
        self._before = True
        self._entered: list[AbstractContextManager[Any]] = []

    def _recreate_cm(self) -> Settled:
        """Return a block of its own for each call of a decorated function."""
        return Settled(self.grad)

    def __enter__(self) -> None:
        self._before = torch.is_grad_enabled()
        if torch.is_inference_mode_enabled():
            self._enter(torch.inference_mode(False))
        for kind in _KINDS:
            if torch.is_autocast_enabled(kind):
                self._enter(torch.autocast(kind, enabled=False))
        if torch.get_default_device() != _CPU:
            self._enter(_CPU)
        torch.set_grad_enabled(self.grad)

    def __exit__(self, *_: object) -> None:
        torch.set_grad_enabled(self._before)
        while self._entered:
            self._entered.pop().__exit__(None, None, None)

    def _enter(self, switch: AbstractContextManager[Any]) -> None:
        switch.__enter__()
        self._entered.append(switch)


def settled(*, grad: bool = False) -> Settled:
    """Compute with plain tensors, in the dtypes that the code names, on the devices it names.

    Args:
        grad: Whether gradients are recorded.
    """
    return Settled(grad)


def as_numbers(values: Any) -> Tensor:
    """Return an array of numbers as a tensor. Floats in a list become float32, as torch's default.

    Raises:
        TypeError, ValueError, RuntimeError: They are not numbers.
    """
    tensor = torch.as_tensor(values).detach()
    if tensor.is_floating_point() and not isinstance(values, (Tensor, np.ndarray)):
        tensor = torch.as_tensor(values, dtype=torch.float32)
    return tensor
