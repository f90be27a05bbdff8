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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

from ..checks import check_text, whole_number
from ..errors import InputError, LayerError
from .ffn import Neuron, Neurons
from .load import LanguageModel
from .tokens import align, encode
from .trace import recording, stoppable

Bank: TypeAlias = tuple[int] | tuple[int, int]
"""(layer,), or (layer, expert) in a layer with experts: where a bank of neurons lies."""


def banks(lm: LanguageModel, layers: Iterable[int] | None = None) -> dict[Bank, Neurons]:
    """Every bank of some layers (None: all), experts and the shared one included, by where it lies."""
    wanted = [lm.ffn[layer] for layer in (range(lm.n_layers) if layers is None else layers)]
    return {(ffn.layer, place) if ffn.n_experts else (ffn.layer,): bank for ffn in wanted for place, bank in enumerate(ffn.banks)}


def bank_of(neuron: Neuron) -> tuple[Bank, int]:
    """A neuron's bank, and which of its neurons it is. Raises LayerError for what is not two or three whole numbers."""
    numbers = [whole_number(n) for n in neuron] if isinstance(neuron, Iterable) and not isinstance(neuron, (str, bytes)) else []
    if len(numbers) not in (2, 3) or None in numbers:
        raise LayerError(f"{neuron!r} is no neuron; expected (layer, number), or (layer, expert, number) in a layer with experts")
    *place, i = numbers
    return cast("Bank", tuple(place)), cast("int", i)


def bank_name(bank: Bank) -> str:
    """A bank as it is written in files: "3", or "3.5" for an expert."""
    return ".".join(map(str, bank))


def named_bank(name: str) -> Bank:
    """The inverse of `bank_name`."""
    return cast("Bank", tuple(map(int, name.split("."))))


WINDOW = 512
"""Pieces tokenized ahead of the model and sorted by length: enough that a batch has little padding, few enough to stream a corpus."""


LONGEST = 1024
"""Tokens of a piece at most: a pass holds every layer's coefficients at all of them, and models with many more positions would run out."""

ADDED = (-1, -1)
"""The span of a token that stands for no place in the text: one that the tokenizer puts in front (BOS) or behind."""

_PART, _MARGIN = 50_000, 500
"""Characters of a long text that are tokenized together, and those on either side that the tokenizer sees as well."""


@dataclass(frozen=True)
class Piece:
    """A text, or as much of a longer one as goes through the model at a time.

    number  its place among all pieces of the corpus
    text    the characters it stands for
    ids     its tokens
    spans   for each token the characters [start, stop) of `text`; `ADDED` for one the tokenizer added
    """

    number: int
    text: str
    ids: list[int]
    spans: list[tuple[int, int]]


def check_texts(texts: str | Iterable[str]) -> None:
    """Raises InputError for what can be no corpus; each text is looked at when it is read."""
    if isinstance(texts, (bytes, Mapping)) or not isinstance(texts, Iterable):
        raise InputError(f"the texts are {texts!r:.60}; expected a text, or texts one after another")


def pieces(lm: LanguageModel, texts: str | Iterable[str], limit: float = math.inf) -> Iterator[Piece]:
    """The pieces of a corpus in order, up to `limit` tokens; the last is cut. Raises InputError for what is no text.

    A text is cut where the model's context ends, at `LONGEST` tokens at most. Texts are tokenized as they are asked for, long ones part by
    part: what is held does not grow with them.
    """
    check_texts(texts)
    longest = min(lm.max_tokens or LONGEST, LONGEST)
    number = itertools.count()
    for text in [texts] if isinstance(texts, str) else texts:
        tokens = _tokens(lm.tokenizer, check_text(text, "a text of the corpus"))
        while own := list(itertools.islice(tokens, int(min(longest, limit)))):
            written = [span for _, span in own if span != ADDED]
            first, last = min((a for a, _ in written), default=0), max((b for _, b in written), default=0)
            spans = [ADDED if span == ADDED else (span[0] - first, span[1] - first) for _, span in own]
            yield Piece(next(number), text[first:last], [token for token, _ in own], spans)
            limit -= len(own)
            if limit < 1:
                return


def _tokens(tokenizer: Any, text: str) -> Iterator[tuple[int, tuple[int, int]]]:
    """The tokens of a text and their characters, as `encode` finds them, but with those of white space that tokenizers trim off.

    A long text is cut at white space. The tokenizer sees some characters beyond the cut, so that tokens are those of the whole text unless
    one of them reaches further than that.
    """
    special = set(tokenizer.all_special_ids)
    for start, stop in _parts(text):
        begin = max(start - _MARGIN, 0)
        ids, spans = encode(tokenizer, text[begin : stop + _MARGIN])
        added = [token in special and a == b for token, (a, b) in zip(ids, spans, strict=True)]
        front = next((i for i, own in enumerate(added) if not own), len(ids))
        back = len(ids) - next((i for i, own in enumerate(reversed(added)) if not own), 0)
        behind = begin  # where the token before ended
        for i, (token, (a, b)) in enumerate(zip(ids, spans, strict=True)):
            if not front <= i < back:
                if start == 0 if i < front else stop == len(text):
                    yield token, ADDED
                continue
            # Of trimmed white space only its end is told.
            a, b = (begin + a, begin + b) if b > a else (behind, max(behind, begin + b))
            behind = b
            if (a >= start or start == 0) and (a < stop or stop == len(text)):
                yield token, (a, b)


def _parts(text: str) -> Iterator[tuple[int, int]]:
    """A text as [start, stop), cut at white space into parts of `_PART` characters at most."""
    start = 0
    while len(text) - start > _PART:
        space = max(text.rfind(c, start + 1, start + _PART) for c in " \n\t")
        stop = space if space > start else start + _PART
        yield start, stop
        start = stop
    yield start, len(text)


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


def check_dtype(lm: LanguageModel, dtype: torch.dtype | None) -> None:
    """Raises InputError for anything but what `scan` can run a model in."""
    if dtype is not None and (dtype != torch.bfloat16 or lm.dtype == torch.float64):
        raise InputError(
            f"a forward pass in {dtype!r} of a model in {lm.dtype} is not offered (float16 overflows, float64 models are there for their "
            "precision); give torch.bfloat16, or None for the model's own"
        )


def scan(
    lm: LanguageModel, rows: Sequence[Sequence[int]], layers: Sequence[int], dtype: torch.dtype | None = None
) -> dict[Bank, Coefficients]:
    """The coefficients of some layers at every token of a few rows of token ids; nothing after the last of these layers runs.

    Of a layer with experts each bank has the tokens that were routed to it, and none is there to which none was; the shared one has all.

    dtype: torch.bfloat16 runs the pass in it, the weights cast on their way; None: the model's own.
    """
    batch = align(lm, rows, [0] * len(rows))
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
        x.flatten() for x in torch.meshgrid(*(torch.arange(n, device=real.device) for n in batch.attention_mask.shape), indexing="ij")
    )
    result: dict[Bank, Coefficients] = {}
    for bank, (m, token) in sorted(found.items()):
        token = torch.arange(len(m)) if token is None else token
        at = token.to(real.device)
        own = real[at]
        if not bool(own.all()):
            m, at = m[own.to(m.device)], at[own]
        result[bank] = Coefficients(m.to(torch.promote_types(m.dtype, torch.float32)), row[at].to(m.device), column[at].to(m.device))
    return result
