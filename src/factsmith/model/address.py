"""Addresses in a model: layers and neurons, checked before anything is computed.

    check_layer(3, lm.n_layers)           # 3, or a LayerError
    check_layers(None, lm.n_layers)       # [0, 1, ...]
    check_dense_layer(3, lm.ffn)          # 3, or an error if the layer is a mixture of experts
    find_neuron(lm.ffn, (3, 1201))        # (layer, bank, index)
    neuron_of("3 1201")                   # (3, 1201)

Numbers may be Python's, numpy's, or tensors of one element.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TypeAlias, cast

from ..core.checks import check_items, whole_number
from ..core.errors import InputError, LayerError, UnsupportedModelError
from .ffn import FeedForward

Neuron: TypeAlias = tuple[int, int] | tuple[int, int, int]
"""(layer, i), or (layer, expert, i) in a layer with experts.

expert == n_experts names the shared bank."""


def check_layer(layer: object, n_layers: int) -> int:
    """Return the layer as an int in [0, n_layers).

    Raises:
        LayerError: The model has no such layer.
    """
    number = whole_number(layer)
    if number is None or not 0 <= number < n_layers:
        raise LayerError(
            f"layer {layer!r} does not exist; this model has layers 0 to {n_layers - 1}",
            argument="layer",
        )
    return number


def check_layers(layers: Iterable[int] | None, n_layers: int) -> list[int]:
    """Return the layers as ints, in the order given. None: every layer.

    Raises:
        LayerError: The model has no such layer.
        InputError: `layers` is not a list of numbers, or is empty.
    """
    if layers is None:
        return list(range(n_layers))
    items = check_items(layers, "layers", "layer numbers, such as [3, 4]")
    if not items:
        raise InputError("layers is empty; give at least one layer, such as [3]")
    return [check_layer(layer, n_layers) for layer in items]


def check_dense(ffn: Sequence[FeedForward]) -> None:
    """Check that a model has a layer without experts.

    Raises:
        UnsupportedModelError: Every layer is a mixture of experts.
    """
    if all(memory.n_experts for memory in ffn):
        raise UnsupportedModelError(
            "every layer of this model is a mixture of experts, without one down-projection that "
            "every token uses; take a model without experts"
        )


def check_dense_layer(layer: object, ffn: Sequence[FeedForward]) -> int:
    """Return the layer as an int in [0, n_layers), if it is one dense memory.

    Raises:
        LayerError: The model has no such layer.
        UnsupportedModelError: The layer is a mixture of experts.
    """
    number = check_layer(layer, len(ffn))
    check_dense(ffn)
    if experts := ffn[number].n_experts:
        dense = [memory.layer for memory in ffn if not memory.n_experts]
        raise UnsupportedModelError(
            f"layer {number} is a mixture of {experts} experts, without one down-projection that "
            f"every token uses; choose among layers {dense}"
        )
    return number


def neuron_numbers(neuron: object) -> tuple[int, ...]:
    """Return the two or three whole numbers of a neuron's address as ints.

    Args:
        neuron: A tuple, a list, or the row of an array or tensor.

    Raises:
        LayerError: It is anything else.
    """
    is_row = isinstance(neuron, (tuple, list)) or getattr(neuron, "ndim", 0) == 1
    items = list(cast("Iterable[object]", neuron)) if is_row else []
    numbers = tuple(n for n in map(whole_number, items) if n is not None)
    if len(numbers) not in (2, 3) or len(numbers) != len(items):
        raise LayerError(
            f"{neuron!r} is not a neuron; give (layer, i), or (layer, expert, i) in a layer with "
            "experts, as whole numbers"
        )
    return numbers


def find_neuron(ffn: Sequence[FeedForward], neuron: Neuron) -> tuple[int, int, int]:
    """Return (layer, bank, i) of a neuron, where bank is an index into `ffn[layer].banks`.

    Args:
        ffn: Every layer's memory.
        neuron: Its address, as `neuron_numbers` takes it.

    Raises:
        LayerError: The model has no such neuron.
    """
    address = neuron_numbers(neuron)
    layer, *bank, i = address
    memory = ffn[check_layer(layer, len(ffn))]
    if bool(bank) != bool(memory.n_experts):
        if memory.n_experts:
            have, form = f"{memory.n_experts} experts", "(layer, expert, i)"
        else:
            have, form = "no experts", "(layer, i)"
        raise LayerError(f"neuron {address}: layer {layer} has {have}; write it as {form}")
    place = bank[0] if bank else 0
    if not 0 <= place < len(memory.banks):
        shared = memory.shared is not None
        more = f" and a shared bank, number {memory.n_experts}" if shared else ""
        raise LayerError(
            f"neuron {address}: expert {place} does not exist; layer {layer} has experts 0 to "
            f"{memory.n_experts - 1}{more}"
        )
    d_ff = memory.banks[place].d_ff
    if not 0 <= i < d_ff:
        raise LayerError(
            f"neuron {address}: index {i} does not exist; this bank has neurons 0 to {d_ff - 1}"
        )
    return layer, place, i


def find_neurons(
    ffn: Sequence[FeedForward], neurons: Iterable[Neuron]
) -> list[tuple[int, int, int]]:
    """Return `find_neuron` of each, every neuron once, in the order given.

    Raises:
        LayerError: The model has no such neuron.
        InputError: `neurons` is not a list.
    """
    items = check_items(neurons, "neurons", "(layer, i) or (layer, expert, i)")
    return list(dict.fromkeys(find_neuron(ffn, neuron) for neuron in items))


def neuron_of(text: str) -> Neuron:
    """Return the neuron that a text such as "5 992", "5:992" or "(5, 992)" names.

    Raises:
        InputError: The text is no neuron.
    """
    numbers = tuple(map(int, re.findall(r"[0-9]+", text)[:4]))
    if not re.fullmatch(r"[\s\d,:.()\[\]-]*", text) or "-" in text or len(numbers) not in (2, 3):
        raise InputError(
            f"{text[:40]!r} is not a neuron; give its layer and number, such as 5 992, or its "
            "layer, expert and number",
            argument="neuron",
        )
    return numbers if len(numbers) == 2 else (numbers[0], numbers[1], numbers[2])
