"""Watch and change single matrix products, for weights that no module of their own multiplies with.

with products({"down": weight}) as seen:          # (n, in) @ (in, out), as they happen
    module(hidden)
seen[0].left, seen[0].right

with replacing_factors({module: ("down", forward, change)}):
    module(hidden)                                # change(left, offset) @ right
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ..core.errors import UnsupportedModelError
from .trace import Player, ending


@dataclass(frozen=True, kw_only=True)
class Product:
    """One matrix product with a watched parameter: out = left @ right (+ a bias).

    `right` is a view of the parameter's storage.
    """

    name: str
    left: Tensor
    right: Tensor


class _Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(
        self, parameters: Mapping[str, Tensor], changes: Mapping[str, Callable[[Tensor], Tensor]]
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names = {p.untyped_storage().data_ptr(): name for name, p in parameters.items()}
        self.changes = changes
        self.seen: list[Product] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            left, right = args[-2:]
            name = self.names.get(right.untyped_storage().data_ptr())
            if name is not None:
                self.seen.append(Product(name=name, left=left, right=right))
                out = self.changes[name](out) if name in self.changes else out
        return out


@contextmanager
def products(
    parameters: Mapping[str, Tensor],
    changes: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
) -> Generator[list[Product], None, None]:
    """Watch the matrix products with some parameters that no module of their own multiplies with.

    Args:
        parameters: The parameters, by name.
        changes: For a parameter's name, a function that the product passes through, (n, out) to
            (n, out).
    """
    with _Products(parameters, changes or {}) as watch:
        yield watch.seen


class _Factors(TorchFunctionMode):
    def __init__(self, changes: Mapping[int, Callable[[Tensor, int], Tensor]]) -> None:
        super().__init__()
        self.changes = changes
        self.seen = 0

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if (
            func in _PRODUCTS
            and len(args) >= 2
            and isinstance(args[0], Tensor)
            and isinstance(args[1], Tensor)
        ):
            left, right = args[:2]
            change = self.changes.get(right.untyped_storage().data_ptr())
            if change is not None:
                self.seen += 1
                args = (change(left, right.storage_offset()), *args[1:])
        return func(*args, **(kwargs or {}))


_PRODUCTS = {
    torch.nn.functional.linear,
    torch.matmul,
    torch.mm,
    Tensor.matmul,
    Tensor.mm,
    Tensor.__matmul__,
}


@contextmanager
def replacing_factors(
    changes: Mapping[nn.Module, tuple[str, Callable[..., Any], Callable[[Tensor, int], Tensor]]],
) -> Generator[None, None, None]:
    """Change what a module multiplies with pieces of one of its parameters.

    This is for parameters that no module of their own multiplies with. Unlike with `products`,
    gradients pass through the change. The effects of nested blocks add up.

    Args:
        changes: For each module three things: the parameter's name; the forward to run while the
            block runs, which takes the module first and multiplies piece by piece; and a function
            of the left factor (n, in) and of where in the parameter's storage the piece begins.
    """
    factors = _Factors(
        {
            getattr(m, name).untyped_storage().data_ptr(): change
            for m, (name, _, change) in changes.items()
        }
    )

    live = [True]

    def plays(module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def play(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            seen = factors.seen
            result = forward(module, *args, **kwargs)
            if factors.seen == seen:
                raise UnsupportedModelError(
                    f"a {type(module).__name__} does not multiply with its weights piece by piece, "
                    "so there is nothing to change"
                )
            return result

        return play

    with ending(live) as stack:
        for module, (_, forward, _) in changes.items():
            player = Player(module, "forward", plays(module, forward), live)
            stack.callback(player.put_back)
            player.stand_in()
        with factors:
            yield
