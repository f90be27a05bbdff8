"""What blocks such as `applied` lend to a model, and take back when they end.

    with lent(lm, [3]) as base:        # {3: the weights of layer 3}, put back at the end
        ...
    take_back(lm, 0)                   # the same for blocks that an interruption tore

Layers in memory get the base matrix copied back, because W + Δ − Δ is not W. A layer that is read
from its file each time it runs (`model.streamed`) has no matrix to keep. There a block adds a
function that is applied after each reading, and its end removes the function.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from weakref import WeakKeyDictionary

from torch import Tensor

from ..core.errors import UnsupportedModelError
from ..model.address import check_layer
from ..model.language_model import LanguageModel
from ..model.streamed import streamed_of
from ..model.turns import turn
from .widening import Held, parameters_of, put_back

_LISTED = 6
"""How many layers an error names."""


@dataclasses.dataclass(frozen=True, eq=False)
class _Block:
    """What a block puts back at its end.

    Attributes:
        weights: {layer: (d_model, d_ff)} the numbers of down-projections in memory.
        parameters: The parameters of the layers that the block widens.
        changes: {layer: how many changes it had}, for layers that are read from files.
    """

    weights: dict[int, Tensor]
    parameters: list[Held]
    changes: dict[int, int]

    def put_back(self, lm: LanguageModel) -> None:
        """Give the model back what it had, without checks."""
        for layer, n in self.changes.items():
            streamed = streamed_of(lm.layers[layer])
            assert streamed is not None
            streamed.undo(lm.layers[layer], n)
        for held in self.parameters:
            put_back(held)
        copy_into(lm, self.weights)


_LENT: WeakKeyDictionary[LanguageModel, list[_Block]] = WeakKeyDictionary()
"""What to put back at the end of every block that is open, the innermost last."""


@contextmanager
def lent(
    lm: LanguageModel, layers: Iterable[int], widened: Iterable[int] = ()
) -> Iterator[dict[int, Tensor]]:
    """Give a block the weights of some layers, which it may change, and put them back after it.

    A Ctrl-C may come while they are put back. Then `take_back` does it.

    Args:
        lm: The model.
        layers: The layers whose down-projections the block changes.
        widened: The layers to which the block appends neurons.

    Returns:
        The weights of the layers that are in memory.
    """
    layers, widened = set(layers), set(widened)
    afar = {layer for layer in layers | widened if is_streamed(lm, layer)}
    block = _Block(
        {layer: weight_of(lm, layer).detach().clone() for layer in sorted(layers - afar)},
        [parameters_of(lm.ffn[layer]) for layer in sorted(widened - afar)],
        {layer: _n_changes(lm, layer) for layer in sorted(afar)},
    )
    blocks = _LENT.setdefault(lm, [])
    try:
        blocks.append(block)
        yield block.weights
    finally:
        if any(other is block for other in blocks):
            block.put_back(lm)
            del blocks[[other is block for other in blocks].index(True)]


def n_lent(lm: LanguageModel) -> int:
    """Return how many blocks of `applied` and `written` are open on a model."""
    return len(_LENT.get(lm, ()))


def take_back(lm: LanguageModel, n: int) -> None:
    """Put weights back as after the blocks of `applied` and `written` beyond the first n.

    It is for blocks that an interruption ended before they could do so.
    """
    blocks = _LENT.get(lm, [])
    while len(blocks) > n:
        blocks[-1].put_back(lm)
        blocks.pop()


def is_streamed(lm: LanguageModel, layer: int) -> bool:
    """Return whether a layer is read from its file each time it runs."""
    return streamed_of(lm.layers[check_layer(layer, lm.n_layers)]) is not None


def change_streamed(lm: LanguageModel, layer: int, apply: Callable[[], object]) -> None:
    """Change a layer that is read from its file.

    Args:
        lm: The model.
        layer: The layer.
        apply: Changes the weights in place. It is called now, and after each reading.
    """
    streamed = streamed_of(lm.layers[layer])
    assert streamed is not None
    streamed.change(lm.layers[layer], apply)


def check_in_memory(lm: LanguageModel, layers: Iterable[int], what: str) -> None:
    """Check that layers are in memory.

    Args:
        lm: The model.
        layers: The layers.
        what: What needs them there, for the error.

    Raises:
        UnsupportedModelError: A layer is read from its file each time it runs.
    """
    if afar := sorted(layer for layer in set(layers) if is_streamed(lm, layer)):
        which = f"layers {afar}" if len(afar) <= _LISTED else f"{len(afar)} layers"
        raise UnsupportedModelError(
            f"the weights of {which} stay on disk, and {what} writes whole matrices; make a delta "
            "and use factsmith.applied, which adds it whenever a layer is read, or load the model "
            "into memory",
            argument="device_map",
        )


def _n_changes(lm: LanguageModel, layer: int) -> int:
    streamed = streamed_of(lm.layers[layer])
    return 0 if streamed is None else streamed.n_changes(lm.layers[layer])


def weight_of(lm: LanguageModel, layer: int) -> Tensor:
    """Return a down-projection without appended neurons: a view of the model's storage."""
    return lm.ffn[check_layer(layer, lm.n_layers)].original_weight()


def copy_into(lm: LanguageModel, weights: Mapping[int, Tensor]) -> None:
    """Copy numbers into down-projections in memory, without checks."""
    with turn(lm, changes=bool(weights)):
        for layer, new in weights.items():
            # Not inside a `no_grad`: a Ctrl-C could leave it off. A detached view needs none.
            weight_of(lm, layer).detach().copy_(new.detach())
