"""model.ffn."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..core.errors import LayerError, UnsupportedModelError
from .trace import (
    Call,
    Product,
    Slot,
    first_tensor,
    get_slot,
    products,
    recording,
    replacing,
    replacing_factors,
    with_first_tensor,
    with_slot,
)

Changes = Mapping[str, Callable[[Tensor], Tensor]]

Take: TypeAlias = Callable[[int, Tensor, Tensor | None], None]
"""Given the place of a bank, coefficients (n, d_ff), and the n tokens they are of, counted through (B, T), ascending; None: all of them."""


def tolerance(dtype: torch.dtype) -> float:
    """Relative difference that two ways of computing the same thing may show in this dtype."""
    return {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2e-2}.get(dtype, 1e-1)


def same(a: Tensor, b: Tensor, within: float | None = None) -> bool:
    """Whether two tensors agree relative to the larger one's greatest entry."""
    if a.shape != b.shape:
        return False
    within = tolerance(a.dtype) if within is None else within
    a, b = a.double(), b.double()
    scale = max(float(a.abs().max()), float(b.abs().max()), 1e-30)
    return bool(((a - b).abs().max() / scale) <= within)


# ── the linear maps ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def is_linear(module: nn.Module) -> bool:
    """Whether the module is one linear map whose orientation its type settles."""
    return isinstance(module, (nn.Linear, Conv1D))


@dataclass(frozen=True, eq=False)
class Matrix:
    """Where a matrix (out, in), or some of its rows, lies in a module; read anew each time, so it follows every change."""

    module: nn.Module
    name: str = "weight"
    transposed: bool = False
    expert: int | None = None
    rows: slice = field(default_factory=lambda: slice(None))

    def read(self) -> Tensor:
        """The matrix (out, in), or a vector for a bias: a view of the module's own storage."""
        stored = getattr(self.module, self.name).detach()
        assert isinstance(stored, Tensor)
        stored = stored if self.expert is None else stored[self.expert]
        return (stored.T if self.transposed else stored)[self.rows]

    def moved(self, places: Mapping[nn.Module, nn.Module]) -> Matrix:
        """The same matrix in another layer built alike."""
        return dataclasses.replace(self, module=places[self.module])


def linear_matrix(module: nn.Module) -> Matrix:
    """The weight of a linear: Conv1D keeps it the other way round."""
    return Matrix(module, transposed=isinstance(module, Conv1D))


# ── the feed-forward memory ─────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, eq=False, kw_only=True)
class Neurons:
    """A bank of d_ff neurons, each with a key it matches and a value it writes.

    layer  index of the decoder layer it belongs to
    """

    layer: int
    _weight: Matrix | None = field(repr=False)
    _bias: Matrix | None = field(repr=False)
    _gate: Matrix | None = field(repr=False)
    _up: Matrix | None = field(repr=False)

    def weight(self) -> Tensor:
        """The down-projection, (d_model, d_ff): a view onto the model's storage in either orientation."""
        return self._read(self._weight)

    @property
    def values(self) -> Tensor:
        """What each neuron writes: (d_ff, d_model), a view."""
        return self.weight().T

    @property
    def bias(self) -> Tensor | None:
        """What is written whatever the input: (d_model,), or None."""
        return None if self._bias is None else self._bias.read()

    @property
    def d_ff(self) -> int:
        """Number of neurons."""
        return self.weight().shape[1]

    @property
    def is_gated(self) -> bool:
        """Whether a neuron's coefficient is act(gate·x)·(up·x) rather than act(key·x)."""
        return self._gate is not None

    @property
    def keys(self) -> Tensor:
        """What each neuron matches: (d_ff, d_model). Raises UnsupportedModelError for gated neurons, whose keys are pairs."""
        if self.is_gated:
            raise UnsupportedModelError(
                f"layer {self.layer} is gated: a key is a pair; use .gate_keys and .up_keys"
            )
        return self._read(self._up)

    @property
    def gate_keys(self) -> Tensor:
        """The gate half of each key: (d_ff, d_model). Raises UnsupportedModelError when the neurons are not gated."""
        return self._half(self._gate)

    @property
    def up_keys(self) -> Tensor:
        """The up half of each key: (d_ff, d_model). Raises UnsupportedModelError when the neurons are not gated."""
        return self._half(self._up)

    def moved(self, layer: int, places: Mapping[nn.Module, nn.Module]) -> Neurons:
        """The same bank in another layer built alike."""
        weight, bias, gate, up = (
            None if m is None else m.moved(places)
            for m in (self._weight, self._bias, self._gate, self._up)
        )
        return Neurons(layer=layer, _weight=weight, _bias=bias, _gate=gate, _up=up)

    def _half(self, matrix: Matrix | None) -> Tensor:
        if not self.is_gated:
            raise UnsupportedModelError(f"layer {self.layer} is not gated; use .keys")
        return self._read(matrix)

    def _read(self, matrix: Matrix | None) -> Tensor:
        if matrix is None:
            raise UnsupportedModelError(
                f"layer {self.layer} has experts, each a memory of its own; use .experts[e], or .shared"
            )
        return matrix.read()


@dataclass(frozen=True, eq=False, kw_only=True)
class FeedForward(Neurons):
    """One layer's memory: one bank of neurons, or experts between which a router chooses.

    module         the part whose output is what the memory writes, (B, S, d_model)
    adds_directly  adding e to the module's output adds exactly e to the layer's output (not so with a norm or multiplier behind it)
    experts        the routed banks; empty for a plain memory
    shared         the bank that every token uses beside the routed ones, or None
    """

    module: nn.Module
    adds_directly: bool
    experts: tuple[Neurons, ...] = ()
    shared: Neurons | None = None
    _down: nn.Module | None = field(default=None, repr=False)
    _routed: Routed | None = field(default=None, repr=False)

    @property
    def down(self) -> nn.Module:
        """The linear whose input are the coefficients and whose weight is edited. Raises UnsupportedModelError for experts."""
        if self._down is None:
            raise UnsupportedModelError(
                f"layer {self.layer} routes each token to some of {self.n_experts} experts, so it has no single down-projection; "
                "choose a layer without experts, or read .experts"
            )
        return self._down

    @property
    def n_experts(self) -> int:
        """Number of routed experts; 0 for a plain memory."""
        return len(self.experts)

    @property
    def banks(self) -> tuple[Neurons, ...]:
        """Every bank of the layer: itself when plain, else its experts and then the shared bank, where there is one."""
        if not self.n_experts:
            return (self,)
        return self.experts if self.shared is None else (*self.experts, self.shared)

    def moved(self, layer: int, places: Mapping[nn.Module, nn.Module]) -> FeedForward:
        """The same memory in another layer built alike."""
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
        """Raises UnsupportedModelError unless the values, weighed by the coefficients, sum to what the down-projection put out."""
        written = call.input @ self.values + (0 if self.bias is None else self.bias)
        if not same(written, call.output):
            raise UnsupportedModelError(
                f"layer {self.layer}: the down-projection ({type(self.down).__name__}) puts out something else than its weight times its "
                "input; merge adapters into the weights, or load without them"
            )

    @contextmanager
    def scaled(self, factors: Mapping[int, Tensor]) -> Generator[None, None, None]:
        """While the block runs, the coefficients of the banks with these places in `banks` are multiplied by factors (d_ff,)."""
        routed = {place: factor for place, factor in factors.items() if place < self.n_experts}
        with ExitStack() as stack:
            if routed:
                assert self._routed is not None
                stack.enter_context(self._routed.scaled(routed))
            for place in factors.keys() - routed.keys():
                down = self.banks[place]._weight
                assert down is not None
                stack.enter_context(
                    replacing({down.module: partial(_times, factors[place])}, where="input")
                )
            yield

    @contextmanager
    def taking(self, take: Take) -> Generator[None, None, None]:
        """While the block runs, `take` is given the coefficients of each of the `banks` as the pass computes them, experts' unweighted."""
        with ExitStack() as stack:
            if self._routed is not None:
                stack.enter_context(self._routed.taking(take))
            for place, bank in enumerate(self.banks[self.n_experts :], self.n_experts):
                assert bank._weight is not None
                stack.enter_context(
                    replacing({bank._weight.module: partial(_taken, take, place)}, where="input")
                )
            yield

    def routing(self, run: Callable[[], Any]) -> Routing:
        """What the experts of this layer do with every token of one pass, which `run` makes. Raises LayerError without experts."""
        with recording(self.routing_parts()) as calls:
            run()
        return self.routing_of(calls)

    def routing_parts(self) -> dict[str, nn.Module]:
        """The modules whose calls `routing_of` needs. Raises LayerError without experts."""
        if self._routed is None:
            raise LayerError(
                f"layer {self.layer} has no experts; its coefficients are the input of its down-projection"
            )
        parts: dict[str, nn.Module] = {"block": self.module, "routed": self._routed.module}
        if self.shared is not None and self.shared._weight is not None:
            parts["shared"] = self.shared._weight.module
        return parts

    def routing_of(self, calls: Mapping[str, Sequence[Call]]) -> Routing:
        """What the experts did in a pass in which the calls of `routing_parts` were recorded."""
        assert self._routed is not None
        return self._routed.read(self, calls)


@dataclass(frozen=True, eq=False, kw_only=True)
class Routing:
    """Experts at work: the layer's memory writes, at token t,

        Σₖ weights[t, k] · (Σᵢ coefficients[t, k, i] · experts[e].values[i] + experts[e].bias),  e = experts[t, k]
        + shared_weight[t] · (the same sum over the shared bank)

    experts        (n_tokens, k) int64, which experts the router chose
    weights        (n_tokens, k)
    coefficients   (n_tokens, k, d_ff)
    shared         (n_tokens, d_ff of the shared bank), or None
    shared_weight  (n_tokens,), or None
    """

    experts: Tensor
    weights: Tensor
    coefficients: Tensor
    shared: Tensor | None
    shared_weight: Tensor | None

    def total(self, ffn: FeedForward) -> Tensor:
        """The sum above, computed from the banks: (n_tokens, d_model)."""
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


def _taken(take: Take, place: int, coefficients: Tensor) -> Tensor:
    take(
        place, coefficients.reshape(-1, coefficients.shape[-1]), None
    )  # some families flatten (B, T) themselves
    return coefficients


def _times(factor: Tensor, coefficients: Tensor) -> Tensor:
    return coefficients * factor.to(coefficients)


# ── experts ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, eq=False)
class Routed:
    """The module that holds all experts' weights, and how it is asked: hidden states, chosen experts, their weights."""

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
        """One expert on (n, d_model): its matrix products and its output."""
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
        """The call with other hidden states, chosen experts and weights."""
        for slot, value in ((self.hidden, hidden), (self.chosen, chosen), (self.weights, weights)):
            args, kwargs = with_slot(call, slot, value)
            call = Call(args=args, kwargs=kwargs, result=None)
        return call

    @property
    def expert_at(self) -> dict[int, int]:
        """Which expert's down-projection begins where in the parameter's storage."""
        stored = getattr(self.module, self.down)
        return {int(stored[expert].storage_offset()): expert for expert in range(len(stored))}

    @property
    def forward(self) -> Callable[..., Any]:
        """The class's own forward, which takes the experts one by one: below any fast grouped kernel that is put over it."""
        forward: Callable[..., Any] = inspect.unwrap(type(self.module).forward)
        return forward

    def scaled(self, factors: Mapping[int, Tensor]) -> AbstractContextManager[None]:
        """A block in which the coefficients of some experts are multiplied by factors (d_ff,), gradients included."""
        expert_at = self.expert_at

        def change(coefficients: Tensor, offset: int) -> Tensor:
            expert = expert_at[offset]
            return _times(factors[expert], coefficients) if expert in factors else coefficients

        return replacing_factors({self.module: (self.down, self.forward, change)})

    def taking(self, take: Take) -> AbstractContextManager[None]:
        """A block in which the experts' coefficients are handed to `take`.

        The module is asked with each token once for every expert it is routed to, as if it were so many tokens with one expert each: an
        expert's coefficients then stand in the order of the tokens, in whatever order the module goes through what a token chose.
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
        """One expert's coefficients on (n, d_model): (n, d_ff)."""
        return next(
            p for p in reversed(self.one(expert, hidden, changes)[0]) if p.name == self.down
        ).left

    def read(self, ffn: FeedForward, calls: Mapping[str, Sequence[Call]]) -> Routing:
        """The routing of one recorded pass; see FeedForward.routing_of."""
        routed = calls["routed"][0]
        hidden, chosen, weights = (
            get_slot(routed, s) for s in (self.hidden, self.chosen, self.weights)
        )
        d_ff = ffn.experts[0].d_ff
        coefficients = hidden.new_zeros(*chosen.shape, d_ff)
        for expert in sorted(set(chosen.flatten().tolist())):
            if 0 <= expert < ffn.n_experts:  # an index past the end says: no expert
                token, place = (chosen == expert).nonzero(as_tuple=True)
                coefficients[token, place] = self.coefficients(expert, hidden[token])
        shared = shared_weight = None
        if "shared" in calls:
            assert ffn.shared is not None
            shared = calls["shared"][0].input.reshape(len(hidden), -1)
            written = calls["shared"][0].output.reshape(len(hidden), -1)
            rest = calls["block"][0].output.reshape(len(hidden), -1) - routed.output.reshape(
                len(hidden), -1
            )
            # The shared bank may be weighed by a gate of its own: what the block adds to the routed sum is a multiple of its output.
            shared_weight = (rest * written).sum(-1) / (written * written).sum(-1).clamp_min(1e-30)
        return Routing(
            experts=chosen,
            weights=weights,
            coefficients=coefficients,
            shared=shared,
            shared_weight=shared_weight,
        )
