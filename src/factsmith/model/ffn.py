"""The one place that knows how models are built: finds layers and feed-forward memories by what they do, settles orientation.

    layers, slot = find_layers(...)             # the modules whose outputs feed one another, in order
    ffn, attention = find_feed_forward(...)     # the position-wise part of one layer, and the part where positions meet
    ffn.values[i]                               # (d_model,) what neuron i writes
    ffn.keys[i]                                 # (d_model,) what neuron i reads (gate_keys / up_keys when gated)

No model is known by name. A part counts as feed-forward because a change of its input at one position changes its output at that
position only; its down-projection is the last linear in it; a gate is told from an up-projection because the coefficients are
affine in the latter. Where the answer is not unique an UnsupportedModelError names the candidates.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..checks import check_items, whole_number
from ..errors import LayerError, UnsupportedModelError
from .trace import Call, Product, first_tensor, products, recording, replacing, replacing_factors, tensors, with_first_tensor

Changes = Mapping[str, Callable[[Tensor], Tensor]]
Slot = int | str
"""Where a layer takes its hidden state: a positional index or a keyword."""

Neuron: TypeAlias = tuple[int, int] | tuple[int, int, int]
"""(layer, i), or (layer, expert, i) in a layer with experts, where expert == n_experts is the shared bank."""

Take: TypeAlias = Callable[[int, Tensor, Tensor | None], None]
"""Given the place of a bank, coefficients (n, d_ff), and the n tokens they are of, counted through (B, T), ascending; None: all of them."""


def get_slot(call: Call, slot: Slot) -> Tensor:
    """The hidden state (B, S, d_model) a layer was called with."""
    value = call.args[slot] if isinstance(slot, int) else call.kwargs[slot]
    assert isinstance(value, Tensor)
    return value


def with_slot(call: Call, slot: Slot, hidden: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The layer's arguments with another hidden state."""
    if isinstance(slot, int):
        return (*call.args[:slot], hidden, *call.args[slot + 1 :]), dict(call.kwargs)
    return call.args, {**call.kwargs, slot: hidden}


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
            raise UnsupportedModelError(f"layer {self.layer} is gated: a key is a pair; use .gate_keys and .up_keys")
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
        weight, bias, gate, up = (None if m is None else m.moved(places) for m in (self._weight, self._bias, self._gate, self._up))
        return Neurons(layer=layer, _weight=weight, _bias=bias, _gate=gate, _up=up)

    def _half(self, matrix: Matrix | None) -> Tensor:
        if not self.is_gated:
            raise UnsupportedModelError(f"layer {self.layer} is not gated; use .keys")
        return self._read(matrix)

    def _read(self, matrix: Matrix | None) -> Tensor:
        if matrix is None:
            raise UnsupportedModelError(f"layer {self.layer} has experts, each a memory of its own; use .experts[e], or .shared")
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
    _routed: _Routed | None = field(default=None, repr=False)

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
            _routed=None if self._routed is None else dataclasses.replace(self._routed, module=places[self._routed.module]),
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
                stack.enter_context(replacing({down.module: partial(_times, factors[place])}, where="input"))
            yield

    @contextmanager
    def taking(self, take: Take) -> Generator[None, None, None]:
        """While the block runs, `take` is given the coefficients of each of the `banks` as the pass computes them, experts' unweighted."""
        with ExitStack() as stack:
            if self._routed is not None:
                stack.enter_context(self._routed.taking(take))
            for place, bank in enumerate(self.banks[self.n_experts :], self.n_experts):
                assert bank._weight is not None
                stack.enter_context(replacing({bank._weight.module: partial(_taken, take, place)}, where="input"))
            yield

    def routing(self, run: Callable[[], Any]) -> Routing:
        """What the experts of this layer do with every token of one pass, which `run` makes. Raises LayerError without experts."""
        with recording(self.routing_parts()) as calls:
            run()
        return self.routing_of(calls)

    def routing_parts(self) -> dict[str, nn.Module]:
        """The modules whose calls `routing_of` needs. Raises LayerError without experts."""
        if self._routed is None:
            raise LayerError(f"layer {self.layer} has no experts; its coefficients are the input of its down-projection")
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
            written = self.coefficients[token, place] @ bank.values + (0 if bank.bias is None else bank.bias)
            total.index_add_(0, token, written * self.weights[token, place, None].to(total.dtype))
        if self.shared is not None and self.shared_weight is not None and ffn.shared is not None:
            written = self.shared @ ffn.shared.values + (0 if ffn.shared.bias is None else ffn.shared.bias)
            total += written * self.shared_weight[:, None]
        return total


def _taken(take: Take, place: int, coefficients: Tensor) -> Tensor:
    take(place, coefficients.reshape(-1, coefficients.shape[-1]), None)  # some families flatten (B, T) themselves
    return coefficients


def _times(factor: Tensor, coefficients: Tensor) -> Tensor:
    return coefficients * factor.to(coefficients)


# ── finding the layers ──────────────────────────────────────────────────────────────────────────────────────────────────────


def module_lists(module: nn.Module) -> dict[str, nn.ModuleList]:
    """Every ModuleList by its path, outermost first."""
    return {name: m for name, m in module.named_modules() if isinstance(m, nn.ModuleList) and len(m)}


def find_layers(module: nn.Module, expected: int | None, run: Callable[[], Any]) -> tuple[tuple[nn.Module, ...], Slot, list[Call]]:
    """The decoder layers, where they take the hidden state, and their calls in one dry run.

    Layers are the members of the one ModuleList that ran once each, in order, every one on what the one before had put out.
    expected: the config's layer count, which decides when nested lists fit too. Raises UnsupportedModelError naming the candidates.
    """
    lists = module_lists(module)
    # Not copies: the very tensor that one layer puts out shows where the next takes it.
    with recording({(name, i): m for name, members in lists.items() for i, m in enumerate(members)}, copy=False) as calls:
        run()
    fitting: dict[str, tuple[Slot, list[Call]]] = {}
    for name, members in lists.items():
        own = [calls[name, i] for i in range(len(members))]
        if all(len(c) == 1 for c in own) and (slot := _chain([c[0] for c in own])) is not None:
            fitting[name] = (slot, [c[0] for c in own])
    if expected is not None and any(len(lists[name]) == expected for name in fitting):
        fitting = {name: found for name, found in fitting.items() if len(lists[name]) == expected}
    if len(fitting) != 1:
        seen = ", ".join(f"{name} ({len(members)} members)" for name, members in lists.items() if "." not in name.rpartition("layers")[2])
        raise UnsupportedModelError(
            f"cannot tell the decoder layers of this model: {len(fitting)} of its module lists pass a hidden state from member to member "
            f"({', '.join(fitting) or 'none'}); expected exactly one. Its lists: {seen or 'none'}"
        )
    name, (slot, found) = next(iter(fitting.items()))
    return tuple(lists[name]), slot, found


def _chain(calls: Sequence[Call]) -> Slot | None:
    """The slot through which each member gets what the one before put out; None when there is no such slot."""
    for before in calls:
        if not any(t.dim() == 3 and t.is_floating_point() for t in tensors(before.result)):
            return None
    if len(calls) == 1:
        out = calls[0].output
        slots = [s for s, t in _slots(calls[0]) if t.shape == out.shape and t.dtype == out.dtype]
        return slots[0] if slots else None
    slot: Slot | None = None
    for before, after in itertools.pairwise(calls):
        given = list(_slots(after))
        found = [s for s, t in given if t is before.output]
        found = found or [s for s, t in given if t.shape == before.output.shape and t.equal(before.output)]
        if not found or (slot is not None and slot not in found):
            return None
        slot = found[0] if slot is None else slot
    first = dict(_slots(calls[0]))
    return slot if slot is not None and slot in first and first[slot].shape == calls[0].output.shape else None


def _slots(call: Call) -> Iterator[tuple[Slot, Tensor]]:
    for index, value in enumerate(call.args):
        if isinstance(value, Tensor):
            yield index, value
    for name, value in call.kwargs.items():
        if isinstance(value, Tensor):
            yield name, value


def build(layer: nn.Module) -> object:
    """How a layer is built: equal for layers whose parts have the same names, types and shapes."""
    return tuple((name, type(m), tuple((n, p.shape) for n, p in m.named_parameters(recurse=False))) for name, m in layer.named_modules())


def counterparts(layer: nn.Module, other: nn.Module) -> dict[nn.Module, nn.Module]:
    """Each part of one layer with the part of that name in another."""
    return dict(zip(layer.modules(), other.modules(), strict=True))


# ── finding the memory inside a layer ───────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, eq=False)
class _Part:
    name: str
    module: nn.Module
    call: Call
    mixes: bool


@dataclass(frozen=True, eq=False)
class _Dry:
    """A layer, its call in a dry run, and the calls of everything in it."""

    layer: nn.Module
    index: int
    call: Call
    d_model: int
    calls: Mapping[str, list[Call]]

    def run(self) -> Any:
        return self.layer(*self.call.args, **self.call.kwargs)

    def refuse(self, why: str) -> UnsupportedModelError:
        return UnsupportedModelError(f"layer {self.index} ({type(self.layer).__name__}): {why}")


def find_feed_forward(layer: nn.Module, index: int, call: Call, slot: Slot) -> tuple[FeedForward, nn.Module | None]:
    """The memory of one layer and the part where its positions meet (None when there is not exactly one).

    call: the layer's own call in a dry run without a cache. Raises UnsupportedModelError naming the candidates.
    """
    hidden = get_slot(call, slot)
    with recording({name: m for name, m in layer.named_modules() if name}) as calls:
        layer(*call.args, **call.kwargs)
    dry = _Dry(layer, index, call, hidden.shape[-1], calls)
    parts = list(_parts(layer, "", calls, hidden))
    mixers = [p for p in parts if p.mixes]
    writers = [p for p in parts if not p.mixes]
    if not writers:
        raise dry.refuse("no part of it works on each position alone, so it has no feed-forward memory")
    routed = [p for p in writers if any(q.dim() == 3 for q in p.module.parameters())]
    ffn = _find_experts(dry, writers) if routed else _find_plain(dry, writers)
    return ffn, _contributor(mixers[0], calls) if len(mixers) == 1 else None


def _find_plain(dry: _Dry, writers: list[_Part]) -> FeedForward:
    """A memory of one bank: plain linears that read the hidden state, then one that writes it."""
    found = _linears(dry, [(p.name, p.module) for p in writers])
    names = ", ".join(name for name, _ in found) or "none"
    held = {id(q) for _, m in found for q in m.parameters()}
    loose = [n for p in writers for n, q in p.module.named_parameters(prefix=p.name) if q.dim() >= 2 and id(q) not in held]
    if loose:
        raise dry.refuse(f"its position-wise parts hold weights that are not plain linears run once a pass: {', '.join(loose[:4])}")
    bank = _bank(dry, [m for _, m in found])
    if bank is None:
        raise dry.refuse(f"its position-wise linears ({names}) are not one or two that read the hidden state and a last one that writes it")
    down = found[-1][1]
    # Some parts take the residual stream along and add it themselves, or end in a norm; then the linear's own output is what is written.
    alone = len(writers) == 1 and same(writers[0].call.output.flatten(), dry.calls[found[-1][0]][0].output.flatten())
    module = writers[0].module if alone else down
    return FeedForward(
        layer=dry.index,
        _weight=bank._weight,
        _bias=bank._bias,
        _gate=bank._gate,
        _up=bank._up,
        module=module,
        adds_directly=_adds_directly(dry, module),
        _down=down,
    )


def _bank(dry: _Dry, ordered: list[nn.Module]) -> Neurons | None:
    """The neurons of linears in the order in which they run; None when they are not one bank."""
    if len(ordered) < 2:
        return None
    *readers, down = (linear_matrix(m) for m in ordered)
    d_out, d_ff = down.read().shape
    shapes = [tuple(m.read().shape) for m in readers]
    plain, pair, fused = [(d_ff, dry.d_model)], [(d_ff, dry.d_model)] * 2, [(2 * d_ff, dry.d_model)]
    if d_out != dry.d_model or shapes not in (plain, pair, fused):
        return None

    def coefficients(changes: Mapping[int, Callable[[Tensor], Tensor]]) -> Tensor:
        with recording({"down": down.module}, stop=True) as calls, replacing({ordered[i]: f for i, f in changes.items()}):
            dry.run()
        return calls["down"][0].input.detach().double()

    gate, up = (None, readers[0]) if shapes == plain else _gate_and_up(readers, d_ff, coefficients)
    bias = Matrix(down.module, "bias") if isinstance(getattr(down.module, "bias", None), Tensor) else None
    return Neurons(layer=dry.index, _weight=down, _bias=bias, _gate=gate, _up=up)


def _gate_and_up(
    readers: Sequence[Matrix], d_ff: int, coefficients: Callable[[Mapping[int, Callable[[Tensor], Tensor]]], Tensor]
) -> tuple[Matrix, Matrix]:
    """Which of two linears (or which half of a fused one) is the gate: the activation bends along the gate, not along the up-projection.

    coefficients: computes them with the outputs of some of the readers passed through functions.
    """
    if len(readers) == 2:
        sources, halves = [0, 1], [slice(None), slice(None)]
    else:
        # Entry 1 of a fused projection belongs to neuron 1 when it is two halves, to neuron 0 when gate and up alternate.
        moved = (coefficients({0: lambda out: _bump(out, 1)}) - coefficients({})).abs().flatten(0, -2).amax(0)
        sources = [0, 0]
        halves = [slice(0, d_ff), slice(d_ff, None)] if int(moved.argmax()) == 1 else [slice(0, None, 2), slice(1, None, 2)]
    bend = []
    for source, half in zip(sources, halves, strict=True):
        mid, plus, minus = (coefficients({source: _scaler(half, factor)}) for factor in (0.0, 1.0, -1.0))
        bend.append(float((plus + minus - 2 * mid).abs().max() / (plus - minus).abs().max().clamp_min(1e-30)))
    first, second = (
        Matrix(readers[s].module, readers[s].name, readers[s].transposed, readers[s].expert, h)
        for s, h in zip(sources, halves, strict=True)
    )
    return (first, second) if bend[1] <= bend[0] else (second, first)


def _bump(out: Tensor, entry: int) -> Tensor:
    out = out.clone()
    out[..., entry] += 1
    return out


def _scaler(rows: slice, factor: float) -> Callable[[Tensor], Tensor]:
    def scale(out: Tensor) -> Tensor:
        out = out.clone()
        out[..., rows] *= factor
        return out

    return scale


def _contributor(part: _Part, calls: Mapping[str, list[Call]]) -> nn.Module:
    """The module that puts out what a part contributes: the part itself, or its linear when the part also adds an input to it."""
    output = part.call.output
    inner: dict[str, nn.Module] = dict(part.module.named_modules(prefix=part.name))
    for name, module in inner.items():
        if is_linear(module) and len(calls[name]) == 1 and calls[name][0].output.numel() == output.numel():
            rest = output - calls[name][0].output.view_as(output)
            if any(same(rest, given) for _, given in _slots(part.call)):
                return module
    return part.module


def _parts(module: nn.Module, path: str, calls: Mapping[str, list[Call]], hidden: Tensor) -> Iterator[_Part]:
    """The outermost weighted parts of a layer, each with whether positions meet in it."""
    for name, child in module.named_children():
        name = f"{path}.{name}" if path else name
        if not any(p.dim() >= 2 for p in child.parameters()):
            continue
        if calls[name]:
            yield _Part(name, child, calls[name][0], _mixes(child, calls[name][0], hidden))
        elif next(child.children(), None) is not None:
            yield from _parts(child, name, calls, hidden)


def _mixes(module: nn.Module, call: Call, hidden: Tensor) -> bool:
    """Whether changing the input at all other positions changes the output at some position."""
    batch, length = hidden.shape[:2]
    slots = [(s, t) for s, t in _slots(call) if t.is_floating_point() and t.dim() >= 2 and t.numel() % (batch * length) == 0]
    if not slots:
        return True
    slot, given = slots[0]

    def output(x: Tensor) -> Tensor | None:
        args, kwargs = with_slot(call, slot, x)
        found = next((t for t in tensors(module(*args, **kwargs)) if t.numel() % (batch * length) == 0), None)
        return None if found is None else found.reshape(batch, length, -1).clone()

    before = output(given)
    if before is None:
        return True
    # An attention head that is sure of itself looks at one position only, so ask at several.
    for kept in range(length - 1, 0, -2):
        changed = torch.roll(given.reshape(batch, length, -1), 1, dims=1) * -1.5 + 0.5 * given.std()
        changed[:, kept] = given.reshape(batch, length, -1)[:, kept]
        after = output(changed.view_as(given))
        if after is None or not same(before[:, kept], after[:, kept]):
            return True
    return False


def _linears(dry: _Dry, roots: list[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    """The linears that run once inside the given modules, in the order in which they run."""
    found = {
        m: name for root, module in roots for name, m in module.named_modules(prefix=root) if is_linear(m) and len(dry.calls[name]) == 1
    }
    order: list[nn.Module] = []

    def note(module: nn.Module) -> Callable[[Tensor], Tensor]:
        def keep(output: Tensor) -> Tensor:
            order.append(module)
            return output

        return keep

    with replacing({m: note(m) for m in found}):
        dry.run()
    return [(found[m], m) for m in order]


def _adds_directly(dry: _Dry, module: nn.Module) -> bool:
    """Whether what is added to the module's output arrives unchanged in the layer's output."""
    plain = first_tensor(dry.run()).double()
    extra = torch.linspace(-1, 1, plain.shape[-1], dtype=plain.dtype, device=plain.device) * plain.std()
    with replacing({module: lambda out: out + extra.to(out.dtype).to(out.device)}):
        moved = first_tensor(dry.run()).double() - plain
    # The middle of the errors: in 16 bits the few huge entries that trained models carry lose what was added to them.
    error = (moved - extra).abs().median() / extra.abs().median()
    return float(error) < max(1e-3, min(0.03, tolerance(dry.call.output.dtype)))


# ── experts ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, eq=False)
class _Routed:
    """The module that holds all experts' weights, and how it is asked: hidden states, chosen experts, their weights."""

    module: nn.Module
    down: str
    hidden: Slot
    chosen: Slot
    weights: Slot
    example: Call

    def one(
        self, expert: int, hidden: Tensor, changes: Mapping[str, Callable[[Tensor], Tensor]] | None = None
    ) -> tuple[list[Product], Tensor]:
        """One expert on (n, d_model): its matrix products and its output."""
        chosen = torch.full((len(hidden), 1), expert, dtype=get_slot(self.example, self.chosen).dtype, device=hidden.device)
        weights = torch.ones((len(hidden), 1), dtype=get_slot(self.example, self.weights).dtype, device=hidden.device)
        call = self.asked(self.example, hidden, chosen, weights)
        with torch.no_grad(), products(dict(self.module.named_parameters(recurse=False)), changes) as seen:
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
            hidden, chosen, weights = (get_slot(call, s) for s in (self.hidden, self.chosen, self.weights))
            given[:] = [chosen]
            call = self.asked(call, hidden.repeat_interleave(chosen.shape[1], 0), chosen.reshape(-1, 1), weights.reshape(-1, 1))
            result = self.forward(module, *call.args, **call.kwargs)
            return with_first_tensor(result, first_tensor(result).view(*chosen.shape, -1).sum(1))

        def keep(coefficients: Tensor, offset: int) -> Tensor:
            expert = expert_at[offset]
            take(expert, coefficients, (given[0] == expert).nonzero()[:, 0])
            return coefficients

        return replacing_factors({self.module: (self.down, forward, keep)})

    def coefficients(self, expert: int, hidden: Tensor, changes: Changes | None = None) -> Tensor:
        """One expert's coefficients on (n, d_model): (n, d_ff)."""
        return next(p for p in reversed(self.one(expert, hidden, changes)[0]) if p.name == self.down).left

    def read(self, ffn: FeedForward, calls: Mapping[str, Sequence[Call]]) -> Routing:
        """The routing of one recorded pass; see FeedForward.routing_of."""
        routed = calls["routed"][0]
        hidden, chosen, weights = (get_slot(routed, s) for s in (self.hidden, self.chosen, self.weights))
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
            rest = calls["block"][0].output.reshape(len(hidden), -1) - routed.output.reshape(len(hidden), -1)
            # The shared bank may be weighed by a gate of its own: what the block adds to the routed sum is a multiple of its output.
            shared_weight = (rest * written).sum(-1) / (written * written).sum(-1).clamp_min(1e-30)
        return Routing(experts=chosen, weights=weights, coefficients=coefficients, shared=shared, shared_weight=shared_weight)


def _find_experts(dry: _Dry, writers: list[_Part]) -> FeedForward:
    """A memory of routed experts kept in three-dimensional weights, perhaps with a shared bank beside them."""
    if len(writers) != 1:
        raise dry.refuse(
            f"it has {len(writers)} position-wise parts, one with experts: {', '.join(p.name for p in writers)}; expected that one alone"
        )
    block = writers[0]
    holders = [
        (name, m) for name, m in block.module.named_modules(prefix=block.name) if any(p.dim() == 3 for p in m.parameters(recurse=False))
    ]
    if len(holders) != 1 or len(dry.calls[holders[0][0]]) != 1:
        raise dry.refuse(
            f"its experts lie in {len(holders)} modules ({', '.join(n for n, _ in holders)}); expected one that is run once a pass"
        )
    name, module = holders[0]
    call = dry.calls[name][0]
    given = list(_slots(call))
    floats = [(s, t) for s, t in given if t.is_floating_point() and t.dim() == 2]
    chosen = [(s, t) for s, t in given if not t.is_floating_point() and t.dim() == 2]
    if len(floats) != 2 or len(chosen) != 1 or floats[0][1].shape[-1] != dry.d_model or floats[1][1].shape != chosen[0][1].shape:
        raise dry.refuse(f"the experts in {name} are not asked with hidden states, chosen experts and their weights alone")
    hidden = floats[0][1]
    routed = _Routed(module, "", floats[0][0], chosen[0][0], floats[1][0], call)
    seen, _ = routed.one(0, hidden)
    if len(seen) not in (2, 3) or seen[-1].right.shape[1] != dry.d_model:
        raise dry.refuse(f"an expert in {name} makes {len(seen)} matrix products; expected two or three, the last writing the hidden state")
    routed = _Routed(module, seen[-1].name, floats[0][0], chosen[0][0], floats[1][0], call)
    count = getattr(module, routed.down).shape[0]
    first = _expert(dry, routed, seen, hidden)
    experts = tuple(_of_expert(first, e) for e in range(count))
    inside = set(module.modules())
    roots = [(n, m) for n, m in block.module.named_modules(prefix=block.name) if n != block.name and m not in inside and dry.calls[n]]
    shared = [bank for n, m in roots if (bank := _bank(dry, [x for _, x in _linears(dry, [(n, m)])])) is not None and not is_linear(m)]
    if len(shared) > 1:
        raise dry.refuse(f"{len(shared)} shared memories beside the experts; expected one at most")
    ffn = FeedForward(
        layer=dry.index,
        _weight=None,
        _bias=None,
        _gate=None,
        _up=None,
        module=block.module,
        adds_directly=_adds_directly(dry, block.module),
        experts=experts,
        shared=shared[0] if shared else None,
        _routed=routed,
    )
    if not same(ffn.routing(dry.run).total(ffn), block.call.output.reshape(-1, dry.d_model)):
        raise dry.refuse(f"the sum over its experts is not what {block.name} puts out, so they are not understood")
    return ffn


def _of_expert(first: Neurons, expert: int) -> Neurons:
    """The bank of another expert: all lie alike in the same parameters."""
    weight, bias, gate, up = (
        None if m is None else dataclasses.replace(m, expert=expert) for m in (first._weight, first._bias, first._gate, first._up)
    )
    return Neurons(layer=first.layer, _weight=weight, _bias=bias, _gate=gate, _up=up)


def _expert(dry: _Dry, routed: _Routed, seen: Sequence[Product], hidden: Tensor) -> Neurons:
    """The first expert's bank, its orientation taken from the products that were seen."""
    expert = 0

    def matrix(product: Product) -> Matrix:
        stored = getattr(routed.module, product.name)[expert]
        return Matrix(routed.module, product.name, stored.stride() == product.right.stride(), expert)

    *reads, write = seen
    readers, down = [matrix(p) for p in reads], matrix(write)
    d_ff = write.right.shape[0]
    shapes = [tuple(m.read().shape) for m in readers]
    if shapes not in ([(d_ff, dry.d_model)], [(d_ff, dry.d_model)] * 2, [(2 * d_ff, dry.d_model)]):
        raise dry.refuse(
            f"its experts read the hidden state with matrices of shapes {shapes}; expected {d_ff} rows, twice that, or two of them"
        )

    def coefficients(changes: Mapping[int, Callable[[Tensor], Tensor]]) -> Tensor:
        return routed.coefficients(expert, hidden, {readers[i].name: f for i, f in changes.items()}).double()

    gate, up = (None, readers[0]) if shapes == [(d_ff, dry.d_model)] else _gate_and_up(readers, d_ff, coefficients)
    written = routed.coefficients(expert, hidden) @ down.read().T
    rest = (routed.one(expert, hidden)[1] - written)[0]
    bias = None
    if not same(rest + written[0], written[0]):
        names = [
            n
            for n, p in routed.module.named_parameters(recurse=False)
            if p.dim() == 2 and p.shape[-1] == dry.d_model and same(p[expert], rest)
        ]
        if len(names) != 1:
            raise dry.refuse("its experts put out more than their values and one bias")
        bias = Matrix(routed.module, names[0], expert=expert)
    return Neurons(layer=dry.index, _weight=down, _bias=bias, _gate=gate, _up=up)


def check_layer(layer: int, n_layers: int) -> int:
    """A layer index in [0, n_layers); raises LayerError."""
    number = whole_number(layer)
    if number is None or not 0 <= number < n_layers:
        raise LayerError(f"layer {layer!r} does not exist; this model has layers 0 to {n_layers - 1}")
    return number


def find_neuron(ffn: Sequence[FeedForward], neuron: Neuron) -> tuple[int, int, int]:
    """(layer, bank, i) of a neuron, the bank an index into `ffn[layer].banks`; raises LayerError for one the model does not have.

    Its numbers may be numpy's, or it the row of an array or a tensor.
    """
    is_row = isinstance(neuron, (tuple, list)) or getattr(neuron, "ndim", 0) == 1
    numbers = [whole_number(n) for n in neuron] if is_row else []
    places = [n for n in numbers if n is not None]
    if len(places) not in (2, 3) or len(places) != len(numbers):
        raise LayerError(f"{neuron!r} is no neuron; expected (layer, i), or (layer, expert, i) in a layer with experts, as whole numbers")
    neuron = cast("Neuron", tuple(places))
    layer, *bank, i = neuron
    memory = ffn[check_layer(layer, len(ffn))]
    if bool(bank) != bool(memory.n_experts):
        have, give = (f"{memory.n_experts} experts", "(layer, expert, i)") if memory.n_experts else ("no experts", "(layer, i)")
        raise LayerError(f"neuron {tuple(neuron)}: layer {layer} has {have}; name its neurons {give}")
    place = bank[0] if bank else 0
    if not 0 <= place < len(memory.banks):
        shared = f" and a shared bank, number {memory.n_experts}" if memory.shared is not None else ""
        raise LayerError(
            f"neuron {tuple(neuron)}: expert {place} does not exist; layer {layer} has experts 0 to {memory.n_experts - 1}{shared}"
        )
    d_ff = memory.banks[place].d_ff
    if not 0 <= i < d_ff:
        raise LayerError(f"neuron {tuple(neuron)}: index {i} does not exist; its bank has neurons 0 to {d_ff - 1}")
    return layer, place, i


def find_neurons(ffn: Sequence[FeedForward], neurons: Iterable[Neuron]) -> list[tuple[int, int, int]]:
    """`find_neuron` of each, every one once, in the order given; raises InputError for what is no list."""
    given = check_items(neurons, "neurons", "a list of (layer, i), or of (layer, expert, i)")
    return list(dict.fromkeys(find_neuron(ffn, neuron) for neuron in given))
