"""A corpus through a model: texts cut to what fits, put together by length, and every layer's coefficients taken in one pass.

    for window in windows(pieces(lm, texts)):              # some hundred pieces at a time
        for rows in batches(window, 2048):                 # alike in length, at most 2,048 tokens with padding
            for bank, found in scan(lm, rows, layers).items():
                found.m, found.row, found.column           # (n, d_ff) coefficients, and where each of them stands

The pass ends before the highest layer's down-projection; the unembedding never runs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias, cast

import torch
from torch import Tensor

from .ffn import Neuron, Neurons
from .load import LanguageModel
from .tokens import align, encode
from .trace import recording, replacing, stoppable

Bank: TypeAlias = tuple[int] | tuple[int, int]
"""(layer,), or (layer, expert) in a layer with experts: where a bank of neurons lies."""


def banks(lm: LanguageModel, layers: Iterable[int] | None = None) -> dict[Bank, Neurons]:
    """Every bank of some layers (None: all), experts and the shared one included, by where it lies."""
    wanted = [lm.ffn[layer] for layer in (range(lm.n_layers) if layers is None else layers)]
    return {(ffn.layer, place) if ffn.n_experts else (ffn.layer,): bank for ffn in wanted for place, bank in enumerate(ffn.banks)}


def bank_of(neuron: Neuron) -> tuple[Bank, int]:
    """A neuron's bank, and which of its neurons it is."""
    *place, i = (int(n) for n in neuron)
    return cast("Bank", tuple(place)), i


def bank_name(bank: Bank) -> str:
    """A bank as it is written in files: "3", or "3.5" for an expert."""
    return ".".join(map(str, bank))


def named_bank(name: str) -> Bank:
    """The inverse of `bank_name`."""
    return cast("Bank", tuple(map(int, name.split("."))))


WINDOW = 512
"""Pieces tokenized ahead of the model and sorted by length: enough that a batch has little padding, few enough to stream a corpus."""


@dataclass(frozen=True)
class Piece:
    """A text, or as much of a longer one as the model has positions for.

    number  its place among all pieces of the corpus
    text    the characters it stands for
    ids     its tokens
    spans   for each token the characters [start, stop) of `text`; (0, 0) for one the tokenizer added
    """

    number: int
    text: str
    ids: list[int]
    spans: list[tuple[int, int]]


def pieces(lm: LanguageModel, texts: str | Iterable[str], limit: float = math.inf) -> Iterator[Piece]:
    """The pieces of a corpus in order, up to `limit` tokens; the last is cut. Raises InputError for what is no text."""
    longest = lm.max_tokens or 1024
    number = itertools.count()
    for text in [texts] if isinstance(texts, str) else texts:
        ids, spans = encode(lm.tokenizer, text)
        for start in range(0, len(ids), longest):
            size = int(min(longest, len(ids) - start, limit))
            own = spans[start : start + size]
            first, last = min((a for a, b in own if b > a), default=0), max(b for _, b in own)
            own = [(a - first, b - first) if b > a else (0, 0) for a, b in own]
            yield Piece(next(number), text[first:last], ids[start : start + size], own)
            limit -= size
            if limit < 1:
                return


def windows(found: Iterator[Piece]) -> Iterator[list[Piece]]:
    """So many pieces at a time as are sorted by length together."""
    while window := list(itertools.islice(found, WINDOW)):
        yield window


def batches(window: Iterable[Piece], batch_tokens: int) -> Iterator[list[Piece]]:
    """Pieces of like length whose padded size stays within the budget, shortest first (at least one piece each)."""
    rows: list[Piece] = []
    for piece in sorted(window, key=lambda piece: len(piece.ids)):
        if rows and len(piece.ids) * (len(rows) + 1) > batch_tokens:
            yield rows
            rows = []
        rows.append(piece)
    if rows:
        yield rows


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


def scan(
    lm: LanguageModel, rows: Sequence[Sequence[int]], layers: Sequence[int], dtype: torch.dtype | None = None
) -> dict[Bank, Coefficients]:
    """The coefficients of some layers at every token of a few rows of token ids; nothing after the last of these layers runs.

    Of a layer with experts each bank has the tokens that were routed to it, the shared one all.

    dtype: torch.bfloat16 runs the pass in it, the weights cast on their way; None: the model's own.
    """
    batch = align(lm, rows, [0] * len(rows))
    dense = [layer for layer in layers if not lm.ffn[layer].n_experts]
    parts = {(layer, name): part for layer in layers if layer not in dense for name, part in lm.ffn[layer].routing_parts().items()}
    found: dict[int, Tensor] = {}
    with torch.no_grad(), stoppable() as stop, ExitStack() as stack:

        def take(layer: int, m: Tensor) -> Tensor:
            found[layer] = m
            if layer == max(layers):
                stop()
            return m

        for kind in {p.device.type for p in lm.module.parameters()} if dtype is not None else ():
            stack.enter_context(torch.autocast(kind, dtype))
        calls = stack.enter_context(recording(parts))
        stack.enter_context(recording({"end": lm.layers[max(layers)]}, stop=True, copy=False))
        stack.enter_context(replacing({lm.ffn[layer].down: partial(take, layer) for layer in dense}, where="input"))
        lm.forward(batch)
    real = batch.attention_mask.bool().flatten()
    row, column = batch.attention_mask.bool().nonzero(as_tuple=True)
    result: dict[Bank, Coefficients] = {}
    for layer in layers:
        ffn = lm.ffn[layer]
        if not ffn.n_experts:
            m = found[layer]
            m = m.reshape(-1, m.shape[-1])[real.to(m.device)]  # some families flatten (B, T) themselves
            result[layer,] = _coefficients(m, row, column)
            continue
        routing = ffn.routing_of({name: calls[layer, name] for name in ffn.routing_parts()})
        own = real.to(routing.experts.device)
        for expert in range(ffn.n_experts):
            token, place = (routing.experts[own] == expert).nonzero(as_tuple=True)
            result[layer, expert] = _coefficients(
                routing.coefficients[own][token, place], row[token.to(row.device)], column[token.to(row.device)]
            )
        if routing.shared is not None:
            result[layer, ffn.n_experts] = _coefficients(routing.shared[own], row, column)
    return result


def _coefficients(m: Tensor, row: Tensor, column: Tensor) -> Coefficients:
    return Coefficients(m.to(torch.promote_types(m.dtype, torch.float32)), row.to(m.device), column.to(m.device))
