"""model.address."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeAlias, cast

from ..core.checks import check_items, whole_number
from ..core.errors import LayerError
from .ffn import FeedForward

Neuron: TypeAlias = tuple[int, int] | tuple[int, int, int]
"""(layer, i), or (layer, expert, i) in a layer with experts, where expert == n_experts is the shared bank."""


def check_layer(layer: int, n_layers: int) -> int:
    """A layer index in [0, n_layers); raises LayerError."""
    number = whole_number(layer)
    if number is None or not 0 <= number < n_layers:
        raise LayerError(
            f"layer {layer!r} does not exist; this model has layers 0 to {n_layers - 1}"
        )
    return number


def find_neuron(ffn: Sequence[FeedForward], neuron: Neuron) -> tuple[int, int, int]:
    """(layer, bank, i) of a neuron, the bank an index into `ffn[layer].banks`; raises LayerError for one the model does not have.

    Its numbers may be numpy's, or it the row of an array or a tensor.
    """
    is_row = isinstance(neuron, (tuple, list)) or getattr(neuron, "ndim", 0) == 1
    numbers = [whole_number(n) for n in neuron] if is_row else []
    places = [n for n in numbers if n is not None]
    if len(places) not in (2, 3) or len(places) != len(numbers):
        raise LayerError(
            f"{neuron!r} is no neuron; expected (layer, i), or (layer, expert, i) in a layer with experts, as whole numbers"
        )
    neuron = cast("Neuron", tuple(places))
    layer, *bank, i = neuron
    memory = ffn[check_layer(layer, len(ffn))]
    if bool(bank) != bool(memory.n_experts):
        have, give = (
            (f"{memory.n_experts} experts", "(layer, expert, i)")
            if memory.n_experts
            else ("no experts", "(layer, i)")
        )
        raise LayerError(
            f"neuron {tuple(neuron)}: layer {layer} has {have}; name its neurons {give}"
        )
    place = bank[0] if bank else 0
    if not 0 <= place < len(memory.banks):
        shared = (
            f" and a shared bank, number {memory.n_experts}" if memory.shared is not None else ""
        )
        raise LayerError(
            f"neuron {tuple(neuron)}: expert {place} does not exist; layer {layer} has experts 0 to {memory.n_experts - 1}{shared}"
        )
    d_ff = memory.banks[place].d_ff
    if not 0 <= i < d_ff:
        raise LayerError(
            f"neuron {tuple(neuron)}: index {i} does not exist; its bank has neurons 0 to {d_ff - 1}"
        )
    return layer, place, i


def find_neurons(
    ffn: Sequence[FeedForward], neurons: Iterable[Neuron]
) -> list[tuple[int, int, int]]:
    """`find_neuron` of each, every one once, in the order given; raises InputError for what is no list."""
    given = check_items(neurons, "neurons", "(layer, i) or (layer, expert, i)")
    return list(dict.fromkeys(find_neuron(ffn, neuron) for neuron in given))
