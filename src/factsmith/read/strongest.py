"""The strongest coefficients of one bank of neurons, kept while a corpus is read.

    strongest = Strongest(d_ff, top=25)
    for rows in batches:                                       # pieces of text, run together
        strongest.add(coefficients, BatchTokens(rows))
    strongest.result(numbers, n_tokens)                        # BankTriggers

For each neuron a text counts once, at the position of its largest coefficient (the first of equal
ones). Of texts that tie, the earlier ones stay. Coefficients of GELU and gated neurons have a sign,
and a coefficient far below zero writes the opposite of the value, so the smallest are kept as well.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..core.artefact import stored
from ..core.errors import NumericsError
from ..corpus.scan import Coefficients
from ..corpus.text import ADDED, Piece
from .triggers import SIGNS, BankTriggers, Sign

LAST = 2**31 - 1
"""Numbers of pieces are kept below it."""

_AT_ONCE = 2**22
"""Coefficients searched for their position at a time."""


class Strongest:
    """The largest and smallest coefficients of one bank so far, in memory that does not grow.

    Attributes:
        keys: {sign: (t, d_ff) int64}, descending. The upper half holds the bits of the coefficient,
            the lower half says how early its piece came. Bits of positive floats are in the order
            of the floats. So one number orders by coefficient, then by piece, and the order of
            batches does not matter.
        places: {sign: (t, d_ff) int32}, the token's position in its piece.
        fired: (d_ff,) float64, the number of tokens at which the coefficient is above zero.
        squares: (d_ff,) float64, the sum of squares over all tokens.
    """

    def __init__(self, d_ff: int, top: int) -> None:
        self.keys = {sign: torch.zeros(top, d_ff, dtype=torch.int64) for sign in SIGNS}
        self.places = {sign: torch.zeros(top, d_ff, dtype=torch.int32) for sign in SIGNS}
        self.fired = torch.zeros(d_ff, dtype=torch.float64)
        self.squares = torch.zeros(d_ff, dtype=torch.float64)

    def add(self, coefficients: Coefficients, tokens: BatchTokens) -> None:
        """Add the coefficients of one batch.

        Raises:
            NumericsError: when a coefficient is not finite.
        """
        m = coefficients.m.float()
        self.fired += (m > 0).sum(0, dtype=torch.int32).cpu()
        self.squares += m.square().sum(0).double().cpu()
        places = tokens.places(coefficients)
        for sign in SIGNS:
            ends = m.new_zeros(len(tokens.early) + 1, m.shape[1])
            ends.scatter_reduce_(
                0, places.row[:, None].expand_as(m), m, "amax" if sign == "top" else "amin"
            )
            strength = ends[:-1].abs().cpu()
            if not bool(strength.amax() < math.inf):
                raise NumericsError(
                    "a coefficient is not finite. Load the model in a wider dtype, or look for "
                    "damaged weights."
                )
            keys = (strength.view(torch.int32).long() << 32) | tokens.early[:, None]
            self._merge(sign, keys, partial(places.first, m, ends))

    def _merge(self, sign: Sign, keys: Tensor, find: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Keep the largest of the present keys and new ones.

        Args:
            sign: Which of the two ends.
            keys: The new keys, (rows, d_ff). A key of at most `LAST` is a coefficient of 0, which
                does not count.
            find: Returns positions by row and neuron. Called for the new keys that stay.
        """
        current, places, top = self.keys[sign], self.places[sign], len(self.keys[sign])
        changed = (keys.amax(0) > current[-1].clamp(min=LAST)).nonzero()[:, 0]
        if not len(changed):
            return
        best = torch.cat([current[:, changed], keys[:, changed]]).topk(top, dim=0)
        where = places[:, changed].gather(0, best.indices.clamp(max=top - 1))
        new = ((best.indices >= top) & (best.values > LAST)).nonzero(as_tuple=True)
        where[new] = find(best.indices[new] - top, changed[new[1]])
        current[:, changed] = best.values.masked_fill(best.values <= LAST, 0)
        places[:, changed] = where

    def merge(self, other: Strongest, n_texts: int) -> None:
        """Add what another collected from the texts that follow the first `n_texts`."""
        self.fired += other.fired
        self.squares += other.squares
        for sign in SIGNS:
            later = other.keys[sign]
            later = torch.where(later != 0, later - n_texts, 0)
            best = torch.cat([self.keys[sign], later]).topk(len(self.keys[sign]), dim=0)
            places = torch.cat([self.places[sign], other.places[sign]])
            self.keys[sign], self.places[sign] = best.values, places.gather(0, best.indices)

    def __getstate__(self) -> dict[str, Any]:
        """Return what is pickled: a row is left out if no neuron has so many strong texts."""
        short = {}
        for sign, keys in self.keys.items():
            n = int((keys != 0).any(1).sum())
            short[sign] = keys[:n].clone(), self.places[sign][:n].clone()
        top = len(self.keys["top"])
        return {"top": top, "short": short, "fired": self.fired, "squares": self.squares}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take up what was pickled."""
        self.__init__(len(state["fired"]), state["top"])  # type: ignore[misc]
        self.fired, self.squares = state["fired"], state["squares"]
        for sign, (keys, places) in state["short"].items():
            self.keys[sign][: len(keys)] = keys
            self.places[sign][: len(places)] = places

    def numbers(self, sign: Sign) -> Tensor:
        """Return the number of each key's piece: (t, d_ff), meaningless where a key is 0."""
        return LAST - (self.keys[sign] & 0xFFFFFFFF)

    def pieces(self) -> Tensor:
        """Return the numbers of all pieces that some neuron refers to, ascending."""
        numbers = torch.cat([self.numbers(sign)[self.keys[sign] != 0] for sign in SIGNS])
        pieces: Tensor = torch.unique(numbers)
        return pieces

    def state(self) -> dict[str, Tensor]:
        """Return all tensors by name, for a checkpoint."""
        signed = {
            f"{sign}.{name}": getattr(self, name)[sign]
            for sign in SIGNS
            for name in ("keys", "places")
        }
        return {**signed, "fired": self.fired, "squares": self.squares}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from tensors that `state` returned."""
        for name, now in self.state().items():
            tensor = stored(tensors, name, now.shape, (now.dtype,), least=0)
            sign, _, part = name.rpartition(".")
            if sign:
                getattr(self, part)[sign] = tensor
            else:
                setattr(self, name, tensor)

    def result(self, pieces: Tensor, n_tokens: int) -> BankTriggers:
        """Return the triggers.

        Args:
            pieces: The numbers of the pieces kept, ascending. A trigger's text is an index into it.
            n_tokens: Number of tokens read.
        """
        coefficients, texts, positions = {}, {}, {}
        for sign in SIGNS:
            keys = self.keys[sign].T
            strength = (keys >> 32).int().view(torch.float32)
            coefficients[sign] = (strength if sign == "top" else -strength).contiguous()
            filled = keys != 0
            texts[sign] = torch.searchsorted(
                pieces, torch.where(filled, self.numbers(sign).T, pieces[0]).contiguous()
            )
            positions[sign] = torch.where(filled, self.places[sign].T, 0).long()
        return BankTriggers(
            coefficients=coefficients,
            texts=texts,
            positions=positions,
            fired=self.fired / n_tokens,
            mean_square=self.squares / n_tokens,
        )


class BatchTokens:
    """The tokens of a batch.

    Attributes:
        written: (tokens,) bool, whether the token is written in the text. The tokenizer adds
            others (BOS). They are no triggers: every text begins with them.
        starts: (rows + 1,), where the tokens of each row begin.
        early: (rows,), how early each row's piece came. Later pieces have lower numbers.
    """

    def __init__(self, rows: Sequence[Piece]) -> None:
        self.written = torch.tensor(
            [tuple(span) != ADDED for piece in rows for span in piece.spans]
        )
        self.starts = torch.tensor([0, *itertools.accumulate(len(piece.ids) for piece in rows)])
        self.early = LAST - torch.tensor([piece.number for piece in rows])

    def places(self, coefficients: Coefficients) -> _Places:
        """Return where a bank's tokens are. Tokens that the tokenizer added are in a last row."""
        n, device = len(self.early), coefficients.m.device
        starts = self.starts.to(device)[coefficients.row]
        written = self.written.to(device)[starts + coefficients.column]
        row = torch.where(written, coefficients.row, n)
        return _Places(
            row,
            coefficients.column,
            row.argsort(stable=True),
            torch.bincount(row, minlength=n + 1),
        )


@dataclass(frozen=True, eq=False)
class _Places:
    """Where the n tokens of a bank are in a batch.

    Attributes:
        row: (n,), the row of each token.
        column: (n,), its column.
        order: (n,), the tokens row by row.
        counts: (rows + 1,), the number of tokens in each row.
    """

    row: Tensor
    column: Tensor
    order: Tensor
    counts: Tensor

    def first(self, m: Tensor, ends: Tensor, row: Tensor, i: Tensor) -> Tensor:
        """Return the columns (p,) at which neurons first reach their ends in some rows.

        Args:
            m: The coefficients, (n, d_ff).
            ends: The end of each neuron in each row, (rows + 1, d_ff).
            row: The rows asked about, (p,).
            i: The neurons asked about, (p,).
        """
        counts, begins = self.counts[:-1, None], (self.counts.cumsum(0) - self.counts)[:-1, None]
        steps = torch.arange(int(counts.max()), device=m.device)
        # In a shorter row the last token fills the rest.
        tokens = self.order[(begins + steps.minimum(counts - 1)).clamp(0, len(m) - 1)]
        columns = []
        for r, at in zip(
            *(torch.split(x.to(m.device), max(_AT_ONCE // len(steps), 1)) for x in (row, i)),
            strict=True,
        ):
            token = tokens[r]
            # argmax gives the first of equals.
            hit = (
                (m.take(token * m.shape[1] + at[:, None]) == ends[r, at, None])
                .byte()
                .argmax(1, keepdim=True)
            )
            columns.append(self.column[token.gather(1, hit)[:, 0]])
        return torch.cat(columns).int().cpu()
