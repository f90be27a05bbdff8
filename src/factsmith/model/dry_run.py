"""What a dry run of one layer shows: its parts, which of them mix positions, and its neurons.

    dry = Dry(layer, index, call, d_model, calls)                  # one recorded run of the layer
    parts = list(weighted_parts(layer, "", calls, hidden))         # its parts, and which mix
    bank = bank_of_linears(dry, linears)                           # keys and values, or None

Nothing is decided by a name. Inputs and outputs are changed, and the effect is compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import UnsupportedModelError
from .neurons import Matrix, Neurons, Rows, is_linear, linear_matrix, rows_of
from .tolerance import same, tolerance
from .trace import Call, Slot, first_tensor, recording, replacing, tensors, with_slot


def tensor_slots(call: Call) -> Iterator[tuple[Slot, Tensor]]:
    """Yield every tensor among a call's arguments, and where it is."""
    for index, value in enumerate(call.args):
        if isinstance(value, Tensor):
            yield index, value
    for name, value in call.kwargs.items():
        if isinstance(value, Tensor):
            yield name, value


@dataclass(frozen=True, eq=False)
class Part:
    """A part of a layer that holds weights.

    Attributes:
        name: Its path in the layer.
        module: The part.
        call: Its call in the dry run.
        mixes: Whether positions meet in it.
    """

    name: str
    module: nn.Module
    call: Call
    mixes: bool


@dataclass(frozen=True, eq=False)
class Dry:
    """A layer, its call in a dry run, and the calls of everything in it.

    Attributes:
        layer: The layer.
        index: Its index.
        call: Its call.
        d_model: Width of the hidden state.
        calls: The calls of its parts, by path.
    """

    layer: nn.Module
    index: int
    call: Call
    d_model: int
    calls: Mapping[str, list[Call]]

    def run(self) -> Any:
        """Run the layer again with the same arguments."""
        return self.layer(*self.call.args, **self.call.kwargs)

    def refuse(self, why: str) -> UnsupportedModelError:
        """Return the error for a layer that is not understood."""
        return UnsupportedModelError(f"layer {self.index} ({type(self.layer).__name__}): {why}")


def bank_of_linears(dry: Dry, ordered: list[nn.Module]) -> Neurons | None:
    """Return the neurons of linears in the order in which they run.

    None: they do not make up one bank.
    """
    if len(ordered) < 2:
        return None
    *readers, down = (linear_matrix(m) for m in ordered)
    d_out, d_ff = down.read().shape
    shapes = [tuple(m.read().shape) for m in readers]
    plain, pair, fused = [(d_ff, dry.d_model)], [(d_ff, dry.d_model)] * 2, [(2 * d_ff, dry.d_model)]
    if d_out != dry.d_model or shapes not in (plain, pair, fused):
        return None

    def coefficients(changes: Mapping[int, Callable[[Tensor], Tensor]]) -> Tensor:
        with (
            recording({"down": down.module}, stop=True) as calls,
            replacing({ordered[i]: f for i, f in changes.items()}),
        ):
            dry.run()
        return calls["down"][0].input.detach().double()

    gate, up = (None, readers[0]) if shapes == plain else gate_and_up(readers, d_ff, coefficients)
    bias = (
        Matrix(down.module, "bias")
        if isinstance(getattr(down.module, "bias", None), Tensor)
        else None
    )
    return Neurons(layer=dry.index, _weight=down, _bias=bias, _gate=gate, _up=up)


def gate_and_up(
    readers: Sequence[Matrix],
    d_ff: int,
    coefficients: Callable[[Mapping[int, Callable[[Tensor], Tensor]]], Tensor],
) -> tuple[Matrix, Matrix]:
    """Return which of two linears, or which half of a fused one, is the gate, then the other.

    The activation bends along the gate, and not along the up-projection.

    Args:
        readers: One or two matrices that read the hidden state.
        d_ff: Number of neurons.
        coefficients: Computes the coefficients while the outputs of some readers pass through
            functions.
    """
    halves: list[Rows]
    if len(readers) == 2:
        sources, halves = [0, 1], ["all", "all"]
    else:
        # Entry 1 of a fused projection belongs to neuron 1 if there are two halves, and to neuron 0
        # if gate and up alternate.
        moved = (
            (coefficients({0: lambda out: _bump(out, 1)}) - coefficients({}))
            .abs()
            .flatten(0, -2)
            .amax(0)
        )
        sources = [0, 0]
        halves = ["first", "second"] if int(moved.argmax()) == 1 else ["even", "odd"]
    bend = []
    for source, half in zip(sources, halves, strict=True):
        mid, plus, minus = (
            coefficients({source: _scaler(half, factor)}) for factor in (0.0, 1.0, -1.0)
        )
        bend.append(
            float(
                (plus + minus - 2 * mid).abs().max() / (plus - minus).abs().max().clamp_min(1e-30)
            )
        )
    first, second = (
        Matrix(readers[s].module, readers[s].name, readers[s].transposed, readers[s].expert, h)
        for s, h in zip(sources, halves, strict=True)
    )
    return (first, second) if bend[1] <= bend[0] else (second, first)


def _bump(out: Tensor, entry: int) -> Tensor:
    out = out.clone()
    out[..., entry] += 1
    return out


def _scaler(rows: Rows, factor: float) -> Callable[[Tensor], Tensor]:
    def scale(out: Tensor) -> Tensor:
        out = out.clone()
        out[..., rows_of(rows, out.shape[-1])] *= factor
        return out

    return scale


def contributor(part: Part, calls: Mapping[str, list[Call]]) -> nn.Module:
    """Return the module whose output is what a part contributes.

    It is the part itself, or its linear if the part also adds one of its inputs.
    """
    output = part.call.output
    inner: dict[str, nn.Module] = dict(part.module.named_modules(prefix=part.name))
    for name, module in inner.items():
        if (
            is_linear(module)
            and len(calls[name]) == 1
            and calls[name][0].output.numel() == output.numel()
        ):
            rest = output - calls[name][0].output.view_as(output)
            if any(same(rest, given) for _, given in tensor_slots(part.call)):
                return module
    return part.module


def weighted_parts(
    module: nn.Module, path: str, calls: Mapping[str, list[Call]], hidden: Tensor
) -> Iterator[Part]:
    """Yield the outermost parts of a layer that hold weights."""
    for name, child in module.named_children():
        name = f"{path}.{name}" if path else name
        if not any(p.dim() >= 2 for p in child.parameters()):
            continue
        if calls[name]:
            yield Part(name, child, calls[name][0], _mixes(child, calls[name][0], hidden))
        elif next(child.children(), None) is not None:
            yield from weighted_parts(child, name, calls, hidden)


def _mixes(module: nn.Module, call: Call, hidden: Tensor) -> bool:
    """Return whether a change of the input at all other positions changes the output at one."""
    batch, length = hidden.shape[:2]
    slots = [
        (s, t)
        for s, t in tensor_slots(call)
        if t.is_floating_point() and t.dim() >= 2 and t.numel() % (batch * length) == 0
    ]
    if not slots:
        return True
    slot, given = slots[0]

    def output(x: Tensor) -> Tensor | None:
        args, kwargs = with_slot(call, slot, x)
        results = tensors(module(*args, **kwargs))
        result = next((t for t in results if t.numel() % (batch * length) == 0), None)
        return None if result is None else result.reshape(batch, length, -1).clone()

    before = output(given)
    if before is None:
        return True
    # A sure attention head looks at one position only, so several positions are tried.
    for kept in range(length - 1, 0, -2):
        changed = torch.roll(given.reshape(batch, length, -1), 1, dims=1) * -1.5 + 0.5 * given.std()
        changed[:, kept] = given.reshape(batch, length, -1)[:, kept]
        after = output(changed.view_as(given))
        if after is None or not same(before[:, kept], after[:, kept]):
            return True
    return False


def linears_in_order(dry: Dry, roots: list[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    """Return the linears that run once inside the given modules, in the order they run."""
    names = {
        m: name
        for root, module in roots
        for name, m in module.named_modules(prefix=root)
        if is_linear(m) and len(dry.calls[name]) == 1
    }
    order: list[nn.Module] = []

    def note(module: nn.Module) -> Callable[[Tensor], Tensor]:
        def keep(output: Tensor) -> Tensor:
            order.append(module)
            return output

        return keep

    with replacing({m: note(m) for m in names}):
        dry.run()
    return [(names[m], m) for m in order]


def adds_unchanged(dry: Dry, module: nn.Module) -> bool:
    """Return whether what is added to the module's output arrives in the layer's output."""
    plain = first_tensor(dry.run()).double()
    extra = (
        torch.linspace(-1, 1, plain.shape[-1], dtype=plain.dtype, device=plain.device) * plain.std()
    )
    with replacing({module: lambda out: out + extra.to(out.dtype).to(out.device)}):
        moved = first_tensor(dry.run()).double() - plain
    # The median: in 16 bits the few huge entries of trained models lose what was added to them.
    error = (moved - extra).abs().median() / extra.abs().median()
    return float(error) < max(1e-3, min(0.03, tolerance(dry.call.output.dtype)))
