"""Suppress or amplify neurons while a block runs.

with intervene(lm, [(3, 1201), (4, 77)], 0):      # 0 suppresses, 2 amplifies
    lm.answer(prompts)
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from ..core.checks import check_number
from .address import Neuron, find_neurons
from .language_model import LanguageModel, check_model


@contextmanager
def intervene(
    lm: LanguageModel, neurons: Iterable[Neuron], scale: float
) -> Generator[None, None, None]:
    """Multiply the coefficients of some neurons by `scale` at every token while the block runs.

    The model is as before when the block ends. Nested blocks multiply. The block belongs to the
    thread that opens it: passes of other threads, a pool's too, run without it.

    Args:
        lm: The model.
        neurons: (layer, i), or (layer, expert, i) in a layer with experts. Rows of an array or a
            tensor work too. A neuron that is given twice is scaled once. An expert's neuron counts
            only for the tokens that are routed to the expert.
        scale: Any finite number.

    Raises:
        LayerError: The model has no such neuron.
        InputError: The scale is not finite.
    """
    check_model(lm)
    scale = check_number(scale, "scale", "the factor on each coefficient")
    factors: dict[int, dict[int, Tensor]] = {}
    for layer, bank, i in find_neurons(lm.ffn, neurons):
        of_layer = factors.setdefault(layer, {})
        if bank not in of_layer:
            width = lm.ffn[layer].banks[bank].d_ff
            of_layer[bank] = torch.ones(width, dtype=torch.float64, device="cpu")
        of_layer[bank][i] = scale
    with ExitStack() as stack:
        for layer, of_layer in factors.items():
            stack.enter_context(lm.ffn[layer].scaled(of_layer))
        yield
