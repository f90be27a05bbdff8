"""The sums behind second moments: Σ m mᵀ of each layer, apart for two halves of the corpus.

    sums = MomentSums({3: 3072})               # an Accumulator: a layer and its number of neurons
    swept = sweep(lm, Corpus(texts, halves=True), [3], [sums])
    sums.result(swept)[3].mean                 # (d_ff, d_ff), with `split_half` and `excess`

Products are taken in float32 (float64 for a float64 model) for one batch and summed in float64.
The halves are compared in two figures; `corpus.moments` explains them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.artefact import stated_count, stored
from ..core.errors import NumericsError
from .factors import cholesky
from .scan import Bank, Coefficients
from .sweep import State, Swept, TextBatch

_STRIPS = 8
"""Strips of a symmetric sum, each from the diagonal to the right edge.

They take 9/16 of the products and of the memory of the whole matrix."""

_PROBES = 64
"""Keys drawn for `excess`. They add less than 1 % to the variation that the halves cause."""


class Estimate(NamedTuple):
    """The second moment of one layer, and how far the halves of the corpus differ.

    `split_half` and `excess` are None if all text fell into one half; `excess` also if a half has
    no neuron that is ever on.
    """

    mean: Tensor
    n_tokens: int
    split_half: float | None
    excess: float | None


class MomentSums:
    """The accumulator of `second_moments`: a `HalvedSum` for each layer.

    Attributes:
        counts: Number of tokens in each half.
    """

    def __init__(self, sizes: Mapping[int, int]) -> None:
        """Start at zero for these layers: {layer: d_ff}."""
        self.counts = [0, 0]
        self._sums = {layer: HalvedSum(d_ff) for layer, d_ff in sizes.items()}

    def add(self, batch: TextBatch, coefficients: Mapping[Bank, Coefficients]) -> None:
        """Add a batch to its half."""
        for (layer, *_), read in coefficients.items():
            self._sums[layer].add(batch.half, read.m)
        self.counts[batch.half] += batch.n_tokens

    def merge(self, other: MomentSums) -> None:
        """Add the sums of other texts, half by half."""
        for layer, total in self._sums.items():
            total.merge(other._sums[layer])
        self.counts = [a + b for a, b in zip(self.counts, other.counts, strict=True)]

    def state(self) -> State:
        """Return the strips as "layer.half.strip", and the counts."""
        tensors = {
            f"{layer}.{half}.{i}": strip.cpu()
            for layer, total in self._sums.items()
            for half, strips in enumerate(total.strips)
            for i, strip in enumerate(strips)
        }
        return tensors, {f"count{half}": str(n) for half, n in enumerate(self.counts)}

    def restore(self, tensors: Mapping[str, Tensor], fields: Mapping[str, str]) -> None:
        """Take up what `state` returned."""
        for layer, total in self._sums.items():
            for half, strips in enumerate(total.strips):
                strips[:] = [
                    stored(tensors, f"{layer}.{half}.{i}", strip.shape, (torch.float64,))
                    for i, strip in enumerate(strips)
                ]
        self.counts = [stated_count(fields, f"count{half}") for half in range(2)]

    def result(self, swept: Swept) -> dict[int, Estimate]:
        """Return each layer's estimate. A layer's sums are let go as soon as it is done."""
        return {layer: self._sums.pop(layer).estimate(self.counts) for layer in list(self._sums)}


class HalvedSum:
    """Σ m mᵀ of one layer in float64, apart for two halves of the corpus.

    Attributes:
        strips: For each half, strip i holds rows starts[i] to starts[i] + width of the sum, from
            the diagonal to the right edge.
    """

    def __init__(self, d_ff: int) -> None:
        """Start at zero for a layer of d_ff neurons."""
        self.width = math.ceil(d_ff / _STRIPS)
        self.starts = range(0, d_ff, self.width)
        self.strips = [
            [
                torch.zeros(min(self.width, d_ff - start), d_ff - start, dtype=torch.float64)
                for start in self.starts
            ]
            for _ in range(2)
        ]

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

    def estimate(self, counts: Sequence[int]) -> Estimate:
        """Return the mean over all tokens, and how far its halves differ. May be called once.

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
        return Estimate(mean, count, float(difference), _excess(a, b, counts))

    def _matrix(self, half: int) -> Tensor:
        """Return the whole sum (d_ff, d_ff) of one half. The strips are changed."""
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
