"""Read the coefficients of several layers at every token of a batch, in one pass.

    for bank, read in scan(lm, rows, layers).items():
        read.m, read.row, read.column      # (n, d_ff) coefficients, and where each token is
    scan(lm, rows, layers, site="inputs")  # (n, d_model) what enters the feed-forward networks

The pass ends before the highest layer's down-projection. The unembedding never runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeAlias, cast

import torch
from torch import Tensor

from ..core.errors import InputError
from ..model.absent import device_of
from ..model.address import Neuron, neuron_numbers
from ..model.language_model import LanguageModel
from ..model.neurons import Neurons
from ..model.trace import recording, stoppable

Bank: TypeAlias = tuple[int] | tuple[int, int]
"""The address of a bank of neurons: (layer,), or (layer, expert) in a layer with experts."""


Site: TypeAlias = Literal["coefficients", "inputs"]
"""What is read of a feed-forward network: its coefficients, or what enters it."""


def banks(lm: LanguageModel, layers: Iterable[int] | None = None) -> dict[Bank, Neurons]:
    """Return every bank of some layers by its address, experts and the shared bank included.

    Args:
        lm: The model.
        layers: The layers. None: every layer.
    """
    wanted = [lm.ffn[layer] for layer in (range(lm.n_layers) if layers is None else layers)]
    return {
        (ffn.layer, place) if ffn.n_experts else (ffn.layer,): bank
        for ffn in wanted
        for place, bank in enumerate(ffn.banks)
    }


def bank_of(neuron: Neuron) -> tuple[Bank, int]:
    """Return a neuron's bank, and which of the bank's neurons it is.

    Raises:
        LayerError: It is not two or three whole numbers.
    """
    *place, i = neuron_numbers(neuron)
    return cast("Bank", tuple(place)), i


def bank_name(bank: Bank) -> str:
    """Return a bank as files write it: "3", or "3.5" for an expert."""
    return ".".join(map(str, bank))


def named_bank(name: str) -> Bank:
    """Return the bank that `bank_name` wrote."""
    return cast("Bank", tuple(map(int, name.split("."))))


@dataclass(frozen=True, eq=False)
class Coefficients:
    """What one bank of neurons did at the tokens of a batch.

    Attributes:
        m: The coefficients (n, d_ff), or the inputs (n, d_model), float32 (float64 for a float64
            model).
        row: The row of the batch that each token is in, (n,) int64.
        column: The column of each token in its row, (n,) int64.
    """

    m: Tensor
    row: Tensor
    column: Tensor


def check_dtype(lm: LanguageModel, dtype: torch.dtype | None) -> None:
    """Check that `scan` can run the model in a dtype.

    Raises:
        InputError: It cannot.
    """
    if dtype is not None and (dtype != torch.bfloat16 or lm.dtype == torch.float64):
        raise InputError(
            f"dtype is {dtype!r} and the model is in {lm.dtype}; give torch.bfloat16 for a model "
            "in 32 or 16 bits, or None for the model's own (float16 overflows, and a float64 model "
            "is used for its precision)",
            argument="dtype",
        )


def scan(
    lm: LanguageModel,
    rows: Sequence[Sequence[int]],
    layers: Sequence[int],
    dtype: torch.dtype | None = None,
    site: Site = "coefficients",
) -> dict[Bank, Coefficients]:
    """Return the coefficients of some layers at every token of a few rows, or their inputs.

    A bank of a layer with experts has the tokens that were routed to it. It is left out if there is
    no such token. A shared bank has all tokens.

    Args:
        lm: The model. Nothing above the last of the layers runs.
        rows: Token ids, row by row.
        layers: The layers to read.
        dtype: torch.bfloat16 runs the pass in it. The weights stay as they are. None: the model's
            own.
        site: What to read. Inputs are those of layers without experts.
    """
    batch = lm.align(rows, [0] * len(rows))
    taken: dict[Bank, tuple[Tensor, Tensor | None]] = {}
    with torch.no_grad(), stoppable() as stop, ExitStack() as stack:

        def take(layer: int, place: int, m: Tensor, token: Tensor | None) -> None:
            experts = lm.ffn[layer].n_experts
            taken[(layer, place) if experts else (layer,)] = m, token
            if layer == max(layers) and not experts:
                stop()

        for kind in (
            {device_of(p).type for p in lm.module.parameters()} if dtype is not None else ()
        ):
            stack.enter_context(torch.autocast(kind, dtype))
        stack.enter_context(recording({"end": lm.layers[max(layers)]}, stop=True, copy=False))
        for layer in layers:
            ffn = lm.ffn[layer]
            if site == "inputs":
                reading = ffn.entering(partial(_take_inputs, take, layer))
            else:
                reading = ffn.taking(partial(take, layer))
            stack.enter_context(reading)
        lm.forward(batch)
    real = batch.attention_mask.bool().flatten()
    row, column = (
        x.flatten()
        for x in torch.meshgrid(
            *(torch.arange(n, device=real.device) for n in batch.attention_mask.shape),
            indexing="ij",
        )
    )
    result: dict[Bank, Coefficients] = {}
    for bank, (m, token) in sorted(taken.items()):
        token = torch.arange(len(m)) if token is None else token
        at = token.to(real.device)
        is_token = real[at]
        if not bool(is_token.all()):
            m, at = m[is_token.to(m.device)], at[is_token]
        result[bank] = Coefficients(
            m.to(torch.promote_types(m.dtype, torch.float32)),
            row[at].to(m.device),
            column[at].to(m.device),
        )
    return result


def _take_inputs(
    take: Callable[[int, int, Tensor, Tensor | None], None], layer: int, inputs: Tensor
) -> None:
    take(layer, 0, inputs, None)
