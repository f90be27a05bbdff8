"""Find a model's layers and their memories by what they do.

    layers, slot, calls = find_layers(...)      # the modules whose outputs feed one another
    ffn, attention = find_feed_forward(...)     # the position-wise part of a layer, and the other
    ffn.values[i]                               # (d_model,) what neuron i writes
    ffn.keys[i]                                 # (d_model,) what neuron i reads

This is the one place that knows how models are built, and it knows no model by name. A part is
feed-forward if a change of its input at one position changes its output at that position only. Its
down-projection is the last linear in it. A gate differs from an up-projection because the
coefficients are affine in the latter. If the answer is not unique, an UnsupportedModelError names
the candidates.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from ..core.errors import UnsupportedModelError
from .dry_run import (
    Dry,
    Part,
    adds_unchanged,
    bank_of_linears,
    contributor,
    linears_in_order,
    tensor_slots,
    weighted_parts,
)
from .experts import find_experts
from .ffn import FeedForward
from .tolerance import same
from .trace import Call, Slot, get_slot, recording, tensors


def module_lists(module: nn.Module) -> dict[str, nn.ModuleList]:
    """Return every ModuleList by its path, outermost first."""
    return {
        name: m for name, m in module.named_modules() if isinstance(m, nn.ModuleList) and len(m)
    }


def find_layers(
    module: nn.Module, expected: int | None, run: Callable[[], Any]
) -> tuple[tuple[nn.Module, ...], Slot, list[Call]]:
    """Return the decoder layers, where they take the hidden state, and their calls in a dry run.

    Layers are the members of the one ModuleList that ran once each, in order, every one on the
    output of the one before.

    Args:
        module: The model.
        expected: The config's layer count. It decides if nested lists fit too.
        run: Runs the model.

    Raises:
        UnsupportedModelError: No list or several lists fit. The message names the candidates.
    """
    lists = module_lists(module)
    # No copies: the very tensor that one layer returns shows where the next takes it.
    with recording(
        {(name, i): m for name, members in lists.items() for i, m in enumerate(members)}, copy=False
    ) as calls:
        run()
    fitting: dict[str, tuple[Slot, list[Call]]] = {}
    for name, members in lists.items():
        ran = [calls[name, i] for i in range(len(members))]
        if all(len(c) == 1 for c in ran) and (slot := _chain([c[0] for c in ran])) is not None:
            fitting[name] = (slot, [c[0] for c in ran])
    if expected is not None and any(len(lists[name]) == expected for name in fitting):
        fitting = {name: fit for name, fit in fitting.items() if len(lists[name]) == expected}
    if len(fitting) != 1:
        seen = ", ".join(
            f"{name} ({len(members)} members)"
            for name, members in lists.items()
            if "." not in name.rpartition("layers")[2]
        )
        raise UnsupportedModelError(
            f"cannot tell the decoder layers of this model: {len(fitting)} of its module lists "
            f"pass a hidden state from member to member ({', '.join(fitting) or 'none'}); expected "
            f"exactly one. Its lists: {seen or 'none'}"
        )
    name, (slot, of_layers) = next(iter(fitting.items()))
    return tuple(lists[name]), slot, of_layers


def _chain(calls: Sequence[Call]) -> Slot | None:
    """Return the slot through which each member gets the output of the one before.

    None: there is no such slot.
    """
    for before in calls:
        if not any(t.dim() == 3 and t.is_floating_point() for t in tensors(before.result)):
            return None
    if len(calls) == 1:
        out = calls[0].output
        slots = [
            s for s, t in tensor_slots(calls[0]) if t.shape == out.shape and t.dtype == out.dtype
        ]
        return slots[0] if slots else None
    slot: Slot | None = None
    for before, after in itertools.pairwise(calls):
        given = list(tensor_slots(after))
        slots = [s for s, t in given if t is before.output] or [
            s for s, t in given if t.shape == before.output.shape and t.equal(before.output)
        ]
        if not slots or (slot is not None and slot not in slots):
            return None
        slot = slots[0] if slot is None else slot
    first = dict(tensor_slots(calls[0]))
    return (
        slot
        if slot is not None and slot in first and first[slot].shape == calls[0].output.shape
        else None
    )


def build(layer: nn.Module) -> object:
    """Return how a layer is built.

    It is equal for layers whose parts have the same names, types and shapes.
    """
    return tuple(
        (name, type(m), tuple((n, p.shape) for n, p in m.named_parameters(recurse=False)))
        for name, m in layer.named_modules()
    )


def counterparts(layer: nn.Module, other: nn.Module) -> dict[nn.Module, nn.Module]:
    """Return for each part of a layer the part of that name in another layer."""
    return dict(zip(layer.modules(), other.modules(), strict=True))


def find_feed_forward(
    layer: nn.Module, index: int, call: Call, slot: Slot
) -> tuple[FeedForward, nn.Module | None]:
    """Return the memory of one layer, and the part where its positions meet.

    Args:
        layer: The layer.
        index: Its index.
        call: Its own call in a dry run without a cache.
        slot: Where it takes the hidden state.

    Returns:
        The memory, and the other part; None if there is not exactly one.

    Raises:
        UnsupportedModelError: The layer is not understood. The message names the candidates.
    """
    hidden = get_slot(call, slot)
    with recording({name: m for name, m in layer.named_modules() if name}) as calls:
        layer(*call.args, **call.kwargs)
    dry = Dry(layer, index, call, hidden.shape[-1], calls)
    parts = list(weighted_parts(layer, "", calls, hidden))
    mixers = [p for p in parts if p.mixes]
    writers = [p for p in parts if not p.mixes]
    if not writers:
        raise dry.refuse("no part works on each position alone, so there is no feed-forward memory")
    routed = [p for p in writers if any(q.dim() == 3 for q in p.module.parameters())]
    ffn = find_experts(dry, writers) if routed else _find_plain(dry, writers)
    return ffn, contributor(mixers[0], calls) if len(mixers) == 1 else None


def _find_plain(dry: Dry, writers: list[Part]) -> FeedForward:
    """Return a memory of one bank: linears that read the hidden state, then one that writes."""
    linears = linears_in_order(dry, [(p.name, p.module) for p in writers])
    names = ", ".join(name for name, _ in linears) or "none"
    held = {id(q) for _, m in linears for q in m.parameters()}
    loose = [
        n
        for p in writers
        for n, q in p.module.named_parameters(prefix=p.name)
        if q.dim() >= 2 and id(q) not in held
    ]
    if loose:
        raise dry.refuse(
            "its position-wise parts hold weights that are not plain linears that run once in a "
            f"pass: {', '.join(loose[:4])}"
        )
    bank = bank_of_linears(dry, [m for _, m in linears])
    if bank is None:
        raise dry.refuse(
            f"its position-wise linears ({names}) are not one or two that read the hidden state "
            "and a last one that writes it"
        )
    path, down = linears[-1]
    # Some parts add the residual stream themselves, or end in a norm. Then the linear's own output
    # is what the memory writes.
    alone = len(writers) == 1 and same(
        writers[0].call.output.flatten(), dry.calls[path][0].output.flatten()
    )
    module = writers[0].module if alone else down
    return FeedForward(
        layer=dry.index,
        _weight=bank._weight,
        _bias=bank._bias,
        _gate=bank._gate,
        _up=bank._up,
        module=module,
        adds_directly=adds_unchanged(dry, module),
        _down=down,
    )
