"""Make-believe devices: tensors that say they are on "cpu:1", "cpu:2" and so on.

    with devices():
        spread(module, {"model.embed_tokens": "cpu:1", "model.layers.0": "cpu:2"})

An operation on tensors of two devices is an error, as on accelerators: only numbers and indices may
come from the CPU. The numbers are on the CPU all the same.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

HOST = torch.device("cpu")
_MOVES = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}
_INDEXING = {
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_put.default,
    torch.ops.aten.index_put_.default,
}


class Placed(Tensor):
    """A tensor on a make-believe device; `held` has its numbers."""

    held: Tensor

    @staticmethod
    def __new__(cls, real: Tensor, device: torch.device) -> Placed:
        placed: Placed = Tensor._make_wrapper_subclass(
            cls,
            real.shape,
            real.stride(),
            real.storage_offset(),
            dtype=real.dtype,
            device=device,
            requires_grad=False,
        )
        placed.held = real
        return placed

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def tolist(self) -> Any:
        return self.held.tolist()

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Placed({self.held}, {self.device})"


def _flat(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _flat(value)


def _bare(value: Any) -> Any:
    if isinstance(value, Placed):
        return value.held
    return type(value)(map(_bare, value)) if isinstance(value, (list, tuple)) else value


def _dressed(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return Placed(value, device)
    return (
        type(value)(_dressed(x, device) for x in value)
        if isinstance(value, (list, tuple))
        else value
    )


def _place(tensor: Tensor) -> torch.device:
    return tensor.device if isinstance(tensor, Placed) else HOST


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    given = [*_flat(args), *_flat(kwargs.values())]
    if func in _INDEXING:  # indices may come from the host
        places = {_place(x) for x in _flat((args[0], *args[2:]))} | {
            _place(x) for x in _flat(args[1])
        } - {HOST}
    else:  # and so may a number
        places = {_place(x) for x in given if isinstance(x, Placed) or x.dim()}
    asked = kwargs.get("device")
    if func not in _MOVES and len(places) > 1:
        raise RuntimeError(
            f"{func}: expected all tensors on one device, found {sorted(map(str, places))}"
        )
    if func is torch.ops.aten.copy_.default:
        place = _place(args[0])
    elif asked is not None:
        place = HOST if torch.device(asked).index is None else torch.device(asked)
        kwargs = {**kwargs, "device": HOST}
    else:
        place = next(iter(places), HOST)
    out = func(*_bare(args), **{name: _bare(value) for name, value in kwargs.items()})
    if given and out is _bare(given[0]):  # changed in place
        return given[0]
    return out if place == HOST else _dressed(out, place)


class _Devices(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Written(TorchFunctionMode):
    """Handle `torch.tensor` of plain numbers, which does not reach the dispatch mode."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.tensor and kwargs.get("device") is not None:
            return func(*args, **{**kwargs, "device": None}).to(kwargs["device"])
        return func(*args, **kwargs)


@contextmanager
def devices() -> Generator[None, None, None]:
    """Open a block in which "cpu:1" and the like are devices."""
    with _Devices(), _Written():
        yield


def spread(module: Any, places: Mapping[str, str]) -> None:
    """Put the named parts of a model on devices; states move as with a `device_map`."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    placed: dict[int, nn.Parameter] = {}  # weights that are tied stay so
    for name, place in places.items():
        part, device = module.get_submodule(name), torch.device(place)
        for inner in part.modules():
            for key, weight in list(inner._parameters.items()):
                if weight is not None and not isinstance(weight, Placed):
                    new = placed.setdefault(
                        id(weight), nn.Parameter(Placed(weight.data, device), requires_grad=False)
                    )
                    inner._parameters[key] = new
            for key, buffer in list(inner._buffers.items()):
                if buffer is not None and not isinstance(buffer, Placed):
                    inner._buffers[key] = Placed(buffer, device)
        hook = AlignDevicesHook(execution_device=None)
        add_hook_to_module(part, hook)
        hook.execution_device = device  # only now: the hook would place the weights
