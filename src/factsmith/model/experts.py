"""Find the memory of a layer with experts, from what its parts do in a dry run.

    ffn = find_experts(dry, writers)        # one bank for each expert, and perhaps a shared one

The experts are kept in three-dimensional weights of one module. It is called with hidden states,
the chosen experts and their weights. Expert 0 runs alone, and its matrix products show its keys
and values.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn

from .dry_run import (
    Dry,
    Part,
    adds_unchanged,
    bank_of_linears,
    gate_and_up,
    linears_in_order,
    tensor_slots,
)
from .ffn import FeedForward
from .neurons import Matrix, Neurons, is_linear
from .products import Product
from .routed import Routed
from .tolerance import same
from .trace import get_slot


def find_experts(dry: Dry, writers: list[Part]) -> FeedForward:
    """Return a memory of routed experts, perhaps with a shared bank.

    Args:
        dry: The layer's dry run.
        writers: The parts of the layer in which positions do not meet.

    Raises:
        UnsupportedModelError: The layer is not understood, or its banks do not sum to its output.
    """
    if len(writers) != 1:
        raise dry.refuse(
            f"it has {len(writers)} position-wise parts, one with experts: "
            f"{', '.join(p.name for p in writers)}; expected that one alone"
        )
    block = writers[0]
    routed, seen = _routed(dry, block)
    first = _expert(dry, routed, seen)
    count = getattr(routed.module, routed.down).shape[0]
    ffn = FeedForward(
        layer=dry.index,
        _weight=None,
        _bias=None,
        _gate=None,
        _up=None,
        module=block.module,
        adds_directly=adds_unchanged(dry, block.module),
        experts=tuple(_of_expert(first, e) for e in range(count)),
        shared=_shared_bank(dry, block, routed.module),
        _routed=routed,
    )
    if not same(ffn.routing(dry.run).total(ffn), block.call.output.reshape(-1, dry.d_model)):
        raise dry.refuse(
            f"the sum over its experts is not the output of {block.name}, so they are not "
            "understood"
        )
    return ffn


def _routed(dry: Dry, block: Part) -> tuple[Routed, list[Product]]:
    """Return the module of a part that holds the experts, and the products of its first expert."""
    holders = [
        (name, m)
        for name, m in block.module.named_modules(prefix=block.name)
        if any(p.dim() == 3 for p in m.parameters(recurse=False))
    ]
    if len(holders) != 1 or len(dry.calls[holders[0][0]]) != 1:
        raise dry.refuse(
            f"its experts are in {len(holders)} modules ({', '.join(n for n, _ in holders)}); "
            "expected one module that runs once in a pass"
        )
    name, module = holders[0]
    call = dry.calls[name][0]
    given = list(tensor_slots(call))
    floats = [(s, t) for s, t in given if t.is_floating_point() and t.dim() == 2]
    chosen = [(s, t) for s, t in given if not t.is_floating_point() and t.dim() == 2]
    if (
        len(floats) != 2
        or len(chosen) != 1
        or floats[0][1].shape[-1] != dry.d_model
        or floats[1][1].shape != chosen[0][1].shape
    ):
        raise dry.refuse(
            f"the experts in {name} are called with other things than hidden states, chosen "
            "experts and their weights"
        )
    (hidden, states), (weights, _) = floats
    routed = Routed(module, "", hidden, chosen[0][0], weights, call)
    seen, _ = routed.one(0, states)
    if len(seen) not in (2, 3) or seen[-1].right.shape[1] != dry.d_model:
        raise dry.refuse(
            f"an expert in {name} makes {len(seen)} matrix products; expected two or three, of "
            "which the last writes the hidden state"
        )
    return dataclasses.replace(routed, down=seen[-1].name), seen


def _shared_bank(dry: Dry, block: Part, holder: nn.Module) -> Neurons | None:
    """Return the bank that is outside the module with the experts; None if there is none."""
    inside = set(holder.modules())
    banks = []
    for name, module in block.module.named_modules(prefix=block.name):
        if name == block.name or module in inside or not dry.calls[name]:
            continue
        bank = bank_of_linears(dry, [m for _, m in linears_in_order(dry, [(name, module)])])
        if bank is not None and not is_linear(module):
            banks.append(bank)
    if len(banks) > 1:
        raise dry.refuse(f"it has {len(banks)} shared memories and experts; expected at most one")
    return banks[0] if banks else None


def _of_expert(first: Neurons, expert: int) -> Neurons:
    """Return the bank of another expert. All are in the same parameters, one after another."""
    weight, bias, gate, up = (
        None if m is None else dataclasses.replace(m, expert=expert)
        for m in (first._weight, first._bias, first._gate, first._up)
    )
    return Neurons(layer=first.layer, _weight=weight, _bias=bias, _gate=gate, _up=up)


def _expert(dry: Dry, routed: Routed, seen: Sequence[Product]) -> Neurons:
    """Return the first expert's bank. Its orientation comes from the observed products."""
    expert, hidden = 0, get_slot(routed.example, routed.hidden)

    def matrix(product: Product) -> Matrix:
        stored = getattr(routed.module, product.name)[expert]
        return Matrix(
            routed.module, product.name, stored.stride() == product.right.stride(), expert
        )

    *reads, write = seen
    readers, down = [matrix(p) for p in reads], matrix(write)
    d_ff = write.right.shape[0]
    shapes = [tuple(m.read().shape) for m in readers]
    if shapes not in ([(d_ff, dry.d_model)], [(d_ff, dry.d_model)] * 2, [(2 * d_ff, dry.d_model)]):
        raise dry.refuse(
            f"its experts read the hidden state with matrices of shapes {shapes}; expected {d_ff} "
            "rows, twice as many, or two matrices"
        )

    def coefficients(changes: Mapping[int, Callable[[Tensor], Tensor]]) -> Tensor:
        return routed.coefficients(
            expert, hidden, {readers[i].name: f for i, f in changes.items()}
        ).double()

    gate, up = (
        (None, readers[0])
        if shapes == [(d_ff, dry.d_model)]
        else gate_and_up(readers, d_ff, coefficients)
    )
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
            raise dry.refuse("its experts add more than their values and one bias")
        bias = Matrix(routed.module, names[0], expert=expert)
    return Neurons(layer=dry.index, _weight=down, _bias=bias, _gate=gate, _up=up)
