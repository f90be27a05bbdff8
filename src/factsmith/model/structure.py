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

# ── finding the layers ──────────────────────────────────────────────────────────────────────────────────────────────────────


def module_lists(module: nn.Module) -> dict[str, nn.ModuleList]:
    """Every ModuleList by its path, outermost first."""
    return {
        name: m for name, m in module.named_modules() if isinstance(m, nn.ModuleList) and len(m)
    }


def find_layers(
    module: nn.Module, expected: int | None, run: Callable[[], Any]
) -> tuple[tuple[nn.Module, ...], Slot, list[Call]]:
    """The decoder layers, where they take the hidden state, and their calls in one dry run.

    Layers are the members of the one ModuleList that ran once each, in order, every one on what the one before had put out.
    expected: the config's layer count, which decides when nested lists fit too. Raises UnsupportedModelError naming the candidates.
    """
    lists = module_lists(module)
    # Not copies: the very tensor that one layer puts out shows where the next takes it.
    with recording(
        {(name, i): m for name, members in lists.items() for i, m in enumerate(members)}, copy=False
    ) as calls:
        run()
    fitting: dict[str, tuple[Slot, list[Call]]] = {}
    for name, members in lists.items():
        own = [calls[name, i] for i in range(len(members))]
        if all(len(c) == 1 for c in own) and (slot := _chain([c[0] for c in own])) is not None:
            fitting[name] = (slot, [c[0] for c in own])
    if expected is not None and any(len(lists[name]) == expected for name in fitting):
        fitting = {name: found for name, found in fitting.items() if len(lists[name]) == expected}
    if len(fitting) != 1:
        seen = ", ".join(
            f"{name} ({len(members)} members)"
            for name, members in lists.items()
            if "." not in name.rpartition("layers")[2]
        )
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
        slots = [
            s for s, t in tensor_slots(calls[0]) if t.shape == out.shape and t.dtype == out.dtype
        ]
        return slots[0] if slots else None
    slot: Slot | None = None
    for before, after in itertools.pairwise(calls):
        given = list(tensor_slots(after))
        found = [s for s, t in given if t is before.output]
        found = found or [
            s for s, t in given if t.shape == before.output.shape and t.equal(before.output)
        ]
        if not found or (slot is not None and slot not in found):
            return None
        slot = found[0] if slot is None else slot
    first = dict(tensor_slots(calls[0]))
    return (
        slot
        if slot is not None and slot in first and first[slot].shape == calls[0].output.shape
        else None
    )


def build(layer: nn.Module) -> object:
    """How a layer is built: equal for layers whose parts have the same names, types and shapes."""
    return tuple(
        (name, type(m), tuple((n, p.shape) for n, p in m.named_parameters(recurse=False)))
        for name, m in layer.named_modules()
    )


def counterparts(layer: nn.Module, other: nn.Module) -> dict[nn.Module, nn.Module]:
    """Each part of one layer with the part of that name in another."""
    return dict(zip(layer.modules(), other.modules(), strict=True))


def find_feed_forward(
    layer: nn.Module, index: int, call: Call, slot: Slot
) -> tuple[FeedForward, nn.Module | None]:
    """The memory of one layer and the part where its positions meet (None when there is not exactly one).

    call: the layer's own call in a dry run without a cache. Raises UnsupportedModelError naming the candidates.
    """
    hidden = get_slot(call, slot)
    with recording({name: m for name, m in layer.named_modules() if name}) as calls:
        layer(*call.args, **call.kwargs)
    dry = Dry(layer, index, call, hidden.shape[-1], calls)
    parts = list(weighted_parts(layer, "", calls, hidden))
    mixers = [p for p in parts if p.mixes]
    writers = [p for p in parts if not p.mixes]
    if not writers:
        raise dry.refuse(
            "no part of it works on each position alone, so it has no feed-forward memory"
        )
    routed = [p for p in writers if any(q.dim() == 3 for q in p.module.parameters())]
    ffn = find_experts(dry, writers) if routed else _find_plain(dry, writers)
    return ffn, contributor(mixers[0], calls) if len(mixers) == 1 else None


def _find_plain(dry: Dry, writers: list[Part]) -> FeedForward:
    """A memory of one bank: plain linears that read the hidden state, then one that writes it."""
    found = linears_in_order(dry, [(p.name, p.module) for p in writers])
    names = ", ".join(name for name, _ in found) or "none"
    held = {id(q) for _, m in found for q in m.parameters()}
    loose = [
        n
        for p in writers
        for n, q in p.module.named_parameters(prefix=p.name)
        if q.dim() >= 2 and id(q) not in held
    ]
    if loose:
        raise dry.refuse(
            f"its position-wise parts hold weights that are not plain linears run once a pass: {', '.join(loose[:4])}"
        )
    bank = bank_of_linears(dry, [m for _, m in found])
    if bank is None:
        raise dry.refuse(
            f"its position-wise linears ({names}) are not one or two that read the hidden state and a last one that writes it"
        )
    down = found[-1][1]
    # Some parts take the residual stream along and add it themselves, or end in a norm; then the linear's own output is what is written.
    alone = len(writers) == 1 and same(
        writers[0].call.output.flatten(), dry.calls[found[-1][0]][0].output.flatten()
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
