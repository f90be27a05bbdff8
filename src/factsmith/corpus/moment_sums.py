"""The sums behind second moments: Σ m mᵀ of each layer, apart for two halves of the corpus.

    sums = MomentSums({3: 3072})               # an Accumulator: a layer and its number of neurons
    swept = sweep(lm, Corpus(texts, halves=True), [3], [sums])
    sums.result(swept)[3].mean                 # (d_ff, d_ff), with `split_half` and `excess`

    sums = MomentSums({3: 3072}, Until(0.2, 18_432, 33_792, 196_608))
    sweep(..., [sums], until=sums)    # ends when no excess is above 0.2

    sums = MomentSums({3: 769}, site="inputs")     # of the inputs and a constant, d_model + 1
    sums.result(swept)[3].sample                   # (m, d_model) some of the inputs

Products are taken in float32 (float64 for a float64 model) for one batch and summed in float64.
The halves are compared in two figures; `corpus.moments` explains them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.artefact import stated_count, stored
from ..core.errors import NumericsError
from .accumulator import State, Swept, TextBatch
from .factors import cholesky
from .scan import Bank, Coefficients, Site

_STRIPS = 8
"""Strips of a symmetric sum, each from the diagonal to the right edge.

They take 9/16 of the products and of the memory of the whole matrix."""

_STEPS = 1.1, 2.0
"""How many times as many tokens the next comparison has, at least and at most."""

_POWER = 1.25
"""How many times as many tokens a smaller excess needs: the ratio of the shares q to this power.

With Gaussian coefficients q is d_ff / n. Those of real models vary more: q falls about as n^-0.8
(SmolLM2-135M, 4 to 18 tokens a neuron)."""

SAMPLE = 24_576
"""Inputs that are kept of each layer at most: those of the first tokens."""

TAIL = 16
"""Token ids that are kept with each of these inputs: its own token and those before it."""

_PART = 2
"""Tokens of a part at least, for each neuron of the widest layer.

Sending the sums of a part takes 9 bytes for each pair of neurons, however many tokens it has."""

_PROBES = 64
"""Keys drawn for `excess`. They add less than 1 % to the variation that the halves cause."""


class Estimate(NamedTuple):
    """The second moment of one layer, and how far the halves of the corpus differ.

    `split_half` and `excess` are None if all text fell into one half; `excess` also if a half has
    no neuron that is ever on. `sample` has some of the inputs, (m, d_model) float16, if inputs were
    summed. `tails` has the last token ids up to each of them, (m, TAIL) int32, -1 where there are
    fewer.
    """

    mean: Tensor
    n_tokens: int
    split_half: float | None
    excess: float | None
    sample: Tensor | None = None
    tails: Tensor | None = None


class Until(NamedTuple):
    """How much text is enough: when the halves agree, which is looked at now and then.

    Attributes:
        excess: The largest `excess` that a layer may have.
        first: Tokens after which the halves are compared for the first time.
        likely: Tokens that are likely to be enough, as long as nothing was compared.
        most: Tokens that are enough in any case.
    """

    excess: float
    first: int
    likely: int
    most: int


class MomentSums:
    """The accumulator of `second_moments`: a `HalvedSum` for each layer.

    Attributes:
        counts: Number of tokens in each half.
        due: Number of tokens at which the halves are compared next.
        expected: How many tokens there will be, by the last comparison.
        least_part: Tokens of a part of the corpus at least.
        site: What is summed up. To inputs a constant 1 is added, so that the sum holds their mean.
    """

    def __init__(
        self, sizes: Mapping[int, int], until: Until | None = None, site: Site = "coefficients"
    ) -> None:
        """Start at zero.

        Args:
            sizes: {layer: d_ff}; of inputs d_model + 1.
            until: What `is_enough` goes by. None: it is not asked.
            site: What is summed up.
        """
        self.site = site
        self.least_part = _PART * max(sizes.values(), default=1)
        self._sizes = dict(sizes)
        self._samples: dict[int, list[Tensor]] = {layer: [] for layer in sizes}
        self._tails: list[Tensor] = []
        self.counts = [0, 0]
        self.until = until
        self.due, self.expected = (0, 0) if until is None else (until.first, until.likely)
        self._sums = {layer: HalvedSum(d_ff) for layer, d_ff in sizes.items()}
        self._order = list(self._sums)  # the layer that failed last is compared first

    def maker(self) -> Callable[[], MomentSums]:
        """Return a function that makes empty sums of the same kind."""
        return partial(MomentSums, self._sizes, self.until, self.site)

    def asked_at(self) -> int:
        """Return the number of tokens before which `is_enough` returns False."""
        assert self.until is not None
        return min(self.due, self.until.most)

    def is_enough(self) -> bool:
        """Return whether every layer's `excess` is small enough, or the text is enough in any case.

        The halves are compared only where that many tokens may be enough, by the last comparison.
        """
        assert self.until is not None
        count = sum(self.counts)
        if count >= self.until.most:
            return True
        if count < self.due:
            return False
        for layer in list(self._order):
            excess = self._sums[layer].excess(self.counts)
            if excess is None or excess > self.until.excess:
                self._order.remove(layer)
                self._order.insert(0, layer)
                ratio = _share(1.0 if excess is None else excess) / _share(self.until.excess)
                needed = max(count * ratio**_POWER, _STEPS[0] * count)
                self.expected = min(round(needed), self.until.most)
                self.due = min(self.expected, round(_STEPS[1] * count))
                return False
        return True

    def add(self, batch: TextBatch, coefficients: Mapping[Bank, Coefficients]) -> None:
        """Add a batch to its half."""
        for (layer, *_), read in coefficients.items():
            m = read.m
            if self.site == "inputs":
                limit = torch.finfo(torch.float16).max
                keep(self._samples[layer], m.clamp(-limit, limit).half().cpu())
                m = torch.cat([m, m.new_ones(len(m), 1)], dim=1)
            self._sums[layer].add(batch.half, m)
        if self.site == "inputs" and coefficients:
            keep(self._tails, _tails(batch, next(iter(coefficients.values()))))
        self.counts[batch.half] += batch.n_tokens

    def merge(self, other: MomentSums) -> None:
        """Add the sums of other texts, half by half."""
        for layer, total in self._sums.items():
            total.merge(other._sums[layer])
            for rows in other._samples[layer]:
                keep(self._samples[layer], rows)
        for rows in other._tails:
            keep(self._tails, rows)
        self.counts = [a + b for a, b in zip(self.counts, other.counts, strict=True)]

    def state(self) -> State:
        """Return the strips as "layer.half.strip", and the counts."""
        tensors = {
            f"{layer}.{half}.{i}": strip.cpu()
            for layer, total in self._sums.items()
            for half, strips in enumerate(total.strips)
            for i, strip in enumerate(strips)
        }
        tensors |= {
            f"{layer}.sample": torch.cat(rows) for layer, rows in self._samples.items() if rows
        }
        if self._tails:
            tensors["tails"] = torch.cat(self._tails)
        counts = {f"count{half}": str(n) for half, n in enumerate(self.counts)}
        if self.until is not None:
            counts |= {"due": str(self.due), "expected": str(self.expected)}
        return tensors, counts

    def restore(self, tensors: Mapping[str, Tensor], fields: Mapping[str, str]) -> None:
        """Take up what `state` returned."""
        for layer, total in self._sums.items():
            for half, strips in enumerate(total.strips):
                strips[:] = [
                    stored(tensors, f"{layer}.{half}.{i}", strip.shape, (torch.float64,))
                    for i, strip in enumerate(strips)
                ]
            if f"{layer}.sample" in tensors:
                shape = (None, total.d_ff - 1)
                self._samples[layer] = [stored(tensors, f"{layer}.sample", shape, (torch.float16,))]
        if "tails" in tensors:
            self._tails = [stored(tensors, "tails", (None, TAIL), (torch.int32,))]
        self.counts = [stated_count(fields, f"count{half}") for half in range(2)]
        if self.until is not None:
            self.due, self.expected = (stated_count(fields, x) for x in ("due", "expected"))

    def result(self, swept: Swept) -> dict[int, Estimate]:
        """Return each layer's estimate. A layer's sums are let go as soon as it is done."""
        estimates = {}
        tails = torch.cat(self._tails) if self._tails else None
        for layer in list(self._sums):
            estimate = self._sums.pop(layer).estimate(self.counts)
            rows = self._samples[layer]
            sample = torch.cat(rows) if rows else None
            estimates[layer] = estimate._replace(sample=sample, tails=tails)
        return estimates


def keep(kept: list[Tensor], rows: Tensor) -> None:
    """Add rows to those that are kept, up to SAMPLE in all."""
    n_kept = sum(map(len, kept))
    if n_kept < SAMPLE:
        kept.append(rows[: SAMPLE - n_kept])


def _tails(batch: TextBatch, read: Coefficients) -> Tensor:
    """Return the last token ids up to each token of a batch, (n, TAIL) int32, filled with -1."""
    tails = torch.full((len(read.row), TAIL), -1, dtype=torch.int32)
    places = zip(read.row.tolist(), read.column.tolist(), strict=True)
    for tail, (row, column) in zip(tails, places, strict=True):
        ids = batch.pieces[row].ids[max(0, column + 1 - TAIL) : column + 1]
        tail[TAIL - len(ids) :] = torch.tensor(ids, dtype=torch.int32)
    return tails


class HalvedSum:
    """Σ m mᵀ of one layer in float64, apart for two halves of the corpus.

    Attributes:
        d_ff: Number of neurons.
        strips: For each half, strip i holds rows starts[i] to starts[i] + width of the sum, from
            the diagonal to the right edge.
    """

    def __init__(self, d_ff: int) -> None:
        """Start at zero for a layer of d_ff neurons."""
        self.d_ff = d_ff
        self.width = math.ceil(d_ff / _STRIPS)
        self.starts = range(0, d_ff, self.width)
        self.strips = [
            [
                torch.zeros(min(self.width, d_ff - start), d_ff - start, dtype=torch.float64)
                for start in self.starts
            ]
            for _ in range(2)
        ]
        self._compared: tuple[list[int], float | None] | None = None  # counts, and their excess

    def add(self, half: int, m: Tensor) -> None:
        """Add the coefficients (n_tokens, d_ff) of one batch."""
        strips = self.strips[half]
        for i, start in enumerate(self.starts):
            strips[i] = (
                strips[i].to(m.device).add_(m[:, start : start + self.width].T @ m[:, start:])
            )

    def merge(self, other: HalvedSum) -> None:
        """Add another sum of the same layer."""
        for strips, others in zip(self.strips, other.strips, strict=True):
            for strip, more in zip(strips, others, strict=True):
                strip.add_(more.to(strip.device))

    def excess(self, counts: Sequence[int]) -> float | None:
        """Return the `excess` of what was added up to now; None if one half has nothing.

        Args:
            counts: Number of tokens in each half.
        """
        if self._compared is not None and self._compared[0] == list(counts):
            return self._compared[1]
        excess = None
        if all(counts):
            a, b = (self._matrix(half).div_(n) for half, n in enumerate(counts))
            excess = _excess(a, b, counts)
        self._compared = list(counts), excess
        return excess

    def estimate(self, counts: Sequence[int]) -> Estimate:
        """Return the mean over all tokens, and how far its halves differ.

        Args:
            counts: Number of tokens in each half.
        """
        halves = [self._matrix(half) for half in range(2)]
        count = sum(counts)
        if not all(counts):
            return Estimate(halves[counts.index(count)] / count, count, None, None)
        mean = (halves[0].to(halves[1].device) + halves[1]) / count
        a, b = (half.div_(n) for half, n in zip(halves, counts, strict=True))
        # Halves of different size differ more than equal ones. The balance is 1 for equal ones.
        balance = 2 * math.sqrt(counts[0] * counts[1]) / count
        difference = balance * (a - b).norm() / mean.norm().clamp(min=torch.finfo(mean.dtype).tiny)
        known = self._compared is not None and self._compared[0] == list(counts)
        excess = self.excess(counts) if known else _excess(a, b, counts)
        return Estimate(mean, count, float(difference), excess)

    def _matrix(self, half: int) -> Tensor:
        """Return the whole sum (d_ff, d_ff) of one half."""
        strips = self.strips[half]
        full = strips[0].new_empty(strips[0].shape[1], strips[0].shape[1])
        for start, strip in zip(self.starts, strips, strict=True):
            block = strip[:, : len(strip)]
            # A product of rounded numbers is symmetric except for rounding.
            strip[:, : len(strip)] = (block + block.T) / 2
            full[start : start + len(strip), start:] = strip
            full[start:, start : start + len(strip)] = strip.T
        return full


def _excess(a: Tensor, b: Tensor, counts: Sequence[int]) -> float | None:
    """Return `excess` of two half moments, each in both roles; None if a half has no neuron on."""
    unused = []
    for seen, unseen, n in ((a, b, counts[0]), (b, a, counts[1])):
        try:
            factor = cholesky(seen)
        except NumericsError:
            return None
        normal = torch.randn(
            len(seen), _PROBES, dtype=factor.dtype, generator=torch.Generator().manual_seed(0)
        ).to(factor.device)
        # seen⁻¹ k for keys k = factor @ normal
        u = torch.linalg.solve_triangular(factor.T, normal, upper=True)
        # Divided by what u does to the half itself, not by |normal|²: then neurons that are never
        # on count on neither side.
        ratio = float((u * (unseen @ u)).sum() / (u * (seen @ u)).sum())
        unused.append(max(1 - 1 / ratio, 0.0) * n / sum(counts))
    share = sum(unused) / 2
    return min(share / (1 - share), 1.0)


def _share(excess: float) -> float:
    """Return q of an excess, which is q / (1 - q)."""
    return excess / (1 + excess)
