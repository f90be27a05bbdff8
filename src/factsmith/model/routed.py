"""The module that holds the weights of all experts of a layer, and how to run one of them.

    products, out = routed.one(2, hidden)         # the matrix products of expert 2, and its output
    routed.coefficients(2, hidden)                # (n, d_ff)
    with routed.scaled({2: factors}): ...         # its coefficients multiplied, in every pass
    with routed.taking(take): ...                 # take(2, coefficients, tokens), as a pass goes

Experts are kept in three-dimensional parameters, and no module of its own multiplies with one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from .products import Product, products, replacing_factors
from .trace import Call, Slot, first_tensor, get_slot, with_first_tensor, with_slot

Changes: TypeAlias = Mapping[str, Callable[[Tensor], Tensor]]
"""For the name of a parameter, a function that the products with it pass through."""

Take: TypeAlias = Callable[[int, Tensor, Tensor | None], None]
"""Called with the index of a bank, its coefficients (n, d_ff), and the n tokens they are of.

The tokens are counted through (B, T), ascending. None: all of them."""


def times(factor: Tensor, coefficients: Tensor) -> Tensor:
    """Return the coefficients times a factor, in their own dtype and device."""
    return coefficients * factor.to(coefficients)


@dataclass(frozen=True, eq=False)
class Routed:
    """The module that holds all experts' weights, and how it is called.

    Attributes:
        module: The module.
        down: The name of the parameter with the down-projections.
        hidden: Where it takes the hidden states.
        chosen: Where it takes the chosen experts.
        weights: Where it takes their weights.
        example: One call.
    """

    module: nn.Module
    down: str
    hidden: Slot
    chosen: Slot
    weights: Slot
    example: Call

    def one(
        self,
        expert: int,
        hidden: Tensor,
        changes: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
    ) -> tuple[list[Product], Tensor]:
        """Run one expert on (n, d_model); return its matrix products and its output."""
        chosen = torch.full(
            (len(hidden), 1),
            expert,
            dtype=get_slot(self.example, self.chosen).dtype,
            device=hidden.device,
        )
        weights = torch.ones(
            (len(hidden), 1), dtype=get_slot(self.example, self.weights).dtype, device=hidden.device
        )
        call = self.asked(self.example, hidden, chosen, weights)
        with (
            torch.no_grad(),
            products(dict(self.module.named_parameters(recurse=False)), changes) as seen,
        ):
            out = first_tensor(self.forward(self.module, *call.args, **call.kwargs))
        return list(seen), out

    def asked(self, call: Call, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Call:
        """Return the call with other hidden states, chosen experts and weights."""
        for slot, value in ((self.hidden, hidden), (self.chosen, chosen), (self.weights, weights)):
            args, kwargs = with_slot(call, slot, value)
            call = Call(args=args, kwargs=kwargs, result=None)
        return call

    @property
    def expert_at(self) -> dict[int, int]:
        """Which expert's down-projection begins at which offset of the parameter's storage."""
        stored = getattr(self.module, self.down)
        return {int(stored[expert].storage_offset()): expert for expert in range(len(stored))}

    @property
    def forward(self) -> Callable[..., Any]:
        """The class's own forward, which takes the experts one by one.

        A fast grouped kernel may be wrapped around it.
        """
        forward: Callable[..., Any] = inspect.unwrap(type(self.module).forward)
        return forward

    def scaled(self, factors: Mapping[int, Tensor]) -> AbstractContextManager[None]:
        """Return a block in which some experts' coefficients are multiplied by factors (d_ff,).

        Gradients pass through.
        """
        expert_at = self.expert_at

        def change(coefficients: Tensor, offset: int) -> Tensor:
            expert = expert_at[offset]
            return times(factors[expert], coefficients) if expert in factors else coefficients

        return replacing_factors({self.module: (self.down, self.forward, change)})

    def taking(self, take: Take) -> AbstractContextManager[None]:
        """Return a block in which `take` gets the experts' coefficients.

        The module runs each token once for every expert that the router chose, as if each were a
        token with one expert. So an expert's coefficients are in the order of the tokens, in
        whatever order the module goes through the experts of a token.
        """
        expert_at = self.expert_at
        given: list[Tensor] = []

        def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            call = Call(args=args, kwargs=kwargs, result=None)
            hidden, chosen, weights = (
                get_slot(call, s) for s in (self.hidden, self.chosen, self.weights)
            )
            given[:] = [chosen]
            call = self.asked(
                call,
                hidden.repeat_interleave(chosen.shape[1], 0),
                chosen.reshape(-1, 1),
                weights.reshape(-1, 1),
            )
            result = self.forward(module, *call.args, **call.kwargs)
            return with_first_tensor(result, first_tensor(result).view(*chosen.shape, -1).sum(1))

        def keep(coefficients: Tensor, offset: int) -> Tensor:
            expert = expert_at[offset]
            take(expert, coefficients, (given[0] == expert).nonzero()[:, 0])
            return coefficients

        return replacing_factors({self.module: (self.down, forward, keep)})

    def coefficients(self, expert: int, hidden: Tensor, changes: Changes | None = None) -> Tensor:
        """Return one expert's coefficients on (n, d_model): (n, d_ff)."""
        return next(
            p for p in reversed(self.one(expert, hidden, changes)[0]) if p.name == self.down
        ).left

    def read(self, call: Call, n_experts: int, d_ff: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return what the experts did in one call, whose experts are computed again one by one.

        Returns:
            The chosen experts (n_tokens, k), their weights (n_tokens, k), and their coefficients
            (n_tokens, k, d_ff).
        """
        hidden, chosen, weights = (
            get_slot(call, s) for s in (self.hidden, self.chosen, self.weights)
        )
        coefficients = hidden.new_zeros(*chosen.shape, d_ff)
        for expert in sorted(set(chosen.flatten().tolist())):
            if 0 <= expert < n_experts:  # an index past the end means no expert
                token, place = (chosen == expert).nonzero(as_tuple=True)
                coefficients[token, place] = self.coefficients(expert, hidden[token])
        return chosen, weights, coefficients
