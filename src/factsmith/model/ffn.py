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

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..errors import LayerError, UnsupportedModelError
from .trace import Call, first_tensor, recording, replacing, tensors

Slot = int | str
"""Where a layer takes its hidden state: a positional index or a keyword."""


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
    return {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2}.get(dtype, 1e-1)


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


def oriented(module: nn.Module) -> Tensor:
    """The weight as (out, in), a view of the module's own storage: Conv1D keeps it the other way round."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.T if isinstance(module, Conv1D) else weight


# ── the feed-forward memory ─────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, eq=False)
class FeedForward:
    """One layer's memory: d_ff neurons, each with a key it matches and a value it writes.

    layer          index of the decoder layer
    module         the part whose output is what the memory writes, (B, S, d_model)
    down           the linear whose input are the coefficients and whose weight is edited
    adds_directly  adding e to the module's output adds exactly e to the layer's output (not so with a norm or multiplier behind it)
    """

    layer: int
    module: nn.Module
    down: nn.Module
    adds_directly: bool
    _gate: _Rows | None = field(repr=False)
    _up: _Rows | None = field(repr=False)

    def weight(self) -> Tensor:
        """The down-projection's weight, (d_model, d_ff): a view onto the model's storage in either orientation."""
        return oriented(self.down).detach()

    @property
    def values(self) -> Tensor:
        """What each neuron writes: (d_ff, d_model), a view."""
        return self.weight().T

    @property
    def bias(self) -> Tensor | None:
        """What is written whatever the input: (d_model,), or None."""
        bias = self.down.bias
        return bias.detach() if isinstance(bias, Tensor) else None

    @property
    def is_gated(self) -> bool:
        """Whether a neuron's coefficient is act(gate·x)·(up·x) rather than act(key·x)."""
        return self._gate is not None

    @property
    def keys(self) -> Tensor:
        """What each neuron matches: (d_ff, d_model). Raises UnsupportedModelError for a gated memory, whose keys are pairs."""
        if self.is_gated:
            raise UnsupportedModelError(f"layer {self.layer} is gated: a key is a pair; use .gate_keys and .up_keys")
        return self._rows(self._up)

    @property
    def gate_keys(self) -> Tensor:
        """The gate half of each key: (d_ff, d_model). Raises UnsupportedModelError when the memory is not gated."""
        if not self.is_gated:
            raise UnsupportedModelError(f"layer {self.layer} is not gated; use .keys")
        return self._rows(self._gate)

    @property
    def up_keys(self) -> Tensor:
        """The up half of each key: (d_ff, d_model). Raises UnsupportedModelError when the memory is not gated."""
        if not self.is_gated:
            raise UnsupportedModelError(f"layer {self.layer} is not gated; use .keys")
        return self._rows(self._up)

    @property
    def d_ff(self) -> int:
        """Number of neurons."""
        return self.weight().shape[1]

    @property
    def n_experts(self) -> int:
        """Number of routed experts; 0 for a plain memory."""
        return 0

    def _rows(self, rows: _Rows | None) -> Tensor:
        if rows is None:
            raise UnsupportedModelError(f"the keys of layer {self.layer} could not be told apart; only its values can be read")
        return rows.read()


@dataclass(frozen=True, eq=False)
class _Rows:
    """Rows of a linear map: all of them, or the half that a fused gate/up projection keeps for one of the two."""

    linear: nn.Module
    rows: slice = field(default_factory=lambda: slice(None))

    def read(self) -> Tensor:
        return oriented(self.linear).detach()[self.rows]


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
    with recording({(name, i): m for name, members in lists.items() for i, m in enumerate(members)}) as calls:
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
    for before, after in zip(calls, calls[1:], strict=False):
        found = [s for s, t in _slots(after) if t is before.output] or [
            s for s, t in _slots(after) if t.shape == before.output.shape and t.equal(before.output)
        ]
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


# ── finding the memory inside a layer ───────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, eq=False)
class _Part:
    name: str
    module: nn.Module
    call: Call
    mixes: bool


def find_feed_forward(layer: nn.Module, index: int, call: Call, slot: Slot) -> tuple[FeedForward, nn.Module | None]:
    """The memory of one layer and the part where its positions meet (None when there is not exactly one).

    call: the layer's own call in a dry run without a cache. Raises UnsupportedModelError naming the candidates.
    """
    d_model = get_slot(call, slot).shape[-1]
    with recording({name: m for name, m in layer.named_modules() if name}) as calls:
        layer(*call.args, **call.kwargs)
    parts = list(_parts(layer, "", calls, get_slot(call, slot)))
    mixers = [p for p in parts if p.mixes]
    writers = [p for p in parts if not p.mixes]
    linears = [(p.name, p.module, p.call) for p in writers if is_linear(p.module)]
    blocks = [p for p in writers if not is_linear(p.module)]
    if len(blocks) == 1 and not linears:
        part = blocks[0]
        inner = [(n, m, calls[n][0]) for n, m in part.module.named_modules(prefix=part.name) if is_linear(m) and len(calls[n]) == 1]
        ordered = _in_call_order(inner, lambda: layer(*call.args, **call.kwargs))
    elif not blocks and len(linears) >= 2:
        part = None
        ordered = _in_call_order(linears, lambda: layer(*call.args, **call.kwargs))
    else:
        names = ", ".join(f"{p.name} ({type(p.module).__name__})" for p in writers)
        raise UnsupportedModelError(
            f"layer {index} has {len(blocks)} position-wise blocks and {len(linears)} linears outside of them ({names or 'none'}); "
            "expected one feed-forward part that reads and writes the hidden state"
        )
    if len(ordered) < 2 or oriented(ordered[-1][1]).shape[0] != d_model:
        raise UnsupportedModelError(
            f"layer {index}: the feed-forward part {part.name if part else ''} has {len(ordered)} plain linears run once per pass "
            f"({', '.join(n for n, _, _ in ordered) or 'none'}); expected a last one that writes the {d_model} hidden dimensions"
        )
    down = ordered[-1][1]
    # Some parts take the residual stream along and add it themselves; then only the linear's output is what the memory writes.
    wrapped = part is not None and same(first_tensor(part.call.result), first_tensor(ordered[-1][2].result).view_as(part.call.output))
    module = part.module if part is not None and wrapped else down
    gate, up = _keys(layer, call, [m for _, m, _ in ordered[:-1] if oriented(m).shape[1] == d_model], down)
    ffn = FeedForward(index, module, down, _adds_directly(layer, call, module), gate, up)
    return ffn, _contributor(mixers[0], calls) if len(mixers) == 1 else None


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
        if not calls[name]:
            yield from _parts(child, name, calls, hidden)
        else:
            yield _Part(name, child, calls[name][0], _mixes(child, calls[name][0], hidden))


def _mixes(module: nn.Module, call: Call, hidden: Tensor) -> bool:
    """Whether changing the input at position 0 changes the output elsewhere."""
    batch, length = hidden.shape[:2]
    slots = [(s, t) for s, t in _slots(call) if t.is_floating_point() and t.dim() >= 2 and t.numel() % (batch * length) == 0]
    if not slots:
        return True
    slot, given = slots[0]
    changed = given.detach().clone()
    changed.view(batch, length, -1)[:, 0] += given.detach().float().std().to(given.dtype) * 2 + 1
    args, kwargs = with_slot(call, slot, changed)
    before, after = (
        next((t for t in tensors(r) if t.numel() % (batch * length) == 0), None) for r in (call.result, module(*args, **kwargs))
    )
    if before is None or after is None or before.shape != after.shape:
        return True
    return not same(before.reshape(batch, length, -1)[:, 1:], after.reshape(batch, length, -1)[:, 1:])


def _in_call_order(found: list[tuple[str, nn.Module, Call]], run: Callable[[], Any]) -> list[tuple[str, nn.Module, Call]]:
    order: list[nn.Module] = []

    def note(module: nn.Module) -> Callable[[Tensor], Tensor]:
        def keep(output: Tensor) -> Tensor:
            order.append(module)
            return output

        return keep

    with replacing({m: note(m) for _, m, _ in found}):
        run()
    return sorted(found, key=lambda item: order.index(item[1]))


def _keys(layer: nn.Module, call: Call, readers: list[nn.Module], down: nn.Module) -> tuple[_Rows | None, _Rows | None]:
    """(gate, up) rows of the linears that read the hidden state; gate is None for a plain memory, both for one we cannot tell."""
    d_ff = oriented(down).shape[1]
    widths = [oriented(m).shape[0] for m in readers]

    def coefficients(change: dict[nn.Module, Callable[[Tensor], Tensor]]) -> Tensor:
        with recording({"down": down}, stop=True) as calls, replacing(change):
            layer(*call.args, **call.kwargs)
        return calls["down"][0].input.detach().double()

    if widths == [d_ff]:
        return None, _Rows(readers[0])
    if widths == [d_ff, d_ff]:
        pair = [_Rows(m) for m in readers]
    elif widths == [2 * d_ff]:
        # Entry 1 of a fused projection belongs to neuron 1 when it is two halves, to neuron 0 when gate and up alternate.
        plain = coefficients({})
        moved = (coefficients({readers[0]: lambda out: _bump(out, 1)}) - plain).abs().flatten(0, -2).amax(0)
        if int(moved.argmax()) == 1:
            pair = [_Rows(readers[0], slice(0, d_ff)), _Rows(readers[0], slice(d_ff, None))]
        else:
            pair = [_Rows(readers[0], slice(0, None, 2)), _Rows(readers[0], slice(1, None, 2))]
    else:
        return None, None
    affine = []
    for rows in pair:
        mid, plus, minus = (coefficients({rows.linear: lambda out, r=rows.rows, f=f: _scale(out, r, f)}) for f in (0.0, 1.0, -1.0))
        affine.append(float((plus + minus - 2 * mid).abs().max() / (plus - minus).abs().max().clamp_min(1e-30)))
    # The activation bends along the gate and not along the up-projection.
    return (pair[0], pair[1]) if affine[1] <= affine[0] else (pair[1], pair[0])


def _bump(out: Tensor, entry: int) -> Tensor:
    out = out.clone()
    out[..., entry] += 1
    return out


def _scale(out: Tensor, rows: slice, factor: float) -> Tensor:
    out = out.clone()
    out[..., rows] *= factor
    return out


def _adds_directly(layer: nn.Module, call: Call, module: nn.Module) -> bool:
    """Whether what is added to the module's output arrives unchanged in the layer's output."""
    plain = first_tensor(layer(*call.args, **call.kwargs)).double()
    extra = torch.linspace(-1, 1, plain.shape[-1], dtype=plain.dtype, device=plain.device) * plain.std()
    with replacing({module: lambda out: out + extra.to(out.dtype).to(out.device)}):
        moved = first_tensor(layer(*call.args, **call.kwargs)).double() - plain
    return same(moved, extra.expand_as(moved), within=tolerance(call.output.dtype) * 10)


def check_layer(layer: int, n_layers: int) -> int:
    """A layer index in [0, n_layers); raises LayerError."""
    if not 0 <= layer < n_layers:
        raise LayerError(f"layer {layer} does not exist; this model has layers 0 to {n_layers - 1}")
    return layer
