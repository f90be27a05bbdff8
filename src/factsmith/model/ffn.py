"""The memory of a layer: its keys, values and coefficients, whatever the family calls them.

    ffn = lm.ffn[3]
    ffn.values[i]                  # (d_model,) what neuron i writes
    ffn.keys[i]                    # (d_model,) what it reads; gate_keys and up_keys if gated
    ffn.experts[e].values          # a bank of a mixture of experts
    lm.routing(prompt, 3)          # which experts each token goes to, and their coefficients
    with ffn.scaled({0: factors}): ...      # the coefficients of bank 0, multiplied
    with ffn.taking(take): ...              # take(bank, coefficients, tokens), as a pass makes them

`structure` finds out which modules the memory is made of.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..core.errors import LayerError, UnsupportedModelError
from .neurons import Neurons
from .routed import Routed, Take, times
from .tolerance import same
from .trace import Call, recording, replacing


@dataclass(frozen=True, eq=False, kw_only=True)
class FeedForward(Neurons):
    """One layer's memory: one bank of neurons, or experts that a router chooses from.

    Attributes:
        module: The part whose output is what the memory writes, (B, S, d_model).
        adds_directly: Whether adding e to the module's output adds exactly e to the layer's output.
            A norm or a multiplier after the module prevents that.
        experts: The routed banks; empty for a plain memory.
        shared: The bank that every token uses in addition to the routed ones, or None.
    """

    module: nn.Module
    adds_directly: bool
    experts: tuple[Neurons, ...] = ()
    shared: Neurons | None = None
    _down: nn.Module | None = field(default=None, repr=False)
    _routed: Routed | None = field(default=None, repr=False)

    @property
    def down(self) -> nn.Module:
        """The linear whose input is the coefficients and whose weight is edited.

        Raises:
            UnsupportedModelError: The layer has experts.
        """
        if self._down is None:
            raise UnsupportedModelError(
                f"layer {self.layer} has {self.n_experts} experts, so it has no single "
                "down-projection; choose a layer without experts, or read .experts"
            )
        return self._down

    @property
    def n_experts(self) -> int:
        """Number of routed experts; 0 for a plain memory."""
        return len(self.experts)

    @property
    def banks(self) -> tuple[Neurons, ...]:
        """Every bank of the layer.

        A plain memory is its only bank. A mixture has its experts, then the shared bank if there is
        one.
        """
        if not self.n_experts:
            return (self,)
        return self.experts if self.shared is None else (*self.experts, self.shared)

    def moved(self, layer: int, places: Mapping[nn.Module, nn.Module]) -> FeedForward:
        """Return the same memory in another layer that is built alike."""
        bank = super().moved(layer, places)
        return dataclasses.replace(
            self,
            **vars(bank),
            module=places[self.module],
            experts=tuple(e.moved(layer, places) for e in self.experts),
            shared=None if self.shared is None else self.shared.moved(layer, places),
            _down=None if self._down is None else places[self._down],
            _routed=None
            if self._routed is None
            else dataclasses.replace(self._routed, module=places[self._routed.module]),
        )

    def check_sum(self, call: Call) -> None:
        """Check that the values, weighed by the coefficients, sum to the down-projection's output.

        Args:
            call: A call of the down-projection.

        Raises:
            UnsupportedModelError: They do not.
        """
        written = call.input @ self.values + (0 if self.bias is None else self.bias)
        if not same(written, call.output):
            raise UnsupportedModelError(
                f"layer {self.layer}: the output of the down-projection "
                f"({type(self.down).__name__}) is not its weight times its input; merge adapters "
                "into the weights, or load the model without them"
            )

    @contextmanager
    def scaled(self, factors: Mapping[int, Tensor]) -> Generator[None, None, None]:
        """While the block runs, multiply the coefficients of some banks.

        Args:
            factors: For the index of a bank in `banks`, the factors (d_ff,).
        """
        routed = {place: factor for place, factor in factors.items() if place < self.n_experts}
        with ExitStack() as stack:
            if routed:
                assert self._routed is not None
                stack.enter_context(self._routed.scaled(routed))
            for place in factors.keys() - routed.keys():
                down = self.banks[place]._weight
                assert down is not None
                stack.enter_context(
                    replacing({down.module: partial(times, factors[place])}, where="input")
                )
            yield

    @contextmanager
    def taking(self, take: Take) -> Generator[None, None, None]:
        """While the block runs, give `take` each bank's coefficients as the pass computes them.

        Those of experts are not weighed by the router.
        """
        with ExitStack() as stack:
            if self._routed is not None:
                stack.enter_context(self._routed.taking(take))
            for place, bank in enumerate(self.banks[self.n_experts :], self.n_experts):
                assert bank._weight is not None
                stack.enter_context(
                    replacing({bank._weight.module: partial(_taken, take, place)}, where="input")
                )
            yield

    @contextmanager
    def entering(self, take: Callable[[Tensor], Any]) -> Generator[None, None, None]:
        """While the block runs, give `take` the network's input at each token, (n_tokens, d_model).

        Raises:
            UnsupportedModelError: The layer has experts.
        """
        self.down  # noqa: B018 - it refuses experts
        assert self._up is not None
        with replacing({self._up.module: partial(_seen, take)}, where="input"):
            yield

    def routing(self, run: Callable[[], Any]) -> Routing:
        """Return what the experts of this layer do with every token of one pass.

        Args:
            run: Makes the pass.

        Raises:
            LayerError: The layer has no experts.
        """
        with recording(self.routing_parts()) as calls:
            run()
        return self.routing_of(calls)

    def routing_parts(self) -> dict[str, nn.Module]:
        """Return the modules whose calls `routing_of` needs.

        Raises:
            LayerError: The layer has no experts.
        """
        if self._routed is None:
            raise LayerError(
                f"layer {self.layer} has no experts; use lm.coefficients, or choose a layer with "
                "experts"
            )
        parts: dict[str, nn.Module] = {"block": self.module, "routed": self._routed.module}
        if self.shared is not None and self.shared._weight is not None:
            parts["shared"] = self.shared._weight.module
        return parts

    def routing_of(self, calls: Mapping[str, Sequence[Call]]) -> Routing:
        """Return what the experts did in a pass.

        Args:
            calls: The recorded calls of `routing_parts`.
        """
        assert self._routed is not None
        routed = calls["routed"][0]
        d_ff = self.experts[0].d_ff
        chosen, weights, coefficients = self._routed.read(routed, self.n_experts, d_ff)
        shared = shared_weight = None
        if "shared" in calls:
            assert self.shared is not None
            n_tokens = len(chosen)
            shared = calls["shared"][0].input.reshape(n_tokens, -1)
            written = calls["shared"][0].output.reshape(n_tokens, -1)
            whole = calls["block"][0].output.reshape(n_tokens, -1)
            rest = whole - routed.output.reshape(n_tokens, -1)
            # The shared bank may have a gate: the block then adds a multiple of its output.
            shared_weight = (rest * written).sum(-1) / (written * written).sum(-1).clamp_min(1e-30)
        return Routing(
            experts=chosen,
            weights=weights,
            coefficients=coefficients,
            shared=shared,
            shared_weight=shared_weight,
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class Routing:
    """Experts at work. At token t the layer's memory writes

        Σₖ weights[t, k] · (Σᵢ coefficients[t, k, i] · experts[e].values[i] + experts[e].bias)
        + shared_weight[t] · (the same sum over the shared bank),        where e = experts[t, k]

    Attributes:
        experts: (n_tokens, k) int64, the experts that the router chose.
        weights: (n_tokens, k).
        coefficients: (n_tokens, k, d_ff).
        shared: (n_tokens, d_ff of the shared bank), or None.
        shared_weight: (n_tokens,), or None.
    """

    experts: Tensor
    weights: Tensor
    coefficients: Tensor
    shared: Tensor | None
    shared_weight: Tensor | None

    def total(self, ffn: FeedForward) -> Tensor:
        """Return the sum above, computed from the banks: (n_tokens, d_model)."""
        total = self.coefficients.new_zeros(len(self.experts), ffn.experts[0].values.shape[1])
        for expert, bank in enumerate(ffn.experts):
            token, place = (self.experts == expert).nonzero(as_tuple=True)
            written = self.coefficients[token, place] @ bank.values + (
                0 if bank.bias is None else bank.bias
            )
            total.index_add_(0, token, written * self.weights[token, place, None].to(total.dtype))
        if self.shared is not None and self.shared_weight is not None and ffn.shared is not None:
            written = self.shared @ ffn.shared.values + (
                0 if ffn.shared.bias is None else ffn.shared.bias
            )
            total += written * self.shared_weight[:, None]
        return total


def _seen(take: Callable[[Tensor], Any], states: Tensor) -> Tensor:
    take(states.reshape(-1, states.shape[-1]))
    return states


def _taken(take: Take, place: int, coefficients: Tensor) -> Tensor:
    # Some families flatten (B, T) themselves.
    take(place, coefficients.reshape(-1, coefficients.shape[-1]), None)
    return coefficients
