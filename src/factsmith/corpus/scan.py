"""A corpus through a model: texts cut to what fits, put together by length, and every layer's coefficients taken in one pass.

    for window in windows(pieces(lm, texts)):              # some hundred pieces at a time
        for rows in batches(window, 2048):                 # alike in length, at most 2,048 tokens with padding
            for bank, found in scan(lm, rows, layers).items():
                found.m, found.row, found.column           # (n, d_ff) coefficients, and where each of them stands

The pass ends before the highest layer's down-projection; the unembedding never runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias, cast

import torch
from torch import Tensor

from ..core.errors import InputError
from ..model.address import Neuron, neuron_numbers
from ..model.ffn import Neurons
from ..model.language_model import LanguageModel
from ..model.trace import recording, stoppable

Bank: TypeAlias = tuple[int] | tuple[int, int]
"""(layer,), or (layer, expert) in a layer with experts: where a bank of neurons lies."""


def banks(lm: LanguageModel, layers: Iterable[int] | None = None) -> dict[Bank, Neurons]:
    """Every bank of some layers (None: all), experts and the shared one included, by where it lies."""
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
    """A bank as it is written in files: "3", or "3.5" for an expert."""
    return ".".join(map(str, bank))


def named_bank(name: str) -> Bank:
    """The inverse of `bank_name`."""
    return cast("Bank", tuple(map(int, name.split("."))))


@dataclass(frozen=True, eq=False)
class Coefficients:
    """What one bank of neurons did at the tokens of a batch.

    m       (n, d_ff) float32 (float64 for a float64 model)
    row     (n,) int64, which row of the batch each token is in
    column  (n,) int64, which token of its row it is
    """

    m: Tensor
    row: Tensor
    column: Tensor


def check_dtype(lm: LanguageModel, dtype: torch.dtype | None) -> None:
    """Raises InputError for anything but what `scan` can run a model in."""
    if dtype is not None and (dtype != torch.bfloat16 or lm.dtype == torch.float64):
        raise InputError(
            f"a forward pass in {dtype!r} of a model in {lm.dtype} is not offered (float16 overflows, float64 models are there for their "
            "precision); give torch.bfloat16, or None for the model's own"
        )


def scan(
    lm: LanguageModel,
    rows: Sequence[Sequence[int]],
    layers: Sequence[int],
    dtype: torch.dtype | None = None,
) -> dict[Bank, Coefficients]:
    """The coefficients of some layers at every token of a few rows of token ids; nothing after the last of these layers runs.

    Of a layer with experts each bank has the tokens that were routed to it, and none is there to which none was; the shared one has all.

    dtype: torch.bfloat16 runs the pass in it, the weights cast on their way; None: the model's own.
    """
    batch = lm.align(rows, [0] * len(rows))
    found: dict[Bank, tuple[Tensor, Tensor | None]] = {}
    with torch.no_grad(), stoppable() as stop, ExitStack() as stack:

        def take(layer: int, place: int, m: Tensor, token: Tensor | None) -> None:
            experts = lm.ffn[layer].n_experts
            found[(layer, place) if experts else (layer,)] = m, token
            if layer == max(layers) and not experts:
                stop()

        for kind in {p.device.type for p in lm.module.parameters()} if dtype is not None else ():
            stack.enter_context(torch.autocast(kind, dtype))
        stack.enter_context(recording({"end": lm.layers[max(layers)]}, stop=True, copy=False))
        for layer in layers:
            stack.enter_context(lm.ffn[layer].taking(partial(take, layer)))
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
    for bank, (m, token) in sorted(found.items()):
        token = torch.arange(len(m)) if token is None else token
        at = token.to(real.device)
        own = real[at]
        if not bool(own.all()):
            m, at = m[own.to(m.device)], at[own]
        result[bank] = Coefficients(
            m.to(torch.promote_types(m.dtype, torch.float32)),
            row[at].to(m.device),
            column[at].to(m.device),
        )
    return result
