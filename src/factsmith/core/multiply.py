"""Multiply by weights with the faster of torch's two libraries for float32 on a CPU.

    with quick_products(): ...     # every linear layer of a pass, and its gradient

    @quick_products()              # the same for a function
    def climb(...): ...

torch multiplies float32 matrices by MKL. On some processors oneDNN, which torch carries too, is
twice as fast: on AMD's with AVX-512, for example. Nothing says so beforehand. So the first block
of a process times both once, and checks oneDNN's numbers. The two differ in the last bits, as any
two orders of summation do. Where oneDNN is not clearly faster, the block changes nothing.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import ContextDecorator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_CLEARLY = 1.3
"""How many times as fast oneDNN must be. Noise in the timing does not reach that far."""

_ROWS = 8
"""Fewer rows are read faster than they are multiplied: then both libraries are equally fast."""

_ACCURACY = 1e-5
"""The largest error of a product that is accepted, as a share of its largest entry."""


class QuickProducts(ContextDecorator):
    """A block or a function that multiplies by weights the faster way. See `quick_products`."""

    def __init__(self) -> None:
        self._mode: TorchFunctionMode | None = None

    def _recreate_cm(self) -> QuickProducts:
        """Return a block of its own for each call of a decorated function."""
        return QuickProducts()

    def __enter__(self) -> None:
        if is_quicker(torch.get_num_threads()):
            self._mode = _ByOneDnn()
            self._mode.__enter__()  # type: ignore[no-untyped-call]
            _thread.blocks = _blocks() + 1

    def __exit__(self, *error: object) -> None:
        if self._mode is not None:
            _thread.blocks = _blocks() - 1
            self._mode.__exit__(*error)  # type: ignore[no-untyped-call]


def quick_products() -> QuickProducts:
    """Multiply by weights the faster way, in the current thread.

    Only float32 products on a CPU with weights that need no gradient of their own are changed.
    Gradients for what is multiplied are passed on.
    """
    return QuickProducts()


_thread = threading.local()
"""`blocks`: how many blocks of the current thread use oneDNN."""


def _blocks() -> int:
    return getattr(_thread, "blocks", 0)


def are_quick() -> bool:
    """Return whether linear layers in the current thread are sent to oneDNN."""
    return _blocks() > 0


@cache
def is_quicker(threads: int) -> bool:
    """Return whether oneDNN multiplies float32 matrices clearly faster on this processor.

    Args:
        threads: The number of threads that torch uses. Each number is timed once.
    """
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    numbers = torch.Generator().manual_seed(0)
    given = torch.randn(128, 512, generator=numbers)
    weight = torch.randn(1536, 512, generator=numbers)
    with torch.no_grad():
        exact = given.double() @ weight.double().T
        try:
            error = (_product(given, weight, None) - exact).abs().max() / exact.abs().max()
        except (AttributeError, NotImplementedError, RuntimeError):
            return False  # this build of torch does not have the operator
        if not float(error) <= _ACCURACY:
            return False
        usual = _fastest(lambda: torch.nn.functional.linear(given, weight))
        return usual > _CLEARLY * _fastest(lambda: _product(given, weight, None))


def _fastest(run: Callable[[], object]) -> float:
    """Return the least processor seconds of a few runs, after one to warm up."""
    run()
    seconds = []
    for _ in range(5):
        begun = time.process_time()
        run()
        seconds.append(time.process_time() - begun)
    return min(seconds)


def _product(given: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(..., in) and (out, in) to (..., out), by oneDNN."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(given, weight, bias, "none", [], "")
    return product


class _Linear(torch.autograd.Function):
    """The product with its gradient for what is multiplied. Weight and bias are constants."""

    @staticmethod
    def forward(ctx: Any, given: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return _product(given, weight, bias)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        slope = slopes[0]
        if torch.is_grad_enabled():  # a gradient of the gradient is asked for
            return slope @ weight, None, None
        return _product(slope.contiguous(), weight.t(), None), None, None


class _ByOneDnn(TorchFunctionMode):
    """Sends the products of linear layers to oneDNN."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if not kwargs:
            if func is torch.nn.functional.linear:
                given, weight, bias = (*args, None)[:3]
                if _fits(given, weight, bias):
                    return _multiplied(given, weight, bias)
            elif func is torch.addmm:  # Conv1D keeps its weight the other way round
                bias, given, weight = args
                if bias.dim() == 1 and given.dim() == 2 and _fits(given, weight, bias, 0):
                    return _multiplied(given, weight.t(), bias)
        return func(*args, **(kwargs or {}))


def _fits(given: Tensor, weight: Tensor, bias: Tensor | None, inputs: int = 1) -> bool:
    """Return whether a product is one that can go to oneDNN, and is worth it.

    A weight that is cut from a parameter, and a product under a dispatch mode, are left alone:
    `model/products.py` watches for them.

    Args:
        given: What is multiplied.
        weight: The weight.
        bias: The bias, or None.
        inputs: The dimension of the weight that meets the input.
    """
    constants = [weight] if bias is None else [weight, bias]
    return (
        type(weight) is nn.Parameter
        and weight.dim() == 2
        and given.dim() >= 2
        and given.numel() >= _ROWS * weight.shape[inputs]
        and all(_is_plain(x) for x in (given, *constants))
        and not (torch.is_grad_enabled() and any(x.requires_grad for x in constants))
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._len_torch_dispatch_stack()
    )


def _is_plain(tensor: Tensor) -> bool:
    """Return whether a tensor holds float32 numbers in the CPU's memory, and nothing more."""
    return (
        type(tensor) in (Tensor, nn.Parameter)  # others multiply in a way of their own
        and tensor.dtype == torch.float32
        and tensor.device.type == "cpu"
        and tensor.layout == torch.strided
    )


def _multiplied(given: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if torch.is_grad_enabled() and given.requires_grad:
        product: Tensor = _Linear.apply(given, weight, bias)  # type: ignore[no-untyped-call]
        return product
    return _product(given, weight, bias)
